"""The tables of `check`: the live card, and the estimate held against it."""

from __future__ import annotations

from typing import TextIO

from rich.text import Text

from vramplan.core.types import GpuProfile, GpuVerdict, Ledger
from vramplan.core.units import human
from vramplan.report import tables
from vramplan.report.estimate import ledger_table, one_card, run_line
from vramplan.report.gpus import card_line


def show_check(
    stream: TextIO,
    card: GpuProfile,
    ledger: Ledger | None = None,
    verdict: GpuVerdict | None = None,
    *,
    width: int | None = None,
) -> None:
    """Verdict first where a model was named; then the card, who else is on it, and the ledger."""
    screen = tables.console(stream, width)
    if ledger is not None and verdict is not None:
        tables.sentence(screen, one_card(ledger.peak.device_bytes, verdict), verdict.verdict)
        screen.print(Text(run_line(ledger), style="dim"))
    tables.sentence(screen, card_line(card))
    if card.processes:
        screen.print()
        table = tables.plain_table(screen)
        tables.add_number(table, "pid")
        tables.add_number(table, "uses")
        tables.add_text(table, "process", screen)
        for process in card.processes:
            used = "-" if process.used_bytes is None else human(process.used_bytes)
            table.add_row(str(process.pid), used, process.name or "-")
        tables.put(screen, table, 2)
    if ledger is not None:
        screen.print()
        tables.put(screen, *ledger_table(screen, ledger))
