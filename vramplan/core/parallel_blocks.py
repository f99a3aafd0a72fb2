"""Decoder blocks whose attention and MLP stand side by side: GPT-NeoX, Falcon, Cohere, Phi; and StableLM, which can.

transformers 5.17, models/*/modeling_*.py. Variables have the originals' names and lifetimes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import architecture as arch
from .attention import chunk, contiguous, expand_heads, heads_of, matmul, narrow, pick, rotary, sdpa, softmax
from .ops import add, add_, clone, scale_
from .sublayers import attention, mlp
from .tape import Tensor

if TYPE_CHECKING:
    from .blocks import Player


# ----------------------------------------------------------------------------------------------------- GPT-NeoX
def neox_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`GPTNeoXLayer.forward`."""
    attn_output = neox_attention(p, p.norm(hidden_states))
    attn_output = p.residual_dropout(attn_output)
    if p.spec.parallel_residual:
        mlp_output = mlp(p, p.norm(hidden_states))
        mlp_output = p.residual_dropout(mlp_output)
        hidden_states = add(p.tape, add(p.tape, mlp_output, attn_output), hidden_states, "hidden states")
    else:
        attn_output = add(p.tape, attn_output, hidden_states)
        mlp_output = mlp(p, p.norm(attn_output))
        mlp_output = p.residual_dropout(mlp_output)
        hidden_states = add(p.tape, mlp_output, attn_output, "hidden states")
    return hidden_states


def neox_attention(p: Player, hidden_states: Tensor) -> Tensor:
    """`GPTNeoXAttention.forward`."""
    qkv = p.linear(hidden_states, "query_key_value")
    qkv = heads_of(p.tape, qkv, p.spec.num_heads)
    query_states, key_states, value_states = chunk(p.tape, qkv, 3, "qkv", by_head=True)
    query_states, key_states = rotary(
        p.tape,
        query_states,
        key_states,
        p.shared.cos,
        p.shared.sin,
        share=p.spec.partial_rotary_factor,
        joined=p.joined,
    )
    attn_output = p.attend(query_states, key_states, value_states)
    attn_output = p.linear(attn_output, "dense")
    return attn_output


# ------------------------------------------------------------------------------------------- Cohere, Phi, StableLM
def cohere_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`CohereDecoderLayer.forward`, `Cohere2DecoderLayer.forward`."""
    residual = hidden_states
    hidden_states = p.norm(hidden_states)
    hidden_states_attention = attention(p, hidden_states)
    hidden_states_mlp = mlp(p, hidden_states)
    hidden_states = add(p.tape, add(p.tape, residual, hidden_states_attention), hidden_states_mlp, "hidden states")
    return hidden_states


def phi_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`PhiDecoderLayer.forward`."""
    residual = hidden_states
    hidden_states = p.norm(hidden_states)
    attn_outputs = attention(p, hidden_states)
    attn_outputs = p.residual_dropout(attn_outputs)
    feed_forward_hidden_states = p.residual_dropout(mlp(p, hidden_states))
    hidden_states = add(p.tape, add(p.tape, attn_outputs, feed_forward_hidden_states), residual, "hidden states")
    return hidden_states


def stablelm_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`StableLmDecoderLayer.forward`: the norm's output stays until the end, also where only attention reads it."""
    residual = hidden_states
    hidden_states = p.norm(hidden_states)
    self_attn_output = attention(p, hidden_states)
    if p.spec.parallel_residual:
        mlp_output = mlp(p, hidden_states)
        mlp_output = p.residual_dropout(mlp_output)
        hidden_states = add(p.tape, add(p.tape, residual, self_attn_output), mlp_output, "hidden states")
    else:
        residual = add(p.tape, residual, self_attn_output)
        mlp_output = mlp(p, p.norm(residual))
        mlp_output = p.residual_dropout(mlp_output)
        hidden_states = add(p.tape, residual, mlp_output, "hidden states")
    return hidden_states


# ------------------------------------------------------------------------------------------------------- Falcon
def falcon_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`FalconDecoderLayer.forward`: one norm for both (7B), one each (40B), or one after the other."""
    tape, spec = p.tape, p.spec
    residual = hidden_states
    mlp_layernorm_out: Tensor | None = None
    attention_layernorm_out = p.norm(hidden_states)
    if spec.parallel_residual and spec.norm_placement == "pre":
        mlp_layernorm_out = p.norm(hidden_states)
    attention_output, attn_weights = falcon_attention(p, attention_layernorm_out)
    if not spec.parallel_residual:
        residual = add(tape, residual, p.attention_dropout(attention_output))
        mlp_layernorm_out = p.norm(residual)
    elif mlp_layernorm_out is None:
        mlp_layernorm_out = attention_layernorm_out
    mlp_output = mlp(p, mlp_layernorm_out)
    if spec.parallel_residual:
        mlp_output = add_(tape, mlp_output, attention_output)
    output = add(tape, residual, p.residual_dropout(mlp_output), "hidden states")
    p.keep(attn_weights)
    return output


def falcon_attention(p: Player, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
    """`FalconAttention.forward` without alibi: (output, eager attention's probabilities)."""
    tape = p.tape
    fused_qkv = p.linear(hidden_states, "query_key_value")
    query_layer, key_layer, value_layer = split_heads(p, fused_qkv)
    query_layer, key_layer = rotary(tape, query_layer, key_layer, p.shared.cos, p.shared.sin)
    attention_scores = None
    if p.run.levers.attention == "eager":
        attn_output, attention_scores = falcon_eager(p, query_layer, key_layer, value_layer)
        attn_output = contiguous(tape, attn_output, "attention by token")
    else:
        flash = p.run.levers.attention == "flash_attention_2"
        kernel = "flash" if flash else p.kernels[True]
        mask = None if flash else p.shared.mask
        attn_output = sdpa(tape, query_layer, key_layer, value_layer, p.heads, kernel, mask)
        attn_output = contiguous(tape, attn_output, "attention by token")
    attn_output = p.linear(attn_output, "dense")
    return attn_output, attention_scores


def split_heads(p: Player, fused_qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`FalconAttention._split_heads`: the new decoder architecture gives every query head its own keys and values."""
    tape, spec = p.tape, p.spec
    width, key_width = arch.query_width(spec), arch.key_width(spec)
    if spec.num_kv_heads == spec.num_heads:
        query, key, value = (narrow(tape, fused_qkv, width, name) for name in "qkv")
        return query, key, value
    query = narrow(tape, fused_qkv, width, "q")
    key, value = pick(tape, fused_qkv, key_width, "k"), pick(tape, fused_qkv, key_width, "v")
    if spec.num_kv_heads == 1:
        return query, key, value
    return clone(tape, query, "q"), broadcast(p, key, "k by query head"), broadcast(p, value, "v by query head")


def broadcast(p: Player, x: Tensor, name: str) -> Tensor:
    """`torch.broadcast_to(x, query.shape).flatten(2, 3)`: a copy; the gradient is summed over the group."""
    return clone(p.tape, expand_heads(p.tape, x, p.spec.num_heads // p.spec.num_kv_heads), name)


def falcon_eager(p: Player, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """`FalconAttention.forward` without sdpa: it returns the probabilities too, in the layer norm's float32."""
    tape, heads, mask = p.tape, p.heads, p.shared.mask
    assert mask is not None  # eager attention always has one
    rows, group = heads.batch * heads.query * heads.seq, heads.query // heads.key
    attention_scores = matmul(tape, query, key, heads, rows, heads.seq, "q k", group)
    attention_scores = scale_(tape, attention_scores, "attention scores scaled")
    attention_scores = softmax(
        tape, add(tape, attention_scores, mask, "attention scores masked"), "attention probabilities"
    )
    attn_output = matmul(tape, attention_scores, value, heads, query.rows, query.columns, "attention", group)
    return attn_output, attention_scores
