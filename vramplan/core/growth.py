"""Steps on expandable segments: what is allocated is a sum, what is reserved is played no further than it grows.

Such segments split a block wherever 512 bytes are left, so that no tails count as allocated. For what it reserves the
large pool is played, two steps of it (see `replay`), short of what hardly adds to it:

* Layers that change one free stretch alone, by as much as the layer before, do the same further up: the last of them
  is played in full, and if it ends as foreseen, those before it need not be.
* Where all large tensors together stay clear of the highest they have been, a section fits below: only what it leaves
  there is played. Clear by a quarter of the largest tensor, for which the room below may be too broken up.

The small pool, which is a tenth, is counted: the most that lives in it, in pages. Against two steps played event by
event, over 95 runs of all kinds: reserved 0.3 % off on average, 3 % at worst (docs/memory-model.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .allocator import GRANULE, SMALL_REQUEST, SMALL_SEGMENT, Op, units
from .expandable import Expandable, ExpandablePool, Outline
from .replay import STATE_SECTION, Played, workspaces
from .unroll import LAYER_SHIFT, Section, Unrolled

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
    deltas = [delta if abs(delta) <= SMALL_REQUEST else 0 for delta in unrolled.deltas]
    running = {id(section): unrolled.running(section, deltas) for section in unrolled.sections}
    held = GRANULE * (pool.live_units() + sum(units(size) for size in states if size <= SMALL_REQUEST))
    highs = {at: max(sums) for at, sums in running.items()}
    tops = [(section.phase, now + highs[id(section)]) for section, now in _levels(unrolled, running, held)]
    most = max(top for _, top in tops)
    graph = max(top for phase, top in tops if phase != "optimizer")
    return max(pool.mapped_units() * GRANULE, _pages(most)), _pages(graph)


def _pages(size: int) -> int:
    return -(-size // SMALL_SEGMENT) * SMALL_SEGMENT


def _at_highest(unrolled: Unrolled, section: Section) -> int:
    """How many events of the section come before its highest point."""
    running = unrolled.running(section, unrolled.deltas)
    return running.index(max(running))


class _Replay:
    """The large pool through the steps. Entries are the sections in the order of time, one for each real layer."""

    def __init__(self, unrolled: Unrolled, memory: Expandable, workspaces_too: bool) -> None:
        self.unrolled, self.memory = unrolled, memory
        self.period = unrolled.period
        self.least_key = -len(unrolled.info) if workspaces_too else 0  # workspaces have negative keys
        self.units = [row[5] // GRANULE if row[5] > SMALL_REQUEST else 0 for row in unrolled.info]
        self.is_large = [bool(n) for n in self.units + self.units[:0:-1]]  # by event
        self.order = unrolled.order
        self.ops: dict[tuple[int, bool], list[Op]] = {}
        self.live: dict[int, int] = {}
        self.outlines: dict[int, Outline] = {}  # after an entry
        self.left: dict[int, list[dict[int, int]]] = {}  # what it and those of its period had left there by then
        self.pinned_bytes = 0
        self.last = unrolled.highest()[1]
        self.largest = max(self.units) * GRANULE
        deltas = [d if large else 0 for d, large in zip(unrolled.deltas, self.is_large, strict=True)]
        running = {id(section): unrolled.running(section, deltas) for section in unrolled.sections}
        highs = {at: max(sums) for at, sums in running.items()}
        self.levels = [
            now + highs[id(section)] for section, now in _levels(unrolled, running, 0)
        ]  # large tensors' most

    def step(self, states: Sequence[int] = ()) -> None:
        """One step; the large ones of `states` are born in it, after the backward."""
        self.live, self.outlines, self.left = {}, {}, {}
        top = entry = 0
        while entry < len(self.order):
            if self.order[entry][0][:2] == STATE_SECTION:
                for size in states:
                    if size > SMALL_REQUEST:
                        self.memory.malloc(size)
            if entry == self.last:
                self._through_the_peak(entry)
            elif self.levels[entry] > top - self.largest // CLEAR:
                self._play(entry, True)
                entry += self._skip(entry)
            else:
                self._play(entry, False)
            top = max(top, self.levels[entry])
            entry += 1
        self.least_key = 0
        self.ops = {at: [op for op in ops if op[0] >= 0] for at, ops in self.ops.items()}

    def _through_the_peak(self, entry: int) -> None:
        section, layer = self.order[entry]
        unrolled, events = self.unrolled, self.order[entry][0].events
        at = _at_highest(unrolled, section)
        self.memory.run(self._written(section, events[:at]), layer << LAYER_SHIFT, self.live)
        self.pinned_bytes = self.memory.large.pinned_bytes()
        self.memory.run(self._written(section, events[at:]), layer << LAYER_SHIFT, self.live)

    def _play(self, entry: int, whole: bool) -> None:
        section, layer = self.order[entry]
        ops = self.ops.get((id(section), whole))
        if ops is None:
            events = section.events if whole else self.unrolled.totals[id(section)].crossing
            ops = self.ops[id(section), whole] = self._written(section, events)
        self.memory.run(ops, layer << LAYER_SHIFT, self.live)

    def _written(self, section: Section, events: Sequence[int]) -> list[Op]:
        large, sizes, least = self.is_large, self.units, self.least_key
        changes = self.unrolled.changes(section, [event for event in events if large[event]])
        return [(key, sizes[e] if e > 0 else 0, relative) for e, key, relative in changes if key >= least]

    # ---------------------------------------------------------------------------------------------- repetitions
    def _skip(self, entry: int) -> int:
        """How many entries after this one were passed over or played, because they repeat those of the last period.

        Those before the last of them need not be played, if that one then does what was foreseen.
        """
        self._note(entry)
        period, before = self.period, entry - self.period
        times = self._matching(entry) // period - 1
        if times < 1 or before not in self.outlines:
            return 0
        at, shift = _moved(self.outlines[before], self.outlines[entry])
        shifts = _shifts(self.left[before], self.left[entry], shift)
        while shift > 0 and shifts is not None and times:
            pool, live, reserved = self.memory.large.clone(self.memory), dict(self.live), self.memory.reserved
            assert isinstance(pool, ExpandablePool)
            begin, end = self.outlines[entry][0][at]
            if begin + shift * times > end:
                times //= 2
                continue
            for i, (fresh, moved) in enumerate(zip(self.left[entry], shifts, strict=True)):
                self._leave(before + 1 + i, fresh, moved, times)
            self.memory.large.push(begin, shift * times)
            last = entry + (times + 1) * period
            for following in range(last - period + 1, last + 1):
                self._play(following, True)
            self._note(last)
            if _moved(self.outlines[entry], self.outlines[last]) == (at, shift * (times + 1)):
                return last - entry
            self.memory.large, self.live, self.memory.reserved = pool, live, reserved
            del self.outlines[last]
            times //= 2
        return 0

    def _note(self, entry: int) -> None:
        self.outlines[entry] = self.memory.large.outline()
        self.left[entry] = [self._left_by(entry - self.period + 1 + i) for i in range(self.period)]

    def _matching(self, entry: int) -> int:
        """How many of the following entries are of the layers that those a period before them were of."""
        order, period = self.order, self.period
        at = entry + 1
        while at < len(order) and at != self.last and order[at][0] is order[at - period][0] and order[at][1] >= 0:
            at += 1
        return at - entry - 1

    def _left_by(self, entry: int) -> dict[int, int]:
        """Blocks of the large tensors that were born in this entry and live, by relative key."""
        if entry < 0 or self.order[entry][1] < 0:
            return {}
        section, layer = self.order[entry]
        shift, live = layer << LAYER_SHIFT, self.live
        ops = self.ops.get((id(section), True), ())
        return {key: live[key + shift] for key, size, rel in ops if rel and size and key + shift in live}

    def _leave(self, entry: int, fresh: dict[int, int], moved: dict[int, int], times: int) -> None:
        """Put into `live` what this entry would leave in each of the `times` periods to come."""
        kept = self._left_by(entry - self.period)
        for n in range(times + 1):
            shift = self.order[entry + n * self.period][1] << LAYER_SHIFT
            for key, block in fresh.items():
                if n == times or key in kept:
                    self.live[key + shift] = block + n * moved[key]
                else:
                    self.live.pop(key + shift, None)


def _moved(before: Outline, after: Outline) -> tuple[int, int]:
    """(which, by how much) of the one free stretch that begins later, all else being equal; else (0, 0)."""
    changed = [i for i, (old, new) in enumerate(zip(before[0], after[0], strict=False)) if old != new]
    if len(changed) != 1 or len(before[0]) != len(after[0]) or before[1] != after[1]:
        return 0, 0
    old, new = before[0][changed[0]], after[0][changed[0]]
    return (changed[0], new[0] - old[0]) if old[1] == new[1] else (0, 0)


def _shifts(before: list[dict[int, int]], after: list[dict[int, int]], shift: int) -> list[dict[int, int]] | None:
    """By how much each block moved, `shift` or nothing; None if they are not the same blocks."""
    out = []
    for old, new in zip(before, after, strict=True):
        moved = {key: block - old[key] for key, block in new.items() if key in old}
        if len(moved) != len(old) or len(moved) != len(new) or not set(moved.values()) <= {0, shift}:
            return None
        out.append(moved)
    return out
