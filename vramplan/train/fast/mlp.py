"""The gated MLP, down(act(gate(x)) * up(x)), as one operation: saves gate and up, and makes their product again."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vramplan.train.fast import kernels
from vramplan.train.fast.linear import Group, in_half
from vramplan.train.fast.norm import Source, source_of

PARTS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS = {"SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}
_TRIED = 16  # width of the MLP that is tried


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
        (gate, up), inner = mlp.first.forward(x)
        product_inner = None
        if mlp.skip:
            y = x.new_zeros(1).expand(*x.shape[:-1], mlp.second.bases[0].outputs)
        else:
            (y,), product_inner = mlp.second.forward(kernels.gated(gate, up, mlp.activation))
        ctx.mlp, ctx.norm, ctx.shape = mlp, source.norm, x.shape
        ctx.save_for_backward(source.tensor, gate, up, inner, product_inner)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        tensor, gate, up, inner, product_inner = ctx.saved_tensors
        gate, up = gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1])
        mlp: Mlp = ctx.mlp
        second, down, inner_grad = mlp.second, None, None
        ups: list[Tensor] = []
        grads = [grad.reshape(-1, grad.shape[-1])]
        if second.slot is not None:
            down, ups = second.lora.weights(second.slot, grad.dtype)
            inner_grad = second.inner_gradient(grads, ups)
        product = second.input_gradient(grads, inner_grad, down, gate.shape)
        kernels.gated_backward_(product, gate, up, mlp.activation)  # all three change their meaning
        if inner_grad is not None and down is not None:
            if product_inner is None:
                product_inner = product @ down.t()
            second.add_gradients(grads, product, product_inner, inner_grad)
        del product, product_inner, inner_grad, grads, grad, down, ups  # before the weights of gate and up are made
        shape = ctx.shape if ctx.needs_input_grad[0] else None
        return mlp.first.backward([gate, up], Source(tensor, ctx.norm), inner, shape), None, None, None


def gated_mlp(mlp: Mlp, x: Tensor) -> Tensor:
    """The MLP of x [..., hidden]."""
    x = in_half(x)
    out: Tensor = _GatedMlp.apply(x, mlp.anchor, mlp, source_of(x))
    return out


def activation_of(module: nn.Module) -> str | None:
    """The activation of a module that is down_proj(act_fn(gate_proj(x)) * up_proj(x)), found by trying; else None."""
    name = ACTIVATIONS.get(type(getattr(module, "act_fn", None)).__name__)
    if name is None or set(module._modules) - {*PARTS, "act_fn"}:
        return None
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, _TRIED, generator=random)
    weights = {part: torch.randn(_TRIED, _TRIED, generator=random) for part in PARTS}
    trial = copy.copy(module)
    trial._modules = {**module._modules, **{part: _Times(weight) for part, weight in weights.items()}}
    gate, up = x @ weights["gate_proj"], x @ weights["up_proj"]
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            got = type(module).forward(trial.train(), x)
    except Exception:  # takes other arguments
        return None
    wanted = kernels.gated(gate, up, name) @ weights["down_proj"]
    return name if torch.allclose(got, wanted, rtol=1e-4, atol=1e-4) else None


class _Times(nn.Module):  # type: ignore[misc]
    """A Linear of the trial."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight
