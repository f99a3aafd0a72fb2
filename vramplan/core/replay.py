"""Runs steps through the allocator: what they allocate, reserve and need, phase by phase.

A run's first step differs from the later ones: the cuBLAS workspaces are born in it, by the first matrix product of
each thread, and the optimizer's state after its backward, both into the holes that are free by then. They stay there,
so the later steps find another layout. The second step is the steady one: in 72 runs that were measured a third has
the same peaks, and reserved one segment of 2 MiB more in one of them, none in the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from .allocator import GRANULE, Native, by_pool
from .unroll import LAYER_SHIFT, Unrolled

STATE_SECTION = ("optimizer", "start")


class Played:
    """Highest points in bytes: by phase in the last step played, `reserved_bytes` over all steps played."""

    def __init__(self) -> None:
        self.allocated: dict[str, int] = {}
        self.reserved_bytes = 0
        self.states: list[int] = []  # blocks of the optimizer's tensors


def play_run(unrolled: Unrolled, memory: Native, states: Sequence[int], steps: int = 2, warm: bool = False) -> Played:
    """The first `steps` optimizer steps on top of what `memory` holds. Raises OutOfMemory under a cap too small.

    `states` are the sizes of the optimizer's tensors in the order of their birth. `warm`: the workspaces are there
    already, from another run of the same process.
    """
    memory.reset_peaks()
    played = play_step(unrolled, memory, states, not warm)
    held = played.states
    for _ in range(steps - 1):
        played = play_step(unrolled, memory)
    played.reserved_bytes, played.states = memory.peak_reserved, held
    return played


def play_step(unrolled: Unrolled, memory: Native, states: Sequence[int] = (), first: bool = False) -> Played:
    """One optimizer step. `first`: it makes the workspaces."""
    played = Played()
    live: dict[int, int] = {}
    written = unrolled.written
    phase = ""
    sizes = unrolled.sums.by_event([size // GRANULE for size in unrolled.kind_sizes])  # of deaths negative
    memory.most_in_use = memory.in_use
    for section, layer, changes in unrolled.steps(first):
        if section.phase != phase:
            _close(played, phase, memory)
            phase = section.phase
        if states and section[:2] == STATE_SECTION:
            born: dict[int, int] = {}
            memory.run(by_pool((i, size // GRANULE, False) for i, size in enumerate(states)), 0, born)
            played.states = list(born.values())
        same = unrolled.same_changes(changes)
        todo = written.get(same)
        if todo is None:
            todo = written[same] = by_pool((key, sizes[e], relative) for e, key, relative in changes)
        memory.run(todo, layer << LAYER_SHIFT, live)
    _close(played, phase, memory)
    played.reserved_bytes = memory.reserved
    return played


def _close(played: Played, phase: str, memory: Native) -> None:
    if phase:
        played.allocated[phase] = max(played.allocated.get(phase, 0), memory.peak_allocated)
    memory.most_in_use = memory.in_use


def workspaces(unrolled: Unrolled) -> list[int]:
    """Bytes of the cuBLAS workspaces that the step leaves behind."""
    return [unrolled.kind_sizes[unrolled.kinds[ident]] for ident in unrolled.workspaces]


def live_at_peak(unrolled: Unrolled) -> tuple[str, list[tuple[int, int]]]:
    """(phase, [(number, how many)]) of the tensors alive at the step's highest point."""
    top, last = unrolled.highest()
    alive: dict[int, int] = {}
    now = 0
    phase = ""
    for number, (section, layer) in enumerate(unrolled.order):
        phase, shift = section.phase, layer << LAYER_SHIFT
        if number == last:
            break
        for event, key, relative in unrolled.crossing_changes(section):
            if key < 0:
                continue
            if event > 0:
                alive[key + shift if relative else key] = event
            else:
                del alive[key + shift if relative else key]
        now += unrolled.totals[id(section)].net
    sizes = unrolled.sums.by_event(unrolled.steady_sizes)
    for event, key, relative in unrolled.changes(section, section.events):
        if now == top:
            break
        if event > 0:
            if key >= 0:
                alive[key + shift if relative else key] = event
        else:
            del alive[key + shift if relative else key]
        now += sizes[event]
    counts: dict[int, int] = {}
    for event in alive.values():
        counts[event] = counts.get(event, 0) + 1
    return phase, list(counts.items())
