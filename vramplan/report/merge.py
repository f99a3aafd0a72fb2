"""The display of a running `merge`: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from typing import Any, Protocol, TextIO

from vramplan.core.units import human
from vramplan.report.fields import one_line
from vramplan.report.live import EVERY_S, clock

Event = dict[str, Any]


class Display(Protocol):
    """Shows events as they come; a context manager."""

    def __enter__(self) -> Display: ...
    def __exit__(self, *error: object) -> None: ...
    def on_event(self, event: Event) -> None: ...


def make_display(stream: TextIO, *, width: int | None = None) -> Display:
    """A live bar if `stream` is a terminal that can move its cursor, else plain lines."""
    if stream.isatty():
        from vramplan.report.tables import console

        screen = console(stream, width)
        if not screen.is_dumb_terminal:
            return LiveDisplay(screen)
    return PlainDisplay(stream)


class PlainDisplay:
    """The phases, and a line every `EVERY_S` seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.told = time.monotonic()

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def on_event(self, event: Event) -> None:
        text = start_text(event) or progress_text(event)
        if event["event"] == "tensor":
            if time.monotonic() - self.told < EVERY_S:
                return
            self.told = time.monotonic()
        if text:
            self.stream.write(text + "\n")
            self.stream.flush()


class LiveDisplay:
    """A bar with bytes done and the time left."""

    def __init__(self, screen: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        from vramplan.report.tables import GROUP_COLOURS

        self.screen = screen
        bar = BarColumn(bar_width=24, complete_style=GROUP_COLOURS["weights"], pulse_style=GROUP_COLOURS["optimizer"])
        text = TextColumn("{task.description}", markup=False)
        self.progress = Progress(bar, text, console=screen, transient=True)
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> LiveDisplay:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def on_event(self, event: Event) -> None:
        if text := start_text(event):
            self.screen.print(text, markup=False)
        elif text := progress_text(event):
            total, done = event.get("total_bytes"), event.get("done_bytes")
            self.progress.update(self.task, total=total, completed=done, description=text)


def start_text(event: Event) -> str | None:
    """A phase, or what will be written, as a line."""
    if event["event"] == "phase":
        return one_line(f"merge: {event.get('message', '')}")
    if event["event"] == "start":
        size = human(int(event.get("total_bytes", 0)))
        return f"merge: {event.get('merged', '?')} of {event.get('tensors', '?')} tensors change, {size} to write"
    return None


def progress_text(event: Event) -> str | None:
    """ "1.20 of 13.50 GiB, 0:01:20 left"."""
    if event["event"] != "tensor":
        return None
    text = f"{human(int(event.get('done_bytes', 0)))} of {human(int(event.get('total_bytes', 0)))}"
    left = event.get("eta_s")
    return f"{text}, {clock(left)} left" if isinstance(left, (int, float)) else text
