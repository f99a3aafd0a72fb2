"""Tokens per second, modelled: what the played step computes and moves, over what the card can.

Matrix products at a share of the card's dense bf16 rate; every tensor born in the step written once and read twice at
a share of its memory bandwidth; and never faster than the CPU can launch one kernel per tensor. The shares are the
card's `SpeedFactors`: read off the rows of one card (docs/measurements) unless `vramplan calibrate` has measured them;
treat the result as a guide, not a promise.

Several cards work at the pace of one, wait for the sum of the gradients once per step (a ring: twice the bytes over the
link), and where they share the weights out, for the gathering of layers that does not hide behind the computing. The
link is taken to be PCIe: cards with NVLink are faster.
"""

from __future__ import annotations

from typing import NamedTuple

from . import architecture as arch
from .fused import graphed, is_fused, skips_last
from .parallel import layer_matrices, shards
from .resident import lora_bytes
from .timeline import checkpoint_period
from .types import GpuProfile, ModelSpec, RunSpec, SpeedFactors
from .unroll import Unrolled

LINK_SHARE, LINK_BYTES_PER_S = 0.75, 16 * 10**9  # of the card's PCIe rate; what is taken where that is not known
TOUCHES = 3  # a tensor is written once and read twice


class Work(NamedTuple):
    """What one micro-step gives the card to do."""

    flops: int
    traffic_bytes: float
    kernels: float
    graphed: bool

    def seconds(self, speed: SpeedFactors, flops_per_s: int, bandwidth_bytes_per_s: int) -> float:
        compute = self.flops / (speed.matmul_share * flops_per_s)
        traffic = self.traffic_bytes / (speed.bandwidth_share * bandwidth_bytes_per_s)
        each = speed.graphed_seconds if self.graphed else speed.launch_seconds
        return max(compute + traffic, self.kernels * each)


def step_flops(model: ModelSpec, run: RunSpec) -> int:
    """Floating-point operations of one micro-step: forward, recomputation, gradients of the inputs."""
    tokens = run.micro_batch_size * run.seq_len
    weights = sum(x.in_features * x.out_features for x in arch.layer_linears(model))
    if model.num_experts:  # only the chosen experts of a token are multiplied
        inner = model.moe_intermediate_size or model.intermediate_size
        weights += model.hidden_size * (3 * inner * model.num_experts_per_token + model.num_experts)
    causal = 2 * run.seq_len * arch.query_width(model)  # two products, half of the square
    layers = model.num_layers
    again = 0
    if run.levers.checkpointing != "none":
        again = -(-layers // checkpoint_period(run.levers.checkpointing))
    per_layer = 2 * weights + causal
    left_out = 2 * model.hidden_size * model.intermediate_size if is_fused(model, run) and skips_last(model) else 0
    forward = layers * per_layer + again * (per_layer - left_out)
    backward = layers * (2 * weights + 5 * causal // 2)
    head = 2 * 2 * model.vocab_size * model.hidden_size
    return tokens * (forward + backward + head)


def work(model: ModelSpec, run: RunSpec, unrolled: Unrolled) -> Work:
    """The work of one micro-step, its share of the optimizer's step included."""
    born, kernels = unrolled.births()
    micro_steps = min(run.accumulation, 2)  # what was played
    return Work(step_flops(model, run), TOUCHES * born / micro_steps, kernels / micro_steps, graphed(model, run))


def rates(gpu: GpuProfile) -> tuple[int, int] | None:
    """(floating-point operations, bytes) per second of the datasheet; None where one is not known."""
    flops = gpu.bf16_flops_per_s or gpu.fp16_flops_per_s
    return (flops, gpu.bandwidth_bytes_per_s) if flops and gpu.bandwidth_bytes_per_s else None


def tokens_per_s(model: ModelSpec, run: RunSpec, gpu: GpuProfile, unrolled: Unrolled) -> int | None:
    """Modelled training speed of all cards together; None when the card's rates are not known."""
    known = rates(gpu)
    if known is None:
        return None
    seconds = work(model, run, unrolled).seconds(gpu.speed, *known)
    seconds = with_offload(seconds, model, run, gpu)
    gathering, summing = link_seconds(model, run, gpu)
    seconds = max(seconds, gathering) + summing / run.accumulation
    return round(run.gpus * run.micro_batch_size * run.seq_len / seconds)


def with_offload(seconds: float, model: ModelSpec, run: RunSpec, gpu: GpuProfile) -> float:
    """The time of a micro-step whose layer inputs travel to the host during the forward, a third of it, and back."""
    if not run.levers.checkpoint_offload or run.levers.checkpointing == "none":
        return seconds
    transfer = host_bytes(model, run) / (LINK_SHARE * (gpu.pcie_bytes_per_s or LINK_BYTES_PER_S))
    return max(seconds / 3, transfer) + max(2 * seconds / 3, transfer)


def host_bytes(model: ModelSpec, run: RunSpec) -> int:
    """What offloaded checkpoints take of the computer's memory, pinned: one layer input each."""
    layers = -(-model.num_layers // checkpoint_period(run.levers.checkpointing))
    width = 4 if run.levers.upcast == "all" else 2
    return layers * run.micro_batch_size * run.seq_len * model.hidden_size * width


def link_seconds(model: ModelSpec, run: RunSpec, gpu: GpuProfile) -> tuple[float, float]:
    """(gathering of the layers in one micro-step, summing of the gradients in one step) between the cards."""
    rate = LINK_SHARE * (gpu.pcie_bytes_per_s or LINK_BYTES_PER_S) * run.gpus / max(run.gpus - 1, 1)
    if run.gpus == 1:
        return 0.0, 0.0
    gathered = 0
    if shards(run) > 1:  # once for the forward, once for the backward
        gathered = 2 * model.num_layers * sum(m.shard_bytes(1) for m in layer_matrices(model, run.levers.upcast))
    return gathered / rate, 2 * lora_bytes(model, run) / rate
