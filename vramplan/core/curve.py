"""A step as it goes: every birth and death with what is on the card after it. The picture of a ledger.

Nothing is drawn here and nothing is made up: a point of the curve is the card after one event of the played step. The
points are in the order of the step; how long the card takes between two of them is not known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

from .allocator import GRANULE, by_pool
from .ledger import GROUPS, NO_CARD, loaded
from .replay import play_run
from .resident import state_births
from .tape import WORKSPACE_KEY
from .timeline import play
from .types import GpuProfile, Ledger, Passage, TensorKind, Timeline
from .unroll import LAYER_SHIFT, Section, Unrolled

OVERHEAD, TAILS_KEY = "overhead", "overhead.rounding"
STACK = ("weights", "optimizer", "adapter", "activations", "loss", "workspace", OVERHEAD)  # from the bottom
LOSS_SECTIONS = ("head", "autocast exit")  # of the forward


# ------------------------------------------------------------------------------------------------------- playing
def timeline(ledger: Ledger, gpu: GpuProfile | None = None) -> Timeline:
    """The step that `ledger` is the highest point of, played again on the same chip. Raises Unplannable."""
    card = gpu or NO_CARD
    unrolled = play(ledger.model, ledger.run, card)
    native = ledger.run.levers.allocator == "native"
    kinds = _Kinds(unrolled)
    resident = tuple(
        kinds.row(line.key, line.label, line.bytes)
        for line in ledger.lines
        if line.key not in kinds.step_keys and not (native and line.key == TAILS_KEY)
    )
    passages = tuple(kinds.passages())
    here = sum(kinds.rows[k - 1].bytes for k in resident if _allocated(kinds.rows[k - 1]))
    return Timeline(
        kinds=tuple(kinds.rows),
        resident=resident,
        passages=passages,
        tails=_tails(ledger, unrolled, here) if native else (),
    )


def _allocated(kind: TensorKind) -> bool:
    """Whether `torch.cuda.memory_allocated` counts it."""
    return kind.group != OVERHEAD or kind.key == TAILS_KEY


class _Kinds:
    """Numbers the tensors of a step by what they are, whatever layer they belong to."""

    def __init__(self, unrolled: Unrolled) -> None:
        self.unrolled = unrolled
        self.step_keys = {row[0] for row in unrolled.info[1:] if row[0] != WORKSPACE_KEY}
        self.rows: list[TensorKind] = []
        self._known: dict[TensorKind, int] = {}
        self._of_info: dict[int, int] = {}

    def _number(self, kind: TensorKind) -> int:
        if kind not in self._known:
            self.rows.append(kind)
            self._known[kind] = len(self.rows)
        return self._known[kind]

    def row(self, key: str, label: str, size: int) -> int:
        head = key.partition(".")[0]
        return self._number(TensorKind(key=key, name=label, group=GROUPS.get(head, OVERHEAD), bytes=size))

    def _event(self, event: int) -> int:
        ident = abs(event)
        if ident not in self._of_info:
            key, name, rows, columns, dtype, size = self.unrolled.info[ident]
            group = GROUPS[key.partition(".")[0]]
            kind = TensorKind(key=key, name=name, group=group, bytes=size, rows=rows, columns=columns, dtype=dtype)
            self._of_info[ident] = self._number(kind)
        return self._of_info[ident] if event > 0 else -self._of_info[ident]

    def passages(self) -> Iterable[Passage]:
        known: dict[int, tuple[int, ...]] = {}
        for section, layer, changes in self.unrolled.steps():
            if id(changes) not in known:
                known[id(changes)] = tuple(self._event(event) for event, _, _ in changes)
            if known[id(changes)]:
                yield Passage(phase=_phase(section), layer=layer, events=known[id(changes)])


def _phase(section: Section) -> str:
    """The head and the loss are a phase of their own here."""
    return "loss" if section.phase == "forward" and section.name in LOSS_SECTIONS else section.phase


def _tails(ledger: Ledger, unrolled: Unrolled, resident_bytes: int) -> tuple[int, ...]:
    """What the native allocator counts above the tensors: the second step, event by event."""
    _, before = loaded(ledger.model, replace(ledger.run, random_weights=True))  # as `ledger` lays it out
    memory = before.clone()
    play_run(unrolled, memory, state_births(ledger.model, ledger.run), steps=1)
    tensors = resident_bytes
    out = [memory.allocated - tensors]
    live: dict[int, int] = {}
    sizes = unrolled.sums.by_event(unrolled.kind_sizes)  # of deaths negative
    for _, layer, changes in unrolled.steps():
        for event, key, relative in changes:
            memory.run(by_pool([(key, sizes[event] // GRANULE, relative)]), layer << LAYER_SHIFT, live)
            tensors += sizes[event]
            out.append(memory.allocated - tensors)
    return tuple(out)


# ------------------------------------------------------------------------------------------------------- reading
class Levels(NamedTuple):
    """Bytes on the card before the first event and after each: of every group that has any, from the bottom of the
    stack, and of all. `allocated` is without what PyTorch's allocator does not hand out; `peak` is its first top."""

    groups: dict[str, list[int]]
    totals: list[int]
    allocated: list[int]
    peak: int


class Stretch(NamedTuple):
    """Points `first` to `end` of the curve, without `end` itself, are of one phase."""

    phase: str
    first: int
    end: int


def levels(step: Timeline) -> Levels:
    """The curve itself: one point more than there are events."""
    held: Counter[str] = Counter()
    outside = 0
    for k in step.resident:
        kind = step.kinds[k - 1]
        held[kind.group] += kind.bytes
        outside += 0 if _allocated(kind) else kind.bytes
    order = [event for passage in step.passages for event in passage.events]
    groups: dict[str, list[int]] = {}
    for group in STACK:
        sizes = [kind.bytes if kind.group == group else 0 for kind in step.kinds]
        deltas = [0, *sizes, *(-size for size in reversed(sizes))]  # by event: a negative one is found from the end
        found = list(accumulate(map(deltas.__getitem__, order), initial=held[group]))
        if group == OVERHEAD and step.tails:
            found = [size + tail for size, tail in zip(found, step.tails, strict=True)]
        if any(found):
            groups[group] = found
    totals = [sum(sizes) for sizes in zip(*groups.values(), strict=True)]
    return Levels(groups, totals, [size - outside for size in totals], totals.index(max(totals)))


def stretches(step: Timeline) -> list[Stretch]:
    """The phases in the order of time. The point before the first event belongs to the first of them."""
    out: list[Stretch] = []
    at = 1
    for passage in step.passages:
        end = at + len(passage.events)
        if out and out[-1].phase == passage.phase:
            out[-1] = out[-1]._replace(end=end)
        else:
            out.append(Stretch(passage.phase, at if out else 0, end))
        at = end
    return out


def place(step: Timeline, point: int) -> Passage:
    """Where a point of the curve lies; the point before the first event, at the first."""
    at = 0
    for passage in step.passages:
        at += len(passage.events)
        if point <= at:
            return passage
    raise IndexError(f"the step has no point {point}")


def live_at(step: Timeline, point: int) -> list[tuple[TensorKind, int]]:
    """(kind, how many) of what is on the card at a point, the most bytes first."""
    counts = Counter(step.resident)
    left = point
    for passage in step.passages:
        for event in passage.events[:left]:
            counts[abs(event)] += 1 if event > 0 else -1
        left -= min(left, len(passage.events))
    found = [(step.kinds[k - 1], count) for k, count in counts.items() if count]
    return sorted(found, key=lambda item: -item[0].bytes * item[1])


def buckets(part: Stretch, count: int) -> list[range]:
    """A stretch in at most `count` pieces of nearly equal length, none of them empty."""
    length = part.end - part.first
    count = min(count, length)
    cuts = [part.first + length * n // count for n in range(count + 1)]
    return [range(low, high) for low, high in pairwise(cuts)]


def thinned(totals: Sequence[int], pieces: Iterable[range]) -> list[int]:
    """The points to draw where there is no room for all: of each piece its beginning, its first lowest and its first
    highest point. So none that is left out lies above or below what is drawn of its piece, and the peak is kept."""
    kept: set[int] = set()
    for piece in pieces:
        sizes = totals[piece.start : piece.stop]
        kept |= {piece.start, piece.start + sizes.index(min(sizes)), piece.start + sizes.index(max(sizes))}
    return sorted(kept)


def widths(parts: Sequence[Stretch], whole: int, least: int) -> list[int]:
    """Shares `whole` among the phases by their events, none below `least`: an optimizer step may have three of
    thousands. The widest give way."""
    lengths = [part.end - part.first for part in parts]
    found = [max(whole * length // sum(lengths), least) for length in lengths]
    while sum(found) != whole:
        step = 1 if sum(found) < whole else -1
        widest = found.index(max(found))
        if step < 0 and found[widest] <= 1:
            break
        found[widest] += step
    return found
