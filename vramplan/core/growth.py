"""Steps on expandable segments: what is allocated is a sum, what is reserved is played no further than it grows.

Such segments split a block wherever 512 bytes are left, so that no tails count as allocated. For what it reserves the
large pool is played, two steps of it (see `replay`), short of what hardly adds to it: where all large tensors together
stay clear of the highest they have been, a section fits below, and only what it leaves there is played. Clear by a
quarter of the largest tensor, for which the room below may be too broken up.

The small pool, which is a tenth, is counted: the most that lives in it, in pages. Against two steps played event by
event, over 105 runs of all kinds: reserved 0.1 % off on average, 3 % at worst (docs/memory-model.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .allocator import GRANULE, SMALL_REQUEST, SMALL_SEGMENT, PoolOps, by_pool, units
from .expandable import Expandable, ExpandablePool
from .replay import STATE_SECTION, Played, workspaces
from .sums import highest as highest_of
from .unroll import LAYER_SHIFT, Change, Section, Unrolled

CLEAR = 4  # of the largest tensor, the part by which a section must stay below the highest point


class Grown(NamedTuple):
    played: Played
    pinned_bytes: int  # pages in use at the highest point


def play_grown(unrolled: Unrolled, memory: Expandable, states: Sequence[int], warm: bool = False) -> Grown:
    """Two steps on top of what `memory` holds, whose large pool is changed. `states`, `warm`: as for `play_run`."""
    resident = memory.allocated + sum(units(size) for size in states) * GRANULE
    resident += 0 if warm else sum(workspaces(unrolled))
    played = Played()
    now, highest = resident, played.allocated
    for section, _ in unrolled.order:
        net, high, _ = unrolled.totals[id(section)]
        highest[section.phase] = max(highest.get(section.phase, 0), now + high)
        now += net
    small, small_in_use = _small_bytes(unrolled, memory.small, states)
    replay = _Replay(unrolled, memory, not warm)
    replay.step(states)
    replay.step()
    most = max(highest.values())  # what is counted rather than played may come out a few small tensors low
    played.reserved_bytes = max(memory.large.mapped_units() * GRANULE + small, most)
    return Grown(played, max(replay.pinned_bytes + small_in_use, most))


def _levels(unrolled: Unrolled, running: dict[int, list[int]], start: int) -> list[tuple[Section, int]]:
    """(section, level before it) in the order of time; `running` are the sums of each section."""
    nets = {at: sums[-1] for at, sums in running.items()}
    out, now = [], start
    for section, _ in unrolled.order:
        out.append((section, now))
        now += nets[id(section)]
    return out


def _small_bytes(unrolled: Unrolled, pool: ExpandablePool, states: Sequence[int]) -> tuple[int, int]:
    """Pages of the small pool: those that are mapped, or the most that lives in them; without those that
    only the optimizer needs, which are free again when the highest point comes."""
    running = unrolled.sums.running([size if size <= SMALL_REQUEST else 0 for size in unrolled.steady_sizes])
    held = GRANULE * (pool.live_units() + sum(units(size) for size in states if size <= SMALL_REQUEST))
    highs = highest_of(running)
    tops = [(section.phase, now + highs[id(section)]) for section, now in _levels(unrolled, running, held)]
    most = max(top for _, top in tops)
    graph = max(top for phase, top in tops if phase != "optimizer")
    return max(pool.mapped_units() * GRANULE, _pages(most)), _pages(graph)


def _pages(size: int) -> int:
    return -(-size // SMALL_SEGMENT) * SMALL_SEGMENT


def _at_highest(unrolled: Unrolled, section: Section) -> int:
    """How many events of the section come before its highest point."""
    running = unrolled.sums.running(unrolled.steady_sizes)[id(section)]
    return running.index(max(running))


class _Replay:
    """The large pool through the steps. Entries are the sections in the order of time, one for each real layer."""

    def __init__(self, unrolled: Unrolled, memory: Expandable, workspaces_too: bool) -> None:
        self.unrolled, self.memory = unrolled, memory
        self.least_key = -len(unrolled.kinds) if workspaces_too else 0  # workspaces have negative keys
        units = [size // GRANULE if size > SMALL_REQUEST else 0 for size in unrolled.kind_sizes]
        self.units = unrolled.sums.by_event(units)
        self.order = unrolled.order
        self.todo: dict[int, list[PoolOps]] = {}  # by the number of the changes
        self.live: dict[int, int] = {}
        self.pinned_bytes = 0
        self.last = unrolled.highest()[1]
        self.largest = max(units) * GRANULE
        running = unrolled.sums.running([size if size > SMALL_REQUEST else 0 for size in unrolled.steady_sizes])
        highs = highest_of(running)
        # the most that large tensors take in each entry
        self.levels = [now + highs[id(section)] for section, now in _levels(unrolled, running, 0)]

    def step(self, states: Sequence[int] = ()) -> None:
        """One step; the large ones of `states` are born in it, after the backward."""
        self.live = {}
        top = 0
        for entry, (section, _) in enumerate(self.order):
            if section[:2] == STATE_SECTION:
                for size in states:
                    if size > SMALL_REQUEST:
                        self.memory.malloc(size)
            if entry == self.last:
                self._through_the_peak(entry)
            elif self.levels[entry] > top - self.largest // CLEAR:
                self._play(entry, True)
            else:
                self._play(entry, False)
            top = max(top, self.levels[entry])
        self.least_key = 0
        for at, todo in self.todo.items():
            if any(op[0] < 0 for _, ops in todo for op in ops):  # workspaces stay
                self.todo[at] = [(large, [op for op in ops if op[0] >= 0]) for large, ops in todo]

    def _through_the_peak(self, entry: int) -> None:
        section, layer = self.order[entry]
        at = _at_highest(self.unrolled, section)
        for number, events in enumerate((section.events[:at], section.events[at:])):
            if number:
                self.pinned_bytes = self.memory.large.pinned_bytes()
            todo = self._written(self.unrolled.changes(section, events))
            self.memory.run(todo, layer << LAYER_SHIFT, self.live)

    def _play(self, entry: int, whole: bool) -> None:
        section, layer = self.order[entry]
        changes = self.unrolled.all_changes(section) if whole else self.unrolled.crossing_changes(section)
        at = self.unrolled.same_changes(changes) if whole else id(changes)
        todo = self.todo.get(at)
        if todo is None:
            todo = self.todo[at] = self._written(changes)
        self.memory.run(todo, layer << LAYER_SHIFT, self.live)

    def _written(self, changes: Sequence[Change]) -> list[PoolOps]:
        units, least = self.units, self.least_key
        return by_pool((key, units[event], relative) for event, key, relative in changes if key >= least)
