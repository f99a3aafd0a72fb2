"""The Python face: what `import vramplan` offers."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from factories import make_gpu, make_ledger, make_plan
from hypothesis import given
from hypothesis import strategies as st

import vramplan
from vramplan.core.notebook import COLOURS, VERDICTS
from vramplan.errors import InputError


def test_estimate_and_plan_by_name():
    run = vramplan.RunSpec(model="llama-2-7b", seq_len=1024, lora=vramplan.Lora(r=8))
    ledger = vramplan.estimate("llama-2-7b", run, gpu="rtx-4090")
    assert isinstance(ledger, vramplan.Ledger)
    assert ledger.peak.device_bytes == sum(line.bytes for line in ledger.lines)
    found = vramplan.plan("llama-2-7b", gpu="rtx-4090", effective_batch_size=6, run=run)
    assert found.run.micro_batch_size * found.run.accumulation == 6


def test_diagnose_text():
    assert vramplan.diagnose("all is well") is None
    text = (
        "CUDA out of memory. Tried to allocate 1.25 GiB (GPU 1; 79.10 GiB total capacity; 76.13 GiB already allocated; "
        "290.12 MiB free; 77.47 GiB reserved in total by PyTorch)"
    )
    found = vramplan.diagnose(text)
    assert found is not None
    assert found.evidence.requested_bytes == 5 * 2**28


def test_a_wrong_name_is_said():
    with pytest.raises(InputError, match="unknown model"):
        vramplan.estimate("lama-2-7b")


def test_importing_it_brings_the_types_alone():
    code = "import sys, vramplan; print(*sorted(m for m in sys.modules if m.startswith('vramplan')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["vramplan", "vramplan.core", "vramplan.core.types"]


# ------------------------------------------------------------------------------------------------------ notebooks
class Page(HTMLParser):
    """Tags that open and close in order, and the cells of each row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "br":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "tr" in self.open and self.rows[-1]:
            self.rows[-1][-1] += data


def test_a_notebook_shows_a_ledger_that_adds_up():
    ledger = vramplan.estimate("llama-2-7b")
    page = Page(ledger._repr_html_())
    steps = {row[0].strip(): round(100 * float(row[1].strip("~"))) for row in page.rows[1:]}
    lines = [row for row in page.rows[1:] if row[4]]
    assert sum(round(100 * float(row[1].strip("~"))) for row in lines) == steps["device"]
    assert "Needs " in page.text and "llama-2-7b, 1 x 2048 tokens" in page.text and "~ modelled" in page.text


def test_a_notebook_shows_a_plan():
    page = Page(vramplan.plan("llama-2-7b", gpu="rtx-4090", effective_batch_size=4)._repr_html_())
    assert page.text.startswith("Fits rtx-4090: batch ") and page.rows[0][0] == "batch"
    impossible = vramplan.plan("llama-2-70b", gpu="rtx-4060", effective_batch_size=1)
    page = Page(impossible._repr_html_())
    assert page.text.startswith("Does not fit rtx-4060") and impossible.advice[0] in page.text


@given(st.text(max_size=20))
def test_what_others_wrote_stays_text(text):
    evil = f"<script>alert(1)</script>{text}&\"'"
    ledger = make_ledger(warnings=(evil,))
    ledger = replace(
        ledger,
        model=replace(ledger.model, name=evil),
        lines=tuple(replace(line, label=evil, formula=evil) for line in ledger.lines),
        run=replace(ledger.run, lora=vramplan.Lora(targets=(evil,))),
    )
    plan = make_plan(ledger=ledger, reason=evil, advice=(evil,), gpu=replace(make_gpu(), key=evil), run=ledger.run)
    for value in (ledger, plan):
        html = value._repr_html_()
        assert Page(html).tags <= {"div", "table", "thead", "tbody", "tr", "th", "td", "b", "br", "span"}
        assert "<script" not in html and "&lt;script" in html


def test_a_page_of_any_colour():
    """Nothing but the groups' and the verdicts' own colours, which read on both; no background but theirs."""
    html = vramplan.estimate("llama-2-7b")._repr_html_() + make_plan()._repr_html_()
    known = {*COLOURS.values(), *(colour for _, colour in VERDICTS.values())}
    assert set(re.findall(r"#[0-9A-Fa-f]{3,8}\b", html)) <= known
    assert not re.search(r"color:\s*(black|white)|<style|class=", html)


def test_this_machines_card_by_name(monkeypatch):
    monkeypatch.setattr("vramplan.sources.gpu.live_gpu", lambda: make_gpu("here"))
    assert vramplan.plan("llama-2-7b", gpu="live", effective_batch_size=1).gpu.key == "here"


def test_types_come_with_the_package():
    assert (Path(vramplan.__file__).parent / "py.typed").is_file()
