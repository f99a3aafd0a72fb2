"""The model families: what each `model_type` of transformers 5.17 adds to the fields that all of them share.

Defaults are those of the config classes (`configuration_*.py`); which Linear has a bias, which norm stands where and
what is fused is read from `modeling_*.py`. A setting that changes the block in a way `ModelSpec` cannot say is refused.
"""

from __future__ import annotations

from vramplan.sources.config_reader import Reader
from vramplan.sources.family_fields import (
    FULL,
    SLIDING,
    Family,
    Fields,
    attention_bias,
    defaults,
    every_layer,
    every_nth_full,
    mlp,
    shared,
    upper_layers,
    window,
)
from vramplan.sources.parallel_families import PARALLEL

__all__ = ["FAMILIES", "shared"]


# -------------------------------------------------------------------------------------------------------- families
def _llama(r: Reader, shared: Fields) -> Fields:
    return {**mlp(r), **attention_bias(r), "mlp_bias": r.flag("mlp_bias")}


def _mistral(r: Reader, shared: Fields) -> Fields:
    return {**mlp(r), **every_layer(r, shared)}


def _qwen2(r: Reader, shared: Fields) -> Fields:
    return {**mlp(r), **upper_layers(r, shared), "qkv_bias": True}


def _qwen3(r: Reader, shared: Fields) -> Fields:
    return {**mlp(r), **attention_bias(r), **upper_layers(r, shared), "qk_norm": "head"}


def _gemma(r: Reader, shared: Fields) -> Fields:
    return {**mlp(r), **attention_bias(r), "norm": "gemma_rmsnorm"}


def _gemma2(r: Reader, shared: Fields, full_every: int = 2) -> Fields:
    return {
        **mlp(r, "hidden_activation"),
        **attention_bias(r),
        **every_nth_full(r, shared, full_every),
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
    return {**mlp(r), **attention_bias(r), "norm_placement": "post", "qk_norm": "full"}


def _olmo(r: Reader, shared: Fields) -> Fields:
    clip = r.nullable_number("clip_qkv", 1e-6, 1e6) is not None
    return {**mlp(r), **attention_bias(r), "norm": "plain_layernorm", "clip_qkv": clip}


def _olmo3(r: Reader, shared: Fields) -> Fields:
    return {**_olmo2(r, shared), **every_nth_full(r, shared, 4)}


def _glm(r: Reader, shared: Fields) -> Fields:
    return {
        **mlp(r),
        "qkv_bias": r.flag("attention_bias"),
        "fused_gate_up": True,
        "partial_rotary_factor": r.rotary_factor("partial_rotary_factor"),
    }


def _glm4(r: Reader, shared: Fields) -> Fields:
    return {**_glm(r, shared), "norm_placement": "sandwich"}


def _exaone4(r: Reader, shared: Fields) -> Fields:
    """Where some layers have a window, the others have no rotary embedding."""
    layers, pattern = shared["num_layers"], r.config.get("sliding_window_pattern", 4)
    if r.nullable_size("sliding_window") is None:
        return {**mlp(r), "norm_placement": "post", "qk_norm": "head"}
    if r.config.get("layer_types") is None and type(pattern) is not int:
        r.refuse("a sliding_window_pattern that is not a number needs layer_types")
    types = r.per_layer("layer_types", layers, (FULL, SLIDING))
    fields = every_nth_full(r, shared, pattern if types is None else 1)
    types = types or fields["layer_types"]
    rope = tuple(int(kind == SLIDING) for kind in types) or (0,) * layers
    return {
        **mlp(r),
        **fields,
        "norm_placement": "post",
        "qk_norm": "head",
        "rope_layers": () if all(rope) else rope,
    }


def _seed_oss(r: Reader, shared: Fields) -> Fields:
    return {
        **mlp(r),
        "qkv_bias": r.flag("attention_bias"),
        "attention_out_bias": r.flag("attention_out_bias"),
        "mlp_bias": r.flag("mlp_bias"),
        "residual_dropout": r.dropout("residual_dropout"),
    }


def _ministral(r: Reader, shared: Fields) -> Fields:
    types = r.per_layer("layer_types", shared["num_layers"], (FULL, SLIDING))
    size = r.nullable_size("sliding_window")
    return {**mlp(r), **window(size, types or (SLIDING,) * shared["num_layers"])}


def _smollm3(r: Reader, shared: Fields) -> Fields:
    layers = shared["num_layers"]
    interval = r.size("no_rope_layer_interval")
    rope = r.per_layer("no_rope_layers", layers, (0, 1))  # despite its name: 1 where the layer has rotary embeddings
    rope = rope or tuple(int((i + 1) % interval != 0) for i in range(layers))
    types = r.per_layer("layer_types", layers, (FULL, SLIDING))
    size = r.nullable_size("sliding_window") if r.flag("use_sliding_window") else None
    return {
        **_llama(r, shared),
        **window(size, types or tuple(FULL if has_rope else SLIDING for has_rope in rope)),
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


def _mixtral(r: Reader, shared: Fields) -> Fields:
    mlp = _mistral(r, shared)
    experts = _experts(r, "num_local_experts")
    return {**mlp, **experts, "moe_intermediate_size": mlp["intermediate_size"], "norm_topk_prob": True}


def _qwen3_moe(r: Reader, shared: Fields) -> Fields:
    if r.size("decoder_sparse_step") != 1 or r.config.get("mlp_only_layers"):
        r.refuse("a mix of dense and expert layers (decoder_sparse_step, mlp_only_layers) is not supported")
    key = "num_experts" if r.config.get("num_local_experts") is None else "num_local_experts"  # its newer name
    size = r.nullable_size("sliding_window") if r.flag("use_sliding_window") else None
    return {
        **mlp(r),
        **attention_bias(r),
        **window(size, (SLIDING,) * shared["num_layers"]),
        **_experts(r, key),
        "qk_norm": "head",
        "moe_intermediate_size": r.size("moe_intermediate_size"),
        "norm_topk_prob": r.flag("norm_topk_prob"),
    }


def _olmoe(r: Reader, shared: Fields) -> Fields:
    if r.config.get("clip_qkv") is not None:
        r.refuse("clip_qkv is not supported")
    dense = mlp(r)
    return {
        **dense,
        **attention_bias(r),
        **_experts(r, "num_experts"),
        "qk_norm": "full",
        "moe_intermediate_size": dense["intermediate_size"],
        "norm_topk_prob": r.flag("norm_topk_prob"),
    }


def _experts(r: Reader, key: str) -> Fields:
    experts, active = r.size(key), r.size("num_experts_per_tok")
    if active > experts:
        r.refuse(f"num_experts_per_tok {active} is more than {key} {experts}")
    return {"num_experts": experts, "num_experts_per_token": active}


# fmt: off
FAMILIES: dict[str, Family] = {
    **PARALLEL,
    "llama": Family("LlamaForCausalLM", defaults(32000, 32, 11008, 2048), _llama),
    "mistral": Family("MistralForCausalLM", defaults(
        32000, 32, 14336, 131072, num_key_value_heads=8, sliding_window=4096), _mistral),
    "qwen2": Family("Qwen2ForCausalLM", defaults(
        151936, 32, 22016, 32768, sliding_window=4096, max_window_layers=28), _qwen2),
    "qwen3": Family("Qwen3ForCausalLM", defaults(
        151936, 32, 22016, 32768, head_dim=128, sliding_window=4096, max_window_layers=28), _qwen3),
    "gemma": Family("GemmaForCausalLM", defaults(
        256000, 16, 24576, 8192, head_dim=256, tie_word_embeddings=True, hidden_act="gelu_pytorch_tanh"), _gemma),
    "gemma2": Family("Gemma2ForCausalLM", defaults(
        256000, 8, 9216, 8192, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, sliding_window=4096,
        hidden_activation="gelu_pytorch_tanh", final_logit_softcapping=30.0, attn_logit_softcapping=50.0), _gemma2),
    "gemma3_text": Family("Gemma3ForCausalLM", defaults(
        262208, 8, 9216, 131072, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, sliding_window=4096,
        hidden_activation="gelu_pytorch_tanh", sliding_window_pattern=6), _gemma3),
    "phi3": Family("Phi3ForCausalLM", defaults(32064, 32, 8192, 4096, partial_rotary_factor=1.0), _phi3),
    "olmo2": Family("Olmo2ForCausalLM", defaults(50304, 32, 11008, 2048), _olmo2),
    "olmo": Family("OlmoForCausalLM", defaults(50304, 32, 11008, 2048), _olmo),
    "olmo3": Family("Olmo3ForCausalLM", defaults(50304, 32, 11008, 2048, sliding_window=4096), _olmo3),
    "glm": Family("GlmForCausalLM", defaults(
        151552, 32, 13696, 131072, num_key_value_heads=2, head_dim=128, attention_bias=True,
        partial_rotary_factor=0.5), _glm),
    "glm4": Family("Glm4ForCausalLM", defaults(
        151552, 32, 13696, 131072, num_key_value_heads=2, head_dim=128, attention_bias=True,
        partial_rotary_factor=0.5), _glm4),
    "exaone4": Family("Exaone4ForCausalLM", defaults(102400, 32, 16384, 2048, sliding_window=4096), _exaone4),
    "seed_oss": Family("SeedOssForCausalLM", defaults(
        155136, 80, 27648, 524288, num_key_value_heads=8, head_dim=128, attention_bias=True, attention_dropout=0.1,
        residual_dropout=0.1), _seed_oss),
    "ministral": Family("MinistralForCausalLM", defaults(
        32000, 32, 14336, 131072, num_key_value_heads=8, sliding_window=4096), _ministral),
    "smollm3": Family("SmolLM3ForCausalLM", defaults(
        128256, 16, 11008, 32768, num_key_value_heads=4, tie_word_embeddings=True, no_rope_layer_interval=4), _smollm3),
    "granite": Family("GraniteForCausalLM", defaults(
        32000, 32, 11008, 2048, residual_multiplier=1.0, logits_scaling=1.0), _granite),
    "starcoder2": Family("Starcoder2ForCausalLM", defaults(
        49152, 24, 12288, 4096, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh", use_bias=True,
        tie_word_embeddings=True), _starcoder2),
    "mixtral": Family("MixtralForCausalLM", defaults(
        32000, 32, 14336, 131072, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2), _mixtral),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", defaults(
        151936, 32, 6144, 32768, num_key_value_heads=4, sliding_window=4096, decoder_sparse_step=1, num_experts=128,
        num_experts_per_tok=8, moe_intermediate_size=768), _qwen3_moe),
    "olmoe": Family("OlmoeForCausalLM", defaults(
        50304, 16, 2048, 4096, num_experts=64, num_experts_per_tok=8), _olmoe),
}
# fmt: on
