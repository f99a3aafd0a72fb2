"""Rows of one file or data set -> a TokenStore: tokenised, cut, checked, and everything left out is counted."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vramplan.core.types import DataSpec
from vramplan.errors import InputError
from vramplan.train.encode import Encoded, Encoder, encoder
from vramplan.train.kinds import BadRow, detect_kind
from vramplan.train.rows import Row, Rows
from vramplan.train.store import TokenStore
from vramplan.train.template_check import TemplateCheck

MAX_SKIPPED = 10_000  # rows left out that are written down one by one
_BLOCK = 512  # rows tokenised together
_BLOCK_BYTES = 8 * 2**20
_EVERY_S = 3.0  # between two signs of life

Report = Callable[[dict[str, Any]], None]


@dataclass
class Source:
    """What was read from one place. `counts`: rows, bad, empty, dropped, truncated, split, tokens_lost."""

    path: str
    store: TokenStore = field(default_factory=TokenStore)
    kind: str = ""
    unit: str = "row"  # what `store.sources` numbers: line or row
    counts: Counter[str] = field(default_factory=Counter)
    skipped: list[dict[str, str]] = field(default_factory=list)

    @property
    def left_out(self) -> int:
        return self.counts["bad"] + self.counts["empty"] + self.counts["dropped"]


class Ingest:
    """Reads one source. Rows go through the tokenizer in blocks; what is wrong with one is said in the file's order."""

    def __init__(self, data: DataSpec, seq_len: int, tokenizer: Any, report: Report) -> None:
        self._data, self._seq_len, self._tokenizer, self._report = data, seq_len, tokenizer, report
        self._encode: Encoder | None = None
        self._check = TemplateCheck(tokenizer)
        self._block: list[Row] = []
        self.source = Source(data.path)

    def read(self, rows: Rows) -> Source:
        """All rows. InputError if one is bad and bad ones are not to be skipped, or if none can be used."""
        self._begun = self._told = time.monotonic()
        size = 0
        for row in rows:
            self._block.append(row)
            size += row.size
            if len(self._block) >= _BLOCK or size >= _BLOCK_BYTES:
                size = 0
                self._flush()
                self._sign_of_life(rows)
        self._flush()
        self._finish()
        return self.source

    def _sign_of_life(self, rows: Rows) -> None:
        now = time.monotonic()
        if now - self._told < _EVERY_S:
            return
        self._told = now
        share = rows.share()
        left = None if not share else (now - self._begun) * (1 - share) / share
        done = self.source.counts["rows"]
        self._report({"event": "progress", "name": "data", "done": done, "share": share, "eta_s": left})

    # ---------------------------------------------------------------------------------------------------- rows
    def _flush(self) -> None:
        block, self._block = self._block, []
        good = [row for row in block if not row.problem]
        if good and self._encode is None:
            first = good[0]
            self.source.unit = first.where.partition(" ")[0]
            self.source.kind = detect_kind(first.value, self._data, f"{self._data.path}, {first.where},")
            self._encode = encoder(self.source.kind, self._tokenizer, self._data, self._warn)
        results = iter(self._encode([row.value for row in good]) if self._encode is not None and good else ())
        for row in block:
            self.source.counts["rows"] += 1
            result = BadRow(row.problem) if row.problem else next(results)
            if isinstance(result, BadRow):
                self._bad_row(row, str(result))
            elif isinstance(result, InputError):
                raise self._placed(row, result)
            else:
                self._keep(row, result)

    def _keep(self, row: Row, encoded: Encoded) -> None:
        if self._data.assistant_only_loss:
            try:
                self._check.look(encoded, row.where)
            except InputError as error:
                raise self._placed(row, error) from error
        length, seq_len = len(encoded.input_ids), self._seq_len
        over, how = max(length - seq_len, 0), self._data.truncation
        if over and how in ("drop", "error"):
            self._too_long(row, length)
            return
        starts = range(0, length if how == "split" else min(length, 1), seq_len)
        kept = [start for start in starts if any(encoded.learned[start + 1 : start + seq_len])]
        if not kept:  # the first token is never predicted
            self._leave_out(row, "empty", f"has nothing to learn in its first {seq_len} tokens")
            return
        if over:
            self.source.counts["split" if how == "split" else "truncated"] += 1
            self.source.counts["tokens_lost"] += 0 if how == "split" else over
        number = row.where.rpartition(" ")[2]
        for start in kept:
            ids, learned = (part[start : start + seq_len] for part in (encoded.input_ids, encoded.learned))
            cut = over if how == "cut" else 0
            self.source.store.append(ids, learned, int(number) if number.isdecimal() else 0, cut)

    def _too_long(self, row: Row, length: int) -> None:
        problem = f"has {length:,} tokens, over the sequence length of {self._seq_len:,}"
        if self._data.truncation == "error":
            raise InputError(
                f"{self._data.path}, {row.where}, {problem}", "raise --seq-len, or say --truncation cut, drop or split"
            )
        self._leave_out(row, "dropped", problem)

    def _bad_row(self, row: Row, problem: str) -> None:
        if self._data.on_bad_row == "fail":
            raise InputError(
                f"{self._data.path}, {row.where}, {problem}",
                "mend the row, or leave such rows out with --on-bad-row skip",
            )
        self._leave_out(row, "bad", problem)

    def _leave_out(self, row: Row, why: str, problem: str) -> None:
        self.source.counts[why] += 1
        if len(self.source.skipped) < MAX_SKIPPED:
            self.source.skipped.append({"file": self._data.path, "where": row.where, "why": why, "reason": problem})

    def _placed(self, row: Row, error: InputError) -> InputError:
        return InputError(f"{self._data.path}, {row.where}: {error.message}", error.hint)

    # ---------------------------------------------------------------------------------------------------- the end
    def _finish(self) -> None:
        """Say what was cut and left out; InputError if nothing is left."""
        source, counts = self.source, self.source.counts
        if not counts["rows"]:
            raise InputError(f"{source.path} holds no rows")
        first_bad = next((f"{s['file']}, {s['where']}, {s['reason']}" for s in source.skipped if s["why"] == "bad"), "")
        if not len(source.store):
            left_out = f"{counts['bad']:,} bad rows, {counts['empty']:,} rows with nothing to learn"
            left_out += f" in {self._seq_len} tokens, {counts['dropped']:,} too long"
            why = f"; the first bad one: {first_bad}" if first_bad else ""
            raise InputError(
                f"none of the {counts['rows']:,} rows of {source.path} can be used ({left_out}){why}",
                "rows need text to learn, within the sequence length",
            )
        if counts["bad"]:
            self._warn(f"{_rows(counts['bad'], 'bad ')} left out; the first: {first_bad}")
        if counts["empty"]:
            self._warn(f"{_rows(counts['empty'])} left out: nothing to learn in their first {self._seq_len} tokens")
        if counts["dropped"]:
            self._warn(
                f"{_rows(counts['dropped'])} left out: longer than the sequence length of {self._seq_len} tokens"
            )
        if counts["truncated"]:
            share = 100 * counts["truncated"] / len(source.store)
            self._warn(
                f"{_rows(counts['truncated'])} ({share:.1f} %) cut to the sequence length of {self._seq_len} tokens: "
                f"{counts['tokens_lost']:,} tokens lost"
            )
        if self._check.unsaid:
            role, _, where = self._check.unsaid.partition(", ")
            self._warn(f"the chat template leaves out what the {role} says ({source.path}, {where})")
        if self._check.endless:
            self._warn(
                f"the end of the assistant's turns is not learned ({source.path}, {self._check.endless}): the model "
                "may not stop; the template's {% generation %} should take in what ends a turn"
            )

    def _warn(self, message: str) -> None:
        self._report({"event": "warning", "message": message})


def _rows(count: int, kind: str = "") -> str:
    return f"{count:,} {kind}row{'' if count == 1 else 's'}"
