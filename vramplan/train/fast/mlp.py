"""The gated MLP, down(act(gate(x)) * up(x)), as one operation: saves gate and up, and makes their product again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vramplan.train.fast import kernels
from vramplan.train.fast.linear import Group
from vramplan.train.fast.norm import Source, source_of


@dataclass(slots=True)
class Mlp:
    """`first` holds gate and up, `second` down."""

    first: Group
    second: Group
    activation: str
    skip: bool = False  # set while a layer is recomputed whose result nobody reads: down's product is left out

    @property
    def anchor(self) -> Tensor | None:
        return self.first.anchor if self.first.anchor is not None else self.second.anchor


class _GatedMlp(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor | None, mlp: Mlp, source: Source) -> Tensor:
        (gate, up), inner = mlp.first.forward(x.reshape(-1, x.shape[-1]))
        product_inner = None
        if mlp.skip:
            y = x.new_zeros(1).expand(*x.shape[:-1], mlp.second.bases[0].outputs)
        else:
            (out,), product_inner = mlp.second.forward(kernels.gated(gate, up, mlp.activation))
            y = out.view(*x.shape[:-1], out.shape[-1])
        ctx.mlp, ctx.norm, ctx.shape = mlp, source.norm, x.shape
        ctx.save_for_backward(source.tensor, gate, up, inner, product_inner)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        tensor, gate, up, inner, product_inner = ctx.saved_tensors
        mlp: Mlp = ctx.mlp
        second, down, inner_grad = mlp.second, None, None
        grads = [grad.reshape(-1, grad.shape[-1])]
        if second.slot is not None:
            down, ups = second.lora.weights(second.slot, grad.dtype)
            inner_grad = second.inner_gradient(grads, ups)
        product = second.input_gradient(grads, inner_grad, down)
        kernels.gated_backward_(product, gate, up, mlp.activation)  # all three change their meaning
        if inner_grad is not None and down is not None:
            if product_inner is None:
                product_inner = product @ down.t()
            second.add_gradients(grads, product, product_inner, inner_grad)
        del product, product_inner, inner_grad, grads, grad, down
        dx = mlp.first.backward([gate, up], Source(tensor, ctx.norm), inner, ctx.needs_input_grad[0])
        return (None if dx is None else dx.view(ctx.shape)), None, None, None


def gated_mlp(mlp: Mlp, x: Tensor) -> Tensor:
    """The MLP of x [..., hidden]."""
    out: Tensor = _GatedMlp.apply(x, mlp.anchor, mlp, source_of(x))
    return out
