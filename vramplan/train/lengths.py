"""How long the rows are, what padding costs, and batches of rows of like length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from vramplan.core.types import RunSpec
from vramplan.train.ingest import Source
from vramplan.train.store import Examples

_SAMPLED = 100_000  # rows looked at to see what padding would cost
MOST_BARS = 64  # of the histogram of lengths


class LengthGrouped(Sampler):  # type: ignore[misc]
    """The indices of an epoch, those of like length together, the longest batch first: transformers' own order.

    transformers' `LengthGroupedSampler` draws from torch's global state, which a resumed run has at another point; here
    seed and epoch alone decide.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """`batch_size`: rows of one optimizer step."""
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def padding_share(lengths: Sequence[int], order: Sequence[int], micro_batch_size: int) -> float:
    """Which part of the tokens in all batches is padding, when rows come in this order."""
    indices, width, real = iter(order), 0, 0
    while batch := [lengths[index] for index in islice(indices, micro_batch_size)]:
        width += len(batch) * max(batch)
        real += sum(batch)
    return 1 - real / width if width else 0.0


def percentile(ascending: Sequence[int], percent: int) -> int:
    """The smallest length that at least `percent` per cent of the rows do not exceed."""
    return ascending[max(-(-len(ascending) * percent // 100), 1) - 1]


def histogram(ascending: Sequence[int]) -> list[list[int]]:
    """[tokens, rows], ascending: so many rows of at most so many tokens and more than the pair before."""
    size = -(-len(ascending) // MOST_BARS)
    bars: list[list[int]] = []
    for start in range(0, len(ascending), size):
        part = ascending[start : start + size]
        if bars and bars[-1][0] == part[-1]:
            bars[-1][1] += len(part)
        else:
            bars.append([part[-1], len(part)])
    return bars


def summary(run: RunSpec, sources: Sequence[Source], train: Examples, held_out: Examples | None) -> dict[str, Any]:
    """What became of the data, for the event `data`: counts of rows and tokens. Shares are of 1."""
    counts = {
        name: sum(source.counts[name] for source in sources)
        for name in ("rows", "bad", "empty", "dropped", "truncated", "split", "tokens_lost")
    }
    store, lengths = train.store, [train.store.length(row) for row in train.rows]
    ascending = sorted(lengths)
    return {
        "path": sources[0].path,
        "kind": sources[0].kind,
        **counts,
        "examples": len(lengths),
        "eval_examples": len(held_out.rows) if held_out is not None else 0,
        "tokens": sum(lengths),
        "learned_tokens": sum(store.learned_tokens(row) for row in train.rows),
        "p50": percentile(ascending, 50),
        "p95": percentile(ascending, 95),
        "longest": ascending[-1],
        "histogram": histogram(ascending),
        "seq_len": run.seq_len,
        "micro_batch_size": run.micro_batch_size,
        "sampling": run.data.train_sampling_strategy if run.data is not None else "random",
        **_costs(run, lengths, train),
    }


def _costs(run: RunSpec, lengths: list[int], train: Examples) -> dict[str, Any]:
    """Shares of padding: packed, or in random batches and in batches of like length."""
    if run.packing:
        slots = len(train) * run.seq_len
        return {"packed_rows": len(train), "padding": round(1 - sum(lengths) / slots, 4)}
    sample, micro = lengths[:_SAMPLED], run.micro_batch_size
    order = random.Random(run.schedule.seed).sample(range(len(sample)), len(sample))
    grouped = LengthGrouped(sample, micro * run.accumulation, run.schedule.seed)
    return {
        "padding_random": round(padding_share(sample, order, micro), 4),
        "padding_grouped": round(padding_share(sample, list(grouped), micro), 4),
    }
