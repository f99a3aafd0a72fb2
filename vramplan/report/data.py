"""Training data as it will be seen: what became of the rows, and some of them in full.

The events come from another process and hold text from anywhere: nothing of it may move the cursor or change the
direction of writing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from vramplan.report import tables

MAX_SHOWN = 3000  # characters of a document; of a longer one the middle is left out
MARKS, ASCII_MARKS = ("«", "»"), ("<<", ">>")
LEARNED, SPECIAL = "bold #009E73", "#56B4E9"

Event = dict[str, Any]


# ------------------------------------------------------------------------------------------------------- counts
def summary_text(event: Event) -> str:
    """What became of the rows, in two lines."""
    number = _Numbers(event)
    first = f"data: {number.count('rows')} {event.get('kind', '')} rows: {number.count('examples')} to train on"
    if event.get("cached"):
        first = "data: tokens of the run so far: " + first.removeprefix("data: ")
    left_out = sum(number.int(name) for name in ("bad", "empty", "dropped"))
    for amount, word in ((number.int("eval_examples"), "held out"), (left_out, "left out")):
        first += f", {amount:,} {word}" if amount else ""
    if number.int("truncated"):
        first += f", {number.count('truncated')} cut ({number.count('tokens_lost')} tokens lost)"
    if number.int("split"):
        first += f", {number.count('split')} split in parts"
    tokens = number.int("tokens")
    learned = tables.percent(number.int("learned_tokens") / tokens) if tokens else "0%"
    second = f"data: {tokens:,} tokens, {learned} learned; per row p50 {number.count('p50')}, p95 {number.count('p95')}"
    return f"{first}\n{second}, longest {number.count('longest')}{_costs(event, number)}"


def _costs(event: Event, number: _Numbers) -> str:
    if number.int("packed_rows"):
        padding = tables.percent(number.float("padding"))
        return f"; packed into {number.count('packed_rows')} rows of {number.count('seq_len')}, {padding} padding"
    wasted, micro = number.float("padding_random"), number.int("micro_batch_size")
    if micro < 2 or wasted < 0.01:
        return ""
    grouped = tables.percent(number.float("padding_grouped"))
    if event.get("sampling") == "group_by_length":
        return f"; batches of {micro:,} are {grouped} padding, in random order {tables.percent(wasted)}"
    return f"; batches of {micro:,} are {tables.percent(wasted)} padding, with --group-by-length {grouped}"


def progress_text(event: Event, clock: str | None) -> str:
    """ "data: 120,000 rows read, 40%, 0:01:20 left"."""
    number = _Numbers(event)
    text = f"data: {number.count('done')} rows read"
    share = number.float("share")
    return text + (f", {tables.percent(share)}, {clock} left" if share and clock else "")


class _Numbers:
    """Numbers of an event, 0 where one is missing or none."""

    def __init__(self, event: Event) -> None:
        self.event = event

    def int(self, name: str) -> int:
        value = self.event.get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    def float(self, name: str) -> float:
        value = self.event.get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0

    def count(self, name: str) -> str:
        return f"{self.int(name):,}"


# ----------------------------------------------------------------------------------------------------- the rows
class Piece(NamedTuple):
    """A stretch of text, all of it learned or not; `ours` says what is left out."""

    text: str
    learned: bool = False
    special: bool = False
    ours: bool = False


def show_sample(screen: Console, event: Event) -> None:
    """One row: a heading, then its text. What is learned stands between marks, and in colour where there is colour."""
    number = _Numbers(event)
    documents = [d for d in event.get("documents") or [] if isinstance(d, dict)]
    screen.print()
    screen.print(Text(_heading(event, number, documents, tables.is_ascii(screen)), style="bold"))
    for index, document in enumerate(documents, start=1):
        if len(documents) > 1:
            source = _Numbers(document)
            place = f"document {index}, {event.get('unit', 'row')} {source.count('source')}"
            text = f"  {_rule(screen)} {place}: {source.count('tokens')} tokens{_cut(source)}"
            screen.print(Text(text, style="dim"))
        screen.print(Padding(_body(screen, shortened(list(pieces(document)))), (0, 0, 0, 2)))


def _rule(screen: Console) -> str:
    return "--" if tables.is_ascii(screen) else "──"


def _heading(event: Event, number: _Numbers, documents: list[Event], ascii_only: bool) -> str:
    opening, closing = ASCII_MARKS if ascii_only else MARKS
    text = f"row {number.count('number')} of {number.count('of')}"
    if len(documents) == 1:
        text += f" ({event.get('unit', 'row')} {_Numbers(documents[0]).count('source')})"
    text += f": {number.count('tokens')} tokens, {number.count('learned_tokens')} learned, marked {opening}so{closing}"
    if len(documents) == 1:
        text += _cut(_Numbers(documents[0]))
    return text + (f", {number.count('padding')} padding" if number.int("padding") else "")


def _cut(document: _Numbers) -> str:
    return f", {document.count('cut')} cut off" if document.int("cut") else ""


def pieces(document: Event) -> Iterator[Piece]:
    """The segments of a document as text that is safe to print."""
    for segment in document.get("segments") or []:
        if not isinstance(segment, list):
            continue
        if len(segment) == 3 and isinstance(segment[0], str):
            yield Piece(printable(segment[0]), bool(segment[1]), bool(segment[2]))
        elif len(segment) == 1 and isinstance(segment[0], int):
            yield Piece(f"\n… {segment[0]:,} tokens left out …\n", ours=True)


def shortened(text: list[Piece], most: int = MAX_SHOWN) -> list[Piece]:
    """At most about `most` characters: two thirds from the start, a third from the end."""
    length = sum(len(piece.text) for piece in text)
    if length <= most:
        return text
    head, tail = most * 2 // 3, most - most * 2 // 3
    start = list(_first(text, head))
    reverse = [piece._replace(text=piece.text[::-1]) for piece in reversed(text)]
    end = [piece._replace(text=piece.text[::-1]) for piece in _first(reverse, tail)]
    return [*start, Piece(f"\n… {length - most:,} characters left out …\n", ours=True), *reversed(end)]


def _first(text: list[Piece], count: int) -> Iterator[Piece]:
    for piece in text:
        if count <= 0:
            return
        yield piece._replace(text=piece.text[:count])
        count -= len(piece.text)


def printable(text: str) -> str:
    """Line breaks stay, tabs become blanks, other spaces one; what has no shape, or turns others round, a box."""
    shown = []
    for char in text.replace("\r\n", "\n").expandtabs(4):
        kind = unicodedata.category(char)
        if char == "\n" or kind[0] not in "CZ":
            shown.append(char)
        else:
            shown.append(" " if kind == "Zs" else "\ufffd")
    return "".join(shown)


def _body(screen: Console, text: list[Piece]) -> Text:
    """Line breaks of the row are shown as such: templates differ in them."""
    ascii_only = tables.is_ascii(screen)
    opening, closing = ASCII_MARKS if ascii_only else MARKS
    body = Text(overflow="fold")
    learning = False
    for piece in [*text, Piece("")]:
        if piece.learned != learning:
            body.append(opening if piece.learned else closing, style=LEARNED)
            learning = piece.learned
        shown = piece.text if ascii_only or piece.ours else piece.text.replace("\n", "↵\n")
        if ascii_only:
            shown = shown.replace("…", "...").encode("ascii", "backslashreplace").decode()
        style = LEARNED if piece.learned else SPECIAL if piece.special else "dim" if piece.ours else ""
        body.append(shown, style=style)
    body.rstrip()
    return body
