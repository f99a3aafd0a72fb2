"""What a step depends on of a chip. Cards that agree in it play the same step."""

from __future__ import annotations

from . import architecture as arch
from .attention import Heads, kernel_for
from .bnb_kernel import MAX_TOKENS, uses_fused_kernel
from .fused import is_fused
from .tape import workspace_bytes
from .types import GpuProfile, ModelSpec, RunSpec
from .varlen import CAPABILITY


def attention_heads(spec: ModelSpec, run: RunSpec) -> Heads:
    """The shape of one attention call; Falcon's new decoder architecture repeats keys and values before the rotary
    embedding."""
    repeated = spec.model_type == "falcon" and spec.num_kv_heads > 1
    key_heads = spec.num_heads if repeated else spec.num_kv_heads
    return Heads(run.micro_batch_size, run.seq_len, spec.num_heads, key_heads, spec.head_dim)


def attention_kernels(spec: ModelSpec, run: RunSpec, capability: tuple[int, int]) -> tuple[str, str]:
    """The backends of `scaled_dot_product_attention` without a mask, and with one."""
    falcon = spec.model_type == "falcon"
    heads, dropout = attention_heads(spec, run), 0.0 if falcon else spec.attention_dropout
    without, masked = (kernel_for(capability, heads, m, gqa=not falcon, dropout=dropout) for m in (False, True))
    return without, masked


def traits(spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> tuple[object, ...]:
    """All of a chip that this step depends on: two cards with the same traits play the same."""
    capability, tokens = gpu.compute_capability, run.micro_batch_size * run.seq_len
    found: list[object] = [workspace_bytes(capability), *attention_kernels(spec, run, capability)]
    if spec.num_experts:  # `core.experts` asks for the generation
        found.append(capability[0])
    if run.packing:  # refused on old cards
        found.append(capability >= CAPABILITY)
    if tokens <= MAX_TOKENS and not is_fused(spec, run):
        found += [
            uses_fused_kernel(tokens, x.out_features, x.in_features, capability, gpu.sm_count)
            for x in arch.layer_linears(spec)
        ]
    return tuple(found)
