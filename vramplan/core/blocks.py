"""Decoder blocks, written like the modelling code they imitate (transformers 5.17, models/*/modeling_*.py).

A block is a short function from hidden states to hidden states. It calls the operations of `ops` and `attention` in
the original's order and with its variable names, because a name that is rebound frees a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

from . import architecture as arch
from .attention import Heads, chunk, eager, kernel_for, narrow, rotary, sdpa
from .bnb_kernel import uses_fused_kernel
from .masks import is_local
from .ops import add, clone, dropout, layernorm, lora_linear4bit, mul, rmsnorm, unary
from .tape import Tape, Tensor
from .types import GpuProfile, ModelSpec, RunSpec, Unplannable

PLAYED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3",
          "granite", "starcoder2", "gpt_neox")  # fmt: skip


Adapters = dict[str, tuple[Tensor, Tensor]]  # Linear name -> (A [r, in], B [out, r]) of one layer


class Shared(NamedTuple):
    """What all layers of one forward use: rotary tables, and masks by whether the layer is local."""

    cos: Tensor
    sin: Tensor
    masks: dict[bool, Tensor]
    spare: tuple[Tensor, ...] = ()  # Gemma 3's second pair of rotary tables


class Player:
    """What every block needs: the tape, the shapes, the adapter of the layer being played, what layers share."""

    def __init__(self, tape: Tape, spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> None:
        if spec.model_type not in PLAYED:
            raise Unplannable(
                f"the training step of architecture {spec.model_type!r} ({spec.architecture}) is not described yet",
                "known: " + ", ".join(PLAYED),
            )
        self.tape = tape
        self.spec = spec
        self.run = run
        self.tokens = run.micro_batch_size * run.seq_len
        self.heads = Heads(run.micro_batch_size, run.seq_len, spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self.linears = {x.short: x for x in arch.layer_linears(spec)}
        self.fused = {
            x.short: uses_fused_kernel(self.tokens, x.out_features, x.in_features, gpu.compute_capability, gpu.sm_count)
            for x in self.linears.values()
        }
        self.norm_dtype = "bfloat16" if run.levers.upcast == "none" else "float32"
        self.kernels = {m: kernel_for(gpu.compute_capability, self.heads, m) for m in (False, True)}
        self.adapters: Adapters = {}
        # torch.cat leaves q head by head in memory, attention's output follows q, and its reshape must copy
        self.joined = spec.model_type in ("phi3", "gpt_neox") or spec.partial_rotary_factor != 1.0
        self.forget()

    def forget(self) -> None:
        """Let go of what the layers share: the decoder's forward has returned."""
        nothing = self.tape.constant(self.run.seq_len, self.spec.head_dim, "bfloat16")
        self.shared = Shared(nothing, nothing, {})

    # --------------------------------------------------------------------------------------------- short forms
    def linear(self, x: Tensor, short: str) -> Tensor:
        """A quantised Linear of the layer, with its adapter if it has one."""
        shape = self.linears[short]
        return lora_linear4bit(
            self.tape,
            x,
            shape.out_features,
            self.adapters.get(short),
            name=short,
            p=self.run.lora.dropout,
            double_quant=self.run.double_quant,
            fused=self.fused[short],
            bias=shape.bias,
        )

    def norm(self, x: Tensor) -> Tensor:
        if self.spec.norm == "layernorm":
            return layernorm(self.tape, x, self.norm_dtype)
        return rmsnorm(
            self.tape, x, self.norm_dtype, self.spec.norm == "gemma_rmsnorm", self.spec.model_type == "olmo2"
        )

    def head_norm(self, x: Tensor, heads: int) -> Tensor:
        """A norm over each head's channels."""
        normed = self.norm(x.view(x.rows * heads, x.columns // heads))
        return normed.view(x.rows, x.columns)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = self.shared.masks.get(is_local(self.spec, self.run, self.tape.layer))
        if self.run.levers.attention == "eager":
            cap = self.spec.attn_logit_softcapping is not None
            return eager(self.tape, query, key, value, self.heads, mask, cap)
        out = sdpa(self.tape, query, key, value, self.heads, self.kernels[mask is not None], mask)
        return clone(self.tape, out, "attention by token") if self.joined else out

    def residual_dropout(self, x: Tensor) -> Tensor:
        return dropout(self.tape, x, self.spec.residual_dropout)


def attention(p: Player, hidden_states: Tensor) -> Tensor:
    """`LlamaAttention.forward` and its relatives."""
    spec = p.spec
    if spec.fused_qkv:  # Phi-3
        qkv = p.linear(hidden_states, "qkv_proj")
        query_states = narrow(p.tape, qkv, arch.query_width(spec), "q")
        key_states = narrow(p.tape, qkv, arch.key_width(spec), "k")
        value_states = narrow(p.tape, qkv, arch.key_width(spec), "v")
    elif spec.qk_norm == "full":  # OLMo-2
        query_states = p.norm(p.linear(hidden_states, "q_proj"))
        key_states = p.norm(p.linear(hidden_states, "k_proj"))
        value_states = p.linear(hidden_states, "v_proj")
    elif spec.qk_norm == "head":  # Qwen3
        query_states = p.head_norm(p.linear(hidden_states, "q_proj"), spec.num_heads)
        key_states = p.head_norm(p.linear(hidden_states, "k_proj"), spec.num_kv_heads)
        value_states = p.linear(hidden_states, "v_proj")
    else:
        query_states = p.linear(hidden_states, "q_proj")
        key_states = p.linear(hidden_states, "k_proj")
        value_states = p.linear(hidden_states, "v_proj")
    if not spec.rope_layers or spec.rope_layers[p.tape.layer % len(spec.rope_layers)]:
        query_states, key_states = rotary(
            p.tape,
            query_states,
            key_states,
            p.shared.cos,
            p.shared.sin,
            share=spec.partial_rotary_factor,
            joined=p.joined,
            cast_back=spec.model_type == "olmo2",
        )
    attn_output = p.attend(query_states, key_states, value_states)
    attn_output = p.linear(attn_output, "o_proj")
    return attn_output


def mlp(p: Player, x: Tensor) -> Tensor:
    """`LlamaMLP.forward`, Phi-3's with one gate_up projection, and StarCoder2's plain one."""
    if p.spec.fused_gate_up:
        up_states = p.linear(x, "gate_up_proj")
        gate, up_states = chunk(p.tape, up_states, 2, "gate_up")
        up_states = mul(p.tape, up_states, unary(p.tape, gate, "activation", saves="input"), "gate * up")
        return p.linear(up_states, "down_proj")
    if p.spec.gated_mlp:
        return p.linear(
            mul(
                p.tape,
                unary(p.tape, p.linear(x, "gate_proj"), "activation", saves="input"),
                p.linear(x, "up_proj"),
                "gate * up",
            ),
            "down_proj",
        )
    hidden_states = p.linear(x, "c_fc")
    hidden_states = unary(p.tape, hidden_states, "activation", saves="input")
    hidden_states = p.linear(hidden_states, "c_proj")
    return p.residual_dropout(hidden_states)


def llama_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`LlamaDecoderLayer.forward`; also Mistral, Qwen2, Qwen3, Gemma, Phi-3, SmolLM3, StarCoder2, Granite."""
    residual = hidden_states
    hidden_states = p.norm(hidden_states)
    hidden_states = p.residual_dropout(attention(p, hidden_states))
    hidden_states = add(p.tape, residual, _scaled(p, hidden_states), "hidden states")
    residual = hidden_states
    hidden_states = p.norm(hidden_states)
    hidden_states = mlp(p, hidden_states)
    if p.spec.model_type == "phi3":
        hidden_states = p.residual_dropout(hidden_states)
    hidden_states = add(p.tape, residual, _scaled(p, hidden_states), "hidden states")
    return hidden_states


def _scaled(p: Player, x: Tensor) -> Tensor:
    return x if p.spec.residual_multiplier is None else unary(p.tape, x, "times residual_multiplier")


def sandwich_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`Gemma2DecoderLayer.forward`, Gemma 3's: a norm before and after attention and MLP."""
    residual = hidden_states
    hidden_states = p.norm(hidden_states)
    hidden_states = attention(p, hidden_states)
    hidden_states = p.norm(hidden_states)
    hidden_states = add(p.tape, residual, hidden_states, "hidden states")
    residual = hidden_states
    hidden_states = p.norm(hidden_states)
    hidden_states = mlp(p, hidden_states)
    hidden_states = p.norm(hidden_states)
    hidden_states = add(p.tape, residual, hidden_states, "hidden states")
    return hidden_states


def post_norm_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`Olmo2DecoderLayer.forward`."""
    residual = hidden_states
    hidden_states = attention(p, hidden_states)
    hidden_states = p.norm(hidden_states)
    hidden_states = add(p.tape, residual, hidden_states, "hidden states")
    residual = hidden_states
    hidden_states = mlp(p, hidden_states)
    hidden_states = p.norm(hidden_states)
    hidden_states = add(p.tape, residual, hidden_states, "hidden states")
    return hidden_states


def neox_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`GPTNeoXLayer.forward`: attention and MLP side by side."""
    attn_output = neox_attention(p, p.norm(hidden_states))
    attn_output = p.residual_dropout(attn_output)
    if p.spec.parallel_residual:
        mlp_output = neox_mlp(p, p.norm(hidden_states))
        mlp_output = p.residual_dropout(mlp_output)
        hidden_states = add(p.tape, add(p.tape, mlp_output, attn_output), hidden_states, "hidden states")
    else:
        attn_output = add(p.tape, attn_output, hidden_states)
        mlp_output = neox_mlp(p, p.norm(attn_output))
        mlp_output = p.residual_dropout(mlp_output)
        hidden_states = add(p.tape, mlp_output, attn_output, "hidden states")
    return hidden_states


def neox_attention(p: Player, hidden_states: Tensor) -> Tensor:
    qkv = p.linear(hidden_states, "query_key_value")
    query_states, key_states, value_states = chunk(p.tape, qkv, 3, "qkv")
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


def neox_mlp(p: Player, hidden_states: Tensor) -> Tensor:
    hidden_states = p.linear(hidden_states, "dense_h_to_4h")
    hidden_states = unary(p.tape, hidden_states, "activation", saves="input")
    hidden_states = p.linear(hidden_states, "dense_4h_to_h")
    return hidden_states


def block(p: Player, hidden_states: Tensor) -> Tensor:
    """The decoder layer of this model."""
    if p.spec.model_type == "gpt_neox":
        return neox_block(p, hidden_states)
    if p.spec.norm_placement == "sandwich":
        return sandwich_block(p, hidden_states)
    if p.spec.norm_placement == "post":
        return post_norm_block(p, hidden_states)
    return llama_block(p, hidden_states)
