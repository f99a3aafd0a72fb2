"""Pictures of a step: in a terminal, as SVG, as a page. The terminal's are golden files, as in test_report.py."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_report import Terminal

from vramplan.core import curve
from vramplan.core.capacity import capacity
from vramplan.core.ledger import estimate
from vramplan.core.recipes import RECIPES
from vramplan.core.sizes import Sizes
from vramplan.core.types import GpuVerdict, MeasuredPhase, Measurement, RunSpec
from vramplan.core.units import GIB
from vramplan.report import picture as shared
from vramplan.report import svg as svg_page
from vramplan.report.picture import Picture
from vramplan.report.svg import svg
from vramplan.report.timeline import CELLS, show_timeline
from vramplan.sources.hf_config import load_model
from vramplan.sources.profiles import load_gpu

GOLDEN = Path(__file__).parent / "golden"
RUNS = {
    "lean": RunSpec(model="llama-3.1-8b"),
    "stock": RunSpec(model="llama-3.1-8b", recipe="peft", levers=RECIPES["peft"]),
    "accumulated": RunSpec(
        model="tinyllama-1.1b", accumulation=4, levers=replace(RECIPES["lean"], checkpointing="none")
    ),
    "small": RunSpec(model="qwen2.5-0.5b", seq_len=128),
}


def card(name: str, gib: float, verdict: str = "fits") -> GpuVerdict:
    return GpuVerdict(gpu=name, usable_bytes=int(gib * GIB), verdict=verdict)


VERDICTS = {
    "lean": (card("rtx-4060", 7.62), card("rtx-4090", 23.52)),
    "stock": (card("rtx-3060-12gb", 11.63, "does_not_fit"),),
    "accumulated": (),
    "small": (card("gtx-1", 0.75, "does_not_fit"),),
}


def measured(step_peaks: dict[str, int]) -> Measurement:
    return Measurement(
        device="cuda", device_name="a card", versions=(), trainable_parameters=0, steps=3, tokens=0, tokens_per_s=0.0,
        phases=tuple(MeasuredPhase(name=name, peak_bytes=size) for name, size in step_peaks.items()), ended="finished",
    )  # fmt: skip


@cache
def make_picture(name: str) -> Picture:
    ledger = estimate(load_model(RUNS[name].model), RUNS[name])
    peaks = {phase.name: phase.peak_bytes + 3 * 2**20 for phase in ledger.phases if phase.name != "load"}
    measurement = measured(peaks) if name == "accumulated" else None
    step = curve.timeline(ledger)
    return Picture(ledger=ledger, step=step, verdicts=VERDICTS[name], measurement=measurement)


def drawn(name: str, width: int, encoding: str = "utf-8") -> str:
    stream = Terminal(encoding)
    show_timeline(stream, make_picture(name), width=width)
    return stream.text


# ------------------------------------------------------------------------------------------------------- terminal
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", RUNS)
def test_golden(name: str, width: int) -> None:
    text = drawn(name, width)
    file = GOLDEN / f"timeline_{name}_{width}.txt"
    if os.environ.get("VRAMPLAN_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("name", RUNS)
def test_no_line_is_wider_than_the_screen_or_ends_in_blanks(name: str, encoding: str) -> None:
    for width in (40, 50, 60, 80, 99, 120, 200):
        for line in drawn(name, width, encoding).splitlines():
            assert len(line) <= width
            assert line == line.rstrip()


@pytest.mark.parametrize("name", RUNS)
def test_columns_reach_as_high_as_the_step_does(name: str) -> None:
    """The top cell of the highest column is that of the peak, and none stands above it."""
    text = drawn(name, 80)
    found = curve.levels(make_picture(name).step)
    bottom, top, _ = shared.span(found, VERDICTS[name])
    cells = "".join(cell for cell, _ in CELLS.values())
    rows = [line for line in text.splitlines() if re.match(r"^ *[\d.]* [│┤≈]", line) and "below" not in line]
    assert len(rows) == 14
    highest = max(14 - at for at, line in enumerate(rows) if any(cell in line for cell in cells))
    peak = found.totals[found.peak]
    assert abs(highest - (peak - bottom) / (top - bottom) * 14) <= 1
    assert f"{peak / GIB:.2f} GiB" in text or f"{peak / 2**20:,.1f} MiB" in text


def test_nothing_but_weights_is_cut_off() -> None:
    for name in RUNS:
        found = curve.levels(make_picture(name).step)
        bottom, _, inside = shared.span(found, VERDICTS[name])
        assert bottom <= min(found.groups["weights"])
        assert all(bottom <= verdict.usable_bytes for verdict in inside)


def test_of_many_cards_those_are_drawn_between_which_the_run_begins_to_fit() -> None:
    verdicts = [card(f"c{n}", n, "fits" if n > 7 else "does_not_fit") for n in (24, 6, 5, 8, 12, 16, 4)]
    assert [verdict.gpu for verdict in shared.capacities(verdicts)] == ["c6", "c8"]
    assert [verdict.gpu for verdict in shared.capacities(verdicts[:3])] == ["c5", "c6", "c24"]
    assert [verdict.gpu for verdict in shared.capacities([card(f"c{n}", n) for n in range(1, 9)])] == ["c1"]


def test_a_terminal_has_colours_and_a_pipe_has_none() -> None:
    class Screen(Terminal):
        def isatty(self) -> bool:
            return True

    piped, screen = Terminal(), Screen()
    os.environ.pop("NO_COLOR", None)
    before = {name: os.environ.get(name) for name in ("TERM", "COLORTERM")}
    os.environ.update(TERM="xterm-256color", COLORTERM="truecolor")
    try:
        show_timeline(piped, make_picture("lean"), width=80)
        show_timeline(screen, make_picture("lean"), width=80)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    assert "\x1b[" not in piped.text
    # Any colour: rich keeps the codes that a style was first drawn with, by whatever test.
    assert re.search(r"\x1b\[(?:\d+;)*38;[25];\d", screen.text)
    assert re.sub(r"\x1b\[[\d;]*m", "", screen.text).split() == piped.text.split()


def test_ticks_are_round_numbers_within() -> None:
    for bottom, top in ((0, 40 * GIB), (5 * GIB, 7 * GIB), (0, 700 * 2**20), (10**9, 10**9 + 5), (0, 3)):
        found = shared.ticks(bottom, top)
        assert len(found) <= 8
        assert all(bottom <= tick <= top for tick in found)
    assert shared.ticks(0, 4 * GIB) == [n * GIB for n in range(5)]


# ------------------------------------------------------------------------------------------------------------ SVG
NAME = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", RUNS)
def test_areas_reach_the_exact_heights(name: str) -> None:
    """Each area's highest point is that of the whole step, to the tenth of a pixel: nothing high was thinned away."""
    picture = make_picture(name)
    found = curve.levels(picture.step)
    bottom, top, _ = shared.span(found, VERDICTS[name])
    root = ElementTree.fromstring(svg(picture))
    areas = {path.get("fill"): path.get("d") or "" for path in root.iter(f"{NAME}path") if path.get("fill")}
    assert list(areas) == [shared.COLOURS[group] for group in reversed(found.groups)]
    high = svg_page.HEIGHT - svg_page.TOP - svg_page.BOTTOM
    group = list(found.groups)[-1]  # the top of the stack is the total
    levels = [float(y) for y in re.findall(r"V([\d.]+)", areas[shared.COLOURS[group]])]
    highest = svg_page.TOP + high - (found.totals[found.peak] - bottom) * high / (top - bottom)
    assert abs(min(levels) - highest) < 0.06


def test_a_picture_is_small_and_holds_every_word_as_text() -> None:
    picture = make_picture("accumulated")
    hostile = replace(picture.ledger.model, name='<script>alert("1")</script>&\x00\ud800]]>')
    text = svg(replace(picture, ledger=replace(picture.ledger, model=hostile)))
    root = ElementTree.fromstring(text.encode())
    words = " ".join(node.text or "" for node in root.iter(f"{NAME}text"))
    assert '<script>alert("1")</script>&' in words
    assert not list(root.iter(f"{NAME}script"))
    assert all(part in words for part in ("forward", "loss", "backward", "optimizer", "peak: loss", "measured"))
    assert len(text) < 80_000


def test_cards_are_drawn_or_named() -> None:
    words = svg(make_picture("lean"))
    assert "rtx-4060: 7.62 GiB usable<" in words and "rtx-4090: 23.52 GiB usable, above the picture" in words


def test_the_picture_of_the_readme_is_drawn_by_this_code() -> None:
    ledger = make_picture("stock").ledger
    verdicts = [
        capacity(Sizes(ledger.model), ledger.run, load_gpu(name)) for name in ("rtx-3060-12gb", "rtx-4060-ti-16gb")
    ]
    picture = replace(make_picture("stock"), verdicts=tuple(verdicts))
    file = Path(__file__).parent.parent / "docs" / "images" / "timeline.svg"
    if os.environ.get("VRAMPLAN_UPDATE_GOLDEN"):
        file.write_text(svg(picture), encoding="utf-8")
    assert svg(picture) == file.read_text(encoding="utf-8")


def test_the_page_of_commands_shows_a_picture_as_it_is_printed() -> None:
    ledger = make_picture("stock").ledger
    card = capacity(Sizes(ledger.model), ledger.run, load_gpu("rtx-3060-12gb"))
    stream = Terminal()
    show_timeline(stream, replace(make_picture("stock"), verdicts=(card,)), width=80)
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    assert stream.text.strip() in page
