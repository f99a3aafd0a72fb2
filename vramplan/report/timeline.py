"""The step in a terminal: what is on the card from its first event to its last, stacked by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.text import Text

from vramplan.core import curve
from vramplan.core.curve import Levels, Stretch
from vramplan.core.rows import Scale, scale_for
from vramplan.core.types import GpuVerdict
from vramplan.report import picture as shared
from vramplan.report import tables
from vramplan.report.picture import Picture

CELLS = {  # group -> its cell, its cell where the output is ASCII: told apart without colour
    "weights": ("█", "W"),
    "optimizer": ("▚", "o"),
    "adapter": ("▓", "a"),
    "workspace": ("░", "w"),
    "activations": ("▄", "A"),
    "loss": ("▒", "L"),
    "overhead": ("·", "."),
}
MARKS = {  # what else is drawn
    "axis": ("│", "|"), "tick": ("┤", "+"), "corner": ("└", "+"), "rule": ("─", "-"), "phase": ("┬", "+"),
    "cut": ("≈", "~"), "card": ("╌", "="), "peak": ("▼", "v"),
}  # fmt: skip
STACKED = 60  # columns from which on the groups can be told apart
MOST_COLUMNS = 160
LEAST_PHASE = 10  # columns, for "optimizer" and a gap


def show_timeline(stream: TextIO, picture: Picture, *, width: int | None = None) -> None:
    """Draw it, with its legend and what it must be read with."""
    screen = tables.console(stream, width)
    for line in _Drawing(screen, picture).lines():
        screen.print(line, soft_wrap=True)


class _Drawing:
    """One picture on one screen. Columns are pieces of the step, each at its highest point; rows are bytes."""

    def __init__(self, screen: Console, picture: Picture) -> None:
        self.picture = picture
        self.ascii = tables.is_ascii(screen)
        self.found: Levels = curve.levels(picture.step)
        self.parts: list[Stretch] = curve.stretches(picture.step)
        cards = shared.capacities(picture.verdicts)
        self.bottom, self.top, self.inside = shared.span(self.found, cards)
        self.outside = [card for card in cards if card not in self.inside]
        self.scale: Scale = scale_for(self.top)
        self.screen_width = screen.width
        self.rows = 18 if screen.width >= tables.WIDE else 14
        self.stacked = screen.width >= STACKED
        self.margin = max(len(self._number(tick)) for tick in self._ticks()) + 2
        self.width = max(min(screen.width, MOST_COLUMNS) - self.margin, len(self.parts))
        self.columns = curve.widths(self.parts, self.width, min(LEAST_PHASE, self.width // len(self.parts)))
        self.points = [self._highest(piece) for piece in self._pieces()]

    # ----------------------------------------------------------------------------------------------------- lines
    def lines(self) -> list[Text]:
        body = [self._row(row) for row in range(self.rows - 1, -1, -1)]
        return [self._title(), self._peak(), *body, *self._phases(), Text(), *self._legend(), *self._notes()]

    def _title(self) -> Text:
        """The unit stands above its axis."""
        where = "on each card" if self.picture.ledger.run.gpus > 1 else "on the card"
        return Text(f"{self.scale.unit.rjust(self.margin - 2)}  {where} over one optimizer step", style="bold")

    def _peak(self) -> Text:
        point = self.found.peak
        column = next(at for at, piece in enumerate(self._pieces()) if point in piece)
        mark, text = self._mark("peak"), f"{self._number(self.found.totals[point], exact=True)} {self.scale.unit}"
        text += f", {shared.where(self.picture.step, point)}"
        at = self.margin + column
        if at + len(text) + 2 <= self.screen_width:
            return Text(" " * at + f"{mark} {text}", style="bold")
        return Text(f"{text} {mark}".rjust(at + 1), style="bold")

    def _row(self, row: int) -> Text:
        """One row of the picture, its axis before it; a card's room crosses it where it lies."""
        line = Text(self._label(row), style="dim", end="")
        card = [card for card in self.inside if self._row_of(card.usable_bytes) == row]
        if card:
            return line.append(self._card_line(card), style=tables.VERDICT_STYLES[card[0].verdict])
        middle = self.bottom + (self.top - self.bottom) * (2 * row + 1) // (2 * self.rows)
        cells = [self._group_at(point, middle) for point in self.points]
        for group in cells:
            line.append(self._cell(group), style=shared.COLOURS.get(group, ""))
        line.rstrip()
        return line

    def _label(self, row: int) -> str:
        tick = next((tick for tick in self._ticks() if self._row_of(tick) == row), None)
        cut = row == 0 and self.bottom > 0
        number = "" if tick is None else self._number(tick)
        return number.rjust(self.margin - 2) + " " + self._mark("cut" if cut else "axis" if tick is None else "tick")

    def _card_line(self, cards: Sequence[GpuVerdict]) -> str:
        names = ", ".join(f"{card.gpu} {self._number(card.usable_bytes, exact=True)}" for card in cards)
        text = f" {names} usable"[: self.width]
        return self._mark("card") * (self.width - len(text)) + text

    def _phases(self) -> list[Text]:
        rule, names = self._mark("corner"), ""
        for part, columns in zip(self.parts, self.columns, strict=True):
            rule += self._mark("phase") + self._mark("rule") * (columns - 1)
            names += part.phase[: max(columns - 1, 1)].ljust(columns)
        indent = " " * (self.margin - 1)
        return [Text(indent + rule, style="dim"), Text(f"{indent} {names}".rstrip(), style="bold")]

    def _legend(self) -> list[Text]:
        """Every group with its cell and its bytes at the peak, in as many lines as it needs."""
        if not self.stacked:
            return []
        peak = self.found.peak
        lines, line = [], Text("at the peak", style="dim", end="")
        for group, sizes in reversed(self.found.groups.items()):
            about = "~" if group == curve.OVERHEAD else ""
            item = Text.assemble(
                (self._cell(group), shared.COLOURS[group]), f" {group} {about}{self._number(sizes[peak], exact=True)}"
            )
            if len(line) + 3 + len(item) > self.screen_width:
                lines.append(line)
                line = item
            else:
                line = Text.assemble(line, "   ", item)
        return [*lines, line]

    def _notes(self) -> list[Text]:
        events = len(self.found.totals) - 1
        notes = [
            f"Left to right: {events:,} allocations and releases in their order, not seconds; each column at its "
            "highest."
        ]
        notes += [text for text in (shared.micro_steps(self.picture), self._measured()) if text]
        if self.bottom:
            notes.append(f"{self._mark('cut')} what lies below is weights alone.")
        need = self.found.totals[self.found.peak]
        for card in self.outside:
            spare = self._number(card.usable_bytes - need, exact=True)
            usable = self._number(card.usable_bytes, exact=True)
            notes.append(f"{card.gpu} is above the picture: {usable} usable, {spare} more than the peak.")
        wrapped = [line for note in notes for line in _wrapped(note, self.screen_width)]
        return [Text(line, style="dim") for line in wrapped]

    def _measured(self) -> str:
        """Highest points that were measured, beside those of the picture without its overhead."""
        peaks = shared.measured_peaks(self.picture)
        if not peaks:
            return ""
        texts = {}
        for phase, measured, predicted in peaks:
            both = f"{self._number(measured, exact=True)} ({self._number(predicted, exact=True)})"
            texts[phase] = f"{phase} {both}"
        return f"Allocated at most, measured (and predicted), in {self.scale.unit}: {', '.join(texts.values())}."

    # ----------------------------------------------------------------------------------------------------- cells
    def _pieces(self) -> list[range]:
        """One for each column; where a phase has fewer events than columns, some are shared."""
        out: list[range] = []
        for part, columns in zip(self.parts, self.columns, strict=True):
            pieces = curve.buckets(part, columns)
            out += [pieces[column * len(pieces) // columns] for column in range(columns)]
        return out

    def _highest(self, piece: range) -> int:
        totals = self.found.totals[piece.start : piece.stop]
        return piece.start + totals.index(max(totals))

    def _group_at(self, point: int, height: int) -> str:
        """What the card holds at this height of the stack; "" above it."""
        if not self.stacked:
            return "weights" if self.found.totals[point] > height else ""
        below = 0
        for group, sizes in self.found.groups.items():
            below += sizes[point]
            if below > height:
                return group
        return ""

    def _cell(self, group: str) -> str:
        return CELLS[group][self.ascii] if group else " "

    def _mark(self, name: str) -> str:
        return MARKS[name][self.ascii]

    def _row_of(self, size: int) -> int:
        return min(max((size - self.bottom) * self.rows // max(self.top - self.bottom, 1), 0), self.rows - 1)

    def _ticks(self) -> list[int]:
        return shared.ticks(self.bottom, self.top)

    def _number(self, size: int, *, exact: bool = False) -> str:
        """A size in the picture's unit; those of ticks as short as they can be."""
        text = self.scale.text(self.scale.steps(size))
        return text if exact else text.rstrip("0").rstrip(".")


def _wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
