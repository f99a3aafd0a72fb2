"""The trainer's own fused layers on fake tensors: what a card's kernels allocate, without the kernels.

`vramplan.train.fast` is installed as it is; what asks for a card is answered here. Each stand-in allocates what the
kernel in `fast/triton_kernels.py` allocates, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vramplan.core.fused import skips_last
from vramplan.core.types import ModelSpec, RunSpec
from vramplan.trace.attention import DEVICE
from vramplan.trace.recorder import Tracker
from vramplan.train.fast import checkpoint, flat, install, kernels, mlp, norm, rotary

Replacement = tuple[Any, str, Any]


def fuse(model: Any, spec: ModelSpec | None, run: RunSpec, tracker: Tracker, layers: int) -> install.Fused | None:
    """Fuse the layers of the wrapped model as the trainer would; None where it would not."""
    if install.why_not(model, run.levers, torch.device(DEVICE)):
        return None
    fill, filled = flat.FlatLora.fill, iter(range(layers))

    def fill_layer(self: Any, slots: Any) -> None:
        tracker.at(next(filled))
        fill(self, slots)

    flat.FlatLora.fill = fill_layer  # type: ignore[method-assign]
    try:
        skips = spec is not None and skips_last(spec)
        fused = install.install(model, run.levers, torch.device(DEVICE), skips, stochastic=False)
    finally:
        flat.FlatLora.fill = fill  # type: ignore[method-assign]
    assert fused.checkpoints is not None
    if run.levers.checkpoint_offload:
        fused.checkpoints.host = HostInputs(tracker)  # type: ignore[assignment]
    return fused


class HostInputs:
    """`checkpoint.HostInputs` without streams."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.sent: dict[int, Tensor] = {}  # without storage on the card
        self.leaving: tuple[int, Tensor] | None = None
        self.coming: tuple[int, Tensor] | None = None

    def send(self, index: int, x: Tensor) -> None:
        self.leaving = None
        self.leaving = (index, x.detach())
        self.sent[index] = torch.empty(x.shape, dtype=x.dtype, device="meta")

    def fetch(self, index: int) -> Tensor:
        if self.leaving is not None and self.leaving[0] == index:
            x = self.leaving[1]
            self.leaving = None
        else:
            assert self.coming is not None
            x = self.coming[1]
        self.coming = None
        del self.sent[index]
        if self.sent:
            below = max(self.sent)
            back = torch.empty(self.sent[below].shape, dtype=self.sent[below].dtype, device=DEVICE)
            self.tracker.relabel(back, "activations.checkpoints", "layer input back from the host")
            self.coming = (below, back)
        return x


# ---------------------------------------------------------------------------------------------------- stand-ins
def _card(tracker: Tracker) -> SimpleNamespace:
    def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, late: bool) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x)
        return y, torch.empty(x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)

    def like(x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    def rms_norm_backward(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    def nothing(*_: Any) -> None:
        return None

    def dequantise(weight: Any, state: Any, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        out = torch.empty(stop - start, state.shape[1], dtype=dtype, device=DEVICE)
        tracker.relabel(out, "workspace.dequantised", "weight dequantised")
        return out

    def add_product_(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
        tracker.workspace("cublas")

    def cross_entropy_(logits: Tensor, *_: Any) -> Tensor:
        return torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)

    return SimpleNamespace(
        rms_norm=rms_norm,
        rms_norm_backward=rms_norm_backward,
        rotate=like,
        gated=like,
        gated_backward_=nothing,
        dequantise=dequantise,
        add_product_=add_product_,
        cross_entropy_=cross_entropy_,
    )


def _outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run on real tensors, unseen: a trial of what a module means."""

    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return call


def _marked(tracker: Tracker) -> tuple[Any, Any]:
    """The checkpoint's backward and recomputation, which tell the tracker where they are."""
    backward: Any = checkpoint._Checkpoint.backward
    recompute: Any = checkpoint.Checkpoints.recompute

    def marked_backward(ctx: Any, *grads: Tensor) -> Any:
        tracker.at(ctx.index)
        return backward(ctx, *grads)

    def marked_recompute(self: Any, *args: Any) -> Any:
        edge = recompute(self, *args)
        tracker.recomputing = False
        return edge

    return staticmethod(marked_backward), marked_recompute


def replacements(tracker: Tracker) -> list[Replacement]:
    """(where, name, what) for `patches.like_cuda`."""
    backward, recompute = _marked(tracker)
    card = _card(tracker)

    def gradients(self: Any, slot: Any) -> Any:
        parameter = self.parameter
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
            tracker.relabel(parameter.grad, "adapter.gradients", "gradient of the adapter")
        return slot.views(parameter.grad, slot.start)

    def weights(self: Any, slot: Any, dtype: torch.dtype) -> Any:
        halves = self.regions[slot].to(dtype)
        tracker.relabel(halves, "adapter.casts", "A and B in bf16")
        return slot.views(halves)

    return [
        (kernels, "on_card", lambda x: True),
        (kernels, "_card", lambda: card),
        (install, "activation_of", _on_host(_outside(mlp.activation_of))),
        (norm, "norm_of", _on_host(_outside(norm.norm_of))),
        (rotary, "same_meaning", _on_host(_outside(rotary.same_meaning))),
        (checkpoint._Checkpoint, "backward", backward),
        (checkpoint.Checkpoints, "recompute", recompute),
        (flat.FlatLora, "gradients", gradients),
        (flat.FlatLora, "weights", weights),
    ]


def _on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    """Try with the host's kernels, not the stand-ins."""

    def call(*args: Any) -> Any:
        pretended = kernels.on_card
        kernels.on_card = lambda x: False
        try:
            return function(*args)
        finally:
            kernels.on_card = pretended

    return call
