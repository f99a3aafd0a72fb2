"""Which heading a line of a ledger stands under."""

from __future__ import annotations

from .types import Ledger, Line

OVERHEAD = "overhead"


def group_of(line: Line) -> str:
    """The heading a line stands under. Only what PyTorch's allocator does not hand out is overhead."""
    head = line.key.partition(".")[0]
    if head == OVERHEAD:
        return OVERHEAD
    return line.group if line.group and line.group != OVERHEAD else head


def by_group(ledger: Ledger) -> dict[str, int]:
    """Bytes under each heading, in the ledger's order. They add up to the device bytes."""
    sizes: dict[str, int] = {}
    for line in ledger.lines:
        if line.bytes:
            sizes[group_of(line)] = sizes.get(group_of(line), 0) + line.bytes
    return sizes
