"""How much of one run a card holds: its verdict, the largest micro-batch and the longest sequence, all exact."""

from __future__ import annotations

from .room import MAX_BATCH
from .sizes import Family, Sizes
from .types import GpuProfile, GpuVerdict, RunSpec

SEQ_LEN_STEP = 128


def capacity(sizes: Sizes, run: RunSpec, gpu: GpuProfile) -> GpuVerdict:
    """One card's verdict, its largest micro-batch at this length and longest sequence at this micro-batch.

    Cards that are asked about with the same `sizes` share what was played. Raises Unplannable.
    """
    return GpuVerdict(
        gpu=gpu.key,
        usable_bytes=gpu.usable_bytes,
        verdict=sizes.verdict(run, gpu),
        max_batch_size=sizes.largest(Family(run, "micro_batch_size", range(1, MAX_BATCH + 1)), gpu),
        max_seq_len=longest_sequence(sizes, run, gpu),
        tokens_per_s=sizes.quick.speed(run, gpu),
    )


def longest_sequence(sizes: Sizes, run: RunSpec, gpu: GpuProfile) -> int:
    """The longest with which the run fits, in steps of 128 tokens and up to the model's own limit; 0 if none does."""
    most = sizes.model.max_position_embeddings
    family = Family(run, "seq_len", (*range(SEQ_LEN_STEP, most, SEQ_LEN_STEP), most))
    return family.size(sizes.largest(family, gpu))
