"""What a decoder makes before its first layer and shares among them: position ids, masks, rotary tables."""

from __future__ import annotations

from . import architecture as arch
from .ops import BF16, FP32
from .tape import Tape, Tensor
from .types import ModelSpec, RunSpec

FP32_TABLES = ("olmo", "olmo2", "olmo3")  # their rotary embeddings return float32, whatever x is
INTERLEAVED = ("cohere", "cohere2")  # repeat_interleave in the place of cat


def position_ids(tape: Tape, run: RunSpec) -> Tensor:
    """`torch.arange(seq_len) + past_seen_tokens`."""
    arange = tape.new("arange", 1, run.seq_len, "int64")
    positions = tape.new("position ids", 1, run.seq_len, "int64")
    del arange
    return positions


def make_mask(tape: Tape, run: RunSpec, dtype: str, local: bool, given: bool) -> Tensor:
    """`sdpa_mask`, `eager_mask` of masking_utils.py: bool [1 or B, 1, S, S], for eager attention in `dtype`.

    `local`: with a sliding window; `given`: the model has an `attention_mask`, which is laid over it.
    """
    seq, batch = run.seq_len, run.micro_batch_size
    padding_mask = tape.new("attention mask as bool", batch, seq, "bool") if given else None
    aranges = [tape.new("arange", 1, n, "int64") for n in (batch, 1)]
    for _ in range(2):
        arange = tape.new("arange", 1, seq, "int64")
        aranges.append(tape.new("arange + offset", 1, seq, "int64"))
        del arange
    if given:
        mask = mask_with_padding(tape, batch, seq, local)
    else:
        mask = local_mask(tape, seq) if local else tape.new("causal mask", seq, seq, "bool")
    del aranges
    if run.levers.attention != "eager":
        del padding_mask
        return mask
    scalars = [tape.new(name, 1, 1, dtype) for name in ("0", "lowest")]
    wide = tape.new("mask", batch * seq, seq, dtype)  # the bool mask was expanded to every sequence
    del scalars, padding_mask
    return wide


def local_mask(tape: Tape, seq: int) -> Tensor:
    """`and_masks(sliding_window_overlay(...), causal_mask_function)`."""
    true = tape.new("True", 1, 1, "bool")
    start = tape.new("start of the window", seq, 1, "int64")
    inside = tape.new("inside the window", seq, seq, "bool")
    del start
    mask = tape.new("True and window", seq, seq, "bool")
    del inside, true
    causal = tape.new("causal mask", seq, seq, "bool")
    mask = tape.new("local mask", seq, seq, "bool")
    del causal
    return mask


def mask_with_padding(tape: Tape, batch: int, seq: int, local: bool) -> Tensor:
    """`and_masks(mask_function, padding_mask_function(...))`: [B, 1, S, S]."""
    true = tape.new("True", 1, 1, "bool")
    inner = local_mask(tape, seq) if local else tape.new("causal mask", seq, seq, "bool")
    both = tape.new("True and causal", seq, seq, "bool")
    del inner, true
    padding = tape.new("padding mask", batch, seq, "bool")
    mask = tape.new("mask", batch * seq, seq, "bool")
    del padding, both
    return mask


def rotary_tables(tape: Tape, spec: ModelSpec, run: RunSpec, dtype: str) -> dict[str, tuple[Tensor, Tensor]]:
    """cos and sin for each kind of layer: [S, rotary width], or [B * S, ...] where every row has its own positions."""
    return {kind: rotary_table(tape, spec, run, dtype) for kind in arch.rotary_kinds(spec)}


def rotary_table(tape: Tape, spec: ModelSpec, run: RunSpec, dtype: str) -> tuple[Tensor, Tensor]:
    """`LlamaRotaryEmbedding.forward`: computed in float32; its locals live until it returns."""
    seq, width = run.seq_len, int(spec.head_dim * spec.partial_rotary_factor)
    if run.packing:
        seq *= run.micro_batch_size
    position_ids_expanded = tape.new("position ids in fp32", 1, seq, FP32)
    freqs = tape.new("rotary angles", width // 2, seq, FP32)
    tape.product()
    emb = tape.new("rotary angles twice", seq, width, FP32)
    cos = tape.new("cos", seq, width, FP32)
    cos = tape.new("cos scaled", seq, width, FP32)
    sin = tape.new("sin", seq, width, FP32)
    sin = tape.new("sin scaled", seq, width, FP32)
    if spec.model_type not in FP32_TABLES and dtype == BF16:
        cos_cast, sin_cast = tape.new("cos", seq, width, BF16), tape.new("sin", seq, width, BF16)
        return cos_cast, sin_cast
    del emb, freqs, position_ids_expanded
    return cos, sin
