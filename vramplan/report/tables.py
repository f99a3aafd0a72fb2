"""What all tables share: the console, colours, bars and the plain style. One family, 80 columns first."""

from __future__ import annotations

import os
import re
from typing import IO, Any, TextIO, cast

from rich.box import SIMPLE_HEAD, Box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Okabe and Ito's colours, told apart with any colour vision; every colour also stands beside its name.
GROUP_COLOURS = {
    "weights": "#0072B2",
    "activations": "#E69F00",
    "loss": "#CC79A7",
    "adapter": "#009E73",
    "optimizer": "#56B4E9",
    "overhead": "#999999",
}
VERDICT_STYLES = {"fits": "#009E73", "tight": "#E69F00", "does_not_fit": "#D55E00"}
VERDICT_WORDS = {"fits": "fits", "tight": "tight", "does_not_fit": "does not fit"}
GAP = 3  # cells between two columns
WIDE = 100  # from here on there is room for formulas
ASCII_HEAD = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_EIGHTHS = " ▏▎▍▌▋▊▉"


class _Trimmed:
    """A stream that drops the blanks with which rich fills up lines: for pipes and files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(r" +$", "", text, flags=re.MULTILINE))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Screen(Console):
    """rich would end the program itself where the reader of a pipe has left; the command line decides that."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def console(stream: TextIO, width: int | None = None) -> Console:
    """A console without markup or highlighting. Piped output is 80 columns wide, unless COLUMNS or `width` says."""
    if width is None and not stream.isatty():
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if columns.isdecimal() and 0 < int(columns) < 10_000 else 80
    file = stream if stream.isatty() else cast(IO[str], _Trimmed(stream))
    return _Screen(file=file, width=width, markup=False, highlight=False, emoji=False)


def is_ascii(screen: Console) -> bool:
    """True where the output's encoding has no box and block characters."""
    return bool(screen.options.ascii_only)


def bar(share: float, width: int, *, ascii_only: bool) -> str:
    """A bar for `share` of 1, at most `width` cells; anything above zero shows at least a sliver."""
    share = min(max(share, 0.0), 1.0)
    if ascii_only:
        return "#" * max(round(share * width), 1 if share else 0)
    eighths = max(round(share * width * 8), 1 if share else 0)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def plain_table(screen: Console) -> Table:
    """A table with a rule under its head and none around."""
    box = ASCII_HEAD if is_ascii(screen) else SIMPLE_HEAD
    return Table(box=box, show_edge=False, pad_edge=False, padding=(0, 1), header_style="bold", border_style="dim")


def add_text(table: Table, title: str, screen: Console) -> None:
    """A left-aligned column that is cut rather than wrapped."""
    table.add_column(title, no_wrap=True, overflow="crop" if is_ascii(screen) else "ellipsis")


def add_number(table: Table, title: str) -> None:
    """A right-aligned column that is never cut."""
    table.add_column(title, justify="right", no_wrap=True)


def put(screen: Console, table: Table, flexible: int = 0) -> None:
    """Print a table; where it is too wide, the column `flexible` gives way and no other."""
    widths = [max(map(_cell_width, (column.header, *column.cells))) for column in table.columns]
    room = screen.width - sum(widths) + widths[flexible] - GAP * (len(widths) - 1)
    table.columns[flexible].max_width = max(room, 1)
    screen.print(table)


def _cell_width(cell: object) -> int:
    return cell_len(cell.plain if isinstance(cell, Text) else str(cell))


def verdict_text(verdict: str) -> Text:
    """The verdict's word in its colour."""
    return Text(VERDICT_WORDS.get(verdict, verdict), style=VERDICT_STYLES.get(verdict, ""))


def sentence(screen: Console, text: str, verdict: str = "") -> None:
    """A sentence; with a verdict, its first word in the verdict's colour."""
    words = Text(text)
    if verdict in VERDICT_STYLES:
        words.stylize("bold " + VERDICT_STYLES[verdict], 0, (text + ":").index(":"))
    screen.print(words, soft_wrap=False)


def percent(share: float) -> str:
    """A share of 1 as a whole percentage; what is there but rounds to nothing is "<1%"."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def command(screen: Console, intro: str, text: str) -> None:
    """A command to paste, on a line of its own that is never broken."""
    screen.print()
    screen.print(Text(intro, style="dim"))
    screen.print(Text("  " + text), soft_wrap=True)


def count(number: int | None) -> str:
    """1234567 -> "1,234,567"; None -> "-"."""
    return "-" if number is None else f"{number:,}"


def billions(number: int) -> str:
    """A parameter count: "6.74 B", "134.5 M", "12.3 K"."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:,.2f} {letter}" if letter == "B" else f"{number / size:,.1f} {letter}"
    return str(number)
