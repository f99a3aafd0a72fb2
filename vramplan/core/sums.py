"""Running sums over the sections of a step, of tensors by their kind: those of one kind have one size.

What a step takes at one size after the other is summed anew many times, and most layers are alike: sections in which
tensors of the same kinds come and go in the same order are summed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .unroll import Section


class Sums:
    """Of sections that stay, by the sizes of kinds, which change."""

    def __init__(
        self, sections: Sequence[Section], kinds: Sequence[int], count: int, times: dict[int, list[int]]
    ) -> None:
        """`kinds`: by tensor, below `count`. `times`: for how many tensors each event of a section stands, where that
        is not one, by the section's id."""
        self.count, self.times = count, times
        self._kinds = [*kinds, *(count + kind for kind in kinds[:0:-1])]  # by event: births, then deaths
        self._events = {id(section): tuple(map(self._kinds.__getitem__, section.events)) for section in sections}
        self._births: dict[int, list[int]] = {}
        first: dict[object, int] = {}
        self.alike = {at: first.setdefault(at if at in times else seen, at) for at, seen in self._events.items()}

    def by_event(self, values: Sequence[int]) -> list[int]:
        """Of each kind's value what a birth adds, and a death takes; also by negative index."""
        return list(map(_signed(values).__getitem__, self._kinds))

    def running(self, values: Sequence[int]) -> dict[int, list[int]]:
        """By the id of a section its sums, from 0 before the first event to the last; alike ones have one list."""
        added = _signed(values).__getitem__
        firsts: dict[int, list[int]] = {}
        for at in self.alike.values():
            if at not in firsts:
                here = map(added, self._events[at])
                firsts[at] = list(accumulate(map(mul, here, self.times[at]) if at in self.times else here, initial=0))
        return {at: firsts[first] for at, first in self.alike.items()}

    def births(self, values: Sequence[int]) -> dict[int, int]:
        """By the id of a section the sum over what is born in it."""
        if not self._births:
            firsts = set(self.alike.values())
            self._births = {at: [kind for kind in self._events[at] if kind < self.count] for at in firsts}
        sums = {at: sum(map(values.__getitem__, kinds)) for at, kinds in self._births.items()}
        return {at: sums[first] for at, first in self.alike.items()}


def highest(sums: dict[int, list[int]]) -> dict[int, int]:
    """The highest of each section's, which are taken once where they are one list."""
    firsts: dict[int, int] = {}
    out = {}
    for at, each in sums.items():
        known = firsts.get(id(each))
        if known is None:
            known = firsts[id(each)] = max(each)
        out[at] = known
    return out


def _signed(values: Sequence[int]) -> list[int]:
    return [*values, *(-value for value in values)]
