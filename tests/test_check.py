"""`check` and `gpus --save` on the machines of `fake_nvml`: the bar adds up and reads without colour, what to close or
change would do, and every way in which a card cannot be read is one line with the documented exit code.

The files golden/check_*.txt are what people see. After a wanted change: VRAMPLAN_UPDATE_GOLDEN=1 pytest this file.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_nvml
import pytest
from factories import make_gpu, make_ledger, make_model, make_run, make_verdict
from fake_nvml import MIB, FakeNvml, card, fail
from hypothesis import given
from hypothesis import strategies as st

from vramplan.cli import run as run_cli
from vramplan.core import occupancy
from vramplan.core.check import _both, check, remedies
from vramplan.core.diagnose import diagnose
from vramplan.core.ledger import estimate
from vramplan.core.recipes import RECIPES
from vramplan.core.room import judge
from vramplan.core.types import (
    CardCheck,
    Fix,
    GpuProcess,
    GpuProfile,
    GpuState,
    Ledger,
    Levers,
    Line,
    OomEvidence,
    Peak,
    Remedy,
    Resident,
)
from vramplan.core.units import GIB
from vramplan.report import card_bar
from vramplan.report.check import show_check, state_line
from vramplan.report.tables import console
from vramplan.sources import gpu, nvml_processes, profiles

GOLDEN = Path(__file__).parent / "golden"
MACHINES: dict[str, Callable[[], FakeNvml]] = {
    name: getattr(fake_nvml, name)
    for name in ("idle_desktop", "busy", "wsl", "container", "mig", "old_driver", "throttled_laptop", "two_cards")
}
REMEDIES = (
    Remedy(kind="close", title="close python3 (pid 4242)", frees_bytes=5000 * MIB, verdict="fits"),
    Remedy(
        kind="change", title="sequences of 1024 tokens", frees_bytes=3 * GIB, verdict="fits", changes_training=True,
        command="vramplan train llama-2-7b --data FILE --seq-len 1024",
    ),
)  # fmt: skip


def live(monkeypatch: pytest.MonkeyPatch, name: str, index: int = 0) -> GpuProfile:
    fake_nvml.install(monkeypatch, MACHINES[name]())
    if name == "container":
        monkeypatch.setattr(nvml_processes, "_is_here", lambda pid: False)
    return gpu.live_gpu(index)


def checked(card: GpuProfile, ledger: Ledger | None = None) -> CardCheck:
    """As `check` puts it together, around a ledger made by hand."""
    if ledger is None:
        return check(card)
    missing = max(ledger.peak.device_bytes - card.usable_bytes, 0)
    verdict = "does_not_fit" if missing else "fits"
    largest = {"max_batch_size": 0, "max_seq_len": 0} if missing else {}
    return CardCheck(
        card=card,
        segments=occupancy.segments(card, ledger),
        missing_bytes=missing,
        notes=occupancy.notes(card),
        ledger=ledger,
        judged=replace(make_verdict(card.key, card.usable_bytes, verdict), **largest),
        remedies=REMEDIES if missing else (),
    )


def draw(found: CardCheck, width: int = 80, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    show_check(stream, found, width=width)
    stream.seek(0)
    return stream.read()


def scenario(monkeypatch: pytest.MonkeyPatch, name: str) -> CardCheck:
    """ "busy+run" is the machine "busy" with a run held against it."""
    machine, _, asked = name.partition("+")
    return checked(live(monkeypatch, machine), make_ledger() if asked else None)


SCENARIOS = (*MACHINES, "idle_desktop+run", "busy+run", "old_driver+run")


# --------------------------------------------------------------------------------------------------- the picture
@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", SCENARIOS)
def test_golden(monkeypatch: pytest.MonkeyPatch, name: str, width: int) -> None:
    text = draw(scenario(monkeypatch, name), width)
    file = GOLDEN / f"check_{name.replace('+', '_')}_{width}.txt"
    if os.environ.get("VRAMPLAN_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


CELLS = {key: pattern.cell for key, pattern in card_bar.PATTERNS.items()}


def printed(text: str) -> tuple[dict[str, float], list[float], float]:
    """Of a printed legend: the number at each pattern, those of the processes, and the card's."""
    rows, inner, total = {}, [], 0.0
    for line in text.splitlines():
        number = re.search(r"  ~?(-?\d+\.\d+)(?:  |$)", line)
        if number is None:
            continue
        if line[:2] in {f"{cell} " for cell in CELLS.values()}:
            rows[line[0]] = float(number[1])
        elif line.startswith("    "):
            inner.append(float(number[1]))
        elif line.startswith("card "):
            total = float(number[1])
    return rows, inner, total


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", SCENARIOS)
def test_the_printed_rows_add_up_to_the_card(monkeypatch: pytest.MonkeyPatch, name: str, width: int) -> None:
    found = scenario(monkeypatch, name)
    rows, inner, total = printed(draw(found, width))
    assert len(rows) >= 2
    assert total == pytest.approx(found.card.total_bytes / GIB, abs=0.0051)
    assert round(sum(rows.values()), 2) == total
    if found.card.processes:
        assert round(sum(inner), 2) == rows[CELLS["others"]]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_bar_is_to_scale(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = scenario(monkeypatch, name)
    lines = draw(found, 80).splitlines()
    (drawn,) = [line for line in lines if line and set(line) <= set(CELLS.values())]
    assert len(drawn) == 80
    inside, _, beyond = drawn.partition(CELLS["end"])
    total = found.card.total_bytes
    cells = len(inside) + len(beyond)
    assert abs(len(inside) - cells * total / (total + found.missing_bytes)) < 2
    assert set(beyond) <= {CELLS["missing"]} and bool(beyond) == bool(found.missing_bytes)
    end = 0
    for segment in found.segments:
        start, end = end, min(end + segment.bytes, total)
        count = inside.count(CELLS[segment.key])
        assert abs(count - (end - start) * len(inside) / total) < 2
        assert (count > 0) == (end > start)
    assert list(dict.fromkeys(inside)) == [CELLS[s.key] for s in found.segments if CELLS[s.key] in inside]


@pytest.mark.parametrize("name", SCENARIOS)
def test_it_reads_everywhere(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = scenario(monkeypatch, name)
    for width in (60, 80, 100, 120, 200):
        for line in draw(found, width).splitlines():
            assert len(line) <= width or line.startswith("  vramplan train")
    text = draw(found, 80, "ascii")  # a strict stream: anything else raises
    bar = next(line for line in text.splitlines() if re.fullmatch(r"[docRA.X|]{80}", line))
    assert bar.startswith("d")


def test_every_pattern_differs() -> None:
    for of in (lambda pattern: pattern.cell, lambda pattern: pattern.ascii_cell):
        cells = [of(pattern) for key, pattern in card_bar.PATTERNS.items() if key != "free"]
        assert len(set(cells)) == len(cells)


sizes = st.integers(0, 90 * 2**30)


@given(st.lists(sizes, min_size=1, max_size=7), st.integers(20, 200))
def test_cells_fill_the_width(parts: list[int], width: int) -> None:
    counts = card_bar.cells(parts, width)
    assert sum(counts) == (width if any(parts) else 0)
    assert all((count > 0) == (size > 0) for count, size in zip(counts, parts, strict=True))


@given(
    st.tuples(sizes, sizes, sizes), st.tuples(sizes, sizes, st.integers(0, 2**30)), st.booleans(),
    st.lists(st.none() | sizes, max_size=12),
)  # fmt: skip
def test_segments_and_print_add_up_whatever_the_sizes(
    parts: tuple[int, int, int], run: tuple[int, int, int], told: bool, held: list[int | None]
) -> None:
    driver, others, free = parts
    resident, rest, context = run
    total = driver + others + free + 1
    found = tuple(GpuProcess(pid=pid, used_bytes=size) for pid, size in enumerate(held, 1))
    fitting = found if sum(size or 0 for size in held) <= others else ()
    on_card = make_gpu(
        total=total, usable=free, reserved_bytes=driver + 1 if told else None, context_bytes=context,
        used_by_others_bytes=others, processes=fitting,
    )  # fmt: skip
    ledger = made_ledger(resident, rest, context)
    both = checked(on_card, ledger)
    assert sum(segment.bytes for segment in both.segments) == total + both.missing_bytes
    assert all(segment.bytes >= 0 for segment in both.segments)
    shares = occupancy.shares(on_card)
    assert sum(size or 0 for _, size in shares) == occupancy.held_by_others_bytes(on_card) == others
    text = io.StringIO()
    screen = console(text, 100)
    table, _ = card_bar.legend(screen, both)
    numbers = [str(cell).lstrip("~").replace(",", "") for cell in table.columns[1].cells]
    labels = [getattr(cell, "plain", "") for cell in table.columns[0].cells]
    outer = [float(n) for n, label in zip(numbers, labels, strict=True) if not label.startswith("    ")]
    assert sum(outer[:-1]) == pytest.approx(outer[-1], abs=1e-6)


def made_ledger(resident: int, rest: int, context: int) -> Ledger:
    minimum = resident + rest
    return make_ledger(
        lines=(Line(key="weights.nf4", label="", bytes=resident, formula=""),),
        resident=Resident(loaded_bytes=0, prepared_bytes=0, with_lora_bytes=resident),
        peak=Peak(allocated_bytes=minimum, phase="backward", reserved_bytes=minimum, minimum_bytes=minimum,
                  device_bytes=minimum + context),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------- notes
NOTES = {
    "idle_desktop": ["a display is attached: drawing takes 432.0 MiB (Xorg, gnome-shell)"],
    "busy": ["a display is attached: drawing takes 812.0 MiB (Xorg)", "held down by power cap (165 of 170 W)",
             "PCIe link runs at 3.0 x4 under load, card and slot could do 4.0 x16"],
    "wsl": ["3.03 GiB are held by 5 processes whose sizes the driver does not tell"],
    "container": ["2 processes are not seen from here, as in a container: numbers and names stay unknown"],
    "mig": [],
    "old_driver": ["ECC is on and takes about a sixteenth, 1.00 GiB", "too old to tell its own share"],
    "throttled_laptop": ["a screen is drawn on this card: drawing takes 420.0 MiB", "power cap (45 W) and heat"],
    "two_cards": ["CUDA_DEVICE_ORDER=PCI_BUS_ID"],
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_notes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = occupancy.notes(live(monkeypatch, name))
    assert len(found) == len(NOTES[name])
    for said, wanted in zip(found, NOTES[name], strict=True):
        assert wanted in said


def test_the_second_mig_instance_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (note,) = occupancy.notes(live(monkeypatch, "mig", 1))
    assert "CUDA_VISIBLE_DEVICES=MIG-00000007-1111-5222-8333-444444444444 picks this one" in note


LINK = GpuState(pcie_max_generation=4, pcie_max_width=16)


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (replace(LINK, busy_percent=99, pcie_generation=1, pcie_width=16), "runs at 1.0 x16 under load"),
        (replace(LINK, busy_percent=0, pcie_generation=1, pcie_width=16), ""),
        (replace(LINK, pcie_generation=1, pcie_width=4), ""),  # may be asleep
        (replace(LINK, busy_percent=99, pcie_generation=4, pcie_width=16), ""),
        (GpuState(busy_percent=99, pcie_max_generation=4, pcie_max_width=16), ""),
        (GpuState(ecc=True), "sixteenth"),
        (GpuState(ecc=True, mig_uuid="MIG-1"), ""),
        (GpuState(display_attached=True), "a display is attached"),
        (GpuState(display_attached=True, display_active=False), ""),
        (GpuState(throttled_by=()), ""),
        (GpuState(throttled_by=("heat",), clock_mhz=900, max_clock_mhz=2100), "by heat, at 900 of 2,100 MHz"),
    ],
)  # fmt: skip
def test_a_note_only_where_it_is_known(state: GpuState, said: str) -> None:
    found = occupancy.notes(make_gpu(state=state))
    assert (said in found[0]) if said else found == ()


def test_ecc_costs_nothing_on_hbm() -> None:
    assert occupancy.notes(make_gpu(state=GpuState(ecc=True), compute_capability=(9, 0))) == ()


@pytest.mark.parametrize("said", ["driver", "CUDA", "PCIe", "ECC", "W", "busy"])
def test_what_is_unknown_is_not_shown(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    assert said in state_line(live(monkeypatch, "busy"))
    assert state_line(live(monkeypatch, "wsl")) == "compute 8.9"


# ------------------------------------------------------------------------------------------ what to close or change
MODEL = make_model()
CARD = profiles.load_gpu("rtx-3060-12gb")


NEED = estimate(MODEL, make_run(), CARD).peak.device_bytes  # about 5 GiB


def short_of(missing: int, *users: GpuProcess) -> GpuProfile:
    """An RTX 3060 on which `NEED` lacks so many bytes. What the users do not hold of the rest is nobody's."""
    others = CARD.usable_bytes - NEED + missing
    assert sum(user.used_bytes or 0 for user in users) <= others
    usable = CARD.usable_bytes - others
    return replace(CARD, source="nvml", processes=users, used_by_others_bytes=others, usable_bytes=usable)


def user(pid: int, size: int | None, name: str | None = "p", **changes: Any) -> GpuProcess:
    return GpuProcess(pid=pid, name=name, used_bytes=size, **changes)


def closing(card: GpuProfile) -> Remedy:
    (found,) = [r for r in remedies(card, estimate(MODEL, make_run(), card)) if r.kind == "close"]
    return found


def test_nothing_to_do_where_it_fits() -> None:
    assert remedies(CARD, estimate(MODEL, make_run(), CARD)) == ()


def test_the_smallest_process_that_is_enough() -> None:
    found = closing(short_of(GIB, user(1, 3 * GIB), user(2, GIB + MIB, "small"), user(3, GIB - MIB), user(4, None)))
    assert (found.title, found.frees_bytes, found.verdict) == ("close small (pid 2)", GIB + MIB, "fits")
    nameless = closing(short_of(GIB, user(5, 3 * GIB, None)))
    assert nameless.title == "close a process (pid 5)"
    unseen = closing(short_of(GIB, GpuProcess(used_bytes=3 * GIB)))
    assert unseen.title == "close a process that is not seen from here"


def test_as_few_as_will_do_where_one_is_not_enough() -> None:
    found = closing(short_of(2 * GIB, *(user(pid, 900 * MIB + pid) for pid in range(1, 6))))
    assert found.title == "close p (pid 5), p (pid 4) and p (pid 3)"
    assert found.frees_bytes == 3 * 900 * MIB + 12
    assert found.verdict == "fits"


def test_a_desktop_comes_last() -> None:
    xorg = user(1, GIB + GIB // 2, "Xorg", graphics=True)
    assert closing(short_of(GIB, xorg, user(2, 2 * GIB))).title == "close p (pid 2)"
    assert closing(short_of(2 * GIB, xorg, user(2, GIB))).title == "close p (pid 2) and Xorg (pid 1)"
    assert closing(short_of(GIB, xorg, user(2, GIB // 4))).title == "close Xorg (pid 1)"  # the other is not needed then


def test_programs_that_cannot_be_told_apart() -> None:
    for users in ((), (user(1, None), user(2, None))):
        card = short_of(GIB, *users)
        found = closing(card)
        assert (found.title, found.frees_bytes) == ("close other programs on the card", card.used_by_others_bytes)
        assert found.verdict == "fits"


def test_many_names_are_cut() -> None:
    found = closing(short_of(3 * GIB, *(user(pid, 300 * MIB) for pid in range(1, 21))))
    assert found.title == "close p (pid 1), p (pid 2), p (pid 3) and 8 more"
    assert found.frees_bytes == 11 * 300 * MIB


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_what_is_said_to_fit_does(batch: int) -> None:
    held = CARD.usable_bytes - NEED + GIB
    card = short_of(GIB, user(1, held, "a"))
    run = make_run(micro_batch_size=batch, seq_len=4096, recipe="peft", levers=RECIPES["peft"])
    ledger = estimate(MODEL, run, card)
    found = remedies(card, ledger)
    roomier = replace(card, usable_bytes=card.usable_bytes + held)
    for remedy in found:
        if remedy.kind == "close":
            assert (remedy.frees_bytes, judge(ledger, roomier)) == (held, remedy.verdict)
            continue
        assert remedy.command.startswith("vramplan train llama-2-7b ")
        left = ledger.peak.device_bytes - card.usable_bytes - remedy.frees_bytes
        assert (left <= 0) == (remedy.verdict == "fits")
        if remedy.kind == "both":
            assert remedy.verdict == "fits" and remedy.title.startswith("close a (pid 1), and ")
    verdicts = {remedy.verdict for remedy in found}
    assert verdicts == {"fits"} or any(remedy.kind == "both" for remedy in found)


def test_both_together_takes_the_first_change_that_then_fits() -> None:
    card = short_of(GIB, user(1, GIB))
    closed = Remedy(kind="close", title="close a", frees_bytes=GIB, verdict="does_not_fit")
    room = card.usable_bytes + GIB
    fixes = tuple(
        Fix(title=title, run=make_run(), device_bytes=room + over, saves_bytes=saved, fits=False, command=title)
        for title, over, saved in (("little", MIB, MIB), ("enough", 0, 2 * MIB), ("more", -GIB, GIB))
    )
    found = _both(closed, fixes, card)
    assert (found.kind, found.title, found.verdict) == ("both", "close a, and enough", "fits")
    assert (found.frees_bytes, found.command) == (GIB + 2 * MIB, "enough")
    assert _both(closed, fixes[:1], card).verdict == "does_not_fit"


def test_offloading_is_among_the_changes() -> None:
    card = short_of(64 * MIB)
    titles = [remedy.title for remedy in remedies(card, estimate(MODEL, make_run(), card))]
    assert "checkpoints in host memory" in titles


@pytest.mark.parametrize("checkpointing", ["none", "every-2", "all"])
def test_the_changes_are_those_of_a_diagnosis(checkpointing: str) -> None:
    run = make_run(micro_batch_size=4, levers=Levers(checkpointing=checkpointing))
    card = short_of(64 * MIB)
    report = OomEvidence(message="CUDA out of memory.", requested_bytes=GIB, total_bytes=card.usable_bytes)
    there = {fix.title: fix.command for fix in diagnose(report, MODEL, run, card).fixes if fix.fits}
    found = remedies(card, estimate(MODEL, run, card))
    here = {remedy.title: remedy.command for remedy in found if remedy.kind == "change"}
    assert here == there and any("host memory" in title for title in here)


def test_where_nothing_helps_it_is_said() -> None:
    card = replace(short_of(GIB, user(1, GIB)), total_bytes=3 * GIB, usable_bytes=GIB, reserved_bytes=GIB)
    found = check(card, MODEL, make_run())
    assert found.remedies and all(remedy.verdict == "does_not_fit" for remedy in found.remedies)
    assert "None of these is enough, alone or together." in draw(found)


def test_a_tight_run_needs_nothing_changed() -> None:
    run = make_run(levers=RECIPES["peft"], recipe="peft", micro_batch_size=2)
    ledger = estimate(MODEL, run, CARD)
    cached = ledger.peak.reserved_bytes - ledger.peak.minimum_bytes
    assert cached > 8 * MIB
    usable = ledger.peak.device_bytes + cached // 2
    holder = GpuProcess(pid=1, name="a", used_bytes=GIB)
    small = GpuProcess(pid=2, name="b", used_bytes=cached // 4)  # not enough to be roomy
    total = usable + GIB + cached // 4
    card = replace(CARD, processes=(holder, small), usable_bytes=usable, total_bytes=total, reserved_bytes=0)
    assert judge(ledger, card) == "tight"
    (found,) = remedies(card, ledger)
    assert (found.kind, found.title, found.verdict) == ("close", "close a (pid 1)", "fits")
    little = replace(card, processes=(replace(holder, used_bytes=cached // 4),), total_bytes=usable + cached // 4)
    assert judge(ledger, little) == "tight" and remedies(little, ledger) == ()


# ----------------------------------------------------------------------------------------------- the command line
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run_cli([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_check_draws_a_run_on_a_busy_card(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.busy())
    code, out, err = cli("check", "llama-2-7b", "--batch-size", 4)
    assert (code, err) == (3, "")
    assert out.startswith("Does not fit rtx-3060-12gb: needs ")
    assert "close python3 (pid 4242)   4.88 GiB   fits" in out
    rows, inner, total = printed(out)
    assert round(sum(rows.values()), 2) == total == 12.0 and len(inner) == 4


def test_the_page_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.busy())
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    shown = page.partition("\n## check\n")[2].split("```")[1].strip("\n")
    assert shown in cli("check", "llama-2-7b", "--batch-size", 4)[1]


def test_check_json(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.busy())
    code, out, err = cli("check", "llama-2-7b", "--batch-size", 4, "--json")
    data = json.loads(out)
    assert (code, err, data["verdict"]) == (3, "", "does_not_fit")
    assert [segment["key"] for segment in data["segments"]] == [
        "driver", "others", "context", "resident", "activations", "headroom"]  # fmt: skip
    total = data["card"]["total_bytes"] + data["missing_bytes"]
    assert sum(segment["bytes"] for segment in data["segments"]) == total
    need = data["estimate"]["peak"]["device_bytes"]
    assert data["missing_bytes"] == need - data["card"]["usable_bytes"]
    assert sum(segment["bytes"] for segment in data["segments"][2:5]) == need
    assert data["remedies"][0]["frees_bytes"] == 5000 * MIB
    assert data["card"]["state"]["throttled_by"] == ["power cap"] and len(data["notes"]) == 3
    code, out, _ = cli("check", "--json")
    alone = json.loads(out)
    assert code == 0 and "verdict" not in alone
    assert [segment["key"] for segment in alone["segments"]] == ["driver", "others", "free"]


FAILURES: dict[str, tuple[dict[str, Any], str]] = {  # calls that fail on a machine with one card, what is said
    "no library": ({"nvmlInit": fail("LIBRARY_NOT_FOUND")}, "no NVIDIA driver library (NVML) on this machine"),
    "no driver": ({"nvmlInit": fail("DRIVER_NOT_LOADED")}, "the NVIDIA driver is not loaded"),
    "mismatch": ({"nvmlInit": fail("LIB_RM_VERSION_MISMATCH")}, "driver and its library have different versions"),
    "no permission": ({"nvmlInit": fail("NO_PERMISSION")}, "NVML may not read the card"),
    "no permission for the card": ({"nvmlDeviceGetHandleByIndex": fail("NO_PERMISSION")}, "NVML may not read the card"),
    "no card": ({"nvmlDeviceGetCount": lambda: 0}, "this machine has no NVIDIA GPU"),
    "lost": ({"nvmlDeviceGetMemoryInfo": fail("GPU_IS_LOST")}, "the GPU has fallen off the bus"),
    "lost at once": ({"nvmlDeviceGetHandleByIndex": fail("GPU_IS_LOST")}, "the GPU has fallen off the bus"),
    "to be reset": ({"nvmlDeviceGetName": fail("RESET_REQUIRED")}, "the GPU has to be reset"),
    "unknown": ({"nvmlInit": fail("UNKNOWN")}, "NVML does not answer: NVML error 999"),
}
COMMANDS = (
    ("check",), ("check", "llama-2-7b"), ("estimate", "llama-2-7b", "--gpu", "live"),
    ("fit", "llama-2-7b", "--effective-batch-size", "4"), ("fit", "llama-2-7b", "--effective-batch-size", "4",
     "--gpu", "live"), ("gpus", "--save", "card"),
)  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("how", FAILURES)
def test_a_card_that_cannot_be_read_is_one_line_and_exit_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli, how: str, words: tuple[str, ...]
) -> None:
    calls, said = FAILURES[how]
    fake = fake_nvml.install(monkeypatch, FakeNvml(card()))
    for name, call in calls.items():
        monkeypatch.setattr(fake, name, call)
    monkeypatch.chdir(tmp_path)
    for extra in ((), ("--json",)):
        code, out, err = cli(*words, *extra)
        assert (code, out) == (1, "")
        assert err.startswith(f"error: {said}" if not said.startswith("driver") else "error: the NVIDIA driver and")
        assert said in err and "--gpu NAME" in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", FAILURES)
def test_gpus_lists_what_is_stored_all_the_same(monkeypatch: pytest.MonkeyPatch, cli: Cli, how: str) -> None:
    calls, said = FAILURES[how]
    fake = fake_nvml.install(monkeypatch, FakeNvml(card()))
    for name, call in calls.items():
        monkeypatch.setattr(fake, name, call)
    code, out, err = cli("gpus")
    assert code == 0 and "rtx-4090" in out
    assert err.startswith("note: ") and said in err and len(err.splitlines()) == 1


def test_without_pynvml(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    code, out, err = cli("check")
    assert (code, out) == (1, "") and "pip install nvidia-ml-py" in err


@pytest.mark.parametrize("words", [("check",), ("fit", "llama-2-7b", "--effective-batch-size", "4")])
def test_an_index_that_is_not_there_is_bad_input(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, words: tuple[str, ...]
) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.two_cards())
    code, out, err = cli(*words, "--gpu-index", 2)
    assert (code, out) == (2, "") and "no GPU with index 2: there are 2 GPUs, counted from 0" in err


def test_cuda_visible_devices_counts_everywhere(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.two_cards())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert json.loads(cli("check", "--json")[1])["card"]["key"] == "rtx-4090"
    assert [live["key"] for live in json.loads(cli("gpus", "--json")[1])["live"]] == ["rtx-4090"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, _, err = cli("check")
    assert code == 1 and "CUDA_VISIBLE_DEVICES='' hides every GPU (unset it)" in err


# ------------------------------------------------------------------------------------------------------ gpus --save
@pytest.mark.parametrize("name", ["desk", "desk.toml"])
def test_a_saved_card_plans_like_the_idle_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_nvml.install(monkeypatch, fake_nvml.busy())
    code, out, err = cli("gpus", "--save", name)
    assert (code, err) == (0, "")
    assert "11.64 GiB usable of 12.00 GiB" in out and "--gpu desk.toml" in out
    assert [file.name for file in tmp_path.iterdir()] == ["desk.toml"]
    fake_nvml.install(
        monkeypatch, FakeNvml(card(**{**fake_nvml.busy().cards[0], "used": 0, "compute": (), "graphics": ()}))
    )
    by_file = json.loads(cli("estimate", "llama-2-7b", "--gpu", "desk.toml", "--json")[1])
    by_card = json.loads(cli("estimate", "llama-2-7b", "--gpu", "live", "--json")[1])
    assert by_file["gpus"][0] == {**by_card["gpus"][0], "gpu": "desk"}
    assert {**by_file, "gpus": 0} == {**by_card, "gpus": 0}


def test_saving_replaces_nothing_unless_forced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli) -> None:
    monkeypatch.chdir(tmp_path)
    fake_nvml.install(monkeypatch, fake_nvml.two_cards())
    (tmp_path / "mine.toml").write_text("completed by hand")
    code, out, err = cli("gpus", "--save", "mine")
    assert (code, out) == (2, "") and "--save mine.toml exists already" in err and "--force" in err
    assert (tmp_path / "mine.toml").read_text() == "completed by hand"
    code, out, _ = cli("gpus", "--save", "mine", "--force", "--gpu-index", 1, "--json")
    data = json.loads(out)
    assert (code, data["saved"], data["card"]["key"], data["card"]["source"]) == (0, "mine.toml", "mine", "file")
    assert profiles.load_gpu("mine.toml").name == data["card"]["name"] == "NVIDIA GeForce RTX 4090"


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--force",), "--force is about saving"), (("--gpu-index", "1"), "--gpu-index is about saving"),
     (("--save", "no/such/folder"), "cannot write no/such/folder.toml"), (("--save", ""), "--save '' names no file"),
     (("--save", "x", "--gpu-index", "7"), "no GPU with index 7")],
)  # fmt: skip
def test_saving_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    fake_nvml.install(monkeypatch, fake_nvml.two_cards())
    code, out, err = cli("gpus", *words)
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_gpus_says_where_the_order_is_open(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.two_cards())
    assert "CUDA may count these in another order" in cli("gpus")[1]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert "CUDA may count these in another order" not in cli("gpus")[1]
