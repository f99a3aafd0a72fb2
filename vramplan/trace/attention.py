"""`scaled_dot_product_attention` as CUDA runs it: the choice of kernel, and each kernel's scratch.

Sources: ATen `native/transformers/cuda/sdp_utils.cpp` (choice), `flash_attn/flash_api.cpp` (`mha_bwd`),
`native/transformers/attention.cpp` (math), torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vramplan.core.attention import Heads, kernel_scratch
from vramplan.core.varlen import varlen_scratch
from vramplan.trace.recorder import Rule, Tracker
from vramplan.trace.rules import tracked

aten = torch.ops.aten
DEVICE = "cpu"  # what stands in for the card
HALF = (torch.bfloat16, torch.float16)
CPU_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's fused kernel, which keeps a bool mask (the CPU keeps a float mask and a product)."""
    return input if not training or p == 0 else torch.native_dropout(input, p, True)[0]


class Attention:
    """Takes the place of `torch.nn.functional.scaled_dot_product_attention`."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        capability = tracker.gpu.compute_capability
        order = ("flash", "efficient") if capability >= (8, 0) else ("efficient",)
        # torch 2.11 puts cuDNN (above 9.15) first on Hopper and data-centre Blackwell
        self.order = ("cudnn", *order) if capability[0] in (9, 10) else order

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if torch.is_autocast_enabled(DEVICE):  # casts the inputs, and is off inside
            half = torch.get_autocast_dtype(DEVICE)
            query, key, value = (t.to(half) for t in (query, key, value))
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(half)
        with torch._C._ExcludeDispatchKeyGuard(CPU_AUTOCAST):
            kernel = self._choose(query, key, value, attn_mask, dropout_p, enable_gqa)
            self.tracker.kernels[kernel] = self.tracker.kernels.get(kernel, 0) + 1
            run = {"cudnn": _cudnn, "flash": _flash, "efficient": _efficient, "math": _math}[kernel]
            return run(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)

    def _choose(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, grouped: bool) -> str:
        """The first kernel in the order of priority that takes these inputs."""
        dim, half = query.shape[-1], query.dtype in HALF
        same_dim = dim == key.shape[-1] == value.shape[-1]
        same_heads = query.shape[1] == key.shape[1] == value.shape[1]
        fits = {
            "cudnn": half and (same_heads or grouped) and max(dim, value.shape[-1]) <= 128 and dim % 8 == 0
            and (p * 16) % 1 == 0 and query.shape[2] > 1 and key.shape[2] > 1,
            "flash": half and mask is None and (same_heads or grouped) and dim <= 256 and same_dim,
            "efficient": same_heads and dim % 8 == 0,
        }  # fmt: skip
        return next((kernel for kernel in self.order if fits[kernel]), "math")


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None, grouped: bool
) -> Any:
    bias = _additive(mask, q)
    return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, p, causal, False, scale=scale)[0]


def _flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None, grouped: bool
) -> Any:
    dim = q.shape[-1]
    pad = -dim % 8
    if pad:
        q, k, v = (functional.pad(t, (0, pad)) for t in (q, k, v))
    scale = dim**-0.5 if scale is None else scale
    out = aten._scaled_dot_product_flash_attention(q, k, v, p, causal, False, scale=scale)[0]
    return out[..., :dim] if pad else out


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None, grouped: bool
) -> Any:
    bias = _additive(mask, q)
    if bias is not None:
        over = bias.shape[-1] % 16
        if over:
            bias = functional.pad(bias, (0, 16 - over))[..., : bias.shape[-1]]
        bias = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    lse = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, lse, p, causal, scale=scale)[0]


def _math(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    """`_scaled_dot_product_attention_math`, written out: the original avoids its in-place add for FakeTensors."""
    dtype, dim = q.dtype, q.shape[-1]
    mask = _additive(mask, q)
    wide_q, wide_k, wide_v = (t.float() if dtype in HALF else t for t in (q, k, v))  # they stay until the end
    factor = (scale if scale is not None else dim**-0.5) ** 0.5
    scaled = wide_q * factor
    if causal:
        mask = _additive(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(), scaled)
    if grouped and q.shape[1] != k.shape[1]:
        times = q.shape[1] // k.shape[1]
        wide_k, wide_v = wide_k.repeat_interleave(times, 1), wide_v.repeat_interleave(times, 1)
    scores = scaled @ (wide_k.transpose(-2, -1) * factor)
    if mask is not None:
        scores.add_(mask)
    scores = aten._safe_softmax(scores, -1)
    if p > 0:
        scores = dropout(scores, p)
    second = scores.to(dtype)  # the other result, made before the product and then dropped
    out = (scores @ wide_v).to(dtype)
    del second
    return out


def _additive(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """`convert_boolean_attn_mask`: `where(mask, 0, -inf)` in q's dtype."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, torch.zeros((), dtype=q.dtype), torch.full((), -float("inf"), dtype=q.dtype))


def _backward(kernel: str) -> Rule:
    def rule(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        q, k = args[1], args[2]
        heads = Heads(q.shape[0], q.shape[2], q.shape[1], k.shape[1], q.shape[3])
        sizes = kernel_scratch(kernel, heads)
        if q.dtype == torch.float32:
            sizes = sizes[:1]  # the efficient kernel sums into the gradient itself
        out = tracked(tr, func, args, kwargs)  # the gradients come first
        with tr.scratch(*sizes, name=f"{kernel} attention scratch"):
            return out

    return rule


def _varlen_forward(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tr.kernels["varlen"] = tr.kernels.get("varlen", 0) + 1
    return tracked(tr, func, args, kwargs)


def _varlen_backward(tr: Tracker, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Packed rows: all tokens of the batch as one sequence [B * S, h, D]."""
    q, k, edges = args[1], args[2], args[6]
    heads = Heads(1, q.shape[0], q.shape[1], k.shape[1], q.shape[2])
    out = tracked(tr, func, args, kwargs)
    with tr.scratch(*varlen_scratch(heads, edges.numel() - 1), name="varlen attention scratch"):
        return out


RULES: dict[Any, Rule] = {
    aten._flash_attention_forward.default: _varlen_forward,
    aten._flash_attention_backward.default: _varlen_backward,
    aten._scaled_dot_product_flash_attention_backward.default: _backward("flash"),
    aten._scaled_dot_product_cudnn_attention_backward.default: _backward("cudnn"),
    aten._scaled_dot_product_efficient_attention_backward.default: _backward("efficient"),
}
