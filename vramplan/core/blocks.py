"""Decoder blocks, written like the modelling code they imitate (transformers 5.17, models/*/modeling_*.py).

A block is a short function from hidden states to hidden states. It calls the operations of `ops` and `attention` in
the original's order and with its variable names, because a name that is rebound frees a tensor.
"""

from __future__ import annotations

from typing import NamedTuple

from . import architecture as arch
from . import fused
from .attention import contiguous, eager, sdpa
from .bnb_kernel import uses_fused_kernel
from .chip import attention_heads, attention_kernels
from .norms import cohere_norm, layernorm, rmsnorm
from .ops import add, cast, dropout, lora_linear, lora_linear4bit, unary
from .parallel_blocks import cohere_block, falcon_block, neox_block, phi_block, stablelm_block
from .sublayers import attention, mlp
from .tape import Tape, Tensor
from .types import GpuProfile, ModelSpec, RunSpec, Unplannable
from .varlen import refuse_unpackable, varlen

PLAYED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3",
          "granite", "starcoder2", "gpt_neox", "mixtral", "qwen3_moe", "olmoe", "falcon", "stablelm", "cohere",
          "cohere2", "phi", "olmo", "olmo3", "glm", "glm4", "exaone4", "seed_oss", "ministral")  # fmt: skip

# apply_rotary_pos_emb concatenates the turned and the other part of a head also where that part is empty
ALWAYS_JOINED = ("phi3", "gpt_neox", "glm", "glm4", "stablelm", "phi")

Adapters = dict[str, tuple[Tensor, Tensor]]  # Linear name -> (A [r, in], B [out, r]) of one layer


class Shared(NamedTuple):
    """What layers of one kind share in a forward: rotary tables, position ids, and a mask where there must be one."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None = None
    position_ids: Tensor | None = None


class Player:
    """What every block needs: the tape, the shapes, the adapter of the layer being played, what layers share."""

    def __init__(self, tape: Tape, spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> None:
        if spec.model_type not in PLAYED:
            raise Unplannable(
                f"the training step of architecture {spec.model_type!r} ({spec.architecture}) is not described yet",
                "known: " + ", ".join(PLAYED),
            )
        if run.packing:
            refuse_unpackable(spec, run, gpu.compute_capability)
        self.tape = tape
        self.spec = spec
        self.run = run
        self.tokens = run.micro_batch_size * run.seq_len
        self.heads = attention_heads(spec, run)
        self.linears = {x.short: x for x in arch.layer_linears(spec)}
        self.sm_count = gpu.sm_count
        self.norm_dtype = "bfloat16" if run.levers.upcast == "none" else "float32"
        self.expert_dtype = "float32" if run.levers.upcast == "all" else "bfloat16"
        self.capability = gpu.compute_capability
        self.kernels = dict(zip((False, True), attention_kernels(spec, run, gpu.compute_capability), strict=True))
        self.fuses = fused.is_fused(spec, run)
        self.fused_norm = self.fuses and fused.fuses_norm(spec)
        self.fused_rotary = self.fuses and fused.fuses_rotary(spec)
        self.groups = {names[0]: names for names in fused.groups(spec)} if self.fuses else {}
        self.flat = fused.FlatLora(tape, spec, run.lora)  # of the layer being played, where layers are fused
        self.shared_input: dict[str, tuple[Tensor, Tensor]] = {}  # results that wait for their call
        self.skip = False  # recomputing a layer whose last product nobody reads
        self.adapters: Adapters = {}
        # torch.cat leaves q head by head in memory, attention's output follows q, and its reshape must copy
        self.joined = spec.model_type in ALWAYS_JOINED or spec.partial_rotary_factor != 1.0
        self.norms_heads_early = spec.model_type.startswith("qwen3")  # k is projected after q is normed
        self.forget()

    def forget(self) -> None:
        """Let go of what the layers share: the decoder's forward has returned."""
        nothing = self.tape.constant(self.run.seq_len, self.spec.head_dim, "bfloat16")
        self.shared = Shared(nothing, nothing)
        self.kept: Tensor | None = None
        self.attn_weights: Tensor | None = None  # a layer's `_`, until the layer returns

    # --------------------------------------------------------------------------------------------- short forms
    def linear(self, x: Tensor, short: str) -> Tensor:
        """A Linear of the layer, quantised or not, with its adapter if it has one."""
        if self.fuses:
            return self.fused_linear(x, short)
        shape = self.linears[short]
        if not shape.quantised:
            weight = self.tape.constant(shape.out_features, shape.in_features, self.expert_dtype)
            return lora_linear(
                self.tape, x, weight, self.adapters.get(short), name=short, p=self.run.lora.dropout, bias=shape.bias
            )
        return lora_linear4bit(
            self.tape,
            x,
            shape.out_features,
            self.adapters.get(short),
            name=short,
            p=self.run.lora.dropout,
            double_quant=self.run.double_quant,
            fused=uses_fused_kernel(self.tokens, shape.out_features, shape.in_features, self.capability, self.sm_count),
            bias=shape.bias,
        )

    def fused_linear(self, x: Tensor, short: str) -> Tensor:
        """`fast.linear.SharedInput`: the first Linear of a group computes all, the others hand out what is there."""
        waiting = self.shared_input.pop(short, None)
        if waiting is not None and waiting[0] is x:
            return waiting[1]
        names = self.groups.get(short, (short,))
        first, *others = fused.linears(self, names, x)
        self.shared_input = {name: (x, y) for name, y in zip(names[1:], others, strict=True)}
        return first

    def norm(self, x: Tensor, heads: int = 1) -> Tensor:
        kind = self.spec.norm
        if self.fused_norm:
            return fused.rms_norm(self.tape, x)
        if kind == "layernorm":
            return layernorm(self.tape, x, self.norm_dtype, self.spec.norm_bias)
        if kind == "cohere_layernorm":
            return cohere_norm(self.tape, x, self.norm_dtype, heads)
        if kind == "plain_layernorm":
            return cast(self.tape, layernorm(self.tape, x, ""), x.dtype, "norm")
        late_cast = self.spec.model_type in ("olmo2", "olmo3")
        return rmsnorm(self.tape, x, self.norm_dtype, kind == "gemma_rmsnorm", late_cast)

    def head_norm(self, x: Tensor, heads: int) -> Tensor:
        """A norm over each head's channels."""
        normed = self.norm(x.view(x.rows * heads, x.columns // heads), heads)
        return normed.view(x.rows, x.columns)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = self.shared.mask
        if self.run.levers.attention == "eager":
            cap = self.spec.attn_logit_softcapping is not None
            out, self.attn_weights = eager(
                self.tape, query, key, value, self.heads, mask, cap, self.spec.attention_dropout
            )
            return out
        if self.run.packing:
            out = varlen(self.tape, query, key, value, self.heads)
        else:
            out = sdpa(self.tape, query, key, value, self.heads, self.kernels[mask is not None], mask)
        return contiguous(self.tape, out, "attention by token")

    def residual_dropout(self, x: Tensor) -> Tensor:
        return dropout(self.tape, x, self.spec.residual_dropout)

    def attention_dropout(self, x: Tensor) -> Tensor:
        return dropout(self.tape, x, self.spec.attention_dropout)

    def keep(self, x: Tensor | None) -> None:
        """What the model's forward holds of a layer's result beside the hidden states, until the next layer returns."""
        if self.tape.replay is None:
            self.kept = x


def llama_block(p: Player, hidden_states: Tensor) -> Tensor:
    """`LlamaDecoderLayer.forward`; also Mistral, Qwen2, Qwen3, Gemma, Phi-3, SmolLM3, StarCoder2, Granite."""
    residual = hidden_states
    hidden_states = p.norm(hidden_states)
    hidden_states = attention(p, hidden_states)
    if p.spec.model_type == "phi3":
        hidden_states = p.residual_dropout(hidden_states)
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


BLOCKS = {
    "gpt_neox": neox_block,
    "falcon": falcon_block,
    "cohere": cohere_block,
    "cohere2": cohere_block,
    "phi": phi_block,
    "stablelm": stablelm_block,
}
BY_NORMS = {"pre": llama_block, "post": post_norm_block, "sandwich": sandwich_block}


def block(p: Player, hidden_states: Tensor) -> Tensor:
    """The decoder layer of this model."""
    try:
        return (BLOCKS.get(p.spec.model_type) or BY_NORMS[p.spec.norm_placement])(p, hidden_states)
    finally:
        p.attn_weights = None
