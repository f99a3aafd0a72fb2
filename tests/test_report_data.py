"""Training data on the screen: counts in two lines, and rows with what is learned marked.

After a wanted change: VRAMPLAN_UPDATE_GOLDEN=1 pytest tests/test_report_data.py, then read the difference in golden/.
"""

from __future__ import annotations

import io
import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_report import Terminal

from vramplan.report import data, tables
from vramplan.report.live import LiveDisplay, PlainDisplay, event_text

GOLDEN = Path(__file__).parent / "golden"
ANSWER = (
    "A captain in the navy, who had been eight years at sea and came back with a fortune of five and twenty "
    "thousand pounds;\nhe was thought by all who met him to have lost nothing of his looks."
)
CHAT = [
    ["<|im_start|>", False, True],
    ["user\nWho was Frederick Wentworth, and what had become of him since?", False, False],
    ["<|im_end|>", False, True],
    ["\n", False, False],
    ["<|im_start|>", False, True],
    ["assistant\n", False, False],
    [ANSWER, True, False],
    ["<|im_end|>", True, True],
    ["\n", False, False],
]
ROW = {
    "event": "sample_row", "number": 1, "of": 1412, "unit": "line", "tokens": 118, "learned_tokens": 71, "padding": 0,
    "documents": [{"source": 3, "tokens": 118, "cut": 12, "segments": CHAT}],
}  # fmt: skip
PACKED = {
    "event": "sample_row", "number": 2, "of": 94, "unit": "row", "tokens": 241, "learned_tokens": 98, "padding": 15,
    "documents": [
        {"source": 1031, "tokens": 118, "cut": 0, "segments": CHAT},
        {"source": 7, "tokens": 123, "cut": 901, "segments": [
            ["<s>", False, True], ["Ünter 中文\ttab", True, False], [8192], ["and\x1b[31m on\u202e.", True, False],
        ]},
    ],
}  # fmt: skip
SUMMARY = {
    "event": "data", "path": "chats.jsonl", "kind": "sharegpt", "rows": 12003, "bad": 3, "empty": 1, "dropped": 0,
    "truncated": 120, "tokens_lost": 48211, "examples": 11399, "eval_examples": 600, "tokens": 2431007,
    "learned_tokens": 1483021, "p50": 180, "p95": 702, "longest": 2048, "seq_len": 2048, "micro_batch_size": 4,
    "sampling": "random", "padding_random": 0.38, "padding_grouped": 0.06, "cached": False,
}  # fmt: skip


def shown(event: dict[str, Any], width: int, encoding: str = "utf-8") -> str:
    stream = Terminal(encoding)
    data.show_sample(tables.console(stream, width), event)
    return stream.text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("name", "event"), [("sample_row", ROW), ("sample_packed", PACKED)])
def test_golden(name: str, event: dict[str, Any], width: int) -> None:
    text = shown(event, width)
    file = GOLDEN / f"{name}_{width}.txt"
    if os.environ.get("VRAMPLAN_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= width


def test_what_is_learned_is_marked_without_colour_and_in_ascii() -> None:
    assert shown(ROW, 80).count("«") == shown(ROW, 80).count("»") == 2  # the heading's, and one run of learned text
    text = shown(PACKED, 80, "ascii")
    assert "<<" in text and ">>" in text and text.isascii()
    assert r"\u4e2d\u6587" in text


def test_colour_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal(tty=True)
    data.show_sample(tables.console(stream, 100), ROW)
    green = "\x1b[1;38;2;0;158;115m", "\x1b[1;38;5;36m"  # rich keeps the style that it first made, also of 256 colours
    assert any(code in stream.text for code in green) and "«" in stream.text


@given(st.text(max_size=200))
def test_nothing_of_a_row_can_move_the_cursor_or_turn_the_text_round(text: str) -> None:
    clean = data.printable(text)
    assert all(char in "\n \ufffd" or unicodedata.category(char)[0] not in "CZ" for char in clean)
    assert clean.count("\n") == text.count("\n")


@given(st.lists(st.tuples(st.text(max_size=300), st.booleans()), max_size=20), st.integers(10, 400))
def test_long_rows_lose_their_middle_only(parts: list[tuple[str, bool]], most: int) -> None:
    pieces = [data.Piece(text, learned) for text, learned in parts]
    whole = "".join(text for text, _ in parts)
    short = data.shortened(pieces, most)
    text = "".join(piece.text for piece in short)
    if len(whole) <= most:
        assert short == pieces
        return
    start, _, end = text.partition("\n… ")
    end = end.partition(" characters left out …\n")[2]
    assert len(start) + len(end) == most
    assert whole.startswith(start) and whole.endswith(end)


def test_the_counts_in_words() -> None:
    assert event_text(SUMMARY) == (
        "data: 12,003 sharegpt rows: 11,399 to train on, 600 held out, 4 left out, 120 cut (48,211 tokens lost)\n"
        "data: 2,431,007 tokens, 61% learned; per row p50 180, p95 702, longest 2,048; batches of 4 are 38% padding, "
        "with --group-by-length 6%"
    )
    grouped = event_text({**SUMMARY, "sampling": "group_by_length"})
    assert grouped is not None and grouped.endswith("batches of 4 are 6% padding, in random order 38%")
    single = event_text({**SUMMARY, "micro_batch_size": 1})
    assert single is not None and single.endswith("longest 2,048")
    packed = event_text({**SUMMARY, "packed_rows": 1210, "padding": 0.021})
    assert packed is not None and packed.endswith("packed into 1,210 rows of 2,048, 2% padding")
    assert "11,399 to train on, 600 held out, 4 left out, 7 split in parts\n" in str(
        event_text({**SUMMARY, "truncated": 0, "split": 7})
    )
    assert str(event_text({**SUMMARY, "cached": True})).startswith("data: tokens of the run so far: 12,003")


def test_progress_says_how_long_it_takes() -> None:
    event = {"event": "progress", "name": "data", "done": 120000, "share": 0.4, "eta_s": 80.2}
    assert event_text(event) == "data: 120,000 rows read, 40%, 0:01:20 left"
    assert event_text({**event, "share": None, "eta_s": None}) == "data: 120,000 rows read"


def test_half_an_event_breaks_no_display(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is another process, of another version perhaps."""
    monkeypatch.setenv("TERM", "xterm")
    broken: list[dict[str, Any]] = [
        {"event": "sample_row"},
        {"event": "sample_row", "documents": [None, {}, {"segments": [None, ["x"], [1, 2, 3], ["y", 1, 0]]}]},
        {"event": "data", "rows": None, "p50": "x"},
        {"event": "progress", "share": "x"},
    ]
    plain = PlainDisplay(io.StringIO(), 0)
    with LiveDisplay(tables.console(Terminal(tty=True), 100), 0) as live:
        for event in broken:
            plain.on_event(event)
            live.on_event(event)
    assert "y" in plain.stream.getvalue()  # type: ignore[attr-defined]
