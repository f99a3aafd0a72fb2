"""Asks the tracer, a process of its own: this one never imports torch."""

from __future__ import annotations

import json
import sys
from typing import Any

from vramplan.core.types import GpuProfile, Ledger, ModelSpec, RunSpec
from vramplan.errors import BAD_INPUT, InputError, VramplanError
from vramplan.sources import records


def trace(
    config: dict[str, Any], spec: ModelSpec | None, run: RunSpec, gpu: GpuProfile, *, full_depth: bool = False
) -> Ledger:
    """The ledger of `run` from the real libraries: some seconds for their import, two for the trace.

    Raises what the tracer says (`InputError` or `VramplanError`), MissingExtra's sentence among it.
    """
    import subprocess

    request = {
        "config": config,
        "spec": records.encode(spec) if spec else None,
        "run": records.encode(run),
        "gpu": records.encode(gpu),
        "full_depth": full_depth,
    }
    child = subprocess.run(
        [sys.executable, "-m", "vramplan.trace"], input=json.dumps(request).encode(), capture_output=True, check=False
    )
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise VramplanError(f"the tracer died (exit code {child.returncode})", "".join(last)[:300]) from None
    if child.returncode:
        kind = InputError if child.returncode == BAD_INPUT else VramplanError
        raise kind(answer["error"], answer["hint"])
    return records.decode(answer, Ledger)
