"""Elementwise kernels of the fused layer: Triton's on a CUDA card (`triton_kernels.py`), plain torch elsewhere.

Each function allocates its results and nothing else on a card. Arithmetic is float32 inside, whatever the dtype.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@cache
def available(device_type: str) -> bool:
    """Whether fused layers can run there: on CUDA they need Triton."""
    return device_type != "cuda" or find_spec("triton") is not None


def on_card(x: Any) -> bool:
    return bool(x.is_cuda)


def _card() -> Any:
    from vramplan.train.fast import triton_kernels

    return triton_kernels


# ----------------------------------------------------------------------------------------------------- RMSNorm
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, late: bool) -> tuple[Tensor, Tensor]:
    """(y like x, 1/rms float32 [rows]) of x [..., n], weight [n].

    y = (offset + weight) * x / rms. `late`: multiplied in float32 and rounded once (Gemma, OLMo-2); else x / rms is
    rounded to the dtype of x first (Llama).
    """
    if on_card(x):
        out: tuple[Tensor, Tensor] = _card().rms_norm(x, weight, eps, offset, late)
        return out
    wide = x.float() if x.dtype != torch.float64 else x
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * inverse
    if late:
        y = (normed * (weight.to(wide.dtype) + offset)).to(x.dtype)
    else:
        y = (weight + offset if offset else weight).to(x.dtype) * normed.to(x.dtype)
    return y, inverse.reshape(-1)


def rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, offset: float) -> Tensor:
    """The gradient of x; the weight is frozen."""
    if on_card(x):
        return _card().rms_norm_backward(grad, x, inverse, weight, offset)
    kind = torch.promote_types(x.dtype, torch.float32)
    inverse = inverse.reshape(*x.shape[:-1], 1)
    normed = x.to(kind) * inverse
    scaled = grad.to(kind) * (weight.to(kind) + offset)
    return (inverse * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))).to(x.dtype)


# ------------------------------------------------------------------------------------------------------ rotary
def rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool = False) -> Tensor:
    """x [B, h, S, D] with its halves turned by the tables [1 or B, S, D]; laid out in memory as x is.

    `backward`: the gradient of x from the gradient of the result (the transposed turn).
    """
    if on_card(x):
        return _card().rotate(x, cos, sin, backward)
    half = x.shape[-1] // 2
    kind = torch.promote_types(x.dtype, torch.float32)
    c, s = cos.unsqueeze(1).to(kind), sin.unsqueeze(1).to(kind)
    a, b = x[..., :half].to(kind), x[..., half:].to(kind)
    out = torch.empty_like(x)
    if backward:
        out[..., :half] = a * c[..., :half] + b * s[..., half:]
        out[..., half:] = b * c[..., half:] - a * s[..., :half]
    else:
        out[..., :half] = a * c[..., :half] - b * s[..., :half]
        out[..., half:] = b * c[..., half:] + a * s[..., half:]
    return out


# --------------------------------------------------------------------------------------------------- gated MLP
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    if on_card(gate):
        return _card().gated(gate, up, activation)
    return _activate(gate, activation) * up


def gated_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    """In place: grad becomes act(gate) * up, gate its own gradient, up its own gradient."""
    if on_card(gate):
        _card().gated_backward_(grad, gate, up, activation)
        return
    with torch.enable_grad():
        leaf = gate.detach().clone().requires_grad_()
        active = _activate(leaf, activation)
    (slope,) = torch.autograd.grad(active, leaf, grad * up)
    product, of_up = active.detach() * up, active.detach() * grad
    for place, value in ((grad, product), (gate, slope), (up, of_up)):
        place.copy_(value)


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


# --------------------------------------------------------------------------------------------- matrix products
def dequantise(weight: Any, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start:stop of a 4-bit weight (`bitsandbytes.nn.Params4bit`, blocks of 64) as [stop - start, in]."""
    state = weight.quant_state
    if on_card(weight):
        return _card().dequantise(weight, state, start, stop, dtype)
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(weight.data, state).to(dtype)[start:stop]


def add_product_(total: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """total += scale * a @ b, in the dtype of `total` (float32 for the gradients of LoRA), a and b in bf16."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, alpha=scale)
    elif on_card(total):
        _card().add_product_(total, a, b, scale)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=scale)


# ------------------------------------------------------------------------------------------------- the loss
def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: Tensor, multiplier: float, softcap: float | None, grad: bool
) -> Tensor:
    """Losses float32 [rows] of logits [rows, V] (before multiplier and softcap) on a card.

    When `grad`, the logits become scale (a float32 scalar on the card) times their own gradient, in place. A row whose
    target is negative counts nothing.
    """
    return _card().cross_entropy_(logits, targets, scale, multiplier, softcap, grad)
