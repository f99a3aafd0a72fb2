"""What every picture of a step shares: which cards are drawn, what was measured, axes and colours. No rich here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10

from vramplan.core import curve
from vramplan.core.curve import Levels, Stretch
from vramplan.core.types import Diagnosis, GpuVerdict, Ledger, Measurement, Timeline
from vramplan.report.tables import GROUP_COLOURS

COLOURS = {**GROUP_COLOURS, "workspace": "#F0E442"}  # Okabe and Ito's too; too light for the words of a table
MOST_LINES = 4  # of cards, before only the two are drawn between which the run begins to fit
HEADROOM = 1.35  # times the peak: a card with more room would make the picture flat, and is named instead
MOSTLY_RESIDENT = 0.5  # share of the picture: then weights are cut off at the bottom
MEASURED_AS = {"loss": "forward"}  # phases of the picture -> of a measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One step, the cards it is held against, what was measured of it, and why it ended."""

    ledger: Ledger
    step: Timeline
    verdicts: tuple[GpuVerdict, ...] = ()
    measurement: Measurement | None = None
    diagnosis: Diagnosis | None = None  # of its end out of memory


def ascending(verdicts: Sequence[GpuVerdict]) -> list[GpuVerdict]:
    """The cards, smallest first."""
    return sorted(verdicts, key=lambda verdict: (verdict.usable_bytes, verdict.gpu))


def capacities(verdicts: Sequence[GpuVerdict]) -> list[GpuVerdict]:
    """The cards whose room is drawn, smallest first: all, or of many the largest that is too small and the smallest
    that is not."""
    found = ascending(verdicts)
    if len(found) <= MOST_LINES:
        return found
    small = [verdict for verdict in found if verdict.verdict == "does_not_fit"][-1:]
    return small + [verdict for verdict in found if verdict.verdict != "does_not_fit"][:1]


def span(found: Levels, cards: Sequence[GpuVerdict]) -> tuple[int, int, list[GpuVerdict]]:
    """(bottom, top, cards within) of the picture in bytes. Where the weights are most of it, the bottom is theirs: all
    that is below is nothing but weights."""
    peak = found.totals[found.peak]
    inside = [card for card in cards if card.usable_bytes <= HEADROOM * peak]
    top = max([peak, *(card.usable_bytes for card in inside)])
    weights = min(found.groups.get("weights", [0]))
    bottom = min([weights, *(card.usable_bytes for card in inside)])
    step = tick_step(top - bottom)
    return (max(bottom - step // 2, 0) // step * step if weights > MOSTLY_RESIDENT * top else 0), top, inside


def tick_step(length: int, most: int = 6) -> int:
    """1, 2 or 5 times a power of ten in GiB or MiB, so that `length` bytes hold at most `most` of them."""
    unit = 2**30 if length > 2**30 else 2**20
    least = max(length / unit / most, 1e-3)
    power: float = 10.0 ** floor(log10(least))
    return max(round(next(n * power for n in (1, 2, 5, 10) if n * power >= least * 0.999) * unit), 1)


def ticks(bottom: int, top: int, most: int = 6) -> list[int]:
    step = tick_step(top - bottom, most)
    return list(range(-(-bottom // step) * step, top + 1, step))


def phase_of(part: Stretch) -> str:
    """The phase of a measurement that this one is in."""
    return MEASURED_AS.get(part.phase, part.phase)


def measured_peaks(picture: Picture) -> list[tuple[str, int, int]]:
    """(phase, the most that was allocated in it, what the step has there) of what was measured, phase by phase.

    A phase begins with what the one before has left, as the counters do that it was measured with.
    """
    if picture.measurement is None:
        return []
    allocated = curve.levels(picture.step).allocated
    highest: dict[str, int] = {}
    for part in curve.stretches(picture.step):
        size = max(allocated[max(part.first - 1, 0) : part.end])
        highest[phase_of(part)] = max(highest.get(phase_of(part), 0), size)
    peaks = {phase.name: phase.peak_bytes for phase in picture.measurement.phases}
    return [(phase, peak, size) for phase, size in highest.items() if (peak := peaks.get(phase)) is not None]


def micro_steps(picture: Picture) -> str:
    """What is not drawn: micro-steps after the second."""
    count = picture.ledger.run.accumulation
    return f"Two of {count} micro-steps are drawn: the others are as the second." if count > 2 else ""


def where(step: Timeline, point: int) -> str:
    """ "backward of layer 31", "loss"."""
    passage = curve.place(step, point)
    return f"{passage.phase} of layer {passage.layer}" if passage.layer >= 0 else passage.phase
