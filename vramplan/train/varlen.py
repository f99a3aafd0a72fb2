"""Attention for packed rows: no document sees another, and no mask is made.

A packed batch says where its documents begin and end (`cu_seq_lens_q`, in transformers' own words for variable-length
attention); models hand that through to their attention function. Ours calls the flash kernel that torch ships, on the
batch as one sequence of B x S tokens. Where that kernel cannot run (a CPU, float32, odd head sizes) the documents go
through `scaled_dot_product_attention` one by one, which computes the same.

The function is registered for attention alone, not for masks: transformers then makes none at all
(`_preprocess_mask_arguments` of masking_utils.py), and never looks for documents in the position ids, which would wait
for the device.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from vramplan.core.types import RunSpec
from vramplan.errors import InputError

NAME = "vramplan_varlen"
ARGUMENTS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
KINDS_OF_LAYER = {"full_attention", "sliding_attention"}


def implementation(run: RunSpec) -> str:
    """The `attn_implementation` to load the model with; ours is made known to transformers when it is wanted.

    FlashAttention's own package understands packed batches by itself. InputError for eager attention.
    """
    if not run.packing or run.levers.attention == "flash_attention_2":
        return run.levers.attention
    if run.levers.attention == "eager":
        raise InputError("packing needs attention that keeps documents apart, which eager does not", "use --attn sdpa")
    AttentionInterface.register(NAME, attention)
    return NAME


def refuse_unpackable(config: Any) -> None:
    """InputError for models whose attention does what the kernel does not: soft-capping, chunks, state spaces."""
    text = config.get_text_config()
    name = text.model_type
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise InputError(f"{name} soft-caps its attention, which cannot be packed", "leave out --packing")
    others = sorted(set(getattr(text, "layer_types", None) or ()) - KINDS_OF_LAYER)
    if others:
        raise InputError(f"{name} has layers of the kind {others[0]}, which cannot be packed", "leave out --packing")


def arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """What of a batch a decoder must be given beside its ids to keep documents apart; nothing of an unpacked one."""
    return {name: inputs[name] for name in ARGUMENTS if name in inputs}


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [B, h, S, D], key and value [B, k, S, D] -> ([B, S, h, D], None).

    `cu_seq_lens_q` int32 [documents + 1]: where each begins in the B x S tokens (a document may be empty); None: every
    row is one document. Then keys may also outnumber queries, as in generation. A sliding window of w lets a token see
    itself and w - 1 before.
    """
    if softcap is not None or s_aux is not None or position_bias is not None:
        raise InputError("attention with soft-capping, sinks or biases cannot be packed", "leave out --packing")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        query, key, value = query.to(half), key.to(half), value.to(half)
    batch, heads, seq, _dim = query.shape
    if cu_seq_lens_q is None and key.shape[2] != seq:
        return _generating(query, key, value, scaling), None
    if cu_seq_lens_q is not None and max_length_q is not None and flash_fits(query, key, value):
        out = _flash(query, key, value, cu_seq_lens_q, max_length_q, dropout, scaling, sliding_window)
        return out.view(batch, seq, heads, -1).contiguous(), None
    edges = range(0, batch * seq + 1, seq) if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    return _by_document(query, key, value, list(edges), dropout, scaling, sliding_window), None


def flash_fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's variable-length flash kernel takes these: half precision on a card from Ampere on."""
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    dim = query.shape[-1]
    same = dim == key.shape[-1] == value.shape[-1]
    return same and dim % 8 == 0 and dim <= 256 and query.dtype in (torch.bfloat16, torch.float16)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: Tensor,
    longest: int,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[B * S, h, D]. Fewer key heads than query heads are the kernel's own business."""
    query, key, value = (t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3]) for t in (query, key, value))
    out: Tensor = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        edges,
        edges,
        longest,
        longest,
        dropout,
        True,  # causal
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )[0]
    return out


def _by_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edges: list[int],
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """[B, S, h, D]: each document alone; none spans two rows."""
    seq, grouped = query.shape[2], query.shape[1] != key.shape[1]
    rows: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    for start, end in pairwise(edges):
        if start == end:
            continue
        row, a, b = start // seq, start % seq, start % seq + end - start
        q, k, v = (t[row : row + 1, :, a:b] for t in (query, key, value))
        mask = _window_mask(b - a, window, q.device) if window is not None and window < b - a else None
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
        rows[row].append(out)
    return torch.cat([torch.cat(parts, dim=2) for parts in rows]).transpose(1, 2).contiguous()


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length], true where a token may look: at itself and the `window` - 1 before it."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def _generating(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """New tokens against all that came before, which the cache has cut to the window: [B, new, h, D]."""
    seq, total = query.shape[2], key.shape[2]
    mask = None if seq == 1 else torch.ones(seq, total, dtype=torch.bool, device=query.device).tril(total - seq)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.transpose(1, 2).contiguous()
