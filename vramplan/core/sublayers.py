"""Attention and MLP as most families have them: `LlamaAttention.forward`, `LlamaMLP.forward` and their relatives.

transformers 5.17, models/*/modeling_*.py. Variables have the originals' names, because a name that is rebound frees a
tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import architecture as arch
from . import fused
from .attention import chunk, heads_of, narrow, rotary
from .experts import sparse_moe_block
from .ops import activation, clamp_, mul
from .tape import Tensor

if TYPE_CHECKING:
    from .blocks import Player


VIEWED_TOGETHER = ("stablelm", "olmo")  # q, k and v are viewed as heads after the third projection, not each at once


def attention(p: Player, hidden_states: Tensor) -> Tensor:
    """From the normed hidden states to the output projection's."""
    query_states, key_states, value_states = project(p, hidden_states)
    query_pass = (query_states, key_states) if p.spec.model_type in ("stablelm", "phi") else None  # views of them
    query_rot_and_key_rot: list[Tensor] = []
    query_states, key_states = rotate(p, query_states, key_states, query_rot_and_key_rot)
    attn_output = p.attend(query_states, key_states, value_states)
    attn_output = p.linear(attn_output, "dense" if p.spec.model_type == "phi" else "o_proj")
    if p.spec.model_type in ("starcoder2", "seed_oss"):
        attn_output = p.residual_dropout(attn_output)
    del query_pass, query_rot_and_key_rot
    return attn_output


def project(p: Player, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, normed or clipped where the family does so."""
    tape, spec = p.tape, p.spec
    if spec.fused_qkv:  # Phi-3
        qkv = p.linear(hidden_states, "qkv_proj")
        query_states = narrow(tape, qkv, arch.query_width(spec), "q")
        key_states = narrow(tape, qkv, arch.key_width(spec), "k")
        return split(p, query_states, key_states, narrow(tape, qkv, arch.key_width(spec), "v"))
    if spec.qk_norm == "full":  # OLMo-2
        query_states = p.norm(p.linear(hidden_states, "q_proj"))
        key_states = p.norm(p.linear(hidden_states, "k_proj"))
        return split(p, query_states, key_states, p.linear(hidden_states, "v_proj"))
    if spec.qk_norm == "head" and p.norms_heads_early:  # Qwen3
        query_states = heads_of(tape, p.linear(hidden_states, "q_proj"), spec.num_heads)
        query_states = p.head_norm(query_states, spec.num_heads)
        key_states = heads_of(tape, p.linear(hidden_states, "k_proj"), spec.num_kv_heads)
        key_states = p.head_norm(key_states, spec.num_kv_heads)
        return query_states, key_states, heads_of(tape, p.linear(hidden_states, "v_proj"), spec.num_kv_heads)
    if spec.clip_qkv or spec.model_type in VIEWED_TOGETHER:
        query_states = p.linear(hidden_states, "q_proj")
        key_states = p.linear(hidden_states, "k_proj")
        value_states = p.linear(hidden_states, "v_proj")
        if spec.clip_qkv:  # OLMo
            query_states = clamp_(tape, query_states, "q")
            key_states = clamp_(tape, key_states, "k")
            value_states = clamp_(tape, value_states, "v")
        return split(p, query_states, key_states, value_states)
    query_states = heads_of(tape, p.linear(hidden_states, "q_proj"), spec.num_heads)
    key_states = heads_of(tape, p.linear(hidden_states, "k_proj"), spec.num_kv_heads)
    value_states = heads_of(tape, p.linear(hidden_states, "v_proj"), spec.num_kv_heads)
    if spec.qk_norm == "head":  # Command R+, EXAONE 4: when all three are there
        query_states = p.head_norm(query_states, spec.num_heads)
        key_states = p.head_norm(key_states, spec.num_kv_heads)
    return query_states, key_states, value_states


def split(p: Player, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as [B, h, S, D]."""
    heads, key_heads = p.spec.num_heads, p.spec.num_kv_heads
    return heads_of(p.tape, query, heads), heads_of(p.tape, key, key_heads), heads_of(p.tape, value, key_heads)


def rotate(p: Player, query_states: Tensor, key_states: Tensor, held: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The rotary embedding, in layers that have one."""
    spec, tape = p.spec, p.tape
    if spec.rope_layers and not spec.rope_layers[p.tape.layer % len(spec.rope_layers)]:
        return query_states, key_states
    if p.fused_rotary:
        return fused.rotate(p, query_states, "q rotary"), fused.rotate(p, key_states, "k rotary")
    cohere = spec.model_type in ("cohere", "cohere2")
    return rotary(
        tape,
        query_states,
        key_states,
        p.shared.cos,
        p.shared.sin,
        share=spec.partial_rotary_factor,
        joined=p.joined,
        cast_back=cohere or spec.model_type in ("olmo", "olmo2", "olmo3"),
        in_fp32=cohere,
        interleaved=spec.model_type in ("glm", "glm4"),
        in_turn=spec.model_type == "phi3",
        held=held if spec.model_type in ("stablelm", "phi") else None,
    )


def mlp(p: Player, x: Tensor) -> Tensor:
    """`LlamaMLP.forward`, Phi-3's with one gate_up projection, StarCoder2's plain one, and a mixture of experts."""
    tape = p.tape
    if p.spec.num_experts:
        return sparse_moe_block(p, x)
    if p.fuses and fused.fuses_mlp(p.spec):
        down_proj = fused.gated_mlp(p, x)
        return p.residual_dropout(down_proj) if p.spec.model_type == "seed_oss" else down_proj
    if p.spec.fused_gate_up:
        up_states = p.linear(x, "gate_up_proj")
        gate, up_states = chunk(tape, up_states, 2, "gate_up")
        up_states = mul(tape, up_states, activation(tape, gate, p.spec.activation), "gate * up")
        return p.linear(up_states, "down_proj")
    if p.spec.gated_mlp:
        gated = mul(
            tape,
            activation(tape, p.linear(x, "gate_proj"), p.spec.activation),
            p.linear(x, "up_proj"),
            "gate * up",
        )
        down_proj = p.linear(gated, "down_proj")
        del gated
        return p.residual_dropout(down_proj) if p.spec.model_type == "seed_oss" else down_proj
    first, second = {"starcoder2": ("c_fc", "c_proj"), "phi": ("fc1", "fc2")}.get(
        p.spec.model_type, ("dense_h_to_4h", "dense_4h_to_h")
    )
    hidden_states = p.linear(x, first)
    hidden_states = activation(tape, hidden_states, p.spec.activation)
    hidden_states = p.linear(hidden_states, second)
    return p.residual_dropout(hidden_states) if p.spec.model_type == "starcoder2" else hidden_states
