"""What can be seen of a running child from outside: the events it appends, and its memory on the card."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

_MAX_LINE_BYTES = 2**20


class Tail:
    """Reads the JSON objects that are appended to a file. Half a line waits; a line that is no object is dropped."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self.position = size_of(path) if from_end else 0
        self.rest = b""
        if from_end:
            _finish_line(path)
            self.position = size_of(path)

    def read(self) -> list[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                new = file.read()
        except OSError:  # not there yet
            return []
        self.position += len(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        if len(self.rest) > _MAX_LINE_BYTES:
            self.rest = b""
        return [event for event in map(_event, lines) if event is not None]


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line) if len(line) <= _MAX_LINE_BYTES else None
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _finish_line(path: Path) -> None:
    """A run that was killed may have left half a line; the next event must not be glued to it."""
    if size_of(path):
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class Card:
    """Memory of a process on the card it uses, seen through NVML; None where anything is in the way."""

    def __init__(self, pid: int, index: int = 0) -> None:
        self.pid, self.index = pid, index
        self.nvml: Any = None
        self.before = 0
        self.peak: int | None = None

    def __enter__(self) -> Card:
        try:
            from vramplan.sources.gpu import Nvml

            nvml = Nvml().__enter__()
        except Exception:
            return self
        self.nvml = nvml
        try:
            self.before = nvml.used_bytes(self.index) or 0
        except Exception:
            self.__exit__()
        return self

    def __exit__(self, *error: object) -> None:
        from contextlib import suppress

        nvml, self.nvml = self.nvml, None
        if nvml is not None:
            with suppress(Exception):
                nvml.__exit__(None, None, None)

    def sample(self) -> int | None:
        """Look once; returns the most bytes seen so far."""
        now = self.now()
        if now is not None:
            self.peak = max(now, self.peak or 0)
        return self.peak

    def now(self) -> int | None:
        """Its bytes at this moment."""
        if self.nvml is None:
            return None
        try:
            own = self.nvml.process_bytes(self.index, self.pid)
            if own is not None:
                return int(own)
            used = self.nvml.used_bytes(self.index)  # in a container NVML knows the child by another number
            return None if used is None else max(int(used) - self.before, 0)
        except Exception:
            return None
