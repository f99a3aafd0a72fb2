"""The display of a running `train`: a progress bar on a terminal, plain lines in a log.

Both take the events of `progress.jsonl`, whose fields may be missing or None: the child is another process.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, TextIO

from vramplan.core.units import human

Event = dict[str, Any]
EVERY_S = 10.0  # between plain lines


class Display(Protocol):
    """Shows events as they come; a context manager."""

    def __enter__(self) -> Display: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...  # fmt: skip
    def on_event(self, event: Event) -> None: ...


def make_display(stream: TextIO, planned_bytes: int, *, width: int | None = None) -> Display:
    """A live bar if `stream` is a terminal that can move its cursor, else plain lines."""
    if stream.isatty():
        from vramplan.report.tables import console

        screen = console(stream, width)
        if not screen.is_dumb_terminal:
            return LiveDisplay(screen, planned_bytes)
    return PlainDisplay(stream, planned_bytes)


class PlainDisplay:
    """One line per phase, and one per `EVERY_S` seconds of steps; the first and the last step always."""

    def __init__(self, stream: TextIO, planned_bytes: int) -> None:
        self.stream, self.planned_bytes = stream, planned_bytes
        self.total: int | None = None
        self.last_t = float("-inf")

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        return None

    def on_event(self, event: Event) -> None:
        if event.get("event") == "start":
            self.total = _int(event.get("total_steps"))
        if event.get("event") == "step":
            t = _float(event.get("t")) or 0.0
            last = self.total is not None and event.get("step") == self.total
            if t - self.last_t < EVERY_S and not last:
                return
            self.last_t = t
            self._say(step_text(event, self.total, self.planned_bytes))
        else:
            self._say(event_text(event))

    def _say(self, text: str | None) -> None:
        if text:
            self.stream.write(text + "\n")
            self.stream.flush()


class LiveDisplay:
    """A bar with step, loss, tokens/s, peak against plan and the time left; other events scroll above it."""

    def __init__(self, screen: Any, planned_bytes: int) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        from vramplan.report.tables import GROUP_COLOURS

        self.planned_bytes = planned_bytes
        self.total: int | None = None
        self.screen = screen
        self.progress = Progress(
            BarColumn(
                bar_width=min(24, max(8, screen.width - 66)),
                complete_style=GROUP_COLOURS["weights"],
                finished_style=GROUP_COLOURS["adapter"],
                pulse_style=GROUP_COLOURS["optimizer"],
            ),
            TextColumn("{task.description}", markup=False),
            console=screen,
            transient=True,
        )
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> LiveDisplay:
        self.progress.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.progress.stop()

    def on_event(self, event: Event) -> None:
        if event.get("event") == "start":
            self.total = _int(event.get("total_steps"))
            done = _int(event.get("resumed_from")) or 0
            self.progress.update(self.task, total=self.total, completed=done)
        if event.get("event") == "step":
            self.progress.update(
                self.task,
                completed=_int(event.get("step")) or 0,
                description=step_text(event, self.total, self.planned_bytes),
            )
        elif text := event_text(event):
            if event.get("event") == "phase":
                self.progress.update(self.task, description=text)
            self.progress.console.print(text)


def step_text(event: Event, total: int | None, planned_bytes: int) -> str:
    """ "12/60  loss 2.314  3,201 tok/s  5.31/5.86 GiB  0:01:20 left", without what the child did not say."""
    parts = [f"{_int(event.get('step')) or 0}/{total if total is not None else '?'}"]
    if (loss := _float(event.get("loss"))) is not None:
        parts.append(f"loss {loss:.3f}")
    if (speed := _float(event.get("tokens_per_s"))) is not None:
        parts.append(f"{speed:,.0f} tok/s")
    if (peak := _int(event.get("peak_bytes"))) is not None:
        parts.append(f"peak {human(peak)} of {human(planned_bytes)}")
    if (left := _float(event.get("eta_s"))) is not None:
        parts.append(f"{clock(left)} left")
    return "  ".join(parts)


def event_text(event: Event) -> str | None:
    """Any other event as a line; None for those that need none (the end is told by the caller)."""
    kind = event.get("event")
    if kind == "phase":
        return one_line(f"{event.get('name', '')}: {event.get('message', '')}".rstrip(": "))
    if kind == "start":
        resumed = _int(event.get("resumed_from")) or 0
        since = f", resumed from step {resumed}" if resumed else ""
        return (
            f"train: {event.get('total_steps', '?')} steps, effective batch {event.get('effective_batch_size', '?')}, "
            f"{event.get('examples', '?')} examples{since}"
        )
    if kind == "eval" and (loss := _float(event.get("loss"))) is not None:
        return f"eval: held-out loss {loss:.3f} at step {event.get('step', '?')}"
    if kind == "restart":
        return one_line(f"restart: {event.get('message', '')}")
    if kind == "warning":
        return one_line(f"warning: {event.get('message', '')}")
    if kind == "sample":
        return one_line(f"sample: {event.get('text', '')}")
    return None


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or d days and h:mm:ss."""
    whole = int(min(max(seconds, 0.0), 10**9))
    hours, rest = divmod(whole, 3600)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{rest // 60:02}:{rest % 60:02}"
    return f"{days} d {text}" if days else text


def one_line(text: str) -> str:
    """Without line breaks and control characters, which a model or a file may well produce."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _float(value: Any) -> float | None:
    from math import isfinite

    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and isfinite(value) else None


def _int(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
