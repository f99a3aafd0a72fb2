"""Families whose attention and MLP can stand side by side: `core/parallel_blocks.py` plays them.

As in `families.py`, which holds the others, defaults and shapes are read from transformers 5.17.
"""

from __future__ import annotations

from vramplan.sources.config_reader import Reader
from vramplan.sources.family_fields import SLIDING, Family, Fields, attention_bias, defaults, every_nth_full, mlp


def _stablelm(r: Reader, shared: Fields) -> Fields:
    if r.flag("qk_layernorm"):
        r.refuse("qk_layernorm (StableLM 2 12B) is not supported")
    parallel = r.flag("use_parallel_residual")
    return {
        **mlp(r),
        "qkv_bias": r.flag("use_qkv_bias"),
        "norm": "layernorm",
        "norm_bias": True,
        "norm_placement": "parallel" if parallel else "pre",
        "parallel_residual": parallel,
        "partial_rotary_factor": r.rotary_factor("partial_rotary_factor"),
        "residual_dropout": r.dropout("hidden_dropout"),
    }


def _cohere(r: Reader, shared: Fields) -> Fields:
    return {
        **mlp(r),
        **attention_bias(r),
        "norm": "cohere_layernorm",
        "norm_placement": "parallel",
        "qk_norm": "head" if r.flag("use_qk_norm") else "none",
        "parallel_residual": True,
        "logits_scaling": r.nullable_number("logit_scale", -1e6, 1e6),
    }


def _cohere2(r: Reader, shared: Fields) -> Fields:
    """Layers with a window have rotary embeddings, the others none."""
    layers = shared["num_layers"]
    fields = every_nth_full(r, shared, r.size("sliding_window_pattern"))
    types = fields["layer_types"]
    return {
        **_cohere(r, shared),
        **fields,
        "qk_norm": "none",
        "rope_layers": tuple(int(kind == SLIDING) for kind in types) or (0,) * layers,
    }


def _phi(r: Reader, shared: Fields) -> Fields:
    if r.flag("qk_layernorm"):
        r.refuse("qk_layernorm is not supported")
    return {
        **mlp(r),
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "lm_head_bias": True,
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_bias": True,
        "norm_placement": "parallel",
        "parallel_residual": True,
        "partial_rotary_factor": r.rotary_factor("partial_rotary_factor"),
        "residual_dropout": r.dropout("resid_pdrop"),
        "embedding_dropout": r.dropout("embd_pdrop"),
    }


def _gpt_neox(r: Reader, shared: Fields) -> Fields:
    dropout = r.dropout("hidden_dropout")
    return {
        **mlp(r),
        **attention_bias(r),
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
    if new and kv_heads in (1, heads):
        r.refuse("new_decoder_architecture with 1 or as many key heads as query heads is not supported")
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


# fmt: off
PARALLEL: dict[str, Family] = {
    "stablelm": Family("StableLmForCausalLM", defaults(
        50304, 32, 6912, 4096, num_key_value_heads=32, partial_rotary_factor=0.25), _stablelm, reads_head_dim=False),
    "cohere": Family("CohereForCausalLM", defaults(
        256000, 64, 22528, 8192, logit_scale=0.0625, tie_word_embeddings=True), _cohere),
    "cohere2": Family("Cohere2ForCausalLM", defaults(
        256000, 64, 22528, 8192, logit_scale=0.0625, tie_word_embeddings=True, sliding_window=4096,
        sliding_window_pattern=4), _cohere2),
    "phi": Family("PhiForCausalLM", defaults(
        51200, 32, 8192, 2048, hidden_act="gelu_new", partial_rotary_factor=0.5), _phi, reads_head_dim=False),
    "gpt_neox": Family("GPTNeoXForCausalLM", defaults(
        50432, 64, 24576, 2048, hidden_act="gelu", attention_bias=True, use_parallel_residual=True, rotary_pct=0.25,
        ), _gpt_neox, reads_head_dim=False),
    "falcon": Family("FalconForCausalLM", {
        "vocab_size": 65024, "num_attention_heads": 71, "max_position_embeddings": 2048, "multi_query": True,
        "parallel_attn": True, "activation": "gelu", "tie_word_embeddings": True}, _falcon, reads_head_dim=False),
}
# fmt: on
