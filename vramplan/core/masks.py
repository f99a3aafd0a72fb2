"""Which layers get an attention mask, and how often the kinds of layers repeat.

transformers 5.17 (masking_utils.py) leaves the mask to the kernel's `is_causal` while nothing is padded and a sliding
window is longer than the sequence. Else it makes one bool mask for all layers of a kind, [1 or B, 1, S, S].
"""

from __future__ import annotations

from .architecture import rotary_kind
from .types import ModelSpec, RunSpec


def padded(run: RunSpec) -> bool:
    """Whether attention must know of padding. With the fused loss the trainer leaves the mask out: padding comes last,
    attention is causal and padded positions carry no label, so no real token sees it. In packed rows padding is one
    more document."""
    return run.padding and run.levers.loss == "full" and not run.packing


def mask_given(run: RunSpec) -> bool:
    """Whether the model is given an `attention_mask`: a bool mask is then made for every sequence, else for one."""
    return padded(run) or (run.driver == "trainer" and run.levers.loss == "full" and not run.packing)


def always_masked(spec: ModelSpec, run: RunSpec) -> bool:
    """Whether sdpa gets a mask even where `is_causal` would do: Falcon asks for it, to add alibi to it."""
    return spec.model_type == "falcon" and run.levers.attention == "sdpa"


def is_local(spec: ModelSpec, run: RunSpec, layer: int) -> bool:
    """Whether this layer's window is not longer than the sequence, so that it needs a mask; with packed rows the kernel
    itself knows windows."""
    if spec.sliding_window is None or run.seq_len < spec.sliding_window or run.packing:
        return False
    return not spec.layer_types or spec.layer_types[layer % len(spec.layer_types)] == "sliding_attention"


def mask_kind(spec: ModelSpec, run: RunSpec, layer: int) -> bool:
    """Which of two masks a layer takes: eager attention, and padding, make one for each kind of layer, however long the
    window."""
    if spec.layer_types and (run.levers.attention == "eager" or padded(run)):
        return spec.layer_types[layer % len(spec.layer_types)] == "sliding_attention"
    return is_local(spec, run, layer)


def pattern_period(spec: ModelSpec, run: RunSpec) -> int:
    """After how many layers their kinds repeat: 1 where all are alike, 6 for Gemma 3's five local and one global."""
    rope = spec.rope_layers or (1,)
    kinds = [
        (mask_kind(spec, run, i), is_local(spec, run, i), bool(rope[i % len(rope)]), rotary_kind(spec, i))
        for i in range(spec.num_layers)
    ]
    return next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[:-p] or p == len(kinds))
