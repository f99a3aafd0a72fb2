"""The table of `watch`: a run as its records have it, predicted beside measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from vramplan.core.types import Ledger
from vramplan.core.units import human
from vramplan.report import tables
from vramplan.report.estimate import run_line
from vramplan.report.fields import number, one_line, whole
from vramplan.report.live import clock, event_text
from vramplan.report.sparkline import sparkline

Event = dict[str, Any]
MOST_LOSSES = 100_000  # kept of a run; of more every second one is left out
SPARK_CELLS, BAR_CELLS, SHOWN = 24, 30, 3
TOLD = ("warning", "oom", "health", "restart")  # events worth a line of their own
ENDED = {"finished": "Done", "interrupted": "Interrupted", "oom": "Out of memory", "error": "Failed"}


class Watched:
    """What is known of a run so far, from its events in their order. A run that was resumed goes on."""

    def __init__(self, folder: str, ledger: Ledger | None, planned_speed: int | None = None) -> None:
        self.folder, self.ledger, self.planned_speed = folder, ledger, planned_speed
        self.total: int | None = None
        self.step = 0
        self.losses: list[float] = []
        self.held_out: tuple[float, int] | None = None
        self.speed: float | None = None
        self.left_s: float | None = None
        self.peak: int | None = None
        self.reserved: int | None = None
        self.phase = ""
        self.told: list[str] = []
        self.end: Event | None = None
        self.gone = False  # it ended without a word

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            kind = event.get("event")
            if kind == "end":
                self.end = event
            elif kind == "start":
                self.end, self.total = None, whole(event.get("total_steps"))
                self.step = whole(event.get("resumed_from")) or 0
            elif kind == "step":
                self._step(event)
            elif kind == "eval" and (loss := number(event.get("loss"))) is not None:
                self.held_out = (loss, whole(event.get("step")) or 0)
            elif kind == "phase":
                self.end, self.phase = None, event_text(event) or ""
            elif kind in TOLD:
                self.told = [*self.told, event_text(event) or ""][-SHOWN:]

    def _step(self, event: Event) -> None:
        self.step = whole(event.get("step")) or self.step
        if (loss := number(event.get("loss"))) is not None:
            self.losses.append(loss)
            if len(self.losses) > MOST_LOSSES:
                self.losses = self.losses[::2]
        self.speed, self.left_s = number(event.get("tokens_per_s")), number(event.get("eta_s"))
        self.reserved = whole(event.get("reserved_bytes"))
        peak = whole(event.get("peak_bytes"))
        self.peak = max(peak, self.peak or 0) if peak is not None else self.peak

    @property
    def is_over(self) -> bool:
        return self.end is not None or self.gone

    def headline(self) -> str:
        """How far it is, or how it ended."""
        at = f"step {self.step:,} of {self.total:,}" if self.total else self.phase or "starting"
        if self.end is not None:
            word = ENDED.get(str(self.end.get("ended")), "Ended")
            return one_line(f"{word}: {self.end.get('message') or at}.").replace("..", ".")
        if self.gone:
            return f"Ended without a word: {at}. Its log may say why: {self.folder}/log.txt"
        left = f", {clock(self.left_s)} left" if self.left_s is not None else ""
        return one_line(f"Running: {at}{left}.")

    def state(self) -> dict[str, Any]:
        """The same for `--json`."""
        peak = self.ledger.peak if self.ledger else None
        ended = None if self.end is None else self.end.get("ended")
        return {
            "running": not self.is_over, "ended": "error" if self.gone else ended, "step": self.step,
            "total_steps": self.total, "phase": self.phase, "eta_s": self.left_s if not self.is_over else 0.0,
            "tokens_per_s": self.speed, "loss": self.losses[-1] if self.losses else None,
            "first_loss": self.losses[0] if self.losses else None,
            "eval_loss": self.held_out[0] if self.held_out else None,
            "peak_bytes": self.peak, "predicted_peak_bytes": peak.allocated_bytes if peak else None,
            "reserved_bytes": self.reserved, "predicted_reserved_bytes": peak.reserved_bytes if peak else None,
            "notes": self.told,
        }  # fmt: skip


def view(screen: Console, watched: Watched) -> RenderableType:
    """The whole of it, to be drawn once or again and again."""
    verdict = (
        "" if not watched.is_over else "fits" if (watched.end or {}).get("ended") == "finished" else "does_not_fit"
    )
    head = Text(watched.headline())
    if verdict:
        head.stylize("bold " + tables.VERDICT_STYLES[verdict], 0, head.plain.index(":"))
    parts: list[RenderableType] = [head]
    about = run_line(watched.ledger) if watched.ledger else "no prediction in the folder"
    parts.append(Text(one_line(f"{watched.folder}: {about}"), style="dim"))
    if watched.total:
        share = min(watched.step / watched.total, 1.0)
        drawn = tables.bar(share, BAR_CELLS, ascii_only=tables.is_ascii(screen))
        parts += [Text(""), Text(f"{drawn:<{BAR_CELLS}}  {share:.0%}", style=tables.GROUP_COLOURS["weights"])]
    parts += [Text(""), _table(screen, watched)]
    parts += [Text(text) for text in watched.told]
    return Group(*parts)


def _table(screen: Console, watched: Watched) -> Table:
    table = tables.plain_table(screen)
    tables.add_text(table, "", screen)
    for title in ("predicted", "measured", "difference"):
        tables.add_number(table, title)
    peak = watched.ledger.peak if watched.ledger else None
    sizes = (
        ("allocated at the peak", peak.allocated_bytes if peak else None, watched.peak),
        ("reserved by PyTorch", peak.reserved_bytes if peak else None, watched.reserved),
    )
    for label, predicted, measured in sizes:
        table.add_row(label, _size(predicted), _size(measured), _difference(predicted, measured))
    speed = None if watched.speed is None else round(watched.speed)
    planned = "-" if watched.planned_speed is None else f"~{watched.planned_speed:,}"
    table.add_row("tokens/s", planned, tables.count(speed), _difference(watched.planned_speed, speed))
    if watched.losses:
        spark = "" if tables.is_ascii(screen) else "  " + sparkline(watched.losses, SPARK_CELLS)
        table.add_row(f"loss{spark}", "", f"{watched.losses[-1]:.3f}", f"from {watched.losses[0]:.3f}")
    if watched.held_out:
        table.add_row("held-out loss", "", f"{watched.held_out[0]:.3f}", f"at step {watched.held_out[1]:,}")
    return table


def _size(size: int | None) -> str:
    return "-" if size is None else human(size)


def _difference(predicted: int | None, measured: int | None) -> str:
    return "-" if not predicted or measured is None else f"{measured / predicted - 1:+.1%}"
