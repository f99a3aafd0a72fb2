"""Training data -> token sequences and batches: the door of the rooms behind it.

`build` reads rows (`rows.py`), turns them into tokens (`kinds.py`, `chat.py`, `encode.py`), cuts and counts
(`ingest.py`), splits, and packs where that is asked for (`packing.py`). A resumed run takes its tokens from the run
folder (`cache.py`). `Collator` makes the batches.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

from vramplan.core.types import SAMPLINGS, TRUNCATIONS, DataSpec, RunSpec
from vramplan.errors import InputError
from vramplan.sources import records
from vramplan.train import cache
from vramplan.train.collate import Collator
from vramplan.train.ingest import Ingest, Report, Source
from vramplan.train.lengths import summary
from vramplan.train.packing import Packing, pack
from vramplan.train.rows import Rows
from vramplan.train.store import IGNORED, Example, Examples, PackedExamples, TokenStore

__all__ = ["IGNORED", "Collator", "Example", "Examples", "PackedExamples", "Splits", "TokenStore", "build"]

CACHE, SKIPPED = "tokens.cache", "skipped.jsonl"


@dataclass(frozen=True, slots=True)
class Splits:
    """`longest` is in tokens, over both splits; `examples` counts rows to train on, before packing; `truncated` rows
    were cut to the run's sequence length; `skipped` rows were left out: bad ones, too long ones, and those with nothing
    to learn. `longest_index` is the place in `train` of its longest example."""

    train: Examples
    eval: Examples | None
    longest: int
    longest_index: int
    examples: int
    truncated: int
    skipped: int
    kind: str  # see core.types.DATA_KINDS
    unit: str = "row"  # what the rows of the training file are numbered by: line or row

    @property
    def chat(self) -> bool:
        """Whether rows were conversations, so that the model is to be talked to."""
        return self.kind in ("messages", "sharegpt", "alpaca")


def build(run: RunSpec, tokenizer: Any, *, report: Report, run_dir: Path | None = None, resume: bool = False) -> Splits:
    """Read, tokenise, cut, split and pack `run.data`. `report` gets warnings and a summary, as events without a time.

    A tokenizer without a chat template is given a plain one if the rows are conversations. Into `run_dir` go the rows
    that were left out, and the tokens, which a resumed run reads back. InputError for data that cannot be used, naming
    file and line.
    """
    if run.data is None:
        raise InputError("the run names no data", "say what to train on with --data")
    data = run.data
    _check(data, run.seq_len)
    stored = run_dir / CACHE if run_dir is not None else None
    mark = cache.fingerprint(run, tokenizer) if stored is not None else ""
    sources = cache.load(stored, mark, tokenizer, report) if stored is not None and resume else None
    kept = sources is not None
    if sources is None:
        template = tokenizer.chat_template
        with _on_all_cores():
            sources = [Ingest(each, run.seq_len, tokenizer, report).read(Rows(each)) for each in _specs(data)]
        if run_dir is not None and stored is not None:
            cache.save(stored, mark, sources, tokenizer.chat_template != template, report)
            _write_skipped(run_dir / SKIPPED, sources)
    splits = _splits(run, data, sources)
    report({"event": "data", "cached": kept, **summary(run, sources, splits.train, splits.eval)})
    return splits


@contextmanager
def _on_all_cores() -> Iterator[None]:
    """Let the tokenizer use all cores while rows are read: for the rest of the run it is told not to, because a process
    that forks would then complain."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _check(data: DataSpec, seq_len: int) -> None:
    if seq_len < 2:
        raise InputError(f"a sequence length of {seq_len} leaves no token to predict", "use at least 2")
    if not (isfinite(data.eval_fraction) and 0 <= data.eval_fraction < 1):
        raise InputError(f"eval_fraction is {data.eval_fraction}, expected a number from 0 to below 1")
    if data.eval_fraction and (data.eval_path or data.eval_split):
        raise InputError("held-out rows come from --eval-fraction or from --eval-data and --eval-split, not from both")
    if Path(data.path).expanduser().is_file():
        _check_file(data)
    words = {"on_bad_row": ("fail", "skip"), "truncation": TRUNCATIONS, "train_sampling_strategy": SAMPLINGS}
    for name, known in words.items():
        if getattr(data, name) not in known:
            raise InputError(f"{name} is {getattr(data, name)!r}, expected one of {', '.join(known)}")


def _check_file(data: DataSpec) -> None:
    """A file has no splits: asking for one must not end in training on what should be held out."""
    default = DataSpec(path="")
    asked = {"--split": data.split != default.split, "--data-config": data.config, "--data-revision": data.revision}
    asked["--eval-split"] = data.eval_split and not data.eval_path
    flag = next((flag for flag, given in asked.items() if given), None)
    if flag is not None:
        hint = "--eval-data names a file of held-out rows" if flag == "--eval-split" else f"leave {flag} out"
        raise InputError(f"{flag} is for data sets by name, and {data.path} is a file", hint)


def _specs(data: DataSpec) -> list[DataSpec]:
    """Where to read: the training rows, and the held-out rows if they have a place of their own."""
    if not data.eval_path and not data.eval_split:
        return [data]
    split = data.eval_split or data.split
    if data.eval_path and data.eval_path != data.path:  # another data set has its own configurations and revisions
        return [data, replace(data, path=data.eval_path, split=split, config=None, revision=None)]
    return [data, replace(data, split=split)]


def _write_skipped(path: Path, sources: Sequence[Source]) -> None:
    """The rows left out, one a line, the first `MAX_SKIPPED` of each source."""
    lines = [json.dumps(row) + "\n" for source in sources for row in source.skipped]
    more = sum(source.left_out - len(source.skipped) for source in sources)
    if more:
        lines.append(json.dumps({"more": more}) + "\n")
    if lines:
        records.write_text(path, "".join(lines))
    else:
        path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- splits
def _splits(run: RunSpec, data: DataSpec, sources: Sequence[Source]) -> Splits:
    first, seed = sources[0], run.schedule.seed
    if len(sources) == 1:
        rows, held_out = _split(len(first.store), data.eval_fraction, seed)
        evaluated = _examples(run, first.store, held_out) if held_out else None
    else:
        rows = range(len(first.store))
        evaluated = _examples(run, sources[1].store, range(len(sources[1].store)))
    train = _examples(run, first.store, rows)
    lengths = train.lengths()
    return Splits(
        train=train,
        eval=evaluated,
        longest=max(source.store.length(index) for source in sources for index in range(len(source.store))),
        longest_index=max(range(len(train)), key=lengths.__getitem__),
        examples=len(rows),
        truncated=sum(source.counts["truncated"] for source in sources),
        skipped=sum(source.left_out for source in sources),
        kind=first.kind,
        unit=first.unit,
    )


def _split(rows: int, fraction: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """(training rows, held-out rows), by the seed alone; with a fraction above 0 each side has at least one row."""
    if fraction == 0:
        return range(rows), ()
    if rows < 2:
        raise InputError("one row cannot be split into training and evaluation", "leave eval_fraction out")
    count = min(max(round(rows * fraction), 1), rows - 1)
    held_out = set(random.Random(seed).sample(range(rows), count))
    return [index for index in range(rows) if index not in held_out], sorted(held_out)


def _examples(run: RunSpec, store: TokenStore, rows: Sequence[int]) -> Examples:
    if not run.packing:
        return Examples(store, rows)
    packing = Packing(pack([store.length(row) for row in rows], run.seq_len, run.schedule.seed))
    return PackedExamples(store, rows, packing, run.seq_len)
