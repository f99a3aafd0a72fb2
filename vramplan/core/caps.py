"""The smallest cap of the allocator under which a run survives, with a margin: tried no further than is asked.

Expandable segments: the pages that hold something at the highest point; all others can be given back. Native, where the
layout itself changes under pressure: the first of a ladder of caps, from what is pinned there with room to spare, under
which two steps survive, in a fresh process and in one that has its workspaces already, as after an evaluation: where
they lie decides what breaks up; never more than what the run reserves with room to spare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .allocator import Native, OutOfMemory
from .replay import play_run, workspaces

if TYPE_CHECKING:
    from .ledger import Simulation

# The margin on what is found (docs/memory-model.md). Native: caps are tried one after the other, each at least this
# much above the one before.
LADDER = 1.004
MARGIN = {"expandable": 0.01, "native": 0.04}


class Caps:
    """What one run needs lies between `least_bytes` and `most_bytes`; each cap that is tried brings them closer."""

    def __init__(self, sim: Simulation, kind: str) -> None:
        self.sim, self.margin = sim, 1 + MARGIN[kind]
        self.cap = max(sim.allocated_bytes, sim.pinned_bytes)
        self.reserved = sim.played.reserved_bytes
        self.starts = [False, True]  # whether the workspaces are there already
        if kind == "expandable":  # a cap is compared with whole segments, so even what is reserved can be too little
            self.cap, self.reserved, self.starts = sim.pinned_bytes, int(sim.pinned_bytes * self.margin), []

    @property
    def least_bytes(self) -> int:
        return min(int(self.cap * self.margin), self.reserved)

    @property
    def most_bytes(self) -> int:
        return self.reserved if self.starts else self.least_bytes

    @property
    def bounds(self) -> tuple[int, int]:
        return self.least_bytes, self.most_bytes

    def minimum_bytes(self) -> int:
        while self.least_bytes < self.most_bytes:
            self.climb()
        return self.least_bytes

    def within(self, room: int) -> bool:
        """Whether `minimum_bytes` are at most `room`."""
        while self.least_bytes <= room < self.most_bytes:
            self.climb()
        return self.most_bytes <= room

    def climb(self) -> None:
        """Try one cap more."""
        warm = self.starts[0]
        memory = self._with_workspaces() if warm else self.sim.before_step.clone()
        memory.cap_bytes = self.cap
        try:
            play_run(self.sim.unrolled, memory, self.sim.states, warm=warm)
        except OutOfMemory as error:
            self.cap = max(error.needed_bytes, int(self.cap * LADDER))
        else:
            del self.starts[0]

    def _with_workspaces(self) -> Native:
        memory = self.sim.before_step.clone()
        for size in workspaces(self.sim.unrolled):
            memory.malloc(size)
        return memory
