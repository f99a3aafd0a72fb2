"""Time and memory of `vramplan diagnose`. `python tests/bench_diagnose.py [snapshot] [log] [start]`, all by default.

snapshot: one of 100 MB, as torch writes it (a list of frames for each allocation, the frames themselves shared). log:
1 GB and 2 GB of a training log through a pipe, with one report at its end, and a line of 500 MB. start: a short log,
with and without a run.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snapshot_tools import CALL, LOSS, Recorder, Stack, forward

from vramplan.core.units import MIB

SNAPSHOT_BYTES = 100 * 10**6
DEPTH = 29  # frames of an allocation in a step of transformers
LINE = b"{'loss': 1.2345, 'grad_norm': 0.5678, 'learning_rate': 0.00019}  34%|###4   | 340/1000 [05:41<11:02]\r\n"
REPORT = (
    b"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 352.00 MiB. GPU 0 has a total capacity of 6.00 GiB "
    b"of which 100.00 MiB is free. Including non-PyTorch memory, this process has 5.40 GiB memory in use. Of the "
    b"allocated memory 5.00 GiB is allocated by PyTorch, and 20.00 MiB is reserved by PyTorch but unallocated.\n"
)


class Torch(Recorder):
    """As torch writes them: deep stacks, each allocation with a list of its own."""

    def stack(self, stack: Stack) -> list[dict[str, Any]]:
        return list(super().stack((*stack[:1], *[CALL] * (DEPTH - len(stack)), *stack[1:]) if stack else ()))


def snapshot(size: int = SNAPSHOT_BYTES) -> bytes:
    """A pickle of about `size` bytes: whole training steps."""
    recorder = Torch()
    nothing: list[dict[str, Any]] = []
    start = recorder.at
    kept: list[int] = []
    while len(recorder.events) * 98 < size:
        for address in reversed(kept):
            recorder.free(address)
        recorder.at = start
        kept = [*forward(recorder, 32), recorder.alloc(256 * MIB, LOSS)]
    for event in recorder.events:
        if event["action"].startswith("free"):
            event["frames"] = nothing
    recorder.oom(352 * MIB, stack=LOSS)
    return pickle.dumps(recorder.snapshot(), 4)


def log(size: int) -> Iterator[bytes]:
    block = LINE * (2**20 // len(LINE))
    for _ in range(size // len(block)):
        yield block
    yield REPORT


def long_line(size: int) -> Iterator[bytes]:
    for _ in range(size // 2**20):
        yield b"x" * 2**20
    yield b"\n" + REPORT


def timed(words: list[str], blocks: Iterator[bytes] | None = None) -> str:
    """Wall and CPU seconds and the most memory of one call; `blocks` go through its stdin."""
    begun = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "vramplan", "diagnose", *words], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    try:
        for block in blocks or ():
            child.stdin.write(block)
        child.stdin.close()
    except BrokenPipeError:
        pass
    said = child.stdout.read()
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begun
    head = said.decode(errors="replace").split("\n")[0][:70]
    unit = 1 if sys.platform == "darwin" else 1024
    return (f"{wall:6.2f} s wall {used.ru_utime + used.ru_stime:6.2f} s CPU {used.ru_maxrss * unit / 2**20:7.0f} MiB  "
            f"exit {os.waitstatus_to_exitcode(status)}  {head}")  # fmt: skip


def main(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        short = Path(folder) / "log.txt"
        short.write_bytes(LINE * 1000 + REPORT)
        if "start" in parts:
            run = ["--model", "llama-3.1-8b", "--batch-size", "2", "--gpu", "rtx-4090"]
            timed([str(short)])  # the first reads everything from the disk
            print("short log           ", min(timed([str(short)]) for _ in range(5)))
            print("short log, --model  ", min(timed([str(short), *run]) for _ in range(5)))
        if "snapshot" in parts:
            path = Path(folder) / "oom.pickle"
            path.write_bytes(snapshot())
            print(f"snapshot, {path.stat().st_size / 10**6:4.0f} MB  ", timed([str(path)]))
        if "log" in parts:
            print("log, 1 GB           ", timed(["-"], log(10**9)))
            print("log, 2 GB           ", timed(["-"], log(2 * 10**9)))
            print("line of 500 MB      ", timed(["-"], long_line(500 * 10**6)))


if __name__ == "__main__":
    main(sys.argv[1:] or ["start", "snapshot", "log"])
