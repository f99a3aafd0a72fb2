"""Training data -> token sequences and batches.

`build` reads the rows (`rows.py`), turns each into tokens (`chat.py`), cuts it to the run's sequence length and keeps
it compactly: 4 bytes and one flag a token. `Collator` makes the batches.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any, overload

from vramplan.core.types import DataSpec, RunSpec
from vramplan.core.units import round_up
from vramplan.errors import InputError
from vramplan.train.chat import BadRow, Encoded, Encoder, detect_kind, encoder
from vramplan.train.rows import Row, read_rows

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that cross entropy leaves out
_MULTIPLE = 8  # tensor cores like lengths that divide by 8
_REPORT_EVERY = 50_000  # rows between two signs of life

Report = Callable[[dict[str, Any]], None]
Example = dict[str, list[int]]


class TokenStore:
    """Token ids of all rows end to end, and which of them are learned."""

    def __init__(self) -> None:
        self._ids = array("i")
        self._learned = bytearray()
        self._ends = array("q", [0])

    def append(self, ids: Sequence[int], learned: Sequence[bool]) -> None:
        if len(ids) != len(learned):
            raise ValueError(f"{len(ids)} tokens with {len(learned)} flags")
        self._ids.extend(ids)
        self._learned.extend(learned)
        self._ends.append(len(self._ids))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def length(self, index: int) -> int:
        """Tokens of one row."""
        return self._ends[index + 1] - self._ends[index]

    def example(self, index: int) -> Example:
        span = slice(self._ends[index], self._ends[index + 1])
        ids = self._ids[span].tolist()
        labels = [token if learned else IGNORED for token, learned in zip(ids, self._learned[span], strict=True)]
        return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


class Examples(Sequence[Example]):
    """Some rows of a TokenStore, as a data set: dicts of `input_ids`, `labels` and `attention_mask`, each [tokens]."""

    def __init__(self, store: TokenStore, rows: Sequence[int]) -> None:
        self._store = store
        self._rows = array("q", rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self._store, self._rows[index])
        return self._store.example(self._rows[index])


@dataclass(frozen=True, slots=True)
class Splits:
    """`longest` is in tokens, over both splits; `examples` counts rows to train on; `truncated` rows were cut to the
    run's sequence length; `skipped` rows were left out: bad ones, and those with nothing to learn."""

    train: Examples
    eval: Examples | None
    longest: int
    examples: int
    truncated: int
    skipped: int
    kind: str  # messages | prompt_completion | text


def build(run: RunSpec, tokenizer: Any, *, report: Report) -> Splits:
    """Read, tokenise, cut and split `run.data`. `report` gets warnings and a summary, as events without a time.

    A tokenizer without a chat template is given a plain one if the rows are messages. InputError for data that cannot
    be used, naming file and line.
    """
    if run.data is None:
        raise InputError("the run names no data", "say what to train on with --data")
    _check(run.data, run.seq_len)
    maker = _Builder(run.data, run.seq_len, tokenizer, report)
    for row in read_rows(run.data):
        maker.add(row)
    maker.finish()
    store = maker.store
    train, held_out = _split(len(store), run.data.eval_fraction, run.schedule.seed)
    return Splits(
        train=Examples(store, train),
        eval=Examples(store, held_out) if held_out else None,
        longest=max(store.length(index) for index in range(len(store))),
        examples=len(train),
        truncated=maker.truncated,
        skipped=maker.bad + maker.empty,
        kind=maker.kind,
    )


def _check(data: DataSpec, seq_len: int) -> None:
    if seq_len < 2:
        raise InputError(f"a sequence length of {seq_len} leaves no token to predict", "use at least 2")
    if data.on_bad_row not in ("fail", "skip"):
        raise InputError(f"on_bad_row is {data.on_bad_row!r}, expected fail or skip")
    if not (isfinite(data.eval_fraction) and 0 <= data.eval_fraction < 1):
        raise InputError(f"eval_fraction is {data.eval_fraction}, expected a number from 0 to below 1")


class _Builder:
    """Collects rows into a TokenStore and counts what happens to them."""

    def __init__(self, data: DataSpec, seq_len: int, tokenizer: Any, report: Report) -> None:
        self.store = TokenStore()
        self.seen = self.truncated = self.bad = self.empty = 0
        self._data, self._seq_len, self._tokenizer, self._report = data, seq_len, tokenizer, report
        self._encode: Encoder | None = None
        self.kind = ""
        self._first_bad = ""

    def add(self, row: Row) -> None:
        self.seen += 1
        if self.seen % _REPORT_EVERY == 0:
            self._phase(f"{self.seen:,} rows read")
        if row.problem:
            self._bad_row(row, row.problem)
            return
        if self._encode is None:
            self.kind = detect_kind(row.value, self._data, f"{self._data.path}, {row.where},")
            self._encode = encoder(self.kind, self._tokenizer, self._data, self._warn)
        try:
            self._keep(self._encode(row.value))
        except BadRow as problem:
            self._bad_row(row, str(problem))
        except InputError as error:
            raise InputError(f"{self._data.path}, {row.where}: {error.message}", error.hint) from error

    def _keep(self, row: Encoded) -> None:
        ids, learned = row.input_ids[: self._seq_len], row.learned[: self._seq_len]
        if not any(learned[1:]):  # the first token is never predicted
            self.empty += 1
            return
        self.truncated += len(row.input_ids) > self._seq_len
        self.store.append(ids, learned)

    def _bad_row(self, row: Row, problem: str) -> None:
        sentence = f"{self._data.path}, {row.where}, {problem}"
        if self._data.on_bad_row == "fail":
            raise InputError(sentence, "mend the row, or leave such rows out with --on-bad-row skip")
        self._first_bad = self._first_bad or sentence
        self.bad += 1

    def finish(self) -> None:
        """Say what was cut and left out; InputError if nothing is left."""
        if not self.seen:
            raise InputError(f"{self._data.path} holds no rows")
        left_out = f"{self.bad:,} bad rows, {self.empty:,} rows with nothing to learn in {self._seq_len} tokens"
        if not len(self.store):
            why = f"; the first bad one: {self._first_bad}" if self._first_bad else ""
            raise InputError(
                f"none of the {self.seen:,} rows of {self._data.path} can be used ({left_out}){why}",
                "rows need text to learn, within the sequence length",
            )
        if self.bad:
            self._warn(f"{self.bad:,} bad rows left out; the first: {self._first_bad}")
        if self.empty:
            self._warn(f"{self.empty:,} rows left out: nothing to learn in their first {self._seq_len} tokens")
        if self.truncated:
            share = 100 * self.truncated / len(self.store)
            self._warn(f"{self.truncated:,} rows ({share:.1f} %) cut to the sequence length of {self._seq_len} tokens")
        self._phase(
            f"{len(self.store):,} {self.kind} rows of {self.seen:,} from {self._data.path}: {self.truncated:,} cut, "
            f"{self.bad + self.empty:,} left out"
        )

    def _warn(self, message: str) -> None:
        self._report({"event": "warning", "message": message})

    def _phase(self, message: str) -> None:
        self._report({"event": "phase", "name": "data", "message": message})


def _split(rows: int, fraction: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """(training rows, held-out rows), by the seed alone; with a fraction above 0 each side has at least one row."""
    if fraction == 0:
        return range(rows), ()
    if rows < 2:
        raise InputError("one row cannot be split into training and evaluation", "leave eval_fraction out")
    count = min(max(round(rows * fraction), 1), rows - 1)
    held_out = set(random.Random(seed).sample(range(rows), count))
    return [index for index in range(rows) if index not in held_out], sorted(held_out)


class Collator:
    """Examples -> a batch: `input_ids`, `labels` and `attention_mask`, each a LongTensor [examples, tokens].

    Pads on the right to the longest example, and from 8 tokens on to a multiple of 8, but not beyond `max_length`.
    Padding has attention 0 and label -100.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.max_length = max_length

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        import torch

        width = self._width(max(len(example["input_ids"]) for example in examples))
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        return {
            name: torch.tensor([e[name] + [value] * (width - len(e[name])) for e in examples], dtype=torch.long)
            for name, value in padding.items()
        }

    def _width(self, longest: int) -> int:
        if longest <= _MULTIPLE:
            return longest
        width = round_up(longest, _MULTIPLE)
        return width if self.max_length is None else max(longest, min(width, self.max_length))
