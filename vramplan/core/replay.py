"""Runs a step through the allocator: what it allocates, reserves and needs, phase by phase."""

from __future__ import annotations

from .allocator import SMALL_REQUEST, Handle, Native
from .tape import WORKSPACE_KEY
from .unroll import LAYER_SHIFT, Change, Unrolled

# One operation on the allocator: (key or None, bytes, high, key is relative). key None: `bytes` is the net change of
# the small pool and `high` its highest point; bytes 0: the large tensor of that key dies.
Op = tuple["int | None", int, int, bool]


class Played:
    """Highest points of one step, in bytes."""

    def __init__(self) -> None:
        self.allocated: dict[str, int] = {}  # by phase
        self.reserved_bytes = 0


def fold(unrolled: Unrolled, changes: list[Change]) -> list[Op]:
    """Changes as operations: runs of small tensors become one net change with its highest point."""
    ops: list[Op] = []
    net = high = 0
    info = unrolled.info
    for event, key, relative in changes:
        size = info[abs(event)][5]
        if size <= SMALL_REQUEST:
            net += size if event > 0 else -size
            high = max(high, net)
            continue
        if net or high:
            ops.append((None, net, high, False))
            net = high = 0
        ops.append((key, size if event > 0 else 0, 0, relative))
    if net or high:
        ops.append((None, net, high, False))
    return ops


def play_step(unrolled: Unrolled, memory: Native) -> Played:
    """One optimizer step on top of what `memory` holds. Raises OutOfMemory under a cap that is too small."""
    played = Played()
    blocks: dict[int, Handle] = {}
    compiled: dict[int, list[Op]] = {}
    phase = ""
    malloc, free, change_small = memory.malloc, memory.free, memory.change_small
    for section, layer, changes in unrolled.steps():
        if section.phase != phase:
            _close(played, phase, memory)
            phase = section.phase
        ops = compiled.get(id(section))
        if ops is None:
            ops = compiled[id(section)] = fold(unrolled, changes)
        shift = layer << LAYER_SHIFT
        for key, size, high, relative in ops:
            if key is None:
                change_small(high, size)
            elif size:
                blocks[key + shift if relative else key] = malloc(size)
            else:
                free(blocks.pop(key + shift if relative else key))
    _close(played, phase, memory)
    return played


def _close(played: Played, phase: str, memory: Native) -> None:
    if phase:
        played.allocated[phase] = max(played.allocated.get(phase, 0), memory.peak_allocated)
        played.reserved_bytes = max(played.reserved_bytes, memory.peak_reserved)
    memory.reset_peaks()


def workspaces(unrolled: Unrolled) -> list[int]:
    """Bytes of the cuBLAS workspaces that the step leaves behind."""
    return [row[5] for row in unrolled.info if row[0] == WORKSPACE_KEY]


def live_at_peak(unrolled: Unrolled) -> tuple[str, list[tuple[int, int]]]:
    """(phase, [(info index, how many)]) of the tensors alive at the step's highest point."""
    info = unrolled.info
    top, last = unrolled.highest()
    alive: dict[int, int] = {}
    now = 0
    phase = ""
    for number, (section, layer, changes) in enumerate(unrolled.steps()):
        phase = section.phase
        shift = layer << LAYER_SHIFT
        for event, key, relative in changes:
            name = key + shift if relative else key
            if event > 0:
                alive[name] = event
                now += info[event][5]
            else:
                del alive[name]
                now -= info[-event][5]
            if number == last and now == top:
                break
        if number == last:
            break
    counts: dict[int, int] = {}
    for event in alive.values():
        counts[event] = counts.get(event, 0) + 1
    return phase, list(counts.items())
