"""What the child tells the world while it runs: events, one a line, and the lock on the run folder. No torch here."""

from __future__ import annotations

import json
import os
import time
from math import isfinite
from pathlib import Path
from types import TracebackType
from typing import Any

from vramplan.errors import InputError

LAUNCHER = "VRAMPLAN_LAUNCHER"  # environment variable: the launcher's pid


class Progress:
    """Appends events to `progress.jsonl`: one JSON object a line, flushed, always with "t" and "event"."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_file() and path.stat().st_size:  # a run that was killed may have left half a line
            with path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")

    def __call__(self, event: str, **fields: Any) -> None:
        self.report({"event": event, **fields})

    def report(self, fields: dict[str, Any]) -> None:
        """Write one event given as a dict. NaN and infinity become null: JSON has no word for them."""
        finite = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in fields.items()}
        line = json.dumps({"t": round(time.time(), 3), **finite}, allow_nan=False) + "\n"
        with self.path.open("ab") as file:  # one write in append mode: a reader never sees half a line for long
            file.write(line.encode())

    def phase(self, name: str, message: str) -> None:
        self("phase", name=name, message=message)

    def warning(self, message: str) -> None:
        self("warning", message=message)


class Lock:
    """`RUN_DIR/lock` holds the pid of the process that trains there. A lock whose process is gone is taken over."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lock"

    def __enter__(self) -> Lock:
        for _ in range(2):
            try:
                descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                self._refuse_if_alive()
                self.path.unlink(missing_ok=True)
                continue
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{os.getpid()}\n")
            return self
        raise InputError(f"{self.path} was taken by another process just now", "wait for it, or choose another folder")

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.path.unlink(missing_ok=True)

    def _refuse_if_alive(self) -> None:
        try:
            pid = int(self.path.read_text()[:32])
        except (OSError, ValueError):
            return  # half-written by a process that died, or gone meanwhile
        launcher = os.environ.get(LAUNCHER, "")  # it locks the folder for its child; torchrun may stand between
        if pid in (os.getpid(), os.getppid()) or str(pid) == launcher or not _alive(pid):
            return
        raise InputError(
            f"{self.path.parent} is in use by process {pid}",
            "wait for it to end, stop it, or choose another folder with -o",
        )


def _alive(pid: int) -> bool:
    if pid <= 0:
        return False
    if os.name == "nt":  # os.kill would end the process there: rather believe the lock
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # not ours to signal, but there
        return True
    return True
