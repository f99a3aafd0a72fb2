"""A plan as a change of another trainer's file: which keys, what they were, and what the file cannot say."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from vramplan.core.dialects import TOOL_NAMES, Rewritten
from vramplan.report import tables
from vramplan.report.fields import one_line


def show_rewritten(screen: Console, words: Rewritten) -> None:
    """The keys, the levers without a key, and how to start the trainer."""
    screen.print()
    rows = words.rows()
    if not rows:
        tables.sentence(screen, one_line(f"{words.source} says all of it already."))
    else:
        table = tables.plain_table(screen)
        tables.add_text(table, one_line(f"in {words.written or words.source}"), screen)
        tables.add_text(table, "was", screen)
        tables.add_text(table, "is", screen)
        for key, was, now in rows:
            table.add_row(*(one_line(text) for text in (key, was, now)))
        tables.put(screen, table, 2)
    for text in words.change.unsaid:
        tables.sentence(screen, one_line(f"{TOOL_NAMES[words.tool]} cannot say {text}"))
    if words.comments_lost:
        tables.sentence(screen, one_line(f"The comments of {words.source} are lost."))
    tables.command(screen, "To run it:", one_line(words.start))
    if words.written is None:
        ending = words.source.rpartition(".")[2]
        screen.print(Text(one_line(f"(-o FILE.{ending} writes a copy of {words.source} with these keys)"), style="dim"))
