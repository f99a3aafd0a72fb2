"""Measured runs of a card -> its overheads: context, reserved over allocated, factors of speed.

Nothing here touches what tensors take: allocated bytes are arithmetic, and what differs from it is a defect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, log
from statistics import median
from typing import NamedTuple

from .speed import rates, seconds_of
from .timeline import play
from .types import Calibration, GpuProfile, MeasuredPhase, Measurement, SpeedFactors
from .units import MIB
from .work import Work, work

# What a factor may be, so that a bad measurement cannot steer a plan: (least, most). A share can be above 1 where a
# tensor that is counted as moved stays in the cache.
LIMITS = {
    "matmul_share": (0.05, 1.0),
    "attention_share": (0.05, 1.0),
    "bandwidth_share": (0.05, 2.0),
    "launch_seconds": (2e-6, 1e-3),
    "begin_seconds": (1e-7, 1e-4),
}
PRIOR = 1e-4  # weight of the default: it decides only what the measurements leave open
ROBUST = 0.1  # an error of the logarithm beyond which a row pulls no harder
CONTEXT_BYTES = (64 * MIB, 4096 * MIB)
CONTEXT_SPREAD_BYTES = 128 * MIB  # the largest reading that is this near the middle one is believed
RESERVED_FACTOR = (1.0, 1.25)


class Timed(NamedTuple):
    """One measured micro-step and what it had to do."""

    work: Work
    seconds: float


def calibrate(
    measurements: Sequence[Measurement], card: GpuProfile, versions: dict[str, str], made: str
) -> Calibration:
    """What these runs on `card` say. Each carries its prediction, made without any calibration.

    Where nothing was measured (a driver that does not tell bytes, a card whose rates are not known) the card's own
    values stay.
    """
    timed = [row for m in measurements if (row := timed_step(m)) is not None]
    known = rates(card)
    speed = fit_speed(timed, *known) if known and timed else SpeedFactors()
    return Calibration(
        card=card.name,
        total_bytes=card.total_bytes,
        versions=tuple(sorted(versions.items())),
        context_bytes=context_bytes(measurements) or card.context_bytes,
        reserved_factor=reserved_factor(measurements),
        speed=speed,
        rows=len(measurements),
        made=made,
        error=mean_error(timed, speed, *known) if known and timed else None,
    )


# ---------------------------------------------------------------------------------------------------------- bytes
def context_bytes(measurements: Sequence[Measurement]) -> int | None:
    """What a process takes besides what PyTorch has reserved: the largest reading that is no outlier."""
    readings = []
    for phase in _held(measurements):
        if phase.process_bytes is not None and phase.reserved_bytes is not None:
            size = phase.process_bytes - phase.reserved_bytes
            if CONTEXT_BYTES[0] <= size <= CONTEXT_BYTES[1]:
                readings.append(size)
    if not readings:
        return None
    middle = median(readings)
    return max(size for size in readings if size <= middle + CONTEXT_SPREAD_BYTES)


def reserved_factor(measurements: Sequence[Measurement]) -> float:
    """Reserved over allocated as measured, over the same as replayed: the middle one, never below 1."""
    ratios = []
    for m in measurements:
        step = next((phase for phase in m.phases if phase.name == "step"), None)
        if m.prediction is None or step is None or not step.peak_bytes or not step.reserved_bytes:
            continue
        peak = m.prediction.peak
        ratios.append(step.reserved_bytes / step.peak_bytes / (peak.reserved_bytes / peak.allocated_bytes))
    low, high = RESERVED_FACTOR
    return round(min(max(median(ratios), low), high), 4) if ratios else low


def _held(measurements: Sequence[Measurement]) -> list[MeasuredPhase]:
    """The moment at which a child held its memory for the driver to be asked."""
    return [phase for m in measurements for phase in m.phases if phase.name == "evaluation"]


# ---------------------------------------------------------------------------------------------------------- speed
def timed_step(measurement: Measurement) -> Timed | None:
    """The measured seconds of a micro-step beside its work; None if it was not timed."""
    if measurement.prediction is None or measurement.tokens_per_s <= 0 or measurement.gpu is None:
        return None
    model, run = measurement.prediction.model, measurement.prediction.run
    tokens = run.micro_batch_size * run.seq_len
    return Timed(work(model, run, play(model, run, measurement.gpu)), tokens / measurement.tokens_per_s)


def fit_speed(rows: Sequence[Timed], flops_per_s: int, bandwidth_bytes_per_s: int) -> SpeedFactors:
    """The factors with the least squared errors of the logarithm of time, large errors counting less.

    A descent along one factor at a time: the time is a maximum, not smooth, and there are only five. What no row
    depends on stays at its default.
    """
    start = SpeedFactors()
    names = tuple(LIMITS)
    point = [log(getattr(start, name)) for name in names]
    default = list(point)

    def loss(at: Sequence[float]) -> float:
        speed = _factors(names, at)
        errors = [log(seconds_of(row.work, speed, flops_per_s, bandwidth_bytes_per_s) / row.seconds) for row in rows]
        return sum(map(_huber, errors)) + PRIOR * sum((a - b) ** 2 for a, b in zip(at, default, strict=True))

    point = _descend(loss, point, [tuple(map(log, LIMITS[name])) for name in names])
    return _factors(names, point)


def _factors(names: Sequence[str], logs: Sequence[float]) -> SpeedFactors:
    return SpeedFactors(**{name: float(f"{exp(value):.4g}") for name, value in zip(names, logs, strict=True)})


def _huber(error: float) -> float:
    size = abs(error)
    return size * size if size <= ROBUST else ROBUST * (2 * size - ROBUST)


def _descend(
    loss: Callable[[Sequence[float]], float], point: list[float], limits: Sequence[tuple[float, ...]]
) -> list[float]:
    """Steps along one coordinate that improve are taken, and halved when none does."""
    best, length = loss(point), 0.5
    while length > 1e-4:
        improved = False
        for axis, (low, high) in enumerate(limits):
            for step in (length, -length):
                moved = list(point)
                moved[axis] = min(max(point[axis] + step, low), high)
                found = loss(moved)
                if found < best - 1e-12:
                    point, best, improved = moved, found, True
        if not improved:
            length /= 2
    return point


def mean_error(rows: Sequence[Timed], speed: SpeedFactors, flops_per_s: int, bandwidth_bytes_per_s: int) -> float:
    """The mean of |modelled / measured - 1| over the rows."""
    ratios = [seconds_of(row.work, speed, flops_per_s, bandwidth_bytes_per_s) / row.seconds for row in rows]
    return round(sum(abs(ratio - 1) for ratio in ratios) / len(ratios), 4)
