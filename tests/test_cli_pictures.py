"""--timeline, --svg and --html on the command line: the right step, whole files, and one line where they cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from factories import make_gpu
from test_cli import Cli, cli  # noqa: F401 -- a fixture
from test_page import curve_of, data_of
from test_pictures import measured

from vramplan.cli import runner, train
from vramplan.core.ledger import estimate
from vramplan.core.types import Ledger, RunSpec
from vramplan.core.units import GIB
from vramplan.errors import VramplanError
from vramplan.sources import records
from vramplan.sources.hf_config import load_model

MODEL = "qwen2.5-0.5b"
SMALL = (MODEL, "--seq-len", "128")
LOG = """torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 1.00 GiB
of which 4.00 MiB is free. Including non-PyTorch memory, this process has 0.99 GiB memory in use. Of the allocated
memory 600.00 MiB is allocated by PyTorch, and 20.00 MiB is reserved by PyTorch but unallocated.
"""


def small_ledger(**changes: Any) -> Ledger:
    return estimate(load_model(MODEL), replace(RunSpec(model=MODEL, seq_len=128), **changes))


def test_the_picture_stands_below_the_table(cli: Cli) -> None:  # noqa: F811
    plain, drawn = cli("estimate", *SMALL), cli("estimate", *SMALL, "--timeline")
    assert drawn.code == 0
    assert drawn.out.startswith(plain.out)
    assert "on the card over one optimizer step" in drawn.out.removeprefix(plain.out)


@pytest.mark.parametrize("words", [("--gpu", "rtx-4060"), ("--gpu", "all"), ("--price", "rtx-4060=1")])
def test_a_page_holds_the_step_that_was_estimated(cli: Cli, tmp_path: Path, words: tuple[str, ...]) -> None:  # noqa: F811
    page, picture = tmp_path / "a.html", tmp_path / "a.svg"
    result = cli("estimate", *SMALL, *words, "--html", page, "--svg", picture, "--json")
    assert result.code == 0, result.err
    peak = json.loads(result.out)["peak"]
    data = data_of(page.read_text(encoding="utf-8"))
    assert max(curve_of(data)) == peak["device_bytes"]
    assert any(card["gpu"] == "rtx-4060" and card["verdict"] == "fits" for card in data["cards"])
    ElementTree.parse(picture)
    assert result.err.splitlines() == [f"note: the step is drawn in {picture}", f"note: the page is {page}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.svg"]


def test_a_page_is_replaced_whole_or_not_at_all(cli: Cli, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    page = tmp_path / "a.html"
    page.write_text("before")

    def full(path: Path | str, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        result = cli("estimate", *SMALL, "--html", page)
    assert (result.code, result.error) == (1, f"error: cannot write {page}: No space left on device")
    assert page.read_text() == "before"
    assert cli("estimate", *SMALL, "--html", page).code == 0
    assert page.read_text().startswith("<!doctype html>")


def test_fit_and_check_draw_their_own_run(cli: Cli, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    page = tmp_path / "a.html"
    result = cli("fit", *SMALL, "--effective-batch-size", 4, "--gpu", "rtx-4060", "--timeline", "--html", page)
    assert result.code == 0 and "on the card over one optimizer step" in result.out
    assert data_of(page.read_text())["cards"][0]["gpu"] == "rtx-4060"
    monkeypatch.setattr("vramplan.sources.gpu.live_gpu", lambda index: make_gpu("here", 8 * GIB, GIB // 2))
    result = cli("check", *SMALL, "--html", page)
    assert result.code == 3
    (card,) = data_of(page.read_text())["cards"]
    assert (card["gpu"], card["usable_bytes"], card["verdict"]) == ("here", GIB // 2, "does_not_fit")
    result = cli("check", "--html", page)
    assert result.code == 2 and result.error.startswith("error: MODEL is missing")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--html", "."), "--html . is a folder"),
        (("--svg", "nowhere/a.svg"), "--svg nowhere/a.svg: there is no folder nowhere"),
        (("--html", "/dev/null"), "--html /dev/null cannot be written"),
        (("--html", "a.x", "--svg", "./a.x"), "--svg and --html both write a.x"),
        (("--timeline", "--json"), "--timeline is a picture"),
        (("--timeline", "--trace"), "--timeline, --svg and --html draw the played step"),
        (("--measured", "run"), "--measured is drawn into a picture"),
        (("--timeline", "--measured", "nothing"), "--measured nothing does not exist"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    cli: Cli,  # noqa: F811
    tmp_path: Path,
    monkeypatch: Any,
    words: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("estimate", *SMALL, *words)
    assert result.code == 2
    assert result.error.startswith(f"error: {said}") and result.error.endswith(
        ")" if "folder nowhere" not in said else "e"
    )
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- measured
def peaks_of(ledger: Ledger, more: int) -> dict[str, int]:
    return {phase.name: phase.peak_bytes + more for phase in ledger.phases if phase.name != "load"}


def test_of_a_file_the_last_measurement_of_this_step_counts(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    ledger, other = small_ledger(), small_ledger(seq_len=256)
    file, page = tmp_path / "m.jsonl", tmp_path / "a.html"
    for predicted, more in ((ledger, 512), (ledger, 1024), (other, 2048)):
        records.append_jsonl(file, replace(measured(peaks_of(predicted, more)), prediction=predicted))
    assert cli("estimate", *SMALL, "--measured", file, "--html", page).code == 0
    found = data_of(page.read_text())["measured"]
    assert [phase for phase, _, _ in found] == ["forward", "backward", "optimizer"]
    assert {of - predicted for _, of, predicted in found} == {1024}
    result = cli("estimate", MODEL, "--seq-len", 512, "--measured", file, "--timeline")
    assert result.code == 2 and "is of another run: seq_len differs" in result.error
    result = cli("estimate", *SMALL, "--lora-r", 8, "--measured", file, "--timeline")
    assert result.code == 2 and "is of another run: lora differs (" in result.error
    result = cli("estimate", MODEL, "--seq-len", 512, "--lora-r", 8, "--measured", file, "--timeline")
    assert "is of another run: seq_len, lora differ (" in result.error


def run_folder(tmp_path: Path, ledger: Ledger) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    records.write_json(folder / "run.json", ledger.run)
    records.write_json(folder / "prediction.json", ledger)
    records.append_jsonl(folder / "measurement.jsonl", measured(peaks_of(ledger, 4096)))
    (folder / "log.txt").write_text(LOG)
    return folder


def test_a_run_folder_says_what_it_ran(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    folder = run_folder(tmp_path, small_ledger())
    result = cli("estimate", *SMALL, "--measured", folder, "--timeline")
    assert result.code == 0 and "Allocated at most, measured (and predicted)" in result.out
    result = cli("estimate", *SMALL, "--batch-size", 2, "--measured", folder, "--timeline")
    assert result.code == 2 and "micro_batch_size differs" in result.error
    (folder / "measurement.jsonl").unlink()
    result = cli("estimate", *SMALL, "--measured", folder, "--timeline")
    assert result.code == 2 and "holds no measurement.jsonl" in result.error


def test_diagnose_draws_the_run_that_ended(cli: Cli, tmp_path: Path) -> None:  # noqa: F811
    folder, page = run_folder(tmp_path, small_ledger()), tmp_path / "a.html"
    result = cli("diagnose", folder, "--html", page)
    assert result.code == 0, result.err
    text = page.read_text()
    data = data_of(text)
    assert max(curve_of(data)) == small_ledger().peak.device_bytes
    assert len(data["measured"]) == 3 and data["cards"][0]["gpu"] == "card in the report"
    assert "Diagnosis" in text and "Tried to allocate 20.00 MiB" in text
    log = tmp_path / "log"
    log.write_text(LOG)
    result = cli("diagnose", log, "--html", page)
    assert result.code == 2 and result.error.startswith("error: --svg and --html draw a run's step")


def test_train_draws_what_it_has_run(cli: Cli, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    ledger, page = small_ledger(), tmp_path / "a.html"
    folder = run_folder(tmp_path, ledger)
    data = tmp_path / "d.jsonl"
    data.write_text('{"text": "a"}\n')
    monkeypatch.setattr(runner, "require_extra", lambda what: None)
    monkeypatch.setattr(runner, "run_training", lambda *args, **options: 4)
    monkeypatch.setattr(train, "_card", lambda run: make_gpu("here"))
    words = ("train", *SMALL, "--data", data, "-o", folder, "--html", page)
    assert cli(*words).code == 4
    found = data_of(page.read_text())
    assert [more - predicted for _, more, predicted in found["measured"]] == [4096] * 3
    assert found["cards"][0]["gpu"] == "here"
    monkeypatch.setattr("vramplan.sources.records.write_text", fails)
    result = cli(*words)
    assert result.code == 4 and result.error == "warning: no picture of the run: cannot write it"
    assert cli(*words, "--data-only").code == 2


def fails(*_: object) -> None:
    raise VramplanError("cannot write it")
