"""The table of `models`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from vramplan.core.types import ModelSpec
from vramplan.report import tables


def show_models(stream: TextIO, rows: Sequence[tuple[str, ModelSpec, int, str]], *, width: int | None = None) -> None:
    """(name, spec, parameters, Hub id), smallest first; at 80 columns without vocabulary and hidden size."""
    screen = tables.console(stream, width)
    wide = screen.width >= tables.WIDE
    tables.sentence(screen, f"{len(rows)} built-in models; a Hub id or a path to config.json works as well.")
    screen.print()
    table = tables.plain_table(screen)
    tables.add_text(table, "model", screen)
    for title in ("parameters", "layers", *(("hidden", "vocab") if wide else ()), "context"):
        tables.add_number(table, title)
    tables.add_text(table, "Hub id", screen)
    for name, spec, total, hub in sorted(rows, key=lambda row: (row[2], row[0])):
        middle = (f"{spec.hidden_size:,}", f"{spec.vocab_size:,}") if wide else ()
        table.add_row(
            name,
            tables.billions(total),
            str(spec.num_layers),
            *middle,
            f"{spec.max_position_embeddings:,}",
            hub or "-",
        )
    tables.put(screen, table, len(table.columns) - 1)
