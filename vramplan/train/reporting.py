"""Where the numbers of a training go besides `progress.jsonl`: to tensorboard, wandb, trackio."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from vramplan.core.types import REPORTERS, Schedule
from vramplan.errors import InputError, VramplanError
from vramplan.train.meter import Meter

MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}


def usable_reporters(schedule: Schedule, run_dir: Path) -> tuple[str, ...]:
    """Who is reported to; "all" is everyone installed. What they write goes below `run_dir`, unless the user has said.

    VramplanError, with what to install, for a library that is not there.
    """
    asked = schedule.report_to
    if asked == ("all",):
        asked = tuple(name for name in REPORTERS if _installed(name))
    for name in asked:
        if name not in REPORTERS:
            raise InputError(f"--report-to {name} is not known", f"one of {', '.join(REPORTERS)}, all, none")
        if not _installed(name):
            raise VramplanError(f"--report-to {name} needs a library that is not installed", f"pip install {name}")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run_dir / "runs"))
    os.environ.setdefault("WANDB_DIR", str(run_dir))
    return asked


def _installed(name: str) -> bool:
    return any(find_spec(module) is not None for module in MODULES[name])


class Window:
    """The optimizer steps since the last log: their tokens, time and highest point.

    The first step of a process warms up: it is a window of its own, and counts in no rate.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.sum: Callable[[int], int] = int  # of several processes: over all of them
        self.begun: float | None = None
        self.tokens: Tensor | int = 0  # on the device: nothing waits at a micro-step
        self.open_tokens: Tensor | int = 0  # of the step in progress
        self.steps = self.windows = self.busy_steps = 0
        self.peak_bytes: int | None = None

    def begin_step(self) -> None:
        if self.begun is None:
            self.begun = time.perf_counter()

    def add_tokens(self, tokens: Tensor) -> None:
        self.open_tokens = self.open_tokens + tokens

    def forget(self) -> None:
        """The step in progress counts for nothing."""
        self.open_tokens = 0

    def end_step(self) -> None:
        self.steps += 1
        self.tokens, self.open_tokens = self.tokens + self.open_tokens, 0
        peak = self.meter.peak_bytes()
        if peak is not None:
            self.peak_bytes = max(peak, self.peak_bytes or 0)

    def close(self) -> dict[str, Any]:
        """What a log says of these steps. Call it once the device has been waited for."""
        tokens = self.sum(int(self.tokens))
        seconds = time.perf_counter() - self.begun if self.begun is not None else 0.0
        meter = self.meter
        meter.tokens += tokens
        self.windows += 1
        if self.windows > 1:
            meter.busy_s += seconds
            meter.busy_tokens += tokens
            self.busy_steps += self.steps
        said: dict[str, Any] = {
            "num_input_tokens_seen": meter.tokens,
            "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
            "oom_events": meter.oom_events,
        }
        reserved = meter.reserved_bytes()
        if self.peak_bytes is not None:
            said["peak_memory_bytes"] = self.peak_bytes
        if reserved is not None:
            said["reserved_memory_bytes"] = reserved
        self._seconds_per_step = seconds / max(self.steps, 1)
        self.begun, self.tokens, self.steps, self.peak_bytes = None, 0, 0, None
        return said

    def tokens_seen(self) -> int:
        """Of all whole steps, logged or not. Waits for the device."""
        return self.meter.tokens + self.sum(int(self.tokens))

    def settle(self) -> None:
        """The training is over: whole steps that nobody has logged count too."""
        self.meter.tokens, self.tokens = self.tokens_seen(), 0

    def seconds_per_step(self) -> float:
        """The mean so far; of the last window as long as there is only the one that warmed up."""
        return self.meter.busy_s / self.busy_steps if self.busy_steps else self._seconds_per_step
