"""A card's memory as one bar and its legend, whose printed numbers add up. Each segment has a pattern of its own, so
that the bar reads without colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.occupancy import shares
from vramplan.core.rows import Scale, apportion, scale_for
from vramplan.core.types import CardCheck, GpuProcess, GpuProfile
from vramplan.report import tables

MOST_CELLS = 120
SHOWN_PROCESSES = 8
MISSING, END = "missing", "end"


@dataclass(frozen=True, slots=True)
class Pattern:
    """How a segment is drawn: its cell, its cell where the output is ASCII, its colour."""

    cell: str
    ascii_cell: str
    colour: str


PATTERNS = {
    "driver": Pattern("░", "d", "#999999"),
    "others": Pattern("▒", "o", "#CC79A7"),
    "context": Pattern("▓", "c", "#56B4E9"),
    "resident": Pattern("█", "R", "#0072B2"),
    "activations": Pattern("▄", "A", "#E69F00"),
    "headroom": Pattern("·", ".", "#009E73"),
    "free": Pattern("·", ".", "#009E73"),
    MISSING: Pattern("×", "X", "#D55E00"),
    END: Pattern("│", "|", "bold"),
}
EXPLAINED = {
    "resident": "weights, adapter, optimizer",
    "activations": "gradients, loss, workspaces",
}


# ----------------------------------------------------------------------------------------------------------- bar
def cells(sizes: Sequence[int], width: int) -> list[int]:
    """Cells for each size, `width` in all; whatever is there has at least one."""
    whole = sum(sizes)
    if not whole:
        return [0] * len(sizes)
    found = [max(size * width // whole, 1 if size else 0) for size in sizes]
    order = sorted(range(len(sizes)), key=lambda index: sizes[index] * width % whole, reverse=True)
    for index in order[: max(width - sum(found), 0)]:
        found[index] += 1
    while sum(found) > width and max(found) > 1:  # slivers were rounded up: the largest gives way
        found[found.index(max(found))] -= 1
    return found


def bar(screen: Console, found: CardCheck) -> Text:
    """The card from its first byte to its last; what a run lacks sticks out behind the card's end."""
    drawn = _clipped(found)
    width = min(screen.width, MOST_CELLS) - (1 if found.missing_bytes else 0)
    line = Text(no_wrap=True)
    for (key, _), count in zip(drawn, cells([size for _, size in drawn], width), strict=True):
        if key == MISSING:
            line.append(_cell(screen, END), style=PATTERNS[END].colour)
        line.append(_cell(screen, key) * count, style=PATTERNS[key].colour)
    return line


def _clipped(found: CardCheck) -> list[tuple[str, int]]:
    """The segments up to the card's end, and what is missing."""
    left, drawn = found.card.total_bytes, []
    for segment in found.segments:
        size = min(segment.bytes, left)
        left -= size
        drawn.append((segment.key, size))
    return [*drawn, (MISSING, found.missing_bytes)] if found.missing_bytes else drawn


def _cell(screen: Console, key: str) -> str:
    pattern = PATTERNS[key]
    return pattern.ascii_cell if tables.is_ascii(screen) else pattern.cell


# -------------------------------------------------------------------------------------------------------- legend
def legend(screen: Console, found: CardCheck) -> tuple[Table, int]:
    """Every segment with its pattern, bytes and share; they and what is missing add up to the card.

    And the column that may be cut.
    """
    total = found.card.total_bytes
    scale = scale_for(total)
    table = tables.plain_table(screen)
    tables.add_text(table, "", screen)
    tables.add_number(table, scale.unit)
    tables.add_number(table, "share")
    tables.add_text(table, "", screen)
    shown = [segment for segment in found.segments if segment.bytes]
    sizes = [segment.bytes for segment in shown]
    steps = apportion([*sizes, -found.missing_bytes], scale.steps(total), scale)
    for segment, count in zip(shown, steps, strict=False):
        mark = "~" if segment.basis == "modelled" else ""
        label = _labelled(screen, segment.key, segment.label)
        share = tables.percent(segment.bytes / total)
        table.add_row(label, mark + scale.text(count), share, Text(EXPLAINED.get(segment.key, ""), style="dim"))
        if segment.key == "others":
            for who, number in _process_rows(found.card, count, scale):
                table.add_row(Text(f"    {who}"), number, "", "")
    if found.missing_bytes:
        label = _labelled(screen, MISSING, "missing")
        table.add_row(label, scale.text(steps[-1]), "", Text("beyond the card's end", style="dim"))
    table.add_section()
    table.add_row(Text("card", style="bold"), Text(scale.text(scale.steps(total)), style="bold"), "100%", "")
    return table, 3


def _labelled(screen: Console, key: str, label: str) -> Text:
    text = Text(_cell(screen, key), style=PATTERNS[key].colour)
    return text.append(f" {label}", style="default")


def _process_rows(card: GpuProfile, steps: int, scale: Scale) -> list[tuple[str, str]]:
    """The processes behind "other processes", largest first; the printed numbers add up to `steps`."""
    if not card.processes:
        return []
    found = shares(card)
    hidden = [_who(process) for process, size in found if process is not None and size is None]
    rest = "sizes not told" if hidden else "not named"
    known = [(_who(process) if process else rest, size) for process, size in found if size is not None]
    shown = known if len(known) <= SHOWN_PROCESSES else known[: SHOWN_PROCESSES - 1]
    more = known[len(shown) :]
    if more:
        shown = [*shown, (f"{len(more)} more", sum(size for _, size in more))]
    counts = apportion([size for _, size in shown], steps, scale)
    rows = [(who, scale.text(count)) for (who, _), count in zip(shown, counts, strict=True)]
    rows += [(who, "-") for who in hidden[:SHOWN_PROCESSES]]
    left = len(hidden) - SHOWN_PROCESSES
    return [*rows, (f"{left} more", "-")] if left > 0 else rows


def _who(process: GpuProcess) -> str:
    pid = "" if process.pid is None else f"pid {process.pid}"
    return ", ".join(part for part in (process.name, pid) if part) or "not seen from here"
