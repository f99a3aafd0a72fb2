"""The display of a running `train`: a progress bar on a terminal, plain lines in a log.

Both take the events of `progress.jsonl`, whose fields may be missing or None: the child is another process.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol, TextIO

from vramplan.core.units import human
from vramplan.report.data import progress_text, show_sample, summary_text
from vramplan.report.fields import number as _float
from vramplan.report.fields import one_line
from vramplan.report.fields import whole as _int
from vramplan.report.survival import health_text, oom_text, rehearsal_text

Event = dict[str, Any]
EVERY_S = 10.0  # between plain lines
SPARK_CELLS, SPARK_WIDTH = 12, 116  # the course of the loss, on terminals at least so wide
MOST_LOSSES = 10_000  # kept; of more every second one is left out
TEXTS = {"oom": oom_text, "rehearsal": rehearsal_text, "health": health_text}


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
    return PlainDisplay(stream, planned_bytes, width=width)


class PlainDisplay:
    """One line per phase, and one per `EVERY_S` seconds of steps; the first and the last step always."""

    def __init__(self, stream: TextIO, planned_bytes: int, *, width: int | None = None) -> None:
        self.stream, self.planned_bytes, self.width = stream, planned_bytes, width
        self.total: int | None = None
        self.last_t = float("-inf")

    def __enter__(self) -> PlainDisplay:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        return None

    def on_event(self, event: Event) -> None:
        if event.get("event") == "start":
            self.total = _int(event.get("total_steps"))
        if event.get("event") in ("step", "eval_progress"):
            t = _float(event.get("t")) or 0.0
            last = self.total is not None and event.get("step") == self.total
            if t - self.last_t < EVERY_S and not last:
                return
            self.last_t = t
            step = event["event"] == "step"
            self._say(step_text(event, self.total, self.planned_bytes) if step else evaluating_text(event))
        elif event.get("event") == "audit":
            from vramplan.report.audit import show_audit
            from vramplan.report.tables import console

            show_audit(console(self.stream, self.width), event)
        elif event.get("event") == "sample_row":
            from vramplan.report.tables import console

            show_sample(console(self.stream, self.width), event)
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
        self.losses: list[float] = []
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
                description=step_text(event, self.total, self.planned_bytes, self._course(event)),
            )
        elif event.get("event") == "eval_progress":
            self.progress.update(self.task, description=evaluating_text(event))
        elif event.get("event") == "audit":
            from vramplan.report.audit import show_audit

            show_audit(self.screen, event)
        elif event.get("event") == "sample_row":
            show_sample(self.progress.console, event)
        elif text := event_text(event):
            if event.get("event") == "phase":
                self.progress.update(self.task, description=text)
            self.progress.console.print(text)

    def _course(self, event: Event) -> str:
        """The losses so far, in a few cells."""
        from vramplan.report.sparkline import sparkline
        from vramplan.report.tables import is_ascii

        if (loss := _float(event.get("loss"))) is not None:
            if len(self.losses) >= MOST_LOSSES:
                del self.losses[::2]
            self.losses.append(loss)
        if self.screen.width < SPARK_WIDTH or is_ascii(self.screen) or len(self.losses) < 2:
            return ""
        return sparkline(self.losses, SPARK_CELLS)


def step_text(event: Event, total: int | None, planned_bytes: int, course: str = "") -> str:
    """ "12/60  loss 2.314  3,201 tok/s  5.31/5.86 GiB  0:01:20 left", without what the child did not say."""
    parts = [f"{_int(event.get('step')) or 0}/{total if total is not None else '?'}"]
    if (loss := _float(event.get("loss"))) is not None:
        parts.append(f"loss {course} {loss:.3f}" if course else f"loss {loss:.3f}")
    if (speed := _float(event.get("tokens_per_s"))) is not None:
        parts.append(f"{speed:,.0f} tok/s")
    if (peak := _int(event.get("peak_bytes"))) is not None:
        parts.append(f"peak {human(peak)} of {human(planned_bytes)}")
    if (left := _float(event.get("eta_s"))) is not None:
        parts.append(f"{clock(left)} left")
    return "  ".join(parts)


def evaluating_text(event: Event) -> str:
    return f"eval: {_int(event.get('done')) or 0} of {_int(event.get('total')) or '?'} batches"


def event_text(event: Event) -> str | None:
    """Any other event as a line; None for those that need none (the end is told by the caller)."""
    kind = event.get("event")
    if kind == "phase":
        return one_line(f"{event.get('name', '')}: {event.get('message', '')}".rstrip(": "))
    if kind == "start":
        resumed = _int(event.get("resumed_from")) or 0
        since = f", resumed from step {resumed}" if resumed else ""
        rows = f", {event['examples']} examples" if event.get("examples") is not None else ""
        batch = event.get("effective_batch_size", "?")
        return f"train: {event.get('total_steps', '?')} steps, effective batch {batch}{rows}{since}"
    if kind == "eval" and (loss := _float(event.get("loss"))) is not None:
        perplexity = _float(event.get("perplexity"))
        beside = f" (perplexity {perplexity:.4g})" if perplexity is not None else ""
        return f"eval: held-out loss {loss:.3f}{beside} at step {event.get('step', '?')}"
    if kind == "restart":
        return one_line(f"restart: {event.get('message', '')}")
    if kind == "warning":
        return one_line(f"warning: {event.get('message', '')}")
    if isinstance(kind, str) and kind in TEXTS:
        return one_line(TEXTS[kind](event))
    if kind == "data":
        return summary_text(event)
    if kind == "progress":
        left = _float(event.get("eta_s"))
        return progress_text(event, None if left is None else clock(left))
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
