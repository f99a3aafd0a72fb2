"""Forked processes of `bench_oom.py`: jobs, another user of the card, and the parent's imports without touching it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from oom_cases import Job

from vramplan.core.types import GpuProfile

Row = dict[str, Any]
LATE = "BENCH_OOM_LATE_IMPORT"  # environment: every child imports bitsandbytes for itself
LIMIT_S = 90  # of one process


def fork(work: Callable[[], int]) -> int:
    """A child that does `work` and ends with its result; its pid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return pid


def wait(pid: int, limit_s: float = LIMIT_S) -> int:
    """Its exit code; killed after a while."""
    end = time.monotonic() + limit_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def work_of(job: Job) -> Callable[[], int]:
    def work() -> int:
        import oom_child

        return oom_child.main(job)

    return work


def played(job: Job) -> Row:
    """The job in a process of its own: what it wrote, and the path of its log."""
    shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True)
    code = wait(fork(work_of(job)))
    result = job.folder / "result.json"
    row: Row = json.loads(result.read_text()) if result.is_file() else {"ended": "error", "killed": code}
    if row["ended"] == "error":
        log = job.folder / "log.txt"
        row["tail"] = log.read_text(errors="replace")[-800:] if log.is_file() else ""
    return row | {"cap_bytes": job.cap_bytes}


@contextmanager
def held(left_bytes: int, gpu: GpuProfile) -> Iterator[None]:
    """The card full but for `left_bytes` and one context, in the hands of another process."""
    reader, writer = os.pipe()

    def work() -> int:
        import oom_child

        oom_child.hold(left_bytes, gpu.context_bytes, writer)
        return 0

    pid = fork(work)
    os.close(writer)
    try:
        if os.read(reader, 1) != b".":
            raise RuntimeError("the other process could not fill the card")
        yield
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        wait(pid)


def import_all(gpu: GpuProfile) -> None:
    """Import what the children need, without touching the card. bitsandbytes asks for its compute capability."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    if os.environ.get(LATE):  # PEFT brings bitsandbytes
        from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

        return
    asked = torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: gpu.compute_capability
    try:
        import oom_child  # noqa: F401
    finally:
        torch.cuda.get_device_capability = asked
    if torch.cuda.is_initialized() or wait(fork(_touches)) != 0:
        print("a forked child cannot use the card: every child imports bitsandbytes for itself", flush=True)
        os.environ[LATE] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])


def _touches() -> int:
    import bitsandbytes
    import torch

    bitsandbytes.functional.quantize_4bit(torch.ones(64, 64, dtype=torch.bfloat16, device="cuda"))
    return 0
