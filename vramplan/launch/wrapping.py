"""Any command of the user's, with its output kept, its memory on the cards sampled, and a snapshot at an OOM.

The command is started as it is; its environment gets a folder on PYTHONPATH (`hook/`), through which Python scripts
write the snapshot. Nothing of it is imported here, and it may be no Python at all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vramplan.errors import InputError
from vramplan.sources.records import write_text

HOOK = Path(__file__).parent / "hook"
FOLDER = "VRAMPLAN_SNAPSHOT_DIR"  # as hook/sitecustomize.py reads it
LOG, SAMPLES, ENDED = "log.txt", "gpu.jsonl", "ended.json"
_CHUNK = 65536
NOT_FOUND, NOT_STARTED = 127, 126  # what a shell says of a command that is not there, or cannot be started


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrapped:
    """How the command ended. Bytes are the most that any card showed; None without NVML, or where it does not tell."""

    exit_code: int
    seconds: float
    card_bytes: int | None
    process_bytes: int | None
    snapshots: tuple[Path, ...]


def wrap(command: Sequence[str], folder: Path, *, snapshot: bool = True, every_s: float = 1.0) -> Wrapped:
    """Run the command to its end, its output shown as it comes and kept in `folder`. InputError if it cannot start.

    `exit_code` is the command's, 128 + n where signal n ended it. Ctrl-C reaches the command; this waits for it.
    """
    begun = time.monotonic()
    with (folder / LOG).open("wb") as log:
        child = _start(command, folder, snapshot)
        with _signals(child), Samples(folder / SAMPLES, child.pid, every_s) as samples:
            _show(child, log)
            code = child.wait()
    wrapped = Wrapped(
        exit_code=code if code >= 0 else 128 - code,
        seconds=round(time.monotonic() - begun, 1),
        card_bytes=samples.card_bytes,
        process_bytes=samples.process_bytes,
        snapshots=tuple(sorted(folder.glob("oom-*.pickle"))),
    )
    _keep(command, wrapped, folder)
    return wrapped


def _start(command: Sequence[str], folder: Path, snapshot: bool) -> subprocess.Popen[bytes]:
    environment = {"PYTHONUNBUFFERED": "1", **os.environ}
    if snapshot:
        others = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(HOOK), *([others] if others else [])])
        environment[FOLDER] = str(folder.absolute())
    try:
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise InputError(f"there is no command {command[0]!r}", "write it as in the shell, after --") from error
    except OSError as error:
        raise InputError(f"{command[0]} cannot be started: {error.strerror or error}") from error


def _show(child: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Pass both streams on as they come, byte by byte for progress bars, and into the log."""
    lock = threading.Lock()

    def copy(source: IO[bytes], target: Any) -> None:
        while chunk := os.read(source.fileno(), _CHUNK):
            with lock:
                log.write(chunk)
                log.flush()
            with suppress(OSError, ValueError):  # nobody reads any more; the command goes on
                target.buffer.write(chunk)
                target.flush()

    assert child.stdout is not None and child.stderr is not None
    pairs = ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
    threads = [threading.Thread(target=copy, args=pair, daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    child.wait()
    for thread in threads:  # a grandchild that goes on may keep them open
        thread.join(timeout=5)


@contextmanager
def _signals(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C of a terminal reaches the command by itself; whatever else is sent to us is handed on."""

    def forward(number: int, _frame: object) -> None:
        if not (number == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()):
            with suppress(OSError):
                child.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------- samples
class Samples:
    """Looks at every visible card now and then, in a thread of its own, and writes a line for each that is in use."""

    def __init__(self, path: Path, pid: int, every_s: float) -> None:
        self.path, self.pid, self.every_s = path, pid, every_s
        self.card_bytes: int | None = None
        self.process_bytes: int | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Samples:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        with suppress(Exception):  # without NVML, or when it goes away, the command runs as well
            from vramplan.sources.gpu import Nvml

            with Nvml() as nvml, self.path.open("a", encoding="utf-8") as file:
                begun = time.monotonic()
                while not self._over.is_set():
                    for row in self._look(nvml):
                        file.write(json.dumps({"t": round(time.monotonic() - begun, 2), **row}) + "\n")
                    file.flush()
                    self._over.wait(self.every_s)

    def _look(self, nvml: Any) -> Iterator[dict[str, Any]]:
        family = descendants(self.pid)
        for index in range(nvml.count()):
            used = nvml.used_bytes(index)
            own = [size for pid, size in nvml.sizes(index).items() if pid in family and size is not None]
            process = sum(own) if own else None  # in a container NVML knows them by other numbers
            self.card_bytes = _most(self.card_bytes, used)
            self.process_bytes = _most(self.process_bytes, process)
            if used is not None:
                yield {"gpu": index, "used_bytes": used, "process_bytes": process}


def _most(known: int | None, new: int | None) -> int | None:
    return known if new is None else max(new, known or 0)


def descendants(pid: int) -> set[int]:
    """The process and its children's children, where /proc tells; else the process alone."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # gone meanwhile
            parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
    family = {pid}
    while new := {child for child, parent in parents.items() if parent in family} - family:
        family |= new
    return family


def _keep(command: Iterable[str], wrapped: Wrapped, folder: Path) -> None:
    text = {
        "command": list(command), "exit_code": wrapped.exit_code, "seconds": wrapped.seconds,
        "card_bytes": wrapped.card_bytes, "process_bytes": wrapped.process_bytes,
        "snapshots": [path.name for path in wrapped.snapshots],
    }  # fmt: skip
    write_text(folder / ENDED, json.dumps(text, indent=2) + "\n")
