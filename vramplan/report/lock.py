"""The tables of `lock`: what was written down, and what has become of it, group by group."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.lock import Drift
from vramplan.core.rows import Scale, apportion, scale_for
from vramplan.core.types import Lock
from vramplan.core.units import human
from vramplan.report import tables
from vramplan.report.fields import one_line


def show_lock(stream: TextIO, made: Lock, path: str, *, width: int | None = None) -> None:
    """What the lock holds, and how to hold a run against it."""
    screen = tables.console(stream, width)
    tables.sentence(screen, one_line(f"Locked: {made.run.model} needs {human(made.peak.device_bytes)}."))
    screen.print()
    scale = scale_for(made.peak.device_bytes)
    table = tables.plain_table(screen)
    tables.add_text(table, f"at the peak ({made.peak.phase})", screen)
    tables.add_number(table, scale.unit)
    sizes = [size for _, size in made.groups]
    parts = apportion(sizes, scale.steps(sum(sizes)), scale)
    for (name, _), steps in sorted(zip(made.groups, parts, strict=True), key=lambda row: -row[0][1]):
        table.add_row(name, scale.text(steps))
    table.add_section()
    table.add_row("device", scale.text(scale.steps(sum(sizes))))
    tables.put(screen, table)
    tables.command(screen, "To hold the run against it later:", one_line(f"vramplan lock --check {path}"))


def show_drift(stream: TextIO, drift: Drift, path: str, *, width: int | None = None) -> None:
    """The verdict, every group then and now, and what of the run is another."""
    screen = tables.console(stream, width)
    tables.sentence(screen, one_line(headline(drift, path)), "does_not_fit" if drift.is_too_much else "fits")
    screen.print()
    tables.put(screen, _groups(screen, drift))
    changes = drift.changes()
    if changes:
        screen.print()
        table = tables.plain_table(screen)
        for title in ("what changed", "locked", "now"):
            tables.add_text(table, title, screen)
        for row in changes:
            table.add_row(*(one_line(text) for text in row))
        tables.put(screen, table, 2)


def headline(drift: Drift, path: str) -> str:
    """Whether the peak rose, and how far, in one sentence."""
    then, now = (human(lock.peak.device_bytes) for lock in (drift.then, drift.now))
    allowed = f"{drift.tolerance:.2%} allowed"
    if drift.is_too_much:
        return f"Rose: {drift.now.run.model} needs {now}, {then} in {path}: {drift.share:+.2%}, {allowed}."
    if drift.rose_bytes == 0:
        return f"Same: {drift.now.run.model} needs {now}, as in {path}."
    return f"Within: {drift.now.run.model} needs {now}, {then} in {path}: {drift.share:+.2%}, {allowed}."


def _groups(screen: Console, drift: Drift) -> Table:
    """Every printed column adds up."""
    rows = drift.rows()
    scale = scale_for(max(drift.then.peak.device_bytes, drift.now.peak.device_bytes))
    table = tables.plain_table(screen)
    tables.add_text(table, "group", screen)
    for title in (f"locked {scale.unit}", f"now {scale.unit}", "more"):
        tables.add_number(table, title)
    then, now = columns([(before, after) for _, before, after in rows], scale)
    for (name, *_), before, after in zip(rows, then, now, strict=True):
        colour = tables.VERDICT_STYLES["does_not_fit"] if after > before else ""
        table.add_row(name, scale.text(before), scale.text(after), Text(_more(after - before, scale), style=colour))
    table.add_section()
    table.add_row("device", scale.text(sum(then)), scale.text(sum(now)), _more(sum(now) - sum(then), scale))
    return table


def columns(sizes: list[tuple[int, int]], scale: Scale) -> tuple[list[int], list[int]]:
    """Both columns in printed steps: each adds up to its total, and what has not changed reads the same in both."""
    then, now = (sum(pair[index] for pair in sizes) for index in (0, 1))
    before = apportion([pair[0] for pair in sizes], scale.steps(then), scale)
    more = apportion([pair[1] - pair[0] for pair in sizes], scale.steps(now) - scale.steps(then), scale)
    return before, [start + change for start, change in zip(before, more, strict=True)]


def _more(steps: int, scale: Scale) -> str:
    return f"{'+' if steps > 0 else '-'}{scale.text(abs(steps))}" if steps else ""
