"""`apply_rotary_pos_emb` in one kernel for q and one for k, which saves the tables alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vramplan.train.fast import kernels

Rotary = Callable[..., tuple[Tensor, Tensor]]


class _Rotate(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return kernels.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return kernels.rotate(grad, cos, sin, backward=True), None, None


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q [B, h, S, D] and k [B, g, S, D] turned by the tables [1 or B, S, D]."""
    assert unsqueeze_dim == 1
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


def same_meaning(original: Rotary, head_dim: int, width: int) -> bool:
    """Whether `original` is the turn of the two halves of a head by tables of `width`, found by trying."""
    if width != head_dim or head_dim % 2:
        return False
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 3, head_dim, generator=random)
    k = torch.randn(2, 2, 3, head_dim, generator=random)
    angle = torch.randn(1, 3, head_dim // 2, generator=random).repeat(1, 1, 2)
    try:
        wanted = original(q, k, angle.cos(), angle.sin())
    except Exception:  # takes other arguments
        return False
    got = apply_rotary(q, k, angle.cos(), angle.sin())
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(got, wanted, strict=True))
