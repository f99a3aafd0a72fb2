"""A ledger as rows whose printed numbers add up, whoever draws them: a terminal, a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .groups import OVERHEAD, group_of
from .types import Ledger, Line
from .units import GIB, MIB

LINE, GROUP, SUBTOTAL, TOTAL = "line", "group", "subtotal", "total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The unit a table prints in: `steps` of its last digit make one unit."""

    unit: str
    unit_bytes: int
    digits: int

    def text(self, steps: int) -> str:
        return f"{steps / 10**self.digits:,.{self.digits}f}"

    def steps(self, size: int) -> int:
        """Bytes in steps of the last digit, rounded."""
        per_unit: int = 10**self.digits
        return (2 * size * per_unit + self.unit_bytes) // (2 * self.unit_bytes)


def scale_for(total: int) -> Scale:
    """GiB with two digits, or MiB with one where the whole is below one GiB."""
    return Scale(unit="GiB", unit_bytes=GIB, digits=2) if total >= GIB else Scale(unit="MiB", unit_bytes=MIB, digits=1)


def apportion(sizes: Sequence[int], total: int, scale: Scale) -> list[int]:
    """Share `total` steps among sizes by largest remainder: each is rounded down or up, and the sum is `total`."""
    factor = 10**scale.digits
    floors = [size * factor // scale.unit_bytes for size in sizes]
    remainders = [size * factor % scale.unit_bytes for size in sizes]
    missing = total - sum(floors)
    for index in sorted(range(len(sizes)), key=lambda index: -remainders[index])[: max(missing, 0)]:
        floors[index] += 1
    return floors


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One printed row. `steps` is the printed number; `share` of the total in [0, 1]; `group` picks the colour.

    `basis` and `formula` are those of the ledger's line, empty where the row stands for several.
    """

    kind: str
    label: str
    group: str
    bytes: int
    steps: int
    share: float
    formula: str = ""
    basis: str = ""


def ledger_rows(ledger: Ledger) -> tuple[Scale, list[Row]]:
    """Groups and their lines, largest first; "allocated at the peak"; overhead; the device total.

    Every printed number is the sum of the printed numbers it stands for.
    """
    groups: dict[str, list[Line]] = {}
    for line in ledger.lines:
        if line.bytes:
            groups.setdefault(group_of(line), []).append(line)
    for lines in groups.values():
        lines.sort(key=lambda line: -line.bytes)
    sizes = {group: sum(line.bytes for line in lines) for group, lines in groups.items()}
    overhead = sizes.get(OVERHEAD, 0)
    allocated = sum(sizes.values()) - overhead
    total = allocated + overhead
    scale = scale_for(total)
    total_steps = scale.steps(total)
    allocated_steps, overhead_steps = apportion([allocated, overhead], total_steps, scale)
    names = sorted((group for group in groups if group != OVERHEAD), key=lambda group: -sizes[group])
    rows: list[Row] = []
    for name, steps in zip(names, apportion([sizes[n] for n in names], allocated_steps, scale), strict=True):
        rows += _group(name, groups[name], steps, total, scale)
    rows.append(_row(SUBTOTAL, "allocated at the peak", "", allocated, allocated_steps, total))
    if overhead:
        rows += _group(OVERHEAD, groups[OVERHEAD], overhead_steps, total, scale)
    rows.append(_row(TOTAL, "device", "", total, total_steps, total))
    return scale, rows


def _group(name: str, lines: list[Line], steps: int, total: int, scale: Scale) -> list[Row]:
    if len(lines) == 1:  # one row says it all
        line = lines[0]
        label = line.label or line.key
        label = label if name.lower() in label.lower() else f"{name}: {label}"
        return [_row(GROUP, label, name, line.bytes, steps, total, line.formula, line.basis)]
    rows = [_row(GROUP, name, name, sum(line.bytes for line in lines), steps, total)]
    for line, part in zip(lines, apportion([line.bytes for line in lines], steps, scale), strict=True):
        rows.append(_row(LINE, line.label or line.key, name, line.bytes, part, total, line.formula, line.basis))
    return rows


def _row(
    kind: str, label: str, group: str, size: int, steps: int, total: int, formula: str = "", basis: str = ""
) -> Row:
    share = size / total if total else 0.0
    return Row(kind=kind, label=label, group=group, bytes=size, steps=steps, share=share, formula=formula, basis=basis)
