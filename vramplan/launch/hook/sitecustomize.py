"""Python itself imports this in every script that `vramplan run` starts, since its folder comes first on PYTHONPATH.

When the script imports torch, and then uses CUDA, allocations are recorded and a memory snapshot is written whenever
memory runs out. It touches no card by itself, changes nothing else, and never raises: the script is not ours.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

FOLDER, ENTRIES, MOST = "VRAMPLAN_SNAPSHOT_DIR", 200_000, 5


def arm(torch: Any) -> None:
    """Record, and write oom-PID.pickle when memory runs out: the last of the first `MOST` times is what stays."""
    folder, written = os.environ[FOLDER], 0

    def observe(device: int, alloc: int, device_alloc: int, device_free: int) -> None:
        nonlocal written
        if written >= MOST:
            return
        written += 1
        with contextlib.suppress(Exception):
            path = os.path.join(folder, f"oom-{os.getpid()}.pickle")
            torch.cuda.memory._dump_snapshot(path + ".part")
            os.replace(path + ".part", path)

    def attach() -> None:
        with contextlib.suppress(Exception):
            torch.cuda.memory._record_memory_history(max_entries=ENTRIES, stacks="python")
            torch._C._cuda_attach_out_of_memory_observer(observe)

    with contextlib.suppress(Exception):
        torch.cuda._lazy_call(attach)  # when CUDA is used, in whatever process that is


class WhenImported:
    """A finder that lets the others find torch, and has `arm` called once it is there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path)
        spec: Any = next((each for each in found if each is not None), None)
        load = getattr(getattr(spec, "loader", None), "exec_module", None)
        if load is None:
            return spec

        def exec_module(module: Any) -> None:
            load(module)
            with contextlib.suppress(Exception):
                arm(module)

        with contextlib.suppress(Exception):  # a loader that takes no attributes is left as it is
            spec.loader.exec_module = exec_module
        return spec


def others_own() -> None:
    """The sitecustomize that would have been imported without this one."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p or ".") != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


if os.environ.get(FOLDER):
    sys.meta_path.insert(0, WhenImported())
others_own()
