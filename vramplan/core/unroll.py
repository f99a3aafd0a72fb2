"""A step at full depth, from one played on a few layers.

Layers of one kind do the same, so the section of events of a middle layer stands for all of them: tensors are renamed
by the layer they belong to, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from .tape import WORKSPACE_KEY, Recorder

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

    def __init__(self, rec: Recorder, played: int, depth: int, period: int) -> None:
        self.info = rec.info
        self.played, self.depth, self.period = played, depth, period
        self.sections = _sections(rec)
        sizes = [row[5] for row in rec.info]
        self.deltas = sizes + [-size for size in sizes[:0:-1]]  # by event: bytes that it adds, by negative index too
        for ident, row in enumerate(rec.info):
            if row[0] == WORKSPACE_KEY:  # resident in a steady step
                self.deltas[ident] = self.deltas[-ident] = 0
        self._real: dict[int, list[int]] = {}  # real layers by the played layer that shows them
        for layer in range(depth):
            self._real.setdefault(self.shown(layer), []).append(layer)
        self.order = list(self._order())  # (section, real layer) in the order of time; -1 outside the layers
        self.born = self._births()
        self._times = {id(s): [self._deaths(event) for event in s.events] for s in self.sections if s.layer < 0}
        self.totals = {id(section): self._totals(section) for section in self.sections}
        self._highest: tuple[int, int] | None = None
        self._born: tuple[int, int] | None = None
        self._compiled: dict[bool, dict[int, list[Change]]] = {}
        self.written: dict[int, list[tuple[int, int, bool]]] = {}  # changes as the allocator takes them, by their id

    def _births(self) -> dict[int, tuple[int, int, int]]:
        """storage -> (kind, played layer, n-th birth of its section)"""
        lasting = {ident for ident, row in enumerate(self.info) if row[0] in LASTING}
        born: dict[int, tuple[int, int, int]] = {}
        kind = 0
        for section in self.sections:
            layer = section.layer
            if layer < 0:  # the layers between two outer sections are one kind
                kind += 1
            births = [event for event in section.events if event > 0]
            for event in lasting.intersection(births):
                # in one layer only: it must not shift the numbers by which layers of a kind know their tensors
                born[event] = (kind, layer, (1 << LAYER_SHIFT) - event % 16 - 1)
                births.remove(event)
            for count, event in enumerate(births):
                born[event] = (kind, layer, count)
            if layer < 0:
                kind += 1
        return born

    def _totals(self, section: Section) -> Totals:
        running = self.running(section, self.deltas)
        here = set(section.events)
        return Totals(running[-1], max(running), tuple(event for event in section.events if -event not in here))

    def running(self, section: Section, deltas: Sequence[int]) -> list[int]:
        """Sums of the section's `deltas` (by event), from 0 before the first to the last."""
        if section.layer >= 0:
            return list(accumulate(map(deltas.__getitem__, section.events), initial=0))
        # outside the layers, a layer's tensor dies for every layer it stands for
        times = self._times[id(section)]
        return list(accumulate(map(mul, map(deltas.__getitem__, section.events), times), initial=0))

    def _deaths(self, event: int) -> int:
        home = -1 if event > 0 else self.born[-event][1]
        return 1 if home < 0 else len(self._real[home])

    def shown(self, layer: int) -> int:
        """The played layer that stands for this real one: the first and last blocks as they are, the middle by one."""
        period, tail = self.period, self.played - 3 * self.period
        if self.played == self.depth or layer < 2 * period:
            return layer
        if layer >= self.depth - tail:
            return layer - self.depth + self.played
        return 2 * period + layer % period

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
        if not self._compiled:
            self._compiled[True] = {id(section): self.changes(section, section.events) for section in self.sections}
            self._compiled[False] = {at: _steady(changes) for at, changes in self._compiled[True].items()}
        compiled = self._compiled[first]
        for section, layer in self.order:
            yield section, layer, compiled[id(section)]

    def births(self) -> tuple[int, int]:
        """(bytes, number) of all tensors that a steady step makes, its workspaces left out."""
        if self._born is None:
            lasting = [row[0] == WORKSPACE_KEY for row in self.info]
            by_section: dict[int, tuple[int, int]] = {}
            for section in self.sections:
                births = [event for event in section.events if event > 0 and not lasting[event]]
                by_section[id(section)] = sum(self.info[event][5] for event in births), len(births)
            found = [by_section[id(section)] for section, _ in self.order]
            self._born = sum(size for size, _ in found), sum(count for _, count in found)
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
        """Events of a section, with the keys of their tensors."""
        out: list[Change] = []
        for event in events:
            ident = abs(event)
            if self.info[ident][0] == WORKSPACE_KEY:
                if event > 0:
                    out.append((event, -event, False))
                continue
            kind, home, count = self.born[ident]
            if home < 0:
                out.append((event, _key(kind, 0, count), False))
            elif section.layer >= 0:
                out.append((event, _key(kind, home - section.layer, count), True))
            else:  # outside the layers, a layer's tensor dies: so does that of every layer it stands for
                out += [(event, _key(kind, real, count), False) for real in self._real[home]]
        return out


Change = tuple[int, int, bool]  # +info index (birth) or -info index (death), key of the tensor, key is relative


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
