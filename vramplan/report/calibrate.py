"""`vramplan calibrate`: a bar while it measures, and what it has learned."""

from __future__ import annotations

from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.types import Calibration, SpeedFactors
from vramplan.core.units import MIB
from vramplan.report import tables
from vramplan.report.live import clock


class Bar(Protocol):
    """Shows how far the set is; a context manager."""

    def __enter__(self) -> Bar: ...
    def __exit__(self, *error: object) -> None: ...
    def step(self, done: int, total: int, name: str, left_s: float) -> None: ...
    def say(self, text: str) -> None: ...


def make_bar(stream: TextIO, width: int | None = None) -> Bar:
    """A bar where `stream` is a terminal that can move its cursor, else a line for every case."""
    screen = tables.console(stream, width)
    return LiveBar(screen) if stream.isatty() and not screen.is_dumb_terminal else PlainBar(stream)


class PlainBar:
    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __enter__(self) -> PlainBar:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def step(self, done: int, total: int, name: str, left_s: float) -> None:
        if name:
            self.say(f"{done + 1}/{total}  {name}  {clock(left_s)} left")

    def say(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()


class LiveBar:
    def __init__(self, screen: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        colours = tables.GROUP_COLOURS
        self.screen = screen
        bar = BarColumn(bar_width=24, complete_style=colours["weights"], finished_style=colours["adapter"])
        self.progress: Any = Progress(
            bar, TextColumn("{task.description}", markup=False), console=screen, transient=True
        )
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> LiveBar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def step(self, done: int, total: int, name: str, left_s: float) -> None:
        text = f"{done}/{total}  {name}  {clock(left_s)} left"
        self.progress.update(self.task, total=total, completed=done, description=text, refresh=True)

    def say(self, text: str) -> None:
        self.progress.console.print(Text(text))


# ------------------------------------------------------------------------------------------------- what was learned
def show_calibration(stream: TextIO, found: Calibration, written: str, *, width: int | None = None) -> None:
    """One card's calibration beside what is taken without one."""
    screen = tables.console(stream, width)
    tables.sentence(screen, f"{found.card}: calibrated on {found.made} from {found.rows} short runs.")
    screen.print(Text(", ".join(f"{name} {version}" for name, version in found.versions), style="dim"))
    screen.print()
    tables.put(screen, calibration_table(screen, found))
    if found.error is not None:
        screen.print(Text(f"tokens/s of these runs, modelled with this: off by {found.error:.0%} on average"))
    screen.print()
    screen.print(Text("kept in  " + written), soft_wrap=True)


def calibration_table(screen: Console, found: Calibration) -> Table:
    table = tables.plain_table(screen)
    tables.add_text(table, "overhead", screen)
    tables.add_number(table, "measured")
    tables.add_number(table, "otherwise")
    speed, usual = found.speed, SpeedFactors()
    rows = (
        ("CUDA context, MiB", f"{found.context_bytes / MIB:,.0f}", "of the card"),
        ("reserved over the replay's", f"{found.reserved_factor:.3f}", "1.000"),
        ("matrix products, of the peak rate", f"{speed.matmul_share:.0%}", f"{usual.matmul_share:.0%}"),
        ("attention, of the peak rate", f"{speed.attention_share:.0%}", f"{usual.attention_share:.0%}"),
        ("memory traffic, of the peak rate", f"{speed.bandwidth_share:.0%}", f"{usual.bandwidth_share:.0%}"),
        ("start of a kernel, us", f"{speed.launch_seconds * 1e6:.1f}", f"{usual.launch_seconds * 1e6:.1f}"),
        ("begin and end of it, us", f"{speed.begin_seconds * 1e6:.1f}", f"{usual.begin_seconds * 1e6:.1f}"),
    )
    for row in rows:
        table.add_row(*row)
    return table
