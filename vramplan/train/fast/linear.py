"""4-bit Linears that share an input, with their LoRA, as one operation with a backward of its own.

    y = x W^T + s (x A^T) B^T        W dequantised for the moment, A and B copied to bf16

One product with all A of the group; B's small product is written first and W's large product adds to it, so LoRA costs
one more pass over y instead of eight. Nothing of size [tokens, out] is saved, and of size [tokens, in] only what the
norm before has saved anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vramplan.core.fused import slices
from vramplan.train.fast import kernels
from vramplan.train.fast.flat import FlatLora, Slot
from vramplan.train.fast.norm import Source, source_of


@dataclass(slots=True)
class Base:
    """One `bitsandbytes.nn.Linear4bit`, [out, in], and which adapter of the group is its own (None: no adapter)."""

    module: Any
    inputs: int
    outputs: int
    adapter: int | None = None

    def parts(self, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(columns of y [T, out], the rows of W that they belong to, in the dtype of y).

        In slices, so that a huge weight never stands in bf16 as a whole.
        """
        for start, stop in slices(self.outputs, self.inputs):
            weight = kernels.dequantise(self.module.weight, start, stop, y.dtype)
            yield (y if stop - start == self.outputs else y[:, start:stop]), weight
            del weight


@dataclass(slots=True)
class Group:
    """Linears with one input, and their adapters in the layer's flat tensor (`slot` None: none is adapted)."""

    bases: Sequence[Base]
    lora: FlatLora
    slot: Slot | None = None

    @property
    def anchor(self) -> Tensor | None:
        """What makes the result require a gradient where the input does not."""
        return None if self.slot is None else self.lora.parameter

    # ------------------------------------------------------------------------------------------------- forward
    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """x [..., in] -> (each y [..., out], x A^T [T, n * r])."""
        leading, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        down = inner = None
        ups: list[Tensor] = []
        if self.slot is not None:
            down, ups = self.lora.weights(self.slot, x.dtype)
            inner = x @ down.t()
        outs = []
        for base in self.bases:
            y = x.new_empty(*leading, base.outputs)  # no view: some models change their q and k in place
            self._product(x, inner, ups, base, y.view(-1, base.outputs))
            outs.append(y)
        return outs, inner

    def _product(self, x: Tensor, inner: Tensor | None, ups: list[Tensor], base: Base, y: Tensor) -> None:
        if inner is not None and base.adapter is not None:
            part, scale = self.part(inner, base.adapter)
            torch.addmm(y, part, ups[base.adapter].t(), beta=0, alpha=scale, out=y)
        for part, weight in base.parts(y):
            if base.adapter is None:
                torch.mm(x, weight.t(), out=part)
            else:
                part.addmm_(x, weight.t())
            del weight
        if base.module.bias is not None:
            y.add_(base.module.bias)

    def part(self, inner: Tensor, adapter: int) -> tuple[Tensor, float]:
        """(the columns of one adapter, its scaling)."""
        assert self.slot is not None
        rank = self.slot.rank
        if len(self.slot.outs) == 1:
            return inner, self.slot.scalings[0]
        return inner[:, adapter * rank : (adapter + 1) * rank], self.slot.scalings[adapter]

    # ------------------------------------------------------------------------------------------------ backward
    def inner_gradient(self, grads: Sequence[Tensor], ups: list[Tensor]) -> Tensor:
        """s dy B of every adapter, [T, n * r]."""
        assert self.slot is not None
        new = grads[0].new_empty if len(self.bases) >= len(self.slot.outs) else grads[0].new_zeros
        inner = new(grads[0].shape[0], self.slot.rank * len(self.slot.outs))
        for base, grad in zip(self.bases, grads, strict=True):
            if base.adapter is not None:
                part, scale = self.part(inner, base.adapter)
                torch.addmm(part, grad, ups[base.adapter], beta=0, alpha=scale, out=part)
        return inner

    def add_gradients(self, grads: Sequence[Tensor], x: Tensor, inner: Tensor, inner_grad: Tensor) -> None:
        """Into the flat gradient: dA += (s dy B)^T x, dB += s dy^T (x A^T)."""
        assert self.slot is not None
        down, ups = self.lora.gradients(self.slot)
        kernels.add_product_(down, inner_grad.t(), x)
        for base, grad in zip(self.bases, grads, strict=True):
            if base.adapter is not None:
                part, scale = self.part(inner, base.adapter)
                kernels.add_product_(ups[base.adapter], grad.t(), part, scale)

    def input_gradient(
        self, grads: Sequence[Tensor], inner_grad: Tensor | None, down: Tensor | None, shape: torch.Size
    ) -> Tensor:
        """dx [..., in] = (s dy B) A + dy W, summed over the group."""
        dx = grads[0].new_empty(shape)  # no view: autograd adds other gradients into what is nobody else's
        total, begun = dx.view(-1, shape[-1]), False
        if inner_grad is not None and down is not None:
            begun = True
            torch.mm(inner_grad, down, out=total)
        for base, grad in zip(self.bases, grads, strict=True):
            for part, weight in base.parts(grad):
                if begun:
                    total.addmm_(part, weight)
                else:
                    torch.mm(part, weight, out=total)
                begun = True
                del weight
        return dx

    def backward(
        self, grads: Sequence[Tensor], source: Source, inner: Tensor | None, shape: torch.Size | None
    ) -> Tensor | None:
        """Adds the gradients of the adapters; returns dx of that shape, if one is given."""
        down = inner_grad = None
        if self.slot is not None and inner is not None:
            down, ups = self.lora.weights(self.slot, grads[0].dtype)
            inner_grad = self.inner_gradient(grads, ups)
            self.add_gradients(grads, source.again(), inner, inner_grad)
        return None if shape is None else self.input_gradient(grads, inner_grad, down, shape)


class _Linears(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, group: Group, source: Source) -> tuple[Tensor, ...]:
        outs, inner = group.forward(x)
        ctx.group, ctx.norm, ctx.shape = group, source.norm, x.shape
        if inner is not None:
            ctx.save_for_backward(source.tensor, inner)
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        flat = [g.reshape(-1, g.shape[-1]) for g in grads]
        tensor, inner = ctx.saved_tensors or (None, None)
        shape = ctx.shape if ctx.needs_input_grad[0] else None
        return ctx.group.backward(flat, Source(tensor, ctx.norm), inner, shape), None, None, None


def linears(group: Group, x: Tensor) -> tuple[Tensor, ...]:
    """All results of the group for x [..., in]."""
    x = in_half(x)
    made: tuple[Tensor, ...] = _Linears.apply(x, group.anchor, group, source_of(x))
    return made


def in_half(x: Tensor) -> Tensor:
    """A float32 stream (a LayerNorm under autocast) enters a product as autocast would have it."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


class SharedInput:
    """Lets `q_proj(x)`, `k_proj(x)`, `v_proj(x)` of untouched modelling code be one operation.

    The first of them computes all; the others hand out what is there, if they are given the same tensor.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.alone = [Group([base], group.lora, group.slot) for base in group.bases]  # for another input each
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}  # place in the group -> (x, its result)

    def member(self, place: int) -> Callable[[Tensor], Tensor]:
        """The forward of one of the Linears."""

        def forward(x: Tensor) -> Tensor:
            given, made = self.waiting.pop(place, (None, None))
            if given is x and made is not None:
                return made
            if place:
                return linears(self.alone[place], x)[0]
            first, *others = linears(self.group, x)
            self.waiting = {i: (x, y) for i, y in enumerate(others, start=1)}
            return first

        return forward

    def forget(self) -> None:
        """Drop what an interrupted forward has left."""
        self.waiting = {}
