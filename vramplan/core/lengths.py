"""What rows of different lengths mean for a run: memory is that of the longest batch, speed that of the usual one."""

from __future__ import annotations

from dataclasses import replace

from .types import Lengths, RunSpec
from .units import round_up

MULTIPLE = 8  # what batches are padded to: tensor cores like lengths that divide by it


def longest_run(run: RunSpec, lengths: Lengths) -> RunSpec:
    """The run at the length that its longest batch has: never more than asked."""
    if run.packing:
        return run
    return replace(run, seq_len=min(run.seq_len, round_up(lengths.longest, MULTIPLE)))


def usual_width(run: RunSpec, lengths: Lengths) -> int:
    """Tokens that a row of a micro-batch has on average, padding included: the expected longest of its rows.

    In random order rows are drawn independently; grouped by length a batch holds rows of one bar. Rows over the
    sequence length are cut.
    """
    grouped = run.data is not None and run.data.train_sampling_strategy == "group_by_length"
    drawn = 1 if grouped else run.micro_batch_size
    width, below, total = 0.0, 0, lengths.rows
    for tokens, rows in lengths.bars:
        share = ((below + rows) / total) ** drawn - (below / total) ** drawn
        width += share * min(round_up(tokens, MULTIPLE), run.seq_len)
        below += rows
    return round_up(max(round(width), 1), MULTIPLE)


def real_share(run: RunSpec, lengths: Lengths) -> float:
    """Which part of the tokens that are computed is no padding."""
    if run.packing:
        return 1.0
    return min(mean(lengths, run.seq_len) / usual_width(run, lengths), 1.0)


def mean(lengths: Lengths, most: int) -> float:
    """Tokens of a row on average. Where rows are cut, by the upper ends of the bars."""
    if lengths.longest <= most:
        return lengths.tokens / lengths.rows
    return sum(min(tokens, most) * rows for tokens, rows in lengths.bars) / lengths.rows
