"""Who else is on a card, as far as it can be known.

Under WSL the driver has no sizes. In a container it may list the processes by the numbers that they have on the host,
which mean something else here or nothing; such a number, and the name that NVML finds for it, would name the wrong
process. They are believed where this process sees the host's numbers, or where the numbered process has NVIDIA's
library loaded.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from vramplan.core.types import GpuProcess
from vramplan.sources.nvml_calls import Calls, whole, words

PROC = "/proc"
_FIRST_NAMESPACE = "pid:[4026531836]"  # the kernel's own constant, PROC_PID_INIT_INO
_MAPS_BYTES = 2**22
_MARKS = (b"libcuda", b"libnvidia", b"/dev/nvidia", b"/dev/dxg")
_KINDS = ("Compute", "Graphics", "MPSCompute")


class Listed(NamedTuple):
    """One process as NVML lists it. `pid` is None where NVML has no number for it."""

    pid: int | None
    used_bytes: int | None
    graphics: bool


def listed(calls: Calls, handle: Any, total: int) -> list[Listed]:
    """The processes on a card, each once. A size of 0, or of all of the card, is none."""
    known: dict[int, Listed] = {}
    nameless: list[Listed] = []
    for kind in _KINDS:
        name = f"nvmlDeviceGet{kind}RunningProcesses"
        for process in calls.first((name, f"{name}_v2"), handle) or ():
            found = Listed(
                whole(process.pid, 1, 2**32 - 2), whole(process.usedGpuMemory, 1, total - 1), kind == "Graphics"
            )
            if found.pid is not None:
                known[found.pid] = _joined(known.get(found.pid, found), found)
            elif found.used_bytes is not None:
                nameless.append(found)
    return [*known.values(), *nameless]


def _joined(one: Listed, other: Listed) -> Listed:
    """A process that computes and draws is in two lists, with the same size."""
    size = max(one.used_bytes or 0, other.used_bytes or 0) or None
    return Listed(one.pid, size, one.graphics and other.graphics)


def others(calls: Calls, found: list[Listed], used: int) -> tuple[GpuProcess, ...]:
    """All but this process, largest first. Sizes that add up to more than what is used are none."""
    believed = sum(process.used_bytes or 0 for process in found) <= used
    processes = []
    for process in found:
        pid = process.pid if process.pid is not None and _is_here(process.pid) else None
        if pid == os.getpid():
            continue
        processes.append(
            GpuProcess(
                pid=pid,
                name=name_of(calls, pid) if pid is not None else None,
                used_bytes=process.used_bytes if believed else None,
                graphics=process.graphics,
            )
        )
    return tuple(sorted(processes, key=lambda process: (-(process.used_bytes or 0), process.pid or 2**32)))


def name_of(calls: Calls, pid: int) -> str | None:
    """The program that runs under this number; None if it is not one of this process's namespace."""
    name = words(calls.may("nvmlSystemGetProcessName", pid)) if _is_here(pid) else None
    return _program(name) if name else None


def _program(path: str) -> str | None:
    """ "C:\\\\Games\\\\game.exe", "/opt/chrome --type=gpu" -> the program alone."""
    return path.partition(" -")[0].replace("\\", "/").rstrip("/").rpartition("/")[2] or None


def _is_here(pid: int) -> bool:
    """Is this number one of this process's own namespace?"""
    try:
        if os.readlink(f"{PROC}/self/ns/pid") == _FIRST_NAMESPACE:  # noqa: PTH115
            return True
    except OSError:  # no Linux: nothing hides numbers
        return True
    try:
        with open(f"{PROC}/{pid}/maps", "rb") as file:  # noqa: PTH123
            mapped = file.read(_MAPS_BYTES)
    except OSError:
        return False
    return any(mark in mapped for mark in _MARKS)
