"""The accumulated gradients as they were before a micro-step, to go back to when it fails half-way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Gradients:
    """A copy of the gradients in host memory, taken before a micro-step.

    Backward writes gradients in place, so a reference would not do. The first micro-step of an optimizer step finds
    none (None): then nothing is copied. On a card the copies go to pinned memory on a stream of their own, beside the
    forward; `ready` makes the backward wait for them.

    parameters: what may get a gradient; asked for once, when it is first needed.
    """

    def __init__(self, parameters: Callable[[], Iterable[Tensor]]) -> None:
        self._find = parameters
        self._parameters: list[Tensor] | None = None
        self._copies: dict[int, Tensor] = {}  # by position; kept from step to step
        self._saved: list[bool] = []
        self._stream: Any = None

    def save(self) -> None:
        """Remember the gradients of now. Allocates on the host only, and only the first time."""
        if self._parameters is None:
            self._parameters = list(self._find())
        gradients = [p.grad for p in self._parameters]
        self._saved = [g is not None for g in gradients]
        cuda = next((g.device for g in gradients if g is not None and g.is_cuda), None)
        if cuda is None:
            self._copy(gradients)
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(cuda)
        self._stream.wait_stream(torch.cuda.current_stream(cuda))
        with torch.cuda.stream(self._stream):
            self._copy(gradients)

    def _copy(self, gradients: list[Tensor | None]) -> None:
        for position, gradient in enumerate(gradients):
            if gradient is None:
                continue
            copy = self._copies.get(position)
            if copy is None or copy.shape != gradient.shape or copy.dtype != gradient.dtype:
                copy = self._copies[position] = host_like(gradient)
            copy.copy_(gradient.detach(), non_blocking=True)

    def ready(self) -> None:
        """Backward may write once this has returned: what it would overwrite is copied, or will be before it runs."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def restore(self) -> None:
        """Put the gradients of `save` back, in place where there is one."""
        self.ready()
        for position, parameter in enumerate(self._parameters or ()):
            if not self._saved[position]:
                parameter.grad = None
            elif parameter.grad is None:
                parameter.grad = self._copies[position].to(parameter.device)
            else:
                parameter.grad.detach().copy_(self._copies[position], non_blocking=True)


def host_like(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape and dtype in host memory, pinned if `tensor` is on a card and that can be."""
    if tensor.is_cuda:
        return pinned(tensor.shape, tensor.dtype)
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def pinned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor in pinned host memory, or where that is scarce (WSL, containers) in ordinary, only slower."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except RuntimeError:
        return torch.empty(shape, dtype=dtype)
