"""`estimate --explain`: one line of the ledger with its formula, its tensors and where it comes from."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.text import Text

from vramplan.core.explain import Explanation
from vramplan.core.units import human
from vramplan.report import tables
from vramplan.report.fields import one_line

BASES = {"exact": "counted exactly", "modelled": "modelled", "measured": "measured"}
SHOWN = 12  # tensors


def show_explanation(stream: TextIO, found: Explanation, *, width: int | None = None) -> None:
    """The line, what it is made of, and the numbers that were put in."""
    screen = tables.console(stream, width)
    line = found.line
    size = f"{human(line.bytes)}, {line.bytes:,} bytes, {BASES.get(line.basis, line.basis)}"
    tables.sentence(screen, one_line(f"{line.key}, {line.label}: {size}."))
    screen.print()
    rows = tables.plain_table(screen)
    rows.show_header = False
    rows.add_column("", no_wrap=True)
    rows.add_column("", overflow="fold")
    put_in = ", ".join(f"{name} = {_number(value)}" for name, value in found.numbers)
    for title, text in (("formula", found.formula), ("here", line.formula), ("with", put_in), ("source", found.source)):
        if text:
            rows.add_row(title, one_line(text))
    screen.print(rows)
    if found.parts:
        _tensors(screen, found)


def _tensors(screen: Console, found: Explanation) -> None:
    screen.print()
    table = tables.plain_table(screen)
    tables.add_text(table, "tensors", screen)
    tables.add_number(table, "count")
    tables.add_text(table, "shape", screen)
    tables.add_text(table, "dtype", screen)
    tables.add_number(table, "bytes")
    for part in found.parts[:SHOWN]:
        table.add_row(one_line(part.name), f"{part.tensors:,}", part.shape, part.dtype, f"{part.bytes:,}")
    rest = found.parts[SHOWN:]
    if rest:
        count, size = sum(part.tensors for part in rest), sum(part.bytes for part in rest)
        table.add_row(f"and {len(rest)} more", f"{count:,}", "", "", f"{size:,}")
    table.add_section()
    total = sum(part.bytes for part in found.parts)
    table.add_row(Text("sum", style="bold"), f"{sum(p.tensors for p in found.parts):,}", "", "", f"{total:,}")
    tables.put(screen, table)
    screen.print(Text("each tensor is rounded up to 512 bytes, as the allocator does", style="dim"))


def _number(value: int | float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.0%}"
