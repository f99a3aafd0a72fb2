"""What the processes of a run on several GPUs tell, each in a file of its own, and which of them failed first."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from vramplan.core.types import RunSpec
from vramplan.launch.watching import Tail, size_of

Event = dict[str, Any]
SHOWN = ("warning", "oom", "health")  # what is told of the other ranks too; their steps are like the main one's
_LOG_BYTES = 256 * 1024
# torch/distributed/elastic/multiprocessing/api.py, `SubprocessContext._poll`
_FIRST_FAILURE = re.compile(r"failed \(exitcode: (-?\d+)\) local_rank: (\d+)")
_FAILURE = re.compile(r"rank\s+: \d+ \(local_rank: (\d+)\)\s+exitcode\s+: (-?\d+)")  # of the table of all that failed
# What a process says when another one is gone: NCCL, gloo, torch's store.
_PEER_GONE = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited")


class Ranks:
    """Rank 0 is the main one, whose events the launcher reads itself and passes to `note`."""

    def __init__(self, run_dir: Path, size: int, *, from_end: bool) -> None:
        self.log = run_dir / "log.txt"
        self.log_from = size_of(self.log) if from_end else 0  # what earlier runs wrote is before it
        paths = {rank: run_dir / f"progress.rank{rank}.jsonl" for rank in range(1, size)}
        self.tails = {rank: Tail(path, from_end=from_end) for rank, path in paths.items()}
        self.pids: dict[int, int] = {}  # by number on this machine, which is that of the card
        self.ends: dict[int, Event] = {}

    def note(self, rank: int, event: Event) -> None:
        """Keep what the launcher needs of a rank's event: which process it is, and how it ended."""
        if event["event"] == "end":
            self.ends[rank] = event
        elif event["event"] == "process" and type(event.get("pid")) is int and event["pid"] > 0:
            self.pids[rank if type(event.get("local_rank")) is not int else event["local_rank"]] = event["pid"]

    def read(self) -> list[Event]:
        """New events of the other ranks that a user should see."""
        shown = []
        for rank, tail in self.tails.items():
            for event in tail.read():
                self.note(rank, event)
                if event["event"] in SHOWN:
                    shown.append(_of_rank(event, rank))
        return shown

    def kill(self) -> None:
        """End all processes at once."""
        for pid in self.pids.values():
            with suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def end(self) -> Event | None:
        """The last words that count: of the rank that failed first, or the main one's. None if there are none."""
        failed = [(rank, event) for rank, event in self.ends.items() if event.get("exit_code") != 0]
        if not failed:
            return self.ends.get(0)

        def order(item: tuple[int, Event]) -> tuple[bool, float]:
            # torchrun stops the others when one has failed: to be interrupted may be a consequence
            rank, event = item
            t = event.get("t")
            return event.get("ended") == "interrupted", float(t) if isinstance(t, (int, float)) else float(rank)

        rank, event = min(failed, key=order)
        return _of_rank(event, rank) if rank and event.get("ended") != "interrupted" else event

    def silent_death(self) -> tuple[int, int] | None:
        """(exit code, local rank) of the process that failed first, if that one left no last words.

        torchrun knows to the second which one failed first. One that lost its connection was not it.
        """
        try:
            with self.log.open("rb") as file:
                file.seek(max(size_of(self.log) - _LOG_BYTES, self.log_from))
                text = file.read().decode("utf-8", errors="replace")
        except OSError:
            return None
        found = _FIRST_FAILURE.findall(text)
        if not found:
            return None
        code, first = (int(number) for number in found[-1])
        if first not in self.ends:
            return code, first
        if not any(said in str(self.ends[first].get("message")).lower() for said in _PEER_GONE):
            return None
        failures = [(int(code), int(rank)) for rank, code in _FAILURE.findall(text)]
        return next(((code, rank) for code, rank in failures if rank not in self.ends and code < 0), None)


def _of_rank(event: Event, rank: int) -> Event:
    message = str(event.get("message") or "")
    return {**event, "rank": rank, "message": message if message.startswith("rank ") else f"rank {rank}: {message}"}


def smaller_micro_batch(run: RunSpec) -> RunSpec | None:
    """The same effective batch in micro-batches of at most half the size; None if they cannot be smaller."""
    from dataclasses import replace

    whole = run.micro_batch_size * run.accumulation
    micro = next((n for n in range(run.micro_batch_size // 2, 0, -1) if whole % n == 0), None)
    return None if micro is None else replace(run, micro_batch_size=micro, accumulation=whole // micro)
