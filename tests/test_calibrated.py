"""`train` and `measure` predict with what `vramplan calibrate` has measured on the card, as `check` and `fit` do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_nvml
import pytest
from factories import make_measurement
from fake_nvml import FakeNvml

from vramplan.cli import run as run_cli
from vramplan.core.ledger import estimate
from vramplan.core.types import Calibration, Ledger, Measurement, RunSpec, SpeedFactors
from vramplan.core.units import MIB
from vramplan.sources import calibration, records
from vramplan.sources.gpu import live_gpu, live_gpus
from vramplan.sources.hf_config import load_model

MODEL = "llama-3.2-1b"
CONTEXT = 333 * MIB
SAID = "note: calibrated on 2026-01-02"
Started = Callable[..., Any]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Started:
    """start(command, *flags): with a calibrated RTX 4090 in the machine, and a child that ends at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("vramplan.cli.runner.EXTRA_MODULES", ("json",))
    fake_nvml.install(monkeypatch, FakeNvml(fake_nvml.card()))
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    store()

    def launch(folder: Path, **_: Any) -> Any:
        return SimpleNamespace(exit_code=0, ended="finished", message="", hint="", measurement=make_measurement(),
                               peak_process_bytes=None)  # fmt: skip

    monkeypatch.setattr("vramplan.launch.launch", launch)

    def call(*words: object) -> Any:
        capsys.readouterr()
        code = run_cli([str(word) for word in words])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


def store(context_bytes: int = CONTEXT) -> None:
    card = live_gpu(0)
    versions = calibration.installed_versions(card)
    found = Calibration(
        card=card.name, total_bytes=card.total_bytes, versions=tuple(sorted(versions.items())),
        context_bytes=context_bytes, reserved_factor=1.05, speed=SpeedFactors(), rows=9, made="2026-01-02", error=None,
    )  # fmt: skip
    calibration.save(found, card)


def predicted(folder: str = "out") -> Ledger:
    return records.read_json(Path(folder) / "prediction.json", Ledger)


def context(ledger: Ledger) -> tuple[int, str]:
    (line,) = (line for line in ledger.lines if line.key == "overhead.context")
    return line.bytes, line.basis


TRAIN = ("train", MODEL, "--data", "d.jsonl", "-o", "out")


def test_train_predicts_with_it(start: Started) -> None:
    plain = estimate(load_model(MODEL), RunSpec(model=MODEL), live_gpu(0)).peak
    result = start(*TRAIN)
    assert (result.code, result.err.count(SAID)) == (0, 1)
    found = predicted()
    assert context(found) == (CONTEXT, "measured")
    assert found.peak.device_bytes == plain.minimum_bytes + CONTEXT != plain.device_bytes
    assert found.peak.reserved_bytes == int(plain.reserved_bytes * 1.05)
    assert found.peak.allocated_bytes == plain.allocated_bytes


def test_train_does_without_if_that_is_wanted(start: Started) -> None:
    result = start(*TRAIN, "--no-calibration")
    assert result.code == 0 and SAID not in result.err
    assert predicted().peak == estimate(load_model(MODEL), RunSpec(model=MODEL), live_gpu(0)).peak


def test_a_resumed_run_is_predicted_with_it_too(start: Started) -> None:
    assert start(*TRAIN, "--no-calibration").code == 0
    result = start("train", "--resume", "-o", "out")
    assert result.code == 0 and SAID in result.err and context(predicted()) == (CONTEXT, "measured")


def test_whether_the_run_fits_is_judged_with_it(start: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with room for the usual context, and not for the one that was measured on it."""
    need = estimate(load_model(MODEL), RunSpec(model=MODEL), live_gpu(0)).peak.device_bytes
    store(live_gpu(0).context_bytes + 64 * MIB)
    used = (live_gpu(0).usable_bytes - need) // MIB - 1
    fake_nvml.install(monkeypatch, FakeNvml(fake_nvml.card(used=used)))
    assert need < live_gpu(0).usable_bytes < need + 64 * MIB
    result = start(*TRAIN)
    assert result.code == 3 and SAID in result.err and not Path("out").exists()
    assert start(*TRAIN, "--no-calibration").code == 0


def test_of_several_cards_the_one_with_the_least_room_is_said_once(
    start: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvml.install(monkeypatch, FakeNvml(fake_nvml.card(), fake_nvml.card(used=300)))
    assert len(live_gpus()) == 2
    result = start(*TRAIN, "--gpus", 2)
    assert (result.code, result.err.count(SAID)) == (0, 1)
    assert context(predicted())[1] == "measured"


def test_a_plan_keeps_its_own_prediction(start: Started) -> None:
    assert start("fit", MODEL, "--effective-batch-size", 4, "--no-calibration", "-o", "plan.json").code == 0
    result = start("train", "plan.json", "--data", "d.jsonl", "-o", "out")
    assert result.code == 0 and SAID not in result.err
    assert context(predicted())[0] != CONTEXT
    for flag in ("--calibration", "--no-calibration"):
        result = start("train", "plan.json", "--data", "d.jsonl", "-o", "other", flag)
        assert result.code == 2 and "--calibration is settled by plan.json" in result.err


def test_one_of_other_versions_is_left_aside(start: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    now = calibration.installed_versions(live_gpu(0))
    monkeypatch.setattr(calibration, "installed_versions", lambda card: {**now, "torch": "0.1"})
    result = start(*TRAIN)
    assert result.code == 0 and "warning: the calibration is left aside: torch was " in result.err
    assert context(predicted())[0] == live_gpu(0).context_bytes


def test_measure_predicts_with_it(start: Started) -> None:
    assert start("measure", MODEL, "--seq-len", 256).err.count(SAID) == 1
    assert SAID not in start("measure", MODEL, "--seq-len", 256, "--no-calibration").err
    tuned, plain = records.read_jsonl(Path("measurements.jsonl"), Measurement)
    assert tuned.prediction is not None and tuned.gpu is not None and plain.gpu is not None
    assert context(tuned.prediction) == (CONTEXT, "measured") and tuned.gpu.context_bytes == CONTEXT
    assert dict(tuned.gpu.sources)["context_bytes"] == "vramplan calibrate, 2026-01-02"  # the row says what it is of
    assert plain.gpu == replace(live_gpu(0), processes=())
