"""A bar for work that may take longer than it should."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

T = TypeVar("T")
PATIENCE_S = 1.5


def watched(items: Iterable[T], total: int, what: str, stream: TextIO, patience_s: float = PATIENCE_S) -> Iterator[T]:
    """The items as they come. On a terminal with a bar, once they have taken longer than `patience_s`."""
    begun, bar = time.monotonic(), None
    try:
        for done, item in enumerate(items, start=1):
            if bar is None and stream.isatty() and time.monotonic() - begun > patience_s:
                bar = _Bar(stream, total, what)
            if bar is not None:
                bar.advance_to(done)
            yield item
    finally:
        if bar is not None:
            bar.close()


class _Bar:
    """Gone again when it is closed."""

    def __init__(self, stream: TextIO, total: int, what: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        from vramplan.report.tables import GROUP_COLOURS, console

        bar = BarColumn(bar_width=24, complete_style=GROUP_COLOURS["weights"])
        columns = bar, TextColumn("{task.completed}/{task.total} {task.description}", markup=False)
        self.progress = Progress(*columns, console=console(stream), transient=True)
        self.task = self.progress.add_task(what, total=total)
        self.progress.start()

    def advance_to(self, done: int) -> None:
        self.progress.update(self.task, completed=done)

    def close(self) -> None:
        self.progress.stop()
