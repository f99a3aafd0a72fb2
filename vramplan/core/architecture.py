"""From a ModelSpec to its modules: which Linears there are, which get quantised, where LoRA goes.

Names are those of transformers 5.17. What decides quantisation is `transformers.integrations.bitsandbytes`: modules
whose type is exactly `nn.Linear`, all but the output embedding; so Falcon's own Linear subclass and the 3-D expert
parameters of MoE models stay as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from .types import Lora, ModelSpec, Unplannable

# Families whose parameters we can list. The blocks that can be played are in core/blocks.py.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3",
              "granite", "starcoder2", "stablelm", "cohere", "cohere2", "phi", "olmo", "olmo3", "glm", "glm4",
              "exaone4", "seed_oss", "ministral", "mixtral", "qwen3_moe", "olmoe")  # fmt: skip
NEOX_LIKE = ("gpt_neox", "falcon")
KNOWN = LLAMA_LIKE + NEOX_LIKE


class Linear(NamedTuple):
    """One `nn.Linear` of a decoder layer: weight [out_features, in_features]."""

    name: str  # "self_attn.q_proj"
    in_features: int
    out_features: int
    bias: bool
    quantised: bool = True

    @property
    def short(self) -> str:
        return self.name.rsplit(".", 1)[-1]


def check_known(spec: ModelSpec) -> None:
    if spec.model_type not in KNOWN:
        raise Unplannable(
            f"architecture {spec.model_type!r} ({spec.architecture}) is not described here",
            "known: " + ", ".join(KNOWN),
        )


def query_width(spec: ModelSpec) -> int:
    return spec.num_heads * spec.head_dim


def key_width(spec: ModelSpec) -> int:
    return spec.num_kv_heads * spec.head_dim


@lru_cache(maxsize=64)
def layer_linears(spec: ModelSpec) -> tuple[Linear, ...]:
    """The Linears of one decoder layer, in the order of their definition."""
    check_known(spec)
    h, a, k, i = spec.hidden_size, query_width(spec), key_width(spec), spec.intermediate_size
    if spec.model_type in NEOX_LIKE:
        plain = spec.model_type != "falcon"
        attn = "attention" if plain else "self_attention"
        return (
            Linear(f"{attn}.query_key_value", h, a + 2 * k, spec.qkv_bias, plain),
            Linear(f"{attn}.dense", a, h, spec.attention_out_bias, plain),
            Linear("mlp.dense_h_to_4h", h, i, spec.mlp_bias, plain),
            Linear("mlp.dense_4h_to_h", i, h, spec.mlp_bias, plain),
        )
    if spec.fused_qkv:
        attention = [Linear("self_attn.o_proj", a, h, spec.attention_out_bias)]
        attention.append(Linear("self_attn.qkv_proj", h, a + 2 * k, spec.qkv_bias))
    else:
        out = "self_attn.dense" if spec.model_type == "phi" else "self_attn.o_proj"
        attention = [
            Linear("self_attn.q_proj", h, a, spec.qkv_bias),
            Linear("self_attn.k_proj", h, k, spec.qkv_bias),
            Linear("self_attn.v_proj", h, k, spec.qkv_bias),
            Linear(out, a, h, spec.attention_out_bias),
        ]
    return (*attention, *_mlp_linears(spec, h, i))


def _mlp_linears(spec: ModelSpec, h: int, i: int) -> tuple[Linear, ...]:
    if spec.num_experts:
        return ()  # the experts are 3-D parameters, the router a bare weight
    if spec.model_type == "phi":
        return (Linear("mlp.fc1", h, i, spec.mlp_bias), Linear("mlp.fc2", i, h, spec.mlp_bias))
    if spec.fused_gate_up:
        up: tuple[Linear, ...] = (Linear("mlp.gate_up_proj", h, 2 * i, spec.mlp_bias),)
    elif spec.gated_mlp:
        up = (Linear("mlp.gate_proj", h, i, spec.mlp_bias), Linear("mlp.up_proj", h, i, spec.mlp_bias))
    else:
        return (Linear("mlp.c_fc", h, i, spec.mlp_bias), Linear("mlp.c_proj", i, h, spec.mlp_bias))
    return (*up, Linear("mlp.down_proj", i, h, spec.mlp_bias))


def layer_vectors(spec: ModelSpec) -> tuple[tuple[str, int], ...]:
    """(name, elements) of the other parameters of a layer: norms, biases of Linears, router, experts."""
    h = spec.hidden_size
    bias = spec.norm == "layernorm" and spec.norm_bias
    out: list[tuple[str, int]] = []
    for name in _norm_names(spec):
        out.append((name + ".weight", h))
        if bias:
            out.append((name + ".bias", h))
    if spec.qk_norm == "head" and spec.norm == "cohere_layernorm":  # a weight for every head
        out += [("self_attn.q_norm.weight", query_width(spec)), ("self_attn.k_norm.weight", key_width(spec))]
    elif spec.qk_norm == "head":
        out += [("self_attn.q_norm.weight", spec.head_dim), ("self_attn.k_norm.weight", spec.head_dim)]
    elif spec.qk_norm == "full":
        out += [("self_attn.q_norm.weight", query_width(spec)), ("self_attn.k_norm.weight", key_width(spec))]
    out += [(linear.name + ".bias", linear.out_features) for linear in layer_linears(spec) if linear.bias]
    if spec.num_experts:
        inner = spec.moe_intermediate_size or spec.intermediate_size
        out.append(("mlp.gate.weight", spec.num_experts * h))
        out.append(("mlp.experts.gate_up_proj", spec.num_experts * 2 * inner * h))
        out.append(("mlp.experts.down_proj", spec.num_experts * inner * h))
    return tuple(out)


def is_expert(name: str) -> bool:
    """Whether this parameter of `layer_vectors` is a 3-D one that holds all experts."""
    return name.startswith("mlp.experts.")


def _norm_names(spec: ModelSpec) -> tuple[str, ...]:
    if spec.norm == "plain_layernorm":
        return ()
    if spec.norm_placement == "sandwich":
        return (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        )
    if spec.norm_placement == "post":
        return ("post_attention_layernorm", "post_feedforward_layernorm")
    if spec.norm_placement == "parallel":
        return ("input_layernorm",)
    return ("input_layernorm", "post_attention_layernorm")


def outer_vectors(spec: ModelSpec) -> tuple[tuple[str, int], ...]:
    """(name, elements) of the parameters outside the layers, embedding and output head left out."""
    out = [] if spec.norm == "plain_layernorm" else [("norm.weight", spec.hidden_size)]
    if spec.norm == "layernorm" and spec.norm_bias:
        out.append(("norm.bias", spec.hidden_size))
    if spec.lm_head_bias:
        out.append(("lm_head.bias", spec.vocab_size))
    return tuple(out)


def buffer_elements(spec: ModelSpec) -> tuple[int, ...]:
    """Elements of the float32 buffers: `inv_freq` and `original_inv_freq`, once per kind of layer in Gemma 3."""
    rotary = int(spec.head_dim * spec.partial_rotary_factor) // 2
    kinds = len(rotary_kinds(spec))
    scale = (1,) if spec.model_type in ("gemma", "gemma2", "gemma3_text") else ()  # embed_scale
    return (rotary,) * (2 * kinds) + scale


def rotary_kinds(spec: ModelSpec) -> tuple[str, ...]:
    """The kinds of layers with rotary tables and buffers of their own: Gemma 3 and OLMo 3 have two."""
    if spec.model_type == "gemma3_text" or (spec.model_type == "olmo3" and len(set(spec.layer_types)) > 1):
        return ("full_attention", "sliding_attention")
    return ("",)


def rotary_kind(spec: ModelSpec, layer: int) -> str:
    """Which of them this layer is."""
    kinds = rotary_kinds(spec)
    return kinds[0] if len(kinds) == 1 or not spec.layer_types else spec.layer_types[layer % len(spec.layer_types)]


def total_parameters(spec: ModelSpec) -> int:
    """All parameters of the model, a tied head counted once: what model cards print."""
    layer = sum(x.in_features * x.out_features for x in layer_linears(spec)) + sum(n for _, n in layer_vectors(spec))
    heads = 1 if spec.tie_word_embeddings else 2
    return layer * spec.num_layers + heads * spec.vocab_size * spec.hidden_size + sum(n for _, n in outer_vectors(spec))


def lora_linears(spec: ModelSpec, lora: Lora) -> tuple[Linear, ...]:
    """The Linears of a layer that get an adapter, by PEFT's rule: equal, or ending in "." + target.

    "all-linear" is every Linear but the output embedding (`peft.tuners.tuners_utils._maybe_include_all_linear_layers`).
    Raises Unplannable for a rank below 1 and for targets that match no Linear of a layer.
    """
    if lora.r < 1:
        raise Unplannable(f"the LoRA rank must be at least 1, not {lora.r}", "use --lora-r 8 or 16")
    linears = layer_linears(spec)
    if lora.targets == ("all-linear",):
        return linears
    chosen = []
    for target in lora.targets:
        hits = [x for x in linears if x.name == target or x.name.endswith("." + target)]
        if not hits:
            raise Unplannable(
                f"the LoRA target {target!r} matches no Linear of {spec.name}",
                "it has: " + ", ".join(x.short for x in linears),
            )
        chosen += [x for x in hits if x not in chosen]
    return tuple(x for x in linears if x in chosen)


def trainable_parameters(spec: ModelSpec, lora: Lora) -> int:
    """r * (in + out) per adapted Linear: A is [r, in], B is [out, r]."""
    per_layer = sum(lora.r * (x.in_features + x.out_features) for x in lora_linears(spec, lora))
    return per_layer * spec.num_layers
