"""Tokens per second, modelled: what the step has to do (`work.py`), over what the card can.

Matrix products and attention each at a share of the card's dense bf16 rate, traffic at a share of its memory
bandwidth, and a little for each tensor's kernels to begin and end, one after the other; and never faster than the
processor can launch them. The shares are the card's `SpeedFactors`: read off the rows of one card (docs/measurements)
unless `vramplan calibrate` has measured them; treat the result as a guide, not a promise.

Several cards work at the pace of one, wait for the sum of the gradients once per step (a ring: twice the bytes over the
link), and where they share the weights out, for the gathering of layers that does not hide behind the computing. The
link is taken to be PCIe: cards with NVLink are faster.
"""

from __future__ import annotations

from .fused import GRAPH_SPARE_BYTES
from .parallel import layer_matrices, shards
from .resident import lora_bytes
from .timeline import checkpoint_period
from .types import GpuProfile, ModelSpec, RunSpec, SpeedFactors
from .unroll import Unrolled
from .work import Work, work

LINK_SHARE, LINK_BYTES_PER_S = 0.75, 16 * 10**9  # of the card's PCIe rate; what is taken where that is not known


def seconds_of(work: Work, speed: SpeedFactors, flops_per_s: int, bandwidth_bytes_per_s: int) -> float:
    """The time of one micro-step on a card with these rates and factors."""
    busy = work.product_flops / (speed.matmul_share * flops_per_s)
    busy += work.attention_flops / (speed.attention_share * flops_per_s)
    busy += work.traffic_bytes / (speed.bandwidth_share * bandwidth_bytes_per_s)
    busy += work.kernels * speed.begin_seconds
    return busy if work.graphed else max(busy, work.kernels * speed.launch_seconds)


def graphs_fit(device_bytes: int, gpu: GpuProfile) -> bool:
    """Whether a card that holds a run of this size has room for its CUDA graphs: they need the activations once, which
    the ordinary steps before them have given back, and a little to spare."""
    return device_bytes + GRAPH_SPARE_BYTES <= gpu.usable_bytes


def rates(gpu: GpuProfile) -> tuple[int, int] | None:
    """(floating-point operations, bytes) per second of the datasheet; None where one is not known."""
    flops = gpu.bf16_flops_per_s or gpu.fp16_flops_per_s
    return (flops, gpu.bandwidth_bytes_per_s) if flops and gpu.bandwidth_bytes_per_s else None


def tokens_per_s(
    model: ModelSpec, run: RunSpec, gpu: GpuProfile, unrolled: Unrolled, graphs: bool = True
) -> int | None:
    """Modelled training speed of all cards together; None when the card's rates are not known.

    graphs: whether the card has room for CUDA graphs, where the run can have them (`graphs_fit`).
    """
    known = rates(gpu)
    if known is None:
        return None
    todo = work(model, run, unrolled)
    seconds = seconds_of(todo._replace(graphed=todo.graphed and graphs), gpu.speed, *known)
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
