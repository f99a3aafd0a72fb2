"""The model families: what each `model_type` of transformers 5.17 adds to the fields that all of them share.

Defaults are those of the config classes (`configuration_*.py`); which Linear has a bias, which norm stands where and
what is fused is read from `modeling_*.py`. A setting that changes the block in a way `ModelSpec` cannot say is refused.
"""

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
def _window(size: int | None, types: tuple[str, ...]) -> Fields:
    """Layers without a window need no list, and a window that no layer uses is none."""
    if size is None or SLIDING not in types:
        return {"sliding_window": None, "layer_types": ()}
    return {"sliding_window": size, "layer_types": types}


def _every_layer(r: Reader, shared: Fields) -> Fields:
    """Mistral's way: a window, if there is one, holds for all layers."""
    return _window(r.nullable_size("sliding_window"), (SLIDING,) * shared["num_layers"])


def _upper_layers(r: Reader, shared: Fields) -> Fields:
    """Qwen's way: if switched on, from layer `max_window_layers` up, unless `layer_types` says otherwise."""
    layers = shared["num_layers"]
    size = r.nullable_size("sliding_window") if r.flag("use_sliding_window") else None
    first = r.optional_size("max_window_layers", minimum=0) or 0
    types = r.per_layer("layer_types", layers, (FULL, SLIDING))
    return _window(size, types or tuple(SLIDING if i >= first else FULL for i in range(layers)))


def _every_nth_full(r: Reader, shared: Fields, n: int) -> Fields:
    """Gemma's way: all layers but each n-th have a window."""
    layers = shared["num_layers"]
    types = r.per_layer("layer_types", layers, (FULL, SLIDING))
    return _window(
        r.nullable_size("sliding_window"),
        types or tuple(SLIDING if (i + 1) % n else FULL for i in range(layers)),
    )


# --------------------------------------------------------------------------------------------------------- the MLP
def _mlp(r: Reader, key: str = "hidden_act") -> Fields:
    return {"intermediate_size": r.size("intermediate_size"), "activation": r.activation(key)}


def _attention_bias(r: Reader) -> Fields:
    bias = r.flag("attention_bias")
    return {"qkv_bias": bias, "attention_out_bias": bias}


# -------------------------------------------------------------------------------------------------------- families
def _llama(r: Reader, shared: Fields) -> Fields:
    return {**_mlp(r), **_attention_bias(r), "mlp_bias": r.flag("mlp_bias")}


def _mistral(r: Reader, shared: Fields) -> Fields:
    return {**_mlp(r), **_every_layer(r, shared)}


def _qwen2(r: Reader, shared: Fields) -> Fields:
    return {**_mlp(r), **_upper_layers(r, shared), "qkv_bias": True}


def _qwen3(r: Reader, shared: Fields) -> Fields:
    return {**_mlp(r), **_attention_bias(r), **_upper_layers(r, shared), "qk_norm": "head"}


def _gemma(r: Reader, shared: Fields) -> Fields:
    return {**_mlp(r), **_attention_bias(r), "norm": "gemma_rmsnorm"}


def _gemma2(r: Reader, shared: Fields, full_every: int = 2) -> Fields:
    return {
        **_mlp(r, "hidden_activation"),
        **_attention_bias(r),
        **_every_nth_full(r, shared, full_every),
        "norm": "gemma_rmsnorm",
        "norm_placement": "sandwich",
        "attn_logit_softcapping": r.nullable_number("attn_logit_softcapping", 1e-3, 1e6),
        "final_logit_softcapping": r.nullable_number("final_logit_softcapping", 1e-3, 1e6),
    }


def _gemma3(r: Reader, shared: Fields) -> Fields:
    if r.flag("use_bidirectional_attention"):
        r.refuse("use_bidirectional_attention is not supported: the model would not be causal")
    return {**_gemma2(r, shared, r.size("sliding_window_pattern")), "qk_norm": "head"}


def _phi3(r: Reader, shared: Fields) -> Fields:
    return {
        **_mistral(r, shared),
        "fused_qkv": True,
        "fused_gate_up": True,
        "partial_rotary_factor": r.rotary_factor("partial_rotary_factor"),
        "residual_dropout": r.dropout("resid_pdrop"),  # embd_pdrop is in the config, but the model never uses it
    }


def _olmo2(r: Reader, shared: Fields) -> Fields:
    return {**_mlp(r), **_attention_bias(r), "norm_placement": "post", "qk_norm": "full"}


def _smollm3(r: Reader, shared: Fields) -> Fields:
    layers = shared["num_layers"]
    interval = r.size("no_rope_layer_interval")
    rope = r.per_layer("no_rope_layers", layers, (0, 1))  # despite its name: 1 where the layer has rotary embeddings
    rope = rope or tuple(int((i + 1) % interval != 0) for i in range(layers))
    types = r.per_layer("layer_types", layers, (FULL, SLIDING))
    size = r.nullable_size("sliding_window") if r.flag("use_sliding_window") else None
    return {
        **_llama(r, shared),
        **_window(size, types or tuple(FULL if has_rope else SLIDING for has_rope in rope)),
        "rope_layers": () if all(rope) else rope,
    }


def _granite(r: Reader, shared: Fields) -> Fields:
    return {
        **_llama(r, shared),
        "residual_multiplier": r.number("residual_multiplier", -1e6, 1e6),
        "logits_scaling": r.number("logits_scaling", 1e-6, 1e6),
    }


def _starcoder2(r: Reader, shared: Fields) -> Fields:
    bias = r.flag("use_bias")
    return {
        **_mistral(r, shared),
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": bias,
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_bias": True,
        "residual_dropout": r.dropout("residual_dropout"),
        "embedding_dropout": r.dropout("embedding_dropout"),
    }


def _stablelm(r: Reader, shared: Fields) -> Fields:
    if r.flag("qk_layernorm"):
        r.refuse("qk_layernorm (StableLM 2 12B) is not supported")
    parallel = r.flag("use_parallel_residual")
    return {
        **_mlp(r),
        "qkv_bias": r.flag("use_qkv_bias"),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_placement": "parallel" if parallel else "pre",
        "parallel_residual": parallel,
        "partial_rotary_factor": r.rotary_factor("partial_rotary_factor"),
        "residual_dropout": r.dropout("hidden_dropout"),
    }


def _cohere(r: Reader, shared: Fields) -> Fields:
    if r.flag("use_qk_norm"):
        r.refuse("use_qk_norm (Command R+) is not supported")
    return {
        **_mlp(r),
        **_attention_bias(r),
        "norm": "layernorm",
        "norm_placement": "parallel",
        "parallel_residual": True,
        "logits_scaling": r.nullable_number("logit_scale", -1e6, 1e6),
    }


def _gpt_neox(r: Reader, shared: Fields) -> Fields:
    dropout = r.dropout("hidden_dropout")
    return {
        **_mlp(r),
        **_attention_bias(r),
        "num_kv_heads": shared["num_heads"],
        "mlp_bias": True,
        "gated_mlp": False,
        "fused_qkv": True,
        "norm": "layernorm",
        "norm_bias": True,
        "parallel_residual": r.flag("use_parallel_residual"),
        "partial_rotary_factor": r.rotary_factor("rotary_pct"),
        "residual_dropout": dropout,
        "embedding_dropout": dropout,
    }


def _falcon(r: Reader, shared: Fields) -> Fields:
    if r.flag("alibi"):
        r.refuse("alibi (Falcon-RW) is not supported")
    new, parallel = r.flag("new_decoder_architecture"), r.flag("parallel_attn")
    norms = r.optional_size("num_ln_in_parallel_attn") or (2 if new else 1)
    if (new and not parallel) or norms not in (1, 2) or (norms == 2 and not new):
        r.refuse("this mix of new_decoder_architecture, parallel_attn and num_ln_in_parallel_attn is not supported")
    heads = shared["num_heads"]
    kv_heads = r.optional_size("num_kv_heads") or heads
    if not new:
        kv_heads = 1 if r.flag("multi_query") else heads
    if heads % kv_heads:
        r.refuse(f"num_kv_heads {kv_heads} does not divide num_attention_heads {heads}")
    bias = r.flag("bias")
    return {
        "num_kv_heads": kv_heads,
        "intermediate_size": r.optional_size("ffn_hidden_size") or 4 * shared["hidden_size"],
        "activation": r.activation("activation"),
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": bias,
        "gated_mlp": False,
        "fused_qkv": True,
        "norm": "layernorm",
        "norm_bias": True,
        "norm_placement": "parallel" if parallel and norms == 1 else "pre",
        "parallel_residual": parallel,
        "residual_dropout": r.dropout("hidden_dropout"),
    }


def _mixtral(r: Reader, shared: Fields) -> Fields:
    mlp = _mistral(r, shared)
    return {**mlp, **_experts(r, "num_local_experts"), "moe_intermediate_size": mlp["intermediate_size"]}


def _qwen3_moe(r: Reader, shared: Fields) -> Fields:
    if r.size("decoder_sparse_step") != 1 or r.config.get("mlp_only_layers"):
        r.refuse("a mix of dense and expert layers (decoder_sparse_step, mlp_only_layers) is not supported")
    key = "num_experts" if r.config.get("num_local_experts") is None else "num_local_experts"  # its newer name
    window = r.nullable_size("sliding_window") if r.flag("use_sliding_window") else None
    return {
        **_mlp(r),
        **_attention_bias(r),
        **_window(window, (SLIDING,) * shared["num_layers"]),
        **_experts(r, key),
        "qk_norm": "head",
        "moe_intermediate_size": r.size("moe_intermediate_size"),
    }


def _experts(r: Reader, key: str) -> Fields:
    experts, active = r.size(key), r.size("num_experts_per_tok")
    if active > experts:
        r.refuse(f"num_experts_per_tok {active} is more than {key} {experts}")
    return {"num_experts": experts, "num_experts_per_token": active}


def _defaults(vocab: int, heads: int, intermediate: int, positions: int, **more: Any) -> Fields:
    return {
        "vocab_size": vocab,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "max_position_embeddings": positions,
        **more,
    }


# fmt: off
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _defaults(32000, 32, 11008, 2048), _llama),
    "mistral": Family("MistralForCausalLM", _defaults(
        32000, 32, 14336, 131072, num_key_value_heads=8, sliding_window=4096), _mistral),
    "qwen2": Family("Qwen2ForCausalLM", _defaults(
        151936, 32, 22016, 32768, sliding_window=4096, max_window_layers=28), _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", _defaults(
        151936, 32, 22016, 32768, head_dim=128, sliding_window=4096, max_window_layers=28), _qwen3),
    "gemma": Family("GemmaForCausalLM", _defaults(
        256000, 16, 24576, 8192, head_dim=256, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"), _gemma),
    "gemma2": Family("Gemma2ForCausalLM", _defaults(
        256000, 8, 9216, 8192, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, sliding_window=4096,
        hidden_activation="gelu_pytorch_tanh", final_logit_softcapping=30.0, attn_logit_softcapping=50.0), _gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", _defaults(
        262208, 8, 9216, 131072, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, sliding_window=4096,
        hidden_activation="gelu_pytorch_tanh", sliding_window_pattern=6), _gemma3),
    "phi3": Family("Phi3ForCausalLM", _defaults(32064, 32, 8192, 4096, partial_rotary_factor=1.0), _phi3),
    "olmo2": Family("Olmo2ForCausalLM", _defaults(50304, 32, 11008, 2048), _olmo2),
    "smollm3": Family("SmolLM3ForCausalLM", _defaults(
        128256, 16, 11008, 32768, num_key_value_heads=4, tie_word_embeddings=True, no_rope_layer_interval=4), _smollm3),
    "granite": Family("GraniteForCausalLM", _defaults(
        32000, 32, 11008, 2048, residual_multiplier=1.0, logits_scaling=1.0), _granite),
    "starcoder2": Family("Starcoder2ForCausalLM", _defaults(
        49152, 24, 12288, 4096, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh", use_bias=True,
        tie_word_embeddings=True), _starcoder2),
    "stablelm": Family("StableLmForCausalLM", _defaults(
        50304, 32, 6912, 4096, num_key_value_heads=32, partial_rotary_factor=0.25), _stablelm, reads_head_dim=False),
    "cohere": Family("CohereForCausalLM", _defaults(
        256000, 64, 22528, 8192, logit_scale=0.0625, tie_word_embeddings=True), _cohere),
    "gpt_neox": Family("GPTNeoXForCausalLM", _defaults(
        50432, 64, 24576, 2048, hidden_act="gelu", attention_bias=True, use_parallel_residual=True, rotary_pct=0.25,
        ), _gpt_neox, reads_head_dim=False),
    "falcon": Family("FalconForCausalLM", {
        "vocab_size": 65024, "num_attention_heads": 71, "max_position_embeddings": 2048, "multi_query": True,
        "parallel_attn": True, "activation": "gelu", "tie_word_embeddings": True}, _falcon, reads_head_dim=False),
    "mixtral": Family("MixtralForCausalLM", _defaults(
        32000, 32, 14336, 131072, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2), _mixtral),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", _defaults(
        151936, 32, 6144, 32768, num_key_value_heads=4, sliding_window=4096, decoder_sparse_step=1, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768), _qwen3_moe),
}
# fmt: on
