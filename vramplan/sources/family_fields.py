"""What the families of `families.py` have in common: shared fields, attention windows, the MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from vramplan.sources.config_reader import Reader

Fields = dict[str, Any]
FULL, SLIDING = "full_attention", "sliding_attention"


class Family(NamedTuple):
    """`extra` turns a reader and the shared fields into the family's own `ModelSpec` fields."""

    architecture: str
    defaults: Fields
    extra: Callable[[Reader, Fields], Fields]
    reads_head_dim: bool = True  # else always hidden_size / heads, whatever the config says


def shared(r: Reader, family: Family) -> Fields:
    """The fields that every family has under the same names."""
    hidden, heads = r.size("hidden_size"), r.size("num_attention_heads")
    head_dim = r.optional_size("head_dim") if family.reads_head_dim else None
    if head_dim is None:
        if hidden % heads:
            r.refuse(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim")
        head_dim = hidden // heads
    kv_heads = r.optional_size("num_key_value_heads") or heads
    if heads % kv_heads:
        r.refuse(f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
    return {
        "hidden_size": hidden,
        "num_layers": r.size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": r.size("vocab_size"),
        "max_position_embeddings": r.size("max_position_embeddings"),
        "tie_word_embeddings": r.flag("tie_word_embeddings"),
        "attention_dropout": r.dropout("attention_dropout"),
    }


# ------------------------------------------------------------------------------------------------ attention windows
def window(size: int | None, types: tuple[str, ...]) -> Fields:
    """Layers without a window need no list, and a window that no layer uses is none."""
    if size is None or SLIDING not in types:
        return {"sliding_window": None, "layer_types": ()}
    return {"sliding_window": size, "layer_types": types}


def every_layer(r: Reader, shared: Fields) -> Fields:
    """Mistral's way: a window, if there is one, holds for all layers."""
    return window(r.nullable_size("sliding_window"), (SLIDING,) * shared["num_layers"])


def upper_layers(r: Reader, shared: Fields) -> Fields:
    """Qwen's way: if switched on, from layer `max_window_layers` up, unless `layer_types` says otherwise."""
    layers = shared["num_layers"]
    size = r.nullable_size("sliding_window") if r.flag("use_sliding_window") else None
    first = r.optional_size("max_window_layers", minimum=0) or 0
    types = r.per_layer("layer_types", layers, (FULL, SLIDING))
    return window(size, types or tuple(SLIDING if i >= first else FULL for i in range(layers)))


def every_nth_full(r: Reader, shared: Fields, n: int) -> Fields:
    """Gemma's way: all layers but each n-th have a window."""
    layers = shared["num_layers"]
    types = r.per_layer("layer_types", layers, (FULL, SLIDING))
    return window(
        r.nullable_size("sliding_window"),
        types or tuple(SLIDING if (i + 1) % n else FULL for i in range(layers)),
    )


# --------------------------------------------------------------------------------------------------------- the MLP
def mlp(r: Reader, key: str = "hidden_act") -> Fields:
    return {"intermediate_size": r.size("intermediate_size"), "activation": r.activation(key)}


def attention_bias(r: Reader) -> Fields:
    bias = r.flag("attention_bias")
    return {"qkv_bias": bias, "attention_out_bias": bias}


def defaults(vocab: int, heads: int, intermediate: int, positions: int, **more: Any) -> Fields:
    return {
        "vocab_size": vocab,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        **more,
    }
