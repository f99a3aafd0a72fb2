"""One short run on the real card, in a folder that is gone afterwards: what `fit --probe` and `calibrate` are made of.

Nothing is downloaded (the weights are random) and nothing of any training is touched: no data, no checkpoint, no
adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vramplan.core.types import GpuProfile, MeasuredPhase, Measurement, RunSpec, Schedule
from vramplan.errors import BAD_INPUT, ENDED_IN_OOM, OK, InputError, VramplanError
from vramplan.launch.child import OnEvent, launch
from vramplan.launch.ending import INTERRUPTED, log_tail
from vramplan.launch.folder import prepare_run_dir
from vramplan.launch.tenants import Say, Tenants

STEPS = 10  # at most: long ones end sooner (train/probe.py)
CAP_VARIABLE = "VRAMPLAN_CAP_BYTES"  # train/probe.py reads it


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a child measured, or that it ended out of memory (`measurement` is what it had by then, if anything)."""

    finished: bool
    measurement: Measurement | None
    message: str = ""
    disturbances: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where children run: the card, its index, an open NVML session. `log` gets the output of one that failed."""

    card: GpuProfile
    nvml: Any
    index: int = 0
    on_event: OnEvent = lambda event: None
    log: Say = lambda text: None


def probe_run(run: RunSpec) -> RunSpec:
    """What is played of a run: its largest batch with random weights, two micro-batches a step where it has more."""
    schedule = Schedule(
        max_steps=STEPS,
        save_steps=0,
        max_grad_norm=run.schedule.max_grad_norm,
        cuda_graphs=run.schedule.cuda_graphs,
        full_determinism=run.schedule.full_determinism,
    )
    accumulation = min(run.accumulation, 2)
    return replace(run, accumulation=accumulation, random_weights=True, model_path=None, data=None, schedule=schedule)


def play(run: RunSpec, place: Place, *, cap_bytes: int | None = None) -> Played:
    """Play `run` in a child and watch the card meanwhile.

    Raises KeyboardInterrupt if that was interrupted, and what the child says of any end but a good one or lack of
    memory.
    """
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="vramplan-probe-") as name, Tenants(place.nvml, place.index) as tenants:
        folder = Path(name)
        prepare_run_dir(folder, run, None, resume=False)
        held = _Held(tenants, place)
        outcome = launch(
            folder,
            probe=True,
            environment=_environment(place, cap_bytes),
            on_event=held.on_event,
            on_sample=tenants.sample,
        )
        if outcome.exit_code == INTERRUPTED:
            raise KeyboardInterrupt
        if outcome.exit_code not in (OK, ENDED_IN_OOM):
            place.log(log_tail(folder / "log.txt"))
            error = InputError if outcome.exit_code == BAD_INPUT else VramplanError
            raise error(outcome.message or "the probing process died", outcome.hint if error is InputError else "")
    return Played(
        finished=outcome.exit_code == OK,
        measurement=outcome.measurement and held.completed(outcome.measurement),
        message=outcome.message,
        disturbances=tenants.disturbances,
    )


def _environment(place: Place, cap_bytes: int | None) -> dict[str, str]:
    """The child takes CUDA's first card, which is then this one: of several, CUDA's order may not be the driver's."""
    chosen = {} if place.nvml.count() == 1 else {"CUDA_VISIBLE_DEVICES": place.nvml.uuid(place.index)}
    return chosen if cap_bytes is None else {**chosen, CAP_VARIABLE: str(cap_bytes)}


class _Held:
    """Looks at the card when the child says that it holds what it needed, and passes all events on."""

    def __init__(self, tenants: Tenants, place: Place) -> None:
        self.tenants, self.place = tenants, place
        self.process_bytes: int | None = None

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "held":
            reserved = event.get("reserved_bytes")
            known = reserved if type(reserved) is int else None
            self.process_bytes = self.tenants.held(known, self.place.card.context_bytes)
        else:
            self.place.on_event(event)

    def completed(self, measurement: Measurement) -> Measurement:
        """With our view of the card where the driver does not tell the child about itself, as in a container."""

        def complete(phase: MeasuredPhase) -> MeasuredPhase:
            if phase.name not in ("step", "evaluation") or phase.process_bytes is not None:
                return phase
            return replace(phase, process_bytes=self.process_bytes)

        return replace(measurement, phases=tuple(map(complete, measurement.phases)))


def most(measurement: Measurement | None, what: str) -> int | None:
    """The most of `what` (peak_bytes, reserved_bytes, process_bytes) in the step and in the evaluation."""
    phases = measurement.phases if measurement is not None else ()
    sizes = [getattr(phase, what) for phase in phases if phase.name in ("step", "evaluation")]
    return max((size for size in sizes if size is not None), default=None)
