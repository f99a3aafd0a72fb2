"""A run that somebody else has started, seen through the records in its folder. Nothing is written, nobody is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vramplan.errors import InputError
from vramplan.launch.folder import lock_pid
from vramplan.launch.watching import Tail
from vramplan.sources.profiles import suggest

RECORD = "progress.jsonl"
LOOK_S = 0.25  # between two looks at the record
SILENT_S = 60.0  # a process that is not seen here may be on another machine that shares the folder, while it writes

Event = dict[str, Any]


def check_folder(run_dir: Path) -> None:
    """InputError for what is no run folder, with the nearest name beside it."""
    if (run_dir / RECORD).is_file() or (run_dir / "run.json").is_file():
        return
    if run_dir.is_dir():
        raise InputError(f"{run_dir} holds no run: there is no {RECORD} in it", "name the folder of vramplan train -o")
    parent = run_dir.parent
    near = suggest(run_dir.name, [path.name for path in parent.iterdir() if path.is_dir()]) if parent.is_dir() else ""
    raise InputError(f"there is no folder {run_dir}", near)


def follow(run_dir: Path, *, once: bool = False) -> Iterator[list[Event]]:
    """What is in the record now, as one list; then, every quarter of a second, what was added, until the run ends.

    With `once` only the first.
    """
    tail = Tail(run_dir / RECORD)
    events = tail.read()
    yield events
    pid = own_pid(events)
    ended = bool(events) and events[-1]["event"] == "end"
    while not once and not ended:
        running = is_running(run_dir, pid)
        time.sleep(LOOK_S)
        events = tail.read()
        pid = own_pid(events, pid)
        ended = (events[-1]["event"] == "end" if events else False) or not (running or events)
        yield events


def is_running(run_dir: Path, pid: int | None = None) -> bool:
    """Whether a process still works in the folder: that of its lock, else the one that said its own number."""
    holder = lock_pid(run_dir) or pid
    if holder is None:
        return False
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(holder, 0)
        return True
    except OSError as error:
        if not isinstance(error, ProcessLookupError):  # somebody else's
            return True
    try:
        return time.time() - (run_dir / RECORD).stat().st_mtime < SILENT_S
    except OSError:
        return False


def own_pid(events: list[Event], before: int | None = None) -> int | None:
    """The number that the run's process has said of itself last; `before` if it has not."""
    said = [event.get("pid") for event in events if event["event"] == "process"]
    found = [pid for pid in said if isinstance(pid, int) and not isinstance(pid, bool) and 0 < pid < 2**31]
    return found[-1] if found else before
