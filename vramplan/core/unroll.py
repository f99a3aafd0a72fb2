"""A step at full depth, from one played on a few layers.

Layers of one kind do the same, so the section of events of a middle layer stands for all of them: tensors are renamed
by the layer they belong to, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from typing import NamedTuple

from .allocator import PoolOps
from .sums import Sums, highest
from .tape import WORKSPACE_KEY, Recorder

Row = tuple[str, str, int, int, str, int]  # ledger key, name, rows, columns, dtype and bytes of a tensor
LASTING = (WORKSPACE_KEY, "workspace.libraries")  # what a thread's first product makes, and keeps
LAYER_SHIFT = 20  # a tensor's key: kind of section, layer, number of its birth there


class Section(NamedTuple):
    """Events of one place: `layer` -1 outside the layers, else the played layer. Phase as the user knows it."""

    phase: str
    name: str
    layer: int
    events: tuple[int, ...]


class Totals(NamedTuple):
    """What a section does to the sum of all live tensors in a steady step, in bytes."""

    net: int
    high: int  # highest point above its beginning, at least 0
    crossing: tuple[int, ...]  # events of tensors that were not born here, or do not die here


class Unrolled:
    """The step at full depth, from a step played on `played` layers.

    Sections are those of the played step. Real layer l is shown by played layer `shown(l)`; a tensor born in a layer's
    section is renamed by the real layer, so that the same event list serves all.
    """

    def __init__(
        self,
        rec: Recorder,
        played: int,
        depth: int,
        period: int,
        first: int | None = None,
        places: Sequence[int] | None = None,
        values: Sequence[int] | None = None,
    ) -> None:
        """`first` layers stand for themselves; None: two periods of them. For a step that is going to be `resized`,
        `places` say of each tensor where in `values` its size is."""
        self.row: Callable[[int], Row] = rec.info.__getitem__
        self.played, self.depth, self.period = played, depth, period
        self.first = 2 * period if first is None else first
        self.sections = _sections(rec)
        self.workspaces = [ident for ident, row in enumerate(rec.info) if row[0] == WORKSPACE_KEY]
        self._number_kinds([row[5] for row in rec.info] if places is None else places)
        self.kind_sizes = self.kind_places if values is None else [values[place] for place in self.kind_places]
        self._real: dict[int, list[int]] = {}  # real layers by the played layer that shows them
        for layer in range(depth):
            self._real.setdefault(self.shown(layer), []).append(layer)
        self.order = list(self._order())  # (section, real layer) in the order of time; -1 outside the layers
        self.born = self._births({ident for ident, row in enumerate(rec.info) if row[0] in LASTING})
        times = {id(s): [self._deaths(event) for event in s.events] for s in self.sections if s.layer < 0}
        self.sums = Sums(self.sections, self.kinds, len(self.kind_places), times)
        counts = {id(s): sum(event > 0 and event not in self.workspaces for event in s.events) for s in self.sections}
        self._birth_count = sum(counts[id(section)] for section, _ in self.order)
        self._crossing = {id(section): _crossing(section) for section in self.sections}
        self._compiled: dict[bool, dict[int, list[Change]]] = {}
        self._crossing_changes: dict[int, list[Change]] = {}
        self._same: dict[int, int] = {}
        self._measure()

    def _number_kinds(self, places: Sequence[int]) -> None:
        """Tensors of one place, which may be the size itself, are of one kind; workspaces have kinds of their own."""
        numbers: dict[int, int] = {}
        self.kinds = [numbers.setdefault(place, len(numbers)) for place in places]
        self.kind_places = list(numbers)
        for ident in self.workspaces:
            self.kinds[ident] = len(self.kind_places)
            self.kind_places.append(places[ident])

    def resized(self, kind_sizes: list[int], row: Callable[[int], Row]) -> Unrolled:
        """The same events of tensors that have other sizes; `row` says all of a tensor."""
        other = copy(self)
        other.kind_sizes, other.row = kind_sizes, row
        other._measure()
        return other

    def _measure(self) -> None:
        """What follows from the sizes."""
        self.steady_sizes = self.kind_sizes.copy()  # by kind; workspaces are resident in a steady step
        for ident in self.workspaces:
            self.steady_sizes[self.kinds[ident]] = 0
        running = self.sums.running(self.steady_sizes)
        highs = highest(running)
        self.totals = {at: Totals(sums[-1], highs[at], self._crossing[at]) for at, sums in running.items()}
        self._info: list[Row] = []
        self._highest: tuple[int, int] | None = None
        self._born: tuple[int, int] | None = None
        self.written: dict[int, list[PoolOps]] = {}  # changes as the allocator takes them, by `same_changes`

    @property
    def info(self) -> list[Row]:
        """All of every tensor: what the player's `Recorder` has."""
        self._info = self._info or [self.row(ident) for ident in range(len(self.kinds))]
        return self._info

    @property
    def sizes(self) -> list[int]:
        """Bytes by tensor."""
        return [self.kind_sizes[kind] for kind in self.kinds]

    def _births(self, lasting: set[int]) -> dict[int, tuple[int, int, int]]:
        """storage -> (kind, played layer, n-th birth of its section)"""
        born: dict[int, tuple[int, int, int]] = {}
        kind = 0
        for section in self.sections:
            layer = section.layer
            if layer < 0:  # the layers between two outer sections are one kind
                kind += 1
            births = [event for event in section.events if event > 0 and event not in lasting]
            for event in lasting.intersection(section.events):
                # in one layer only: it must not shift the numbers by which layers of a kind know their tensors
                born[event] = (kind, layer, (1 << LAYER_SHIFT) - event % 16 - 1)
            for count, event in enumerate(births):
                born[event] = (kind, layer, count)
            if layer < 0:
                kind += 1
        return born

    def _deaths(self, event: int) -> int:
        home = -1 if event > 0 else self.born[-event][1]
        return 1 if home < 0 else len(self._real[home])

    def shown(self, layer: int) -> int:
        """The played layer that stands for this real one: the first and last as they are, the middle by one period."""
        first, last = self.first, self.played - self.first - self.period
        if self.played == self.depth or layer < first:
            return layer
        if layer >= self.depth - last:
            return layer - self.depth + self.played
        return first + (layer - first) % self.period

    def real_layers(self, played: int) -> list[int]:
        return self._real.get(played, [])

    def _order(self) -> Iterator[tuple[Section, int]]:
        run: list[Section] = []
        for section in self.sections:
            if section.layer < 0:
                yield from self._layers(run)
                run = []
                yield section, -1
            else:
                run.append(section)
        yield from self._layers(run)

    def _layers(self, run: list[Section]) -> Iterator[tuple[Section, int]]:
        if not run:
            return
        by_layer = {s.layer: s for s in run}
        forward = run[0].layer < run[-1].layer or len(run) == 1
        for layer in range(self.depth) if forward else range(self.depth - 1, -1, -1):
            section = by_layer.get(self.shown(layer))
            if section is not None:
                yield section, layer

    def steps(self, first: bool = False) -> Iterator[tuple[Section, int, list[Change]]]:
        """(section, real layer, its changes) in the order of time; a key of a relative change gets the layer added.

        cuBLAS workspaces are born in the `first` step, by the first product of each thread, and stay: in a steady step
        they are resident, and left out.
        """
        compiled = self._all_compiled()[first]
        for section, layer in self.order:
            yield section, layer, compiled[id(section)]

    def all_changes(self, section: Section) -> list[Change]:
        """Of a `first` step."""
        return self._all_compiled()[True][id(section)]

    def _all_compiled(self) -> dict[bool, dict[int, list[Change]]]:
        """Changes by the id of their section, of a first step and of a steady one."""
        if not self._compiled:
            self._compiled[True] = {id(each): self.changes(each, each.events) for each in self.sections}
            self._compiled[False] = {at: _steady(changes) for at, changes in self._compiled[True].items()}
            self._find_same()
        return self._compiled

    def _find_same(self) -> None:
        """Keys are relative and sizes go by kind: most layers of a model do the same, and are written down once."""
        kinds = self.sums.by_event(range(1, len(self.kind_sizes) + 1))
        first: dict[object, int] = {}
        for compiled in self._compiled.values():
            for changes in compiled.values():
                seen = tuple((kinds[event], key, relative) for event, key, relative in changes)
                self._same[id(changes)] = first.setdefault(seen, id(changes))

    def same_changes(self, changes: list[Change]) -> int:
        """The same number for a section's changes and for those of every other that do the same to the allocator."""
        return self._same[id(changes)]

    def crossing_changes(self, section: Section) -> list[Change]:
        """Of tensors that were not born here, or do not die here."""
        at = id(section)
        if at not in self._crossing_changes:
            self._crossing_changes[at] = self.changes(section, self._crossing[at])
        return self._crossing_changes[at]

    def births(self) -> tuple[int, int]:
        """(bytes, number) of all tensors that a steady step makes, its workspaces left out."""
        if self._born is None:
            found = self.sums.births(self.steady_sizes)
            self._born = sum(found[id(section)] for section, _ in self.order), self._birth_count
        return self._born

    def peak_bytes(self) -> int:
        """The most that the step's tensors take together."""
        return self.highest()[0]

    def highest(self) -> tuple[int, int]:
        """(bytes, number of the section in `steps`) of the step's highest point."""
        if self._highest is not None:
            return self._highest
        now = best = where = 0
        for number, (section, _) in enumerate(self.order):
            net, high, _ = self.totals[id(section)]
            if now + high > best:
                best, where = now + high, number
            now += net
        self._highest = best, where
        return best, where

    def changes(self, section: Section, events: Iterable[int]) -> list[Change]:
        """Events of a section, with the keys of their tensors; of those that it lets go itself, just numbers."""
        out: list[Change] = []
        crossing = set(self._crossing[id(section)])
        for event in events:
            ident = abs(event)
            if ident in self.workspaces:
                if event > 0:
                    out.append((event, -event, False))
                continue
            kind, home, count = self.born[ident]
            if event not in crossing:
                out.append((event, count, False))
            elif home < 0:
                out.append((event, _key(kind, 0, count), False))
            elif section.layer >= 0:
                out.append((event, _key(kind, home - section.layer, count), True))
            else:  # outside the layers, a layer's tensor dies: so does that of every layer it stands for
                out += [(event, _key(kind, real, count), False) for real in self._real[home]]
        return out


Change = tuple[int, int, bool]  # +info index (birth) or -info index (death), key of the tensor, key is relative


def _crossing(section: Section) -> tuple[int, ...]:
    here = set(section.events)
    return tuple(event for event in section.events if -event not in here)


def _steady(changes: list[Change]) -> list[Change]:
    """Without the workspaces, whose keys are negative; the same list where there are none."""
    return [change for change in changes if change[1] >= 0] if any(key < 0 for _, key, _ in changes) else changes


def _key(kind: int, layer: int, count: int) -> int:
    return (((kind << 14) + layer) << LAYER_SHIFT) + count


def _sections(rec: Recorder) -> list[Section]:
    out = []
    for i, (at, name) in enumerate(rec.marks):
        end = rec.marks[i + 1][0] if i + 1 < len(rec.marks) else len(rec.events)
        phase, _, rest = name.partition(" ")
        layer = int(rest) if rest.lstrip("-").isdigit() else -1
        out.append(Section(phase, rest if layer < 0 else "", layer, tuple(rec.events[at:end])))
    return out
