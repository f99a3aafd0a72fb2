"""A step at full depth, from one played on a few layers.

Layers of one kind do the same, so the section of events of a middle layer stands for all of them: tensors are renamed
by the layer they belong to, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Iterator
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


class Unrolled:
    """The step at full depth, from a step played on `played` layers.

    Sections are those of the played step. Real layer l is shown by played layer `shown(l)`; a tensor born in a layer's
    section is renamed by the real layer, so that the same event list serves all.
    """

    def __init__(self, rec: Recorder, played: int, depth: int, period: int) -> None:
        self.info = rec.info
        self.played, self.depth, self.period = played, depth, period
        self.sections = _sections(rec)
        self._highest: tuple[int, int] | None = None
        self._compiled: dict[bool, dict[int, list[Change]]] = {}
        self.born: dict[int, tuple[int, int, int]] = {}  # storage -> (kind, played layer, n-th birth of its section)
        kind = 0
        for section in self.sections:
            if section.layer < 0:  # the layers between two outer sections are one kind
                kind += 1
            count = 0
            for event in section.events:
                if event > 0 and rec.info[event][0] in LASTING:
                    # in one layer only: it must not shift the numbers by which layers of a kind know their tensors
                    self.born[event] = (kind, section.layer, (1 << LAYER_SHIFT) - event % 16 - 1)
                elif event > 0:
                    self.born[event] = (kind, section.layer, count)
                    count += 1
            if section.layer < 0:
                kind += 1

    def shown(self, layer: int) -> int:
        """The played layer that stands for this real one: the first and last blocks as they are, the middle by one."""
        period, tail = self.period, self.played - 3 * self.period
        if self.played == self.depth or layer < 2 * period:
            return layer
        if layer >= self.depth - tail:
            return layer - self.depth + self.played
        return 2 * period + layer % period

    def real_layers(self, played: int) -> list[int]:
        return [layer for layer in range(self.depth) if self.shown(layer) == played]

    def order(self) -> Iterator[tuple[Section, int]]:
        """(section, real layer) in the order of time; sections outside the layers have layer -1."""
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
            self._compiled[True] = {id(section): self._compile(section) for section in self.sections}
            self._compiled[False] = {at: _steady(changes) for at, changes in self._compiled[True].items()}
        compiled = self._compiled[first]
        for section, layer in self.order():
            yield section, layer, compiled[id(section)]

    def peak_bytes(self) -> int:
        """The most that the step's tensors take together."""
        return self.highest()[0]

    def highest(self) -> tuple[int, int]:
        """(bytes, number of the section in `steps`) of the step's highest point."""
        if self._highest is not None:
            return self._highest
        info = self.info
        sums: dict[int, tuple[int, int]] = {}
        now = best = where = 0
        for number, (section, _, changes) in enumerate(self.steps()):
            if id(section) not in sums:
                net = high = 0
                for event, _, _ in changes:
                    net += info[event][5] if event > 0 else -info[-event][5]
                    high = max(high, net)
                sums[id(section)] = (net, high)
            net, high = sums[id(section)]
            if now + high > best:
                best, where = now + high, number
            now += net
        self._highest = best, where
        return best, where

    def _compile(self, section: Section) -> list[Change]:
        out: list[Change] = []
        for event in section.events:
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
                out += [(event, _key(kind, real, count), False) for real in self.real_layers(home)]
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
