"""Several logs of one run, one per rank: which files they are, and which rank failed first.

A folder of logs is as `torchrun --log-dir` leaves it (RUN/attempt_0/RANK/stderr.log), or flat, with a number in each
name. The first rank to fail is the cause, the others fail because it did: by the time in or above the report where
all have one, else in the order given, in a folder by rank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vramplan.core.types import OomEvidence
from vramplan.errors import InputError
from vramplan.sources.oom_text import is_weak, read_report

MAX_FILES, MAX_DEPTH = 1024, 6
SUFFIXES = (".log", ".txt", ".out", ".err")
_RANK = re.compile(r"(?:global_?rank|local_?rank|rank|worker|proc|task)[-_.]?(\d{1,6})(?!\d)", re.I)
_ATTEMPT = re.compile(r"attempt_(\d{1,6})[/\\](\d{1,6})[/\\]")
_NUMBER = re.compile(r"(?:\A|[-_.])(\d{1,4})\Z")


class RankReport(NamedTuple):
    """What one log says; `rank` by the report, else by the file's name."""

    path: Path
    rank: int | None
    evidence: OomEvidence
    time: str | None


def logs_in(folder: Path) -> list[Path]:
    """The logs below a folder, in the order of attempts and ranks. InputError if there are none, or too many."""
    found = [path for path in _below(folder, MAX_DEPTH) if _is_log(path)]
    if not found:
        raise InputError(f"{folder} is not a run folder: it holds no log.txt, and no other logs",
                         "give the log itself")  # fmt: skip
    if len(found) > MAX_FILES:
        raise InputError(f"{folder} holds more than {MAX_FILES:,} logs", "give those of one run")
    return sorted(found, key=lambda path: (*_place(path), str(path)))


def _below(folder: Path, depth: int) -> list[Path]:
    found: list[Path] = []
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror or error}") from None
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            found += _below(path, depth - 1) if depth else []
        elif path.is_file():
            found.append(path)
        if len(found) > 100 * MAX_FILES:
            break
    return found


def _is_log(path: Path) -> bool:
    return Path(path.name.removesuffix(".gz")).suffix.lower() in SUFFIXES


def _place(path: Path) -> tuple[int, int]:
    attempt = _ATTEMPT.search(str(path))
    rank = rank_of(path)
    return int(attempt[1]) if attempt else 0, MAX_FILES if rank is None else rank


def rank_of(path: Path) -> int | None:
    """ "attempt_0/3/stderr.log" -> 3, "train.rank3.log" -> 3, "out-3.txt" -> 3."""
    attempt = _ATTEMPT.search(str(path))
    if attempt:
        return int(attempt[2])
    name = Path(path.name.removesuffix(".gz")).stem
    found = _RANK.search(name) or _NUMBER.search(name)
    return int(found[1]) if found else None


def reports(paths: Sequence[Path]) -> list[RankReport]:
    """The reports of those logs that have one, the first to fail before the others."""
    found = []
    for path in paths:
        report = read_report(path)
        if report is not None:
            evidence = report.evidence
            rank = rank_of(path) if evidence.rank is None and len(paths) > 1 else evidence.rank
            found.append(RankReport(path, rank, replace(evidence, rank=rank), report.time))
    same = timed(found)
    return sorted(found, key=lambda report: (is_weak(report.evidence), report.time or "" if same else ""))


def timed(found: Sequence[RankReport]) -> bool:
    """Whether all of them have a time, written in one way."""
    return len({report.time is not None and "-" in report.time for report in found}) == 1 and all(
        report.time for report in found
    )


def others_text(found: Sequence[RankReport]) -> str:
    """One line on those that came after the first."""
    from vramplan.core.units import human

    def name(report: RankReport) -> str:
        asked = report.evidence.requested_bytes
        rank = "" if report.rank is None else f"rank {report.rank} "
        return f"{rank}({report.path.name}{f', {human(asked)} asked for' if asked else ''})"

    shown = ", ".join(map(name, found[1:6]))
    left = f" and {len(found) - 6} more" if len(found) > 6 else ""
    first = found[0]
    who = first.path.name if first.rank is None else f"rank {first.rank} ({first.path.name})"
    if timed(found) and not is_weak(first.evidence):
        return f"{who} failed first, at {first.time}; after it {shown}{left}"
    return f"{who} is taken for the first to fail; out of memory too: {shown}{left}"
