"""RMSNorm that saves its input and 1/rms, and lets the product that follows recompute its result."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vramplan.train.fast import kernels

_TRIED = 32  # width of the norm that is tried
_TAG = "_vramplan_normed"  # on the result of a fused norm: what it was made of


class Norm(NamedTuple):
    """What a norm module computes: weight [n], and how (`kernels.rms_norm`)."""

    weight: Tensor
    eps: float
    offset: float
    late: bool

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.rms_norm(x, self.weight, self.eps, self.offset, self.late)


class _RmsNorm(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        y, inverse = norm(x)
        ctx.save_for_backward(x, inverse)
        ctx.norm = norm
        ctx.mark_non_differentiable(inverse)
        ctx.set_materialize_grads(False)  # no zeros for it
        return y, inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        x, inverse = ctx.saved_tensors
        norm = ctx.norm
        return kernels.rms_norm_backward(grads[0].contiguous(), x, inverse, norm.weight, norm.offset), None


class Source(NamedTuple):
    """Where the input of a product comes from: itself, or the norm that made it and that norm's input."""

    tensor: Tensor
    norm: Norm | None

    def again(self) -> Tensor:
        """The product's input [tokens, n]."""
        x = self.tensor if self.norm is None else self.norm(self.tensor)[0]
        return x.reshape(-1, x.shape[-1])


def forward(norm: Norm, x: Tensor) -> Tensor:
    """The norm of x, remembering what it was made of."""
    if x.dim() == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():  # heads that lie token by token
        return forward(norm, x.transpose(1, 2)).transpose(1, 2)
    x = x.contiguous()
    y: Tensor = _RmsNorm.apply(x, norm)[0]
    if torch.is_grad_enabled():  # else nobody saves anything, and the tag would keep x as long as a view of y
        setattr(y, _TAG, Source(x.detach(), norm))
    return y


def source_of(x: Tensor) -> Source:
    """What to save for a product with x."""
    made: Source | None = getattr(x, _TAG, None)
    return Source(x, None) if made is None else made


def norm_of(module: nn.Module) -> Norm | None:
    """The meaning of an RMSNorm module of transformers, found by trying a small one in bf16; None if it is none."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float) or getattr(module, "bias", None) is not None:
        return None
    random = torch.Generator().manual_seed(0)
    x = torch.randn(8, _TRIED, generator=random).to(torch.bfloat16)
    try:
        trial: Any = type(module)(_TRIED, eps=eps).to(torch.bfloat16)
        trial.weight.data = torch.rand(_TRIED, generator=random).to(torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            wanted = trial(x)
    except Exception:  # a module that is made or called otherwise
        return None
    for offset, late in ((0.0, False), (0.0, True), (1.0, True)):
        got, _ = Norm(trial.weight, eps, offset, late)(x)
        if got.dtype == wanted.dtype and torch.allclose(got.float(), wanted.float(), rtol=1e-6, atol=1e-6):
            return Norm(weight, eps, offset, late)
    return None
