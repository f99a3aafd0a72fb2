"""The table of a memory snapshot: who holds what, and what the allocator has left in which pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.holders import HOLDERS
from vramplan.core.types import Holdings
from vramplan.core.units import human
from vramplan.report import tables


def show_holdings(stream: TextIO, held: Holdings, asked: int | None = None, *, width: int | None = None) -> None:
    """Headline, holders, then what they do not say: pieces left, layers, peak, growth."""
    screen = tables.console(stream, width)
    screen.print(Text(headline(held)))
    if held.holders:
        screen.print()
        table = holders_table(screen, held)
        tables.put(screen, table, len(table.columns) - 1 if screen.width >= tables.WIDE else 0)
    screen.print()
    for text in remarks(held, asked):
        tables.sentence(screen, text)


def headline(held: Holdings) -> str:
    when = "when memory ran out" if held.moment == "oom" else "when the snapshot was taken"
    return (
        f"GPU {held.device}, {when}: {human(held.allocated_bytes)} allocated of {human(held.reserved_bytes)} reserved."
    )


def holders_table(screen: Console, held: Holdings) -> Table:
    """A row for each holder; the peak where the trace has a higher one, the place where there is room."""
    peaks = held.peak_bytes is not None and any(holder.peak_bytes != holder.bytes for holder in held.holders)
    wide = screen.width >= tables.WIDE
    table = tables.plain_table(screen)
    tables.add_text(table, "held by", screen)
    for title in ("bytes", "share", *(("at the peak",) if peaks else ()), "tensors"):
        tables.add_number(table, title)
    if wide:
        tables.add_text(table, "allocated at", screen)
    for holder in held.holders:
        label = Text(holder.label, style=tables.GROUP_COLOURS.get(holder.group, ""))
        share = tables.percent(holder.bytes / held.allocated_bytes) if held.allocated_bytes else ""
        row: list[Text | str] = [label, human(holder.bytes) if holder.bytes else "-", share if holder.bytes else ""]
        row += [human(holder.peak_bytes) if holder.peak_bytes else "-"] if peaks else []
        row += [tables.count(holder.tensors) if holder.tensors else ""]
        table.add_row(*row, *((short(holder.where),) if wide else ()))
    return table


def short(where: str) -> str:
    """ "models/llama/modeling_llama.py:403 forward" -> without the folders, for which a table has no room."""
    return where.rpartition("/")[2]


def remarks(held: Holdings, asked: int | None) -> Iterator[str]:
    idle = held.reserved_bytes - held.allocated_bytes
    text = f"Reserved, not allocated: {human(idle)}, the largest piece {human(held.largest_free_bytes)}"
    if asked and held.moment == "oom":
        enough = "larger than" if held.largest_free_bytes >= asked else "smaller than"
        text += f", {enough} the {human(asked)} asked for"
    yield text + "."
    if held.private_pools_bytes:
        yield f"In private pools, as of CUDA graphs: {human(held.private_pools_bytes)}."
    layers = [size for size in held.layer_bytes if size]
    if layers:
        yield f"{len(layers)} layer{'s' * (len(layers) > 1)} in the forward, up to {human(max(layers))} each."
    if held.peak_bytes is None:
        yield "No trace was recorded: the peak and the past are not known."
    else:
        place = f", at {short(held.peak_where)}" if held.peak_where else ""
        yield f"Highest in {tables.count(held.events)} events: {human(held.peak_bytes)}{place}."
    if held.growth is not None:
        growth = held.growth
        place = f", {short(growth.where)}" if growth.where else ""
        yield f"Grows by {human(growth.bytes)} a step over {growth.steps} steps: {HOLDERS[growth.key]}{place}."
