"""The display of `watch`: on a terminal a table, drawn again and again; elsewhere the table, lines, and the table."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, TextIO

from vramplan.report.live import PlainDisplay
from vramplan.report.tables import console
from vramplan.report.watch import Event, Watched, view


class Screen(Protocol):
    """A context manager; what it shows stays when it is left."""

    def __enter__(self) -> Screen: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...  # fmt: skip
    def show(self, events: list[Event]) -> None: ...


def make_screen(stream: TextIO, watched: Watched, width: int | None = None) -> Screen:
    """For a terminal that can move its cursor, or for anything else."""
    screen = console(stream, width)
    if screen.is_terminal and not screen.is_dumb_terminal:
        return LiveScreen(screen, watched)
    return PlainScreen(stream, watched, width)


class LiveScreen:
    """The table in its place, as it is now."""

    def __init__(self, screen: Any, watched: Watched) -> None:
        from rich.live import Live

        self.screen, self.watched = screen, watched
        self.live = Live(console=screen, auto_refresh=False)

    def __enter__(self) -> LiveScreen:
        self.live.start()
        self.show([])
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.show([])
        self.live.stop()

    def show(self, events: list[Event]) -> None:
        self.live.update(view(self.screen, self.watched), refresh=True)


class PlainScreen:
    """The table as it is found, unless the run is over; lines; the table at the end."""

    def __init__(self, stream: TextIO, watched: Watched, width: int | None) -> None:
        self.screen, self.watched = console(stream, width), watched
        planned = watched.ledger.peak.allocated_bytes if watched.ledger else 0
        self.lines = PlainDisplay(stream, planned, width=width)
        self.lines.total = watched.total

    def __enter__(self) -> PlainScreen:
        if not self.watched.is_over:
            self._draw()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self._draw()

    def show(self, events: list[Event]) -> None:
        for event in events:
            self.lines.on_event(event)

    def _draw(self) -> None:
        self.screen.print(view(self.screen, self.watched))
