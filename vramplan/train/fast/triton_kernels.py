"""The kernels of `kernels.py` in Triton. Imported only where tensors are on a CUDA card.

Each makes one pass over what it reads and allocates its results alone. Row offsets are 64 bits wide: a chunk of logits
or the hidden states of a long context have more than 2^31 elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

SILU, GELU, GELU_TANH = 0, 1, 2
_ACTIVATION = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}
_TILE = 4096  # elements of a program that is bound by memory


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Any, programs: int, tensors: tuple[Tensor, ...], numbers: tuple[Any, ...], constants: tuple[Any, ...],
    warps: int,
) -> None:  # fmt: skip
    """Start a kernel (arguments in the order tensors, numbers, constants).

    Triton works out at every call which compiled variant the arguments need, which takes longer than a small kernel
    runs. The variant depends on dtypes, numbers and constants, and on pointers being multiples of 16: so it is looked
    up by those.
    """
    key = (kernel, numbers, constants, *[t.dtype for t in tensors])
    made = _compiled.get(key)
    if made is None or any(t.data_ptr() & 15 for t in tensors):
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        made = kernel[(programs,)](*tensors, *numbers, **dict(zip(names, constants, strict=True)), num_warps=warps)
        if made is not None and not any(t.data_ptr() & 15 for t in tensors):
            _compiled[key] = made
        return
    made[(programs, 1, 1)](*tensors, *numbers, *constants)


# ----------------------------------------------------------------------------------------------------- RMSNorm
@triton.jit
def _rms_norm(x_ptr, w_ptr, y_ptr, inv_ptr, rows, n, eps, offset, LATE: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = tl.arange(0, N)[None, :]
    mask = (row < rows) & (column < n)
    x = tl.load(x_ptr + row * n + column, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1)[:, None] / n + eps)
    w = tl.load(w_ptr + column, mask=column < n, other=0.0)
    normed = x * inverse
    if LATE:
        y = normed * (w.to(tl.float32) + offset)
    else:
        y = normed.to(y_ptr.dtype.element_ty).to(tl.float32) * (w.to(tl.float32) + offset)
    tl.store(y_ptr + row * n + column, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(inv_ptr + row, inverse, mask=row < rows)


@triton.jit
def _rms_norm_backward(g_ptr, x_ptr, inv_ptr, w_ptr, dx_ptr, rows, n, offset, R: tl.constexpr, N: tl.constexpr):
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = tl.arange(0, N)[None, :]
    mask = (row < rows) & (column < n)
    g = tl.load(g_ptr + row * n + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * n + column, mask=mask, other=0.0).to(tl.float32)
    inverse = tl.load(inv_ptr + row, mask=row < rows, other=0.0)
    w = tl.load(w_ptr + column, mask=column < n, other=0.0).to(tl.float32) + offset
    normed = x * inverse
    scaled = g * w
    mean = tl.sum(scaled * normed, axis=1)[:, None] / n
    dx = inverse * (scaled - normed * mean)
    tl.store(dx_ptr + row * n + column, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _rows(n: int) -> tuple[int, int, int]:
    """(rows of a program, padded width, warps) for rows of n elements."""
    width = triton.next_power_of_2(n)
    rows = max(1, _TILE // width)
    return rows, width, 4 if rows * width <= 4096 else 8 if width <= 8192 else 16


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, late: bool) -> tuple[Tensor, Tensor]:
    n = x.shape[-1]
    rows = x.numel() // n
    y = torch.empty_like(x)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    r, width, warps = _rows(n)
    _launch(_rms_norm, -(-rows // r), (x, weight, y, inverse), (rows, n, eps, offset), (late, r, width), warps)
    return y, inverse


def rms_norm_backward(grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, offset: float) -> Tensor:
    n = x.shape[-1]
    rows = x.numel() // n
    dx = torch.empty_like(x)
    r, width, warps = _rows(n)
    tensors = (grad, x, inverse, weight, dx)
    _launch(_rms_norm_backward, -(-rows // r), tensors, (rows, n, offset), (r, width), warps)
    return dx


# ------------------------------------------------------------------------------------------------------ rotary
@triton.jit
def _rotate(x_ptr, cos_ptr, sin_ptr, y_ptr, seq, heads, x_b, x_s, x_h, t_b, half,
            BACKWARD: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch, position = token // seq, token % seq
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (column < half)
    at = batch * x_b + position * x_s + head * x_h + column
    table = batch * t_b + position * (2 * half) + column
    some = column < half
    c1 = tl.load(cos_ptr + table, mask=some, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + table, mask=some, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + table + half, mask=some, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + table + half, mask=some, other=0.0).to(tl.float32)
    a = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + at + half, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        first = a * c1 + b * s2
        second = b * c2 - a * s1
    else:
        first = a * c1 - b * s1
        second = b * c2 + a * s2
    tl.store(y_ptr + at, first.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + at + half, second.to(y_ptr.dtype.element_ty), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    batch, heads, seq, dim = x.shape
    cos, sin = cos.contiguous(), sin.contiguous()
    if x.stride(-1) != 1:
        x = x.contiguous()
    y = torch.empty_like(x)
    if y.stride() != x.stride():  # x is no dense layout of its own (a part of a wider tensor)
        x = x.contiguous()
        y = torch.empty_like(x)
    table = cos.stride(0) if cos.shape[0] > 1 else 0
    numbers = (seq, heads, x.stride(0), x.stride(2), x.stride(1), table, dim // 2)
    constants = (backward, triton.next_power_of_2(heads), triton.next_power_of_2(dim // 2))
    _launch(_rotate, batch * seq, (x, cos, sin, y), numbers, constants, 4)
    return y


# --------------------------------------------------------------------------------------------------- gated MLP
@triton.jit
def _act(x, KIND: tl.constexpr):
    """(activation, its slope) of float32 x."""
    if KIND == 0:
        s = 1.0 / (1.0 + tl.exp(-x))
        value = x * s
        slope = s * (1.0 + x * (1.0 - s))
    elif KIND == 1:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 2.0 / (1.0 + tl.exp(-2.0 * inner)) - 1.0
        value = 0.5 * x * (1.0 + t)
        slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def _gated(gate_ptr, up_ptr, y_ptr, total, KIND: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = at < total
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0)
    value, _ = _act(gate, KIND)
    y = value.to(up.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_backward(grad_ptr, gate_ptr, up_ptr, total, KIND: tl.constexpr, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    mask = at < total
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=mask, other=0.0)
    value, slope = _act(gate, KIND)
    value = value.to(up.dtype).to(tl.float32)
    wide = up.to(tl.float32)
    kind = grad_ptr.dtype.element_ty
    tl.store(grad_ptr + at, (value * wide).to(kind), mask=mask)
    tl.store(gate_ptr + at, (grad * wide * slope).to(kind), mask=mask)
    tl.store(up_ptr + at, (grad * value).to(kind), mask=mask)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    y = torch.empty_like(gate)
    total = gate.numel()
    _launch(_gated, -(-total // _TILE), (gate, up, y), (total,), (_ACTIVATION[activation], _TILE), 8)
    return y


def gated_backward_(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> None:
    total = gate.numel()
    _launch(_gated_backward, -(-total // _TILE), (grad, gate, up), (total,), (_ACTIVATION[activation], _TILE), 8)


# ------------------------------------------------------------------------------------------------ 4-bit weights
@triton.jit
def _dequantise(packed_ptr, absmax_ptr, scales_ptr, scale_code_ptr, offset_ptr, code_ptr, out_ptr, first, blocks,
                NESTED: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """`B` blocks of 64 weights: two in a byte, the first in its upper half (bitsandbytes kDequantizeBlockwise)."""
    local = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    mask = local < blocks
    block = first + local
    if NESTED:
        q = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        scale = tl.load(scale_code_ptr + q, mask=mask, other=0.0) * tl.load(
            scales_ptr + block // 256, mask=mask, other=0.0
        )
        scale += tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    byte = tl.arange(0, 32)[None, :]
    packed = tl.load(packed_ptr + block[:, None] * 32 + byte, mask=mask[:, None], other=0).to(tl.int32)
    high = tl.load(code_ptr + ((packed >> 4) & 15)) * scale[:, None]
    low = tl.load(code_ptr + (packed & 15)) * scale[:, None]
    pair = tl.interleave(high, low)  # [B, 64]
    at = local[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + at, pair.to(out_ptr.dtype.element_ty), mask=mask[:, None])


def dequantise(weight: Any, state: Any, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    inputs = state.shape[1]
    out = torch.empty(stop - start, inputs, dtype=dtype, device=weight.device)
    if state.blocksize != 64 or start * inputs % 64 or out.numel() % 64:
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, state).to(dtype)[start:stop]
    first, blocks = start * inputs // 64, out.numel() // 64
    packed = weight.data if weight.dtype == torch.uint8 else weight.data.view(torch.uint8)
    if state.nested:
        scales = (state.absmax, state.state2.absmax, state.state2.code, state.offset)
    else:
        scales = (state.absmax,) * 4
    tensors = (packed, *scales, state.code, out)
    _launch(_dequantise, -(-blocks // 32), tensors, (first, blocks), (state.nested, 32), 4)
    return out


def add_product_(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """cuBLAS adds bf16 products into a float32 matrix itself."""
    torch.addmm(total, a, b, out_dtype=total.dtype, alpha=scale, out=total)


# ------------------------------------------------------------------------------------------------- the loss
@triton.jit
def _cross_entropy(logits_ptr, target_ptr, loss_ptr, scale_ptr, multiplier, softcap, n: tl.constexpr,
                   CAPPED: tl.constexpr, GRAD: tl.constexpr, N: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * n
    target = tl.load(target_ptr + row)
    counts = tl.where(target >= 0, 1.0, 0.0)  # an ignored row has no loss and no gradient
    top = -float("inf")
    total = 0.0
    wanted = 0.0
    for start in range(0, n, N):
        column = start + tl.arange(0, N)
        z = tl.load(base + column, mask=column < n, other=-float("inf")).to(tl.float32) * multiplier
        if CAPPED:
            z = tl.where(column < n, softcap * (2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0), -float("inf"))
        highest = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - highest) + tl.sum(tl.exp(z - highest), axis=0)
        wanted += tl.sum(tl.where(column == target, z, 0.0), axis=0)
        top = highest
    lse = top + tl.log(total)
    tl.store(loss_ptr + row, (lse - wanted) * counts)
    if GRAD:
        scale = tl.load(scale_ptr) * multiplier * counts
        for start in range(0, n, N):
            column = start + tl.arange(0, N)
            z = tl.load(base + column, mask=column < n, other=-float("inf")).to(tl.float32) * multiplier
            slope = scale
            if CAPPED:
                t = tl.where(column < n, 2.0 / (1.0 + tl.exp(-2.0 * z / softcap)) - 1.0, 0.0)
                z = tl.where(column < n, softcap * t, -float("inf"))
                slope = scale * (1.0 - t * t)
            g = (tl.exp(z - lse) - tl.where(column == target, 1.0, 0.0)) * slope
            tl.store(base + column, g.to(logits_ptr.dtype.element_ty), mask=column < n)


def cross_entropy_(
    logits: Tensor, targets: Tensor, scale: Tensor, multiplier: float, softcap: float | None, grad: bool
) -> Tensor:
    rows, n = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    width = min(triton.next_power_of_2(n), 16384)
    numbers = (multiplier, softcap or 1.0)
    constants = (n, softcap is not None, grad, width)
    _launch(_cross_entropy, rows, (logits, targets, losses, scale), numbers, constants, 16 if width >= 8192 else 4)
    return losses
