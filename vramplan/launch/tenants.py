"""Who else is on the card: whether it is quiet before something is measured on it, and whether it stays so meanwhile.

A process that holds memory and does nothing is no disturbance: what it holds is not free, and that is known. One that
grows, appears or computes is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from vramplan.core.units import MIB, human
from vramplan.errors import VramplanError
from vramplan.launch.watching import Card

LOOKS, PAUSE_S = 5, 0.25  # a card is quiet if it was so over this many looks
LIMIT_S = 60.0
GROWTH_BYTES = 32 * MIB  # a desktop's own ups and downs are smaller
BUSY_PERCENT = 10  # a desktop that draws stays below
IDLE_BYTES = 64 * MIB  # who computes holds more than this: a CUDA context alone is larger
UNKNOWN_BYTES = 1024 * MIB  # memory on the card that is neither the child's nor was there before

Sizes = dict[int, "int | None"]
Say = Callable[[str], None]


class Look(NamedTuple):
    """The card at one moment, without what this process has. None: the driver does not say."""

    used_bytes: int | None
    sizes: Sizes  # of the other processes, by pid
    busy_percent: int | None


def look(nvml: Any, index: int) -> Look:
    """Raises what NVML says of a card that cannot be asked (VramplanError)."""
    return Look(nvml.used_bytes(index), nvml.sizes(index), nvml.busy_percent(index))


# ------------------------------------------------------------------------------------------------------ before it
def wait_until_quiet(nvml: Any, index: int, say: Say) -> None:
    """Return when nobody grows and nobody computes; `say` what is waited for. VramplanError after `LIMIT_S`."""
    until = time.monotonic() + LIMIT_S
    looks: list[Look] = []
    said = False
    while True:
        looks = [*looks[1 - LOOKS :], look(nvml, index)]
        if len(looks) == LOOKS:
            reason = unrest(looks, nvml.process_name)
            if not reason:
                return
            if time.monotonic() >= until:
                text = f"the card did not come to rest within {LIMIT_S:.0f} s: {reason}"
                raise VramplanError(text, "wait for it, or end it")
            if not said:
                say(f"waiting up to {LIMIT_S:.0f} s for the card to come to rest: {reason}")
                said = True
        time.sleep(PAUSE_S)


def unrest(looks: list[Look], name_of: Callable[[int], str | None]) -> str:
    """What keeps the card from being quiet over these looks; "" if nothing does."""
    first, last = looks[0], looks[-1]
    for pid, size in last.sizes.items():
        if pid not in first.sizes:
            return f"{_named(pid, name_of)} has just started on it"
        before = first.sizes[pid]
        if size is not None and before is not None and abs(size - before) > GROWTH_BYTES:
            return f"{_named(pid, name_of)} {'grows' if size > before else 'shrinks'}, now {human(size)}"
    used = [each.used_bytes for each in looks if each.used_bytes is not None]
    if used and max(used) - min(used) > GROWTH_BYTES:
        return f"the memory in use changes, now {human(used[-1])}"
    busy = sorted(each.busy_percent or 0 for each in looks)[len(looks) // 2]
    if busy > BUSY_PERCENT and (not used or used[-1] > IDLE_BYTES):
        return f"something computes on it ({busy} % of the time)" + _who(last.sizes, name_of)
    return ""


def _named(pid: int, name_of: Callable[[int], str | None]) -> str:
    name = name_of(pid)
    return f"process {pid} ({name})" if name else f"process {pid}"


def _who(sizes: Sizes, name_of: Callable[[int], str | None]) -> str:
    """The largest processes, which may be the one."""
    largest = sorted(sizes, key=lambda pid: -(sizes[pid] or 0))[:3]
    return ": " + ", ".join(_named(pid, name_of) for pid in largest) if largest else ""


# ----------------------------------------------------------------------------------------------------- meanwhile
class Tenants:
    """Looks at the card while a child runs there: the child's memory, and what others do.

    Everything is None or empty where the driver cannot be asked; looking never fails.
    """

    def __init__(self, nvml: Any, index: int) -> None:
        self.nvml, self.index = nvml, index
        self.card = Card(0, index)
        self.before: Look | None = None
        self.seen: dict[str, None] = {}  # disturbances, each once, in their order

    def __enter__(self) -> Tenants:
        self.before = self._look()
        self.card.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.card.__exit__(*error)

    def sample(self, pid: int) -> None:
        """Look once; `pid` is the child's."""
        self.card.pid = pid
        self.card.sample()
        now = self._look()
        if self.before is not None and now is not None:
            self.seen.update(dict.fromkeys(intruders(self.before, now, pid, self.nvml.process_name)))

    def held(self, reserved_bytes: int | None, context_bytes: int) -> int | None:
        """What the child has on the card now, while it says that PyTorch has reserved this much of it."""
        now = self.card.now()
        if now is not None and reserved_bytes is not None and now > reserved_bytes + context_bytes + UNKNOWN_BYTES:
            self.seen[f"{human(now - reserved_bytes)} more are in use than PyTorch has reserved"] = None
        return now

    @property
    def disturbances(self) -> tuple[str, ...]:
        return tuple(self.seen)

    def _look(self) -> Look | None:
        try:
            return look(self.nvml, self.index)
        except Exception:  # a driver that stops answering must not end the run
            return None


def intruders(before: Look, now: Look, child: int, name_of: Callable[[int], str | None]) -> list[str]:
    """Which processes have appeared or grown since.

    In a container the driver may know the child by another number: then one stranger is the child.
    """
    new = [pid for pid in now.sizes if pid not in before.sizes and pid != child]
    if child not in now.sizes and new:
        new.remove(max(new, key=lambda pid: now.sizes[pid] or 0))
    found = [f"{_named(pid, name_of)} appeared on the card" for pid in new]
    for pid, size in now.sizes.items():
        was = before.sizes.get(pid)
        if size is not None and was is not None and size - was > GROWTH_BYTES:
            found.append(f"{_named(pid, name_of)} grew on the card")
    return found
