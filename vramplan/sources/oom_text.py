"""Finds the first out-of-memory report in a log, however it is wrapped, prefixed or cut: log -> OomEvidence.

Logs are untrusted and may be gigabytes: they are read in blocks, searched for a few byte strings, and only the
neighbourhood of a hit is decoded and looked at. What a message does not say stays None.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vramplan.core.types import OomEvidence
from vramplan.errors import InputError
from vramplan.sources.log_stream import Source, blocks_of, opened
from vramplan.sources.oom_fields import WEAK, kind_of, numbers

BEFORE_BYTES, AFTER_BYTES = 2**17, 2**16  # of the log around a hit: traceback before, wrapped lines after
MAX_LINE, MAX_MESSAGE_LINES, MAX_MESSAGE = 8192, 40, 1200
MAX_FRAMES, MAX_GAP, MAX_TRACEBACK_LINES = 40, 16, 600

# Strings without which no line can start a report: searching for them is all that most of a log costs. The first may be
# cut off by a line break, the others say what they say on one line.
LONG = (
    "out of memory", "OutOfMemory", "Tried to allocate", "exceed allowed memory", "exceed per_process", "CUDA calloc",
    "KV cache", "cache blocks",
)  # fmt: skip
SHORT = (
    "OUT_OF_MEMORY", "ALLOC_FAILED", "CUDNN_STATUS_INTERNAL", "MemoryAllocation", "allocate memory", "MemoryError",
    "Out of memory", "Killed", "SIGKILL", "oom-kill", "oom_kill", "code: -9", "code  : -9", "code = -9", "status -9",
    "code 137", "status 137", "code: 137", "code (137)", "Exit Code: ", "oomd killed", "low on resource: memory",
    "running low on memory", "paging file is too small", "shared memory", "</torch_", "OUT_OF_DEVICE_MEMORY",
)  # fmt: skip
NEEDLES = tuple(needle.encode() for needle in (*LONG, *SHORT))
# One of these is in each of them: most of a log is searched for fewer strings.
SHARED = (
    b"emory", b"llocat", b"per_process", b"CUDA calloc", b"cache", b"OUT_OF_", b"ALLOC_FAILED", b"CUDNN_STATUS",
    b"illed", b"SIGKILL", b"oom", b" -9", b" 137", b"(137", b"Exit Code: ", b"paging file", b"</torch_",
)  # fmt: skip
MAX_HITS = 256  # of one string in one block: a log that repeats it thousands of times is not looked at line by line
SIGNS = {
    "checkpointing_inactive": b"None of the inputs have requires_grad=True",  # torch.utils.checkpoint
    "float32_compute": b"but bnb_4bit_compute_dtype=torch.float32",  # bitsandbytes, Linear4bit
}

_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
# What launchers put before each line: [rank1]:, [default1]:, 1: (srun -l), [1]<stderr>:, (Worker rank=1 pid=254)
_PREFIX = re.compile(
    r"\s*(?:\[(?:rank|default)(?P<a>\d{1,6})\]:?|\[(?:\d+,)?(?P<b>\d{1,6})\]<std(?:err|out)>:?|"
    r"\(\w+ (?:rank=(?P<c>\d{1,6}) )?pid=\d+\)|(?P<d>\d{1,4}): )"
)
_STAMP = re.compile(
    r"\s*(?:\[?\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d[.,\d]*Z?\]?|(?:ERROR|WARNING|INFO)\s+\d\d-\d\d \d\d:\d\d:\d\d)"
    r"[\s,:-]*(?:\[[\w.]+:\d+\]\s*)?(?:-?\s*(?:ERROR|WARNING|INFO|CRITICAL)\s*[-:]?\s*)?"
)
_STOP = re.compile(r'Traceback \(most|\s*File "|During handling|The above exception|[\w.]*(?:Error|Exception|Warning):')
_COMPLETE = re.compile(r"butunallocated\.|reservedintotalbyPyTorch\)|memoryfraction\):\S+$|CUDAcalloc\D*\d+bytes")
MANY_LINES = ("torch", "cudaMallocAsync", "nccl", "vllm")  # all others say everything on their first line
_FRAMES = (
    re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<name>[^\s(]+)'),
    re.compile(r"File (?P<file>\S+?):(?P<line>\d+), in (?P<name>\w+)"),
    re.compile(r"(?P<file>\S+\.py):(?P<line>\d+) in (?P<name>[\w<>]+)"),
    re.compile(r"(?P<file>\S+\.py) in (?P<name>\w+)\("),
)

# When it was: 2026-11-30 12:34:56,789, and without a year as glog ([E1130 12:34:56.789) and vLLM (11-30 12:34:56) do
_TIME = re.compile(
    r"(?<!\d)(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d(?:[.,]\d{1,9})?)|"
    r"(?<!\d)(\d\d)-?(\d\d) (\d\d:\d\d:\d\d(?:[.,]\d{1,9})?)"
)
TIME_BYTES = 4096  # above a report in which its time is looked for


class Report(NamedTuple):
    """A report, and when it was, as a text that sorts; "MMDD ..." where the log gives no year."""

    evidence: OomEvidence
    time: str | None


# ------------------------------------------------------------------------------------------------------- streams
def read_evidence(source: Source) -> OomEvidence | None:
    """The first out-of-memory report in a file (by its path) or an open stream; None if there is none.

    Of several ranks the first one wins; a report of what asked for memory beats "exit code 137". Memory stays bounded
    whatever the size of the log. InputError if the file cannot be read or is a memory snapshot.
    """
    report = read_report(source)
    return None if report is None else report.evidence


def read_report(source: Source) -> Report | None:
    """The same with its time."""
    try:
        with opened(source) as stream:
            return _scan(blocks_of(stream))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path, a closed stream
        raise InputError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from None


def read_run_evidence(folder: Path) -> OomEvidence | None:
    """The report in a run folder's log; of several processes in the log of whichever ran out of memory, for which the
    main one's has at most a line."""
    logs = [*sorted(folder.glob("log.rank*.txt")), folder / "log.txt"]
    return next((found for log in logs if (found := read_evidence(log)) is not None), None)


def parse(text: str) -> OomEvidence | None:
    """The first out-of-memory report in a text; None if there is none. Never raises, whatever the text."""
    strong, weak = _first(text, len(text))
    data = text.encode("utf-8", errors="replace")
    report = _with_signs(strong or weak, {name for name, needle in SIGNS.items() if needle in data})
    return None if report is None else report.evidence


def _scan(blocks: Iterator[bytes]) -> Report | None:
    before = b""
    weak: Report | None = None
    signs: set[str] = set()
    block = next(blocks, b"")
    while block:
        following = next(blocks, b"")
        edge = block + following[:64]
        signs |= {name for name, needle in SIGNS.items() if needle in edge}
        if any(part in edge for part in SHARED) and any(needle in edge for needle in NEEDLES):
            here = (before + block).decode("utf-8", errors="replace")
            strong, other = _first(here + following[:AFTER_BYTES].decode("utf-8", errors="replace"), len(here))
            if strong is not None:
                return _with_signs(strong, signs)
            weak = weak or other
        before = (before + block)[-BEFORE_BYTES:]
        block = following
    return _with_signs(weak, signs)


def _with_signs(report: Report | None, signs: set[str]) -> Report | None:
    if report is None or not signs:
        return report
    from dataclasses import replace

    return report._replace(evidence=replace(report.evidence, signs=tuple(sorted(signs))))


# ------------------------------------------------------------------------------------------------------- reports
def _first(text: str, limit: int) -> tuple[Report | None, Report | None]:
    """The first report that starts before `limit`, and the first of what only tells how the process ended."""
    weak: Report | None = None
    done = -1
    for hit in sorted(position for needle in (*LONG, *SHORT) for position in _hits(text, needle, limit)):
        if hit <= done:
            continue
        start = max(text.rfind("\n", 0, hit), text.rfind("\r", 0, hit), hit - 512) + 1
        evidence, end = _report(text, start)
        done = max(end, hit)
        if evidence is None or (weak is not None and is_weak(evidence)):
            continue
        report = Report(evidence, _time(text, start, end))
        if not is_weak(evidence):
            return report, weak
        weak = report
    return None, weak


def _time(text: str, start: int, end: int) -> str | None:
    """The time in the report's line, else the last above it."""
    for part in (text[start : min(end, start + MAX_LINE)], text[max(0, start - TIME_BYTES) : start]):
        found = [*_TIME.finditer(part)]
        if found:
            day, clock, month, date, short = found[-1].groups()
            return (f"{day} {clock}" if day else f"{month}{date} {short}").replace(",", ".")
    return None


def _hits(text: str, needle: str, limit: int) -> Iterator[int]:
    at = text.find(needle, 0, limit + len(needle))
    for _ in range(MAX_HITS):
        if at < 0:
            return
        yield at
        at = text.find(needle, at + len(needle), limit + len(needle))


def _report(text: str, start: int) -> tuple[OomEvidence | None, int]:
    """The report in the line that starts at `start`, and where that line ends."""
    raw = next(_lines_from(text, start), "")
    end = start + len(raw)
    kind = kind_of(_compact([_split_prefix(raw)[1]]))
    if kind is None and not any(needle in raw for needle in LONG):
        return None, end
    rank, lines = _message_lines(text, start)
    if kind is not None and kind not in MANY_LINES:
        lines = lines[:1]
    compact = _compact(lines)
    kind = kind_of(compact)
    if kind is None:
        return None, end
    found, frames = numbers(compact), _frames(text, start, rank, kind)
    needed = next(n for n in range(1, len(lines) + 1) if numbers(_compact(lines[:n])) == found)
    return OomEvidence(message=_clean(lines[:needed]), kind=kind, rank=rank, frames=frames, **found), end


def _compact(lines: list[str]) -> str:
    return re.sub(r"\s+", "", "".join(lines))


def is_weak(evidence: OomEvidence) -> bool:
    return evidence.kind in ("host", "cudnn") and WEAK.search(_compact([evidence.message])) is not None


def _message_lines(text: str, start: int) -> tuple[int | None, list[str]]:
    """(rank, the lines of the message without their prefixes), from the line that starts at `start`."""
    rank: int | None = None
    lines: list[str] = []
    compact = ""
    for number, raw in enumerate(_lines_from(text, start)):
        who, line = _split_prefix(raw)
        if number == 0:
            rank = who
        elif who is not None and who != rank:
            continue  # another rank, in between
        elif not line.strip() and "NCCL" in compact:
            continue
        elif not line.strip() or _STOP.match(line.lstrip()):
            break
        lines.append(line)
        compact += _compact([line])
        if len(lines) >= MAX_MESSAGE_LINES or len(compact) > MAX_MESSAGE or _COMPLETE.search(compact):
            break
    return rank, lines


def _lines_from(text: str, start: int) -> Iterator[str]:
    for _ in range(4 * MAX_MESSAGE_LINES):
        if start >= len(text):
            return
        end = min((p for p in (text.find("\n", start), text.find("\r", start, start + MAX_LINE)) if p >= 0),
                  default=len(text))  # fmt: skip
        yield text[start : min(end, start + MAX_LINE)]
        start = end + (2 if text[end : end + 2] == "\r\n" else 1)


def _split_prefix(raw: str) -> tuple[int | None, str]:
    """(rank, line) without colours, rank prefixes, time stamps and the frame of a boxed traceback."""
    line = _ANSI.sub("", raw).strip("\x00")
    rank: int | None = None
    for _ in range(4):
        prefix = _PREFIX.match(line)
        if prefix is not None:
            found = prefix["a"] or prefix["b"] or prefix["c"] or prefix["d"]
            rank = int(found) if found and rank is None else rank
            line = line[prefix.end() :]
            continue
        stamp = _STAMP.match(line)
        if stamp is None:
            break
        line = line[stamp.end() :]
    return rank, line.strip("│┃|╭╰╮╯─ \t") if line.lstrip()[:1] in "│┃╭╰" and line.strip() else line


def _clean(lines: list[str]) -> str:
    """One line: blanks and control characters to single blanks, without torch's closing advice."""
    text = " ".join("".join(c if c.isprintable() else " " for c in " ".join(lines)).split())
    for closing in (" If reserved ", " See documentation ", " Please use `empty_cache`", " Please use empty_cache"):
        text = text.partition(closing)[0]
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


def _frames(text: str, start: int, rank: int | None, kind: str) -> tuple[str, ...]:
    """The traceback above the message, innermost last: "loss/loss_utils.py:37 fixed_cross_entropy"."""
    if kind in (
        "host",
        "shm",
        "bitsandbytes",
        "nccl",
    ):  # printed by the system or by C: what is above is something else's
        return ()
    found: list[str] = []
    gap = 0
    for raw in reversed(text[max(0, start - BEFORE_BYTES) : start].splitlines()[-MAX_TRACEBACK_LINES:]):
        who, line = _split_prefix(raw[:MAX_LINE])
        if who is not None and rank is not None and who != rank:
            continue
        frame = next((match for pattern in _FRAMES if (match := pattern.search(line))), None)
        gap = 0 if frame else gap + 1
        if gap > MAX_GAP or "Traceback (most recent call last)" in line or len(found) == MAX_FRAMES:
            break
        if frame is not None:
            parts = frame.groupdict()
            where = "/".join(re.split(r"[\\/]", parts["file"])[-3:])
            found.append(f"{where}:{parts.get('line') or '?'} {parts['name']}"[:200])
    return tuple(reversed(found))
