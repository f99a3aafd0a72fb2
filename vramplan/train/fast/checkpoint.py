"""Checkpoints of whole layers: only the layer's input is kept, on the card or in pinned host memory.

Beside `torch.utils.checkpoint` it does three things. The first pass runs without a graph at all. The recomputation
leaves out the layer's last product where nobody reads its result (a quarter of a Llama layer's arithmetic). And inputs
that wait in host memory travel on a stream of their own while the layers compute: each leaves during its own layer's
forward and comes back during the backward of the layer above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from vramplan.train.fast.mlp import Mlp
from vramplan.train.gradients import pinned

Layer = Callable[[Tensor], Any]


class Checkpoints:
    """The checkpoints of one model. `skipped` are the MLPs whose last product a recomputation leaves out."""

    def __init__(
        self, device: torch.device, offload: bool, skipped: Sequence[Mlp | None], stochastic: bool = False
    ) -> None:
        self.stochastic = stochastic  # some module draws random numbers: a recomputation must draw the same
        self.device = device
        self.host: HostInputs | None = None
        if offload:
            self.offload()
        self.skipped = skipped
        self.dtype = torch.bfloat16
        self.device_type = device.type

    def offload(self) -> None:
        """From the next forward on, inputs wait in host memory; on a CPU they are there already."""
        if self.device.type == "cuda" and self.host is None:
            self.host = HostInputs(self.device)

    def function(self, index: int, anchor: Tensor | None) -> Callable[..., Any]:
        """What transformers' `GradientCheckpointingLayer` calls as its `_gradient_checkpointing_func`."""

        def checkpoint(layer: Layer, x: Tensor) -> Any:
            if not torch.is_grad_enabled() or not (x.requires_grad or anchor is not None):
                return layer(x)
            return _Checkpoint.apply(x, anchor, layer, index, self)

        checkpoint.needs_no_input_gradient = True  # type: ignore[attr-defined]  # the adapter's is enough
        return checkpoint

    def random_state(self) -> tuple[Tensor, ...]:
        """The states of the generators, where they matter."""
        if not self.stochastic:
            return ()
        return (torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self.device_type == "cuda" else []))

    @contextmanager
    def _same_random_numbers(self, state: tuple[Tensor, ...]) -> Iterator[None]:
        now = self.random_state()
        _set_random_state(state)
        try:
            yield
        finally:
            _set_random_state(now)

    def recompute(self, layer: Layer, x: Tensor, index: int, autocast: bool, state: tuple[Tensor, ...]) -> Any:
        """The graph of a layer's result; the result itself is let go."""
        mlp = self.skipped[index]
        if mlp is not None:
            mlp.skip = True
        try:
            cast = torch.autocast(self.device_type, dtype=self.dtype, enabled=autocast)
            with torch.enable_grad(), cast, self._same_random_numbers(state):
                out = layer(x)
        finally:
            if mlp is not None:
                mlp.skip = False
        return get_gradient_edge(out)

    def forget(self) -> None:
        """Drop what an interrupted step has left."""
        if self.host is not None:
            self.host.forget()


def _set_random_state(state: tuple[Tensor, ...]) -> None:
    if state:
        torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


class _Checkpoint(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, layer: Layer, index: int, owner: Checkpoints) -> Any:
        ctx.layer, ctx.index, ctx.owner = layer, index, owner
        ctx.autocast = torch.is_autocast_enabled(owner.device_type)
        ctx.random = owner.random_state()
        if owner.host is None:
            ctx.save_for_backward(x)
        else:
            owner.host.send(index, x)
        return layer(x)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        owner: Checkpoints = ctx.owner
        layer, ctx.layer = ctx.layer, None  # it holds the tables of the rotary embedding, and autograd holds ctx
        (x,) = ctx.saved_tensors if owner.host is None else (owner.host.fetch(ctx.index),)
        x = x.detach().requires_grad_(ctx.needs_input_grad[0])
        edge = owner.recompute(layer, x, ctx.index, ctx.autocast, ctx.random)
        torch.autograd.backward(edge, grad)
        return x.grad, None, None, None, None


class HostInputs:
    """Layer inputs in pinned host memory, one buffer a layer, kept from step to step."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.buffers: dict[int, Tensor] = {}  # flat, pinned
        self.leaving: tuple[int, Tensor, torch.cuda.Event] | None = None  # still on the card, on its way out
        self.coming: tuple[int, Tensor, torch.cuda.Event] | None = None
        self.shapes: dict[int, tuple[torch.Size, torch.dtype]] = {}

    def send(self, index: int, x: Tensor) -> None:
        """Copy a layer's input to the host while the layer computes. The one before has arrived by then."""
        if self.leaving is not None:
            torch.cuda.current_stream().wait_event(self.leaving[2])
        self.leaving = None
        place = self._buffer(index, x)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            place.copy_(x.detach().reshape(-1), non_blocking=True)
            sent = self.stream.record_event()
        self.leaving = (index, x.detach(), sent)
        self.shapes[index] = (x.shape, x.dtype)

    def fetch(self, index: int) -> Tensor:
        """A layer's input on the card again; the one below it sets out."""
        if self.leaving is not None and self.leaving[0] == index:
            x = self.leaving[1]
            torch.cuda.current_stream().wait_event(self.leaving[2])  # what overwrites it later comes after the copy
            self.leaving = None
            del self.shapes[index]
        else:
            if self.coming is None or self.coming[0] != index:
                self._call(index)
            assert self.coming is not None
            _, x, arrived = self.coming
            torch.cuda.current_stream().wait_event(arrived)
        self.coming = None
        below = max((i for i in self.shapes if i < index), default=None)
        if below is not None:
            self._call(below)
        return x

    def _call(self, index: int) -> None:
        shape, dtype = self.shapes.pop(index)
        x = torch.empty(shape, dtype=dtype, device=self.stream.device)
        self.stream.wait_stream(torch.cuda.current_stream())  # who had this memory before is done with it
        with torch.cuda.stream(self.stream):
            x.view(-1).copy_(self.buffers[index][: x.numel()], non_blocking=True)
            self.coming = (index, x, self.stream.record_event())

    def _buffer(self, index: int, x: Tensor) -> Tensor:
        held = self.buffers.get(index)
        if held is None or held.numel() < x.numel() or held.dtype != x.dtype:
            self.buffers[index] = pinned((x.numel(),), x.dtype)
        return self.buffers[index][: x.numel()]

    def forget(self) -> None:
        """An interrupted step's inputs are not asked for any more."""
        torch.cuda.current_stream().wait_stream(self.stream)
        self.leaving = self.coming = None
        self.shapes = {}
