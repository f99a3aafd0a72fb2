"""The table of `gpus`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.types import GpuProfile
from vramplan.core.units import GIB, human
from vramplan.report import tables


def show_gpus(
    stream: TextIO, stored: Sequence[GpuProfile], live: Sequence[GpuProfile], *, width: int | None = None
) -> None:
    """This machine's cards first, then the stored ones, smallest first."""
    screen = tables.console(stream, width)
    if live:
        cards = "card" if len(live) == 1 else "cards"
        tables.sentence(screen, f"This machine has {len(live)} {cards}; --gpu live plans for the first.")
        screen.print()
        tables.put(screen, *card_table(screen, live))
        if not all(card.state is None or card.state.order_certain for card in live):
            screen.print(Text("CUDA may count these in another order: `vramplan check` says more", style="dim"))
        screen.print()
    tables.sentence(screen, f"{len(stored)} stored cards for --gpu; usable is what one process may fill on Linux.")
    screen.print()
    tables.put(screen, *card_table(screen, sorted(stored, key=lambda card: (card.usable_bytes, card.key))))
    if any(card.usable_basis == "modelled" for card in stored):
        screen.print(Text("~ modelled from the total; the others were read on such a card", style="dim"))


def show_saved(stream: TextIO, card: GpuProfile, path: str, *, width: int | None = None) -> None:
    """What was written, and how it is used."""
    screen = tables.console(stream, width)
    tables.sentence(screen, card_line(card))
    tables.command(screen, f"Written to {path}. To plan for it elsewhere:", f"vramplan estimate MODEL --gpu {path}")


def card_table(screen: Console, cards: Sequence[GpuProfile]) -> tuple[Table, int]:
    """One row a card, its full name where there is room for it; and the column that may be cut."""
    wide = screen.width >= tables.WIDE
    table = tables.plain_table(screen)
    tables.add_text(table, "card", screen)
    for title in ("GiB", "usable", "bf16 TFLOPS", "GB/s", "compute"):
        tables.add_number(table, title)
    if wide:
        tables.add_text(table, "name", screen)
    for card in cards:
        mark = "~" if card.usable_basis == "modelled" else ""
        table.add_row(
            card.key,
            f"{card.total_bytes / GIB:.2f}",
            f"{mark}{card.usable_bytes / GIB:.2f}",
            _rate(card.bf16_flops_per_s, 10**12),
            _rate(card.bandwidth_bytes_per_s, 10**9),
            "{}.{}".format(*card.compute_capability),
            *([card.name] if wide else []),
        )
    return table, 6 if wide else 0


def card_line(card: GpuProfile) -> str:
    """One card on one line: how much of it is usable."""
    return f"{card.name}: {human(card.usable_bytes)} usable of {human(card.total_bytes)}"


def _rate(rate: int | None, unit: int) -> str:
    return "-" if rate is None else f"{rate / unit:,.0f}"
