"""Several cards that train together: what each holds of the frozen weights, and what talking to the others takes.

"ddp" has the whole model on every card. "fsdp" is `vramplan.train.fsdp`: torch's `fully_shard` (FSDP2) shares out every
frozen matrix of a decoder layer along its first dimension, each rank padded to the same number of rows; input embedding
and head too, where they are two matrices. Constants of the quantisation, norms, biases, adapter and optimizer are whole
on every card. A packed 4-bit weight is a column of bf16 (`bnb_4bit_quant_storage`), four weights in each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from . import architecture as arch
from .tape import DTYPE_BYTES
from .types import PARALLELS, GpuProfile, ModelSpec, RunSpec, Unplannable
from .units import MIB

# Gradients are summed over the cards in flat buckets; one that is as large as this itself needs none.
BUCKET_BYTES = 32 * MIB

# Per channel NCCL keeps one buffer for each of its three protocols (nccl src/include/device.h: simple 4 MiB, LL
# 8 x 512 x 8 lines of 16 bytes, LL128 120 x 640 x 8 words of 8). NVLink cards get about 24 channels, others about 4.
CHANNEL_BYTES = 4 * MIB + 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8
NVLINK_CAPABILITIES = ((7, 0), (8, 0), (9, 0), (10, 0))
NVLINK_CHANNELS, CHANNELS = 24, 4
# What two H100 held beside context, buffers and PyTorch's memory (docs/measurements/h100-two-gpus.jsonl). What it is
# made of was not looked into, nor whether other cards hold as much.
LIBRARY_BYTES = 633 * MIB


class Matrix(NamedTuple):
    """A frozen weight [rows, columns] as it is shared out: along the rows."""

    name: str
    rows: int
    columns: int
    dtype: str

    def shard_bytes(self, shards: int) -> int:
        """One card's part, padding included."""
        return shard_rows(self.rows, shards) * self.columns * DTYPE_BYTES[self.dtype]


def check_parallel(run: RunSpec) -> None:
    """Raises Unplannable for a number of GPUs, or a way to use them, that does not exist."""
    if run.gpus < 1:
        raise Unplannable(f"the number of GPUs must be at least 1, not {run.gpus}")
    if run.parallel not in PARALLELS:
        raise Unplannable(f"no way to use several GPUs is called {run.parallel!r}", "known: " + ", ".join(PARALLELS))
    if run.gpus > 1 and run.parallel == "none":
        raise Unplannable(f"{run.gpus} GPUs need a way to train together", "--parallel ddp or fsdp")


def shards(run: RunSpec) -> int:
    """Into how many parts the frozen weights are shared out."""
    return run.gpus if run.parallel == "fsdp" else 1


def shard_rows(rows: int, parts: int) -> int:
    return -(-rows // parts)


def packed_rows(elements: int) -> int:
    """Rows of a packed 4-bit weight in bf16 storage."""
    return -(-elements // 4)


def layer_matrices(spec: ModelSpec, upcast: str) -> list[Matrix]:
    """What is shared out of one decoder layer, in the order of its definition."""
    wide = "float32" if upcast == "all" else "bfloat16"
    out = []
    for x in arch.layer_linears(spec):
        if x.quantised:
            out.append(Matrix(x.short, packed_rows(x.in_features * x.out_features), 1, "bfloat16"))
        else:
            out.append(Matrix(x.short, x.out_features, x.in_features, wide))
    experts = [(name, n) for name, n in arch.layer_vectors(spec) if arch.is_expert(name)]
    out += [Matrix(name, spec.num_experts, n // spec.num_experts, wide) for name, n in experts]
    return out


def vocabulary_matrix(spec: ModelSpec, upcast: str) -> Matrix:
    """The input embedding, or the head."""
    return Matrix("vocabulary", spec.vocab_size, spec.hidden_size, "float32" if upcast == "all" else "bfloat16")


def vocabulary_shards(spec: ModelSpec, parts: int) -> int:
    """Into how many parts embedding and head are shared out: a tied one serves both ends of the step, and stays."""
    return 1 if spec.tie_word_embeddings else parts


def largest_bucket(sizes: Iterable[int]) -> int:
    """Bytes of the largest flat bucket that gradients of these sizes are summed in, one after the other."""
    most = now = 0
    for size in sizes:
        if size >= BUCKET_BYTES:
            continue
        now = now + size if now + size <= BUCKET_BYTES else size
        most = max(most, now)
    return most


def nccl_bytes(run: RunSpec, gpu: GpuProfile) -> int:
    """What NCCL takes of a card beside torch's allocator, modelled; 0 for one card."""
    if run.gpus == 1:
        return 0
    channels = NVLINK_CHANNELS if gpu.compute_capability in NVLINK_CAPABILITIES else CHANNELS
    return LIBRARY_BYTES + CHANNEL_BYTES * channels


def outside_bytes(run: RunSpec, gpu: GpuProfile) -> int:
    """What a card must hold beside torch's allocator: the CUDA context, and NCCL where several train together."""
    return gpu.context_bytes + nccl_bytes(run, gpu)
