"""Calibration: factors from measured runs, the cache they are kept in, the set that measures them, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import make_gpu
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_tools import CARD, VERSIONS, Bench

import vramplan
from vramplan.cli import run as run_cli
from vramplan.core import calibrate as core
from vramplan.core.calibrate import LIMITS, Timed, context_bytes, fit_speed, mean_error, reserved_factor, timed_step
from vramplan.core.ledger import estimate
from vramplan.core.speed import rates, seconds_of
from vramplan.core.timeline import play as played_step
from vramplan.core.types import Calibration, GpuProfile, MeasuredPhase, Measurement, SpeedFactors
from vramplan.core.units import MIB
from vramplan.core.work import work
from vramplan.launch import calibrating
from vramplan.launch.calibrating import CASES, FEWEST, case_model, case_run
from vramplan.sources import calibration, gpu, records
from vramplan.sources.hf_config import load_model
from vramplan.sources.profiles import load_gpu

NAMES = tuple(LIMITS)
NOW = {**VERSIONS, "driver": "580"}
TRUE = SpeedFactors(
    matmul_share=0.55, attention_share=0.35, bandwidth_share=0.6, launch_seconds=60e-6, begin_seconds=9e-6
)


# ----------------------------------------------------------------------------------------------------- factors
def works(card: GpuProfile) -> list[Any]:
    """The work of every case of the standard set."""
    found = []
    for case in CASES:
        model, run = case_model(case)[0], case_run(case)
        found.append(work(model, run, played_step(model, run, card)))
    return found


WORKS = {name: works(load_gpu(name)) for name in ("rtx-4090", "h200")}


def timed(name: str, true: SpeedFactors) -> tuple[list[Timed], tuple[int, int]]:
    known = rates(load_gpu(name))
    assert known is not None
    return [Timed(each, seconds_of(each, true, *known)) for each in WORKS[name]], known


def off(found: SpeedFactors, true: SpeedFactors) -> dict[str, float]:
    return {name: abs(getattr(found, name) / getattr(true, name) - 1) for name in NAMES}


@settings(max_examples=40, deadline=None)
@given(st.floats(0.3, 0.9), st.floats(0.4, 1.0), st.floats(2e-5, 9e-5), st.floats(2e-6, 2e-5))
def test_known_factors_are_found_again(matmul: float, bandwidth: float, launch: float, begin: float) -> None:
    true = SpeedFactors(matmul_share=matmul, bandwidth_share=bandwidth, launch_seconds=launch, begin_seconds=begin)
    rows, known = timed("rtx-4090", true)
    found = fit_speed(rows, *known)
    assert mean_error(rows, found, *known) < 0.02
    for name, error in off(found, true).items():
        slower = replace(true, **{name: 0.8 * getattr(true, name)})  # a factor that changes nothing cannot be found
        if mean_error(rows, slower, *known) > 0.02:
            assert error < 0.05, name


@pytest.mark.parametrize("name", WORKS)
def test_the_standard_set_tells_all_factors_of_small_and_large_cards(name: str) -> None:
    rows, known = timed(name, TRUE)
    assert max(off(fit_speed(rows, *known), TRUE).values()) < 0.03


def test_one_wild_row_does_not_carry_the_others_away() -> None:
    rows, known = timed("rtx-4090", TRUE)
    for wild in range(len(rows)):
        spoilt = [replace_seconds(row, 3.0) if i == wild else row for i, row in enumerate(rows)]
        found = fit_speed(spoilt, *known)
        good = [row for i, row in enumerate(rows) if i != wild]
        assert mean_error(good, found, *known) < 0.05  # with plain squares it is 0.1


def replace_seconds(row: Timed, factor: float) -> Timed:
    return Timed(row.work, row.seconds * factor)


def test_what_no_row_tells_stays_as_it_is() -> None:
    rows, known = timed("rtx-4090", TRUE)
    heavy = [row for row in rows if row.work.graphed and row.seconds > 0.05]
    found = fit_speed(heavy, *known)
    usual = SpeedFactors()
    assert found.launch_seconds == usual.launch_seconds
    assert abs(found.matmul_share / TRUE.matmul_share - 1) < 0.05


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_factors_stay_within_their_limits(factor: float) -> None:
    rows, known = timed("rtx-4090", TRUE)
    found = fit_speed([replace_seconds(row, factor) for row in rows], *known)
    assert all(low <= getattr(found, name) <= high for name, (low, high) in LIMITS.items())


# ------------------------------------------------------------------------------------------------------- measured
def measured(case: Any = CASES[0], *, card: GpuProfile = CARD, context: int | None = 500 * MIB,
             reserve: float = 1.0, tokens_per_s: float = 1000.0) -> Measurement:  # fmt: skip
    """A row as `calibrate` keeps it, of a card that needs this context and reserves so much more than was replayed."""
    ledger = estimate(case_model(case)[0], case_run(case), card)
    reserved = int(ledger.peak.reserved_bytes * reserve)
    sizes: dict[str, Any] = {
        "peak_bytes": ledger.peak.allocated_bytes, "reserved_bytes": reserved,
        "process_bytes": None if context is None else reserved + context,
    }  # fmt: skip
    return Measurement(
        device="cuda", device_name=card.name, versions=tuple(VERSIONS.items()),
        phases=(MeasuredPhase(name="evaluation", **sizes), MeasuredPhase(name="step", **sizes)),
        trainable_parameters=1, steps=10, tokens=1, tokens_per_s=tokens_per_s, ended="finished",
        prediction=ledger, gpu=card,
    )  # fmt: skip


def test_the_context_is_the_largest_reading_that_is_no_outlier() -> None:
    readings = [500 * MIB, 510 * MIB, 520 * MIB, 900 * MIB, 3 * MIB, None]
    assert context_bytes([measured(context=size) for size in readings]) == 520 * MIB
    assert context_bytes([measured(context=None)]) is None
    assert context_bytes([]) is None


def test_the_reserve_is_relative_to_the_replay_and_never_less() -> None:
    rows = [measured(reserve=factor) for factor in (0.9, 1.03, 1.04, 1.05, 2.0)]
    assert reserved_factor(rows) == pytest.approx(1.04, abs=1e-3)
    assert reserved_factor(rows[:1]) == 1.0 and reserved_factor([]) == 1.0
    assert reserved_factor(rows[4:]) == 1.25


def test_a_step_is_timed_by_its_micro_batches() -> None:
    row = timed_step(measured(CASES[0], tokens_per_s=4096.0))
    assert row is not None and row.seconds == 0.5
    assert timed_step(measured(tokens_per_s=0.0)) is None
    assert timed_step(replace(measured(), prediction=None)) is None


def test_a_card_without_rates_keeps_the_usual_speed() -> None:
    unknown = make_gpu(bf16_flops_per_s=None, fp16_flops_per_s=None)
    found = core.calibrate([measured(card=unknown)], unknown, NOW, "2026-01-02")
    assert (found.speed, found.error, found.context_bytes) == (SpeedFactors(), None, 500 * MIB)


CALIBRATION = Calibration(
    card=CARD.name, total_bytes=CARD.total_bytes, versions=tuple(sorted(NOW.items())), context_bytes=333 * MIB,
    reserved_factor=1.05, speed=TRUE, rows=9, made="2026-01-02", error=0.04,
)  # fmt: skip


@settings(max_examples=8, deadline=None)
@given(st.integers(64 * MIB, 4096 * MIB), st.floats(1.0, 1.25), st.sampled_from(["llama-3.2-1b", "qwen2.5-0.5b"]))
def test_calibration_never_touches_the_arithmetic(context: int, factor: float, name: str) -> None:
    model, run = load_model(name), vramplan.RunSpec(model=name)
    found = replace(CALIBRATION, context_bytes=context, reserved_factor=factor)
    plain, tuned = (estimate(model, run, card) for card in (CARD, calibration.applied(CARD, found)))
    assert tuned.peak.allocated_bytes == plain.peak.allocated_bytes and tuned.phases == plain.phases
    assert tuned.resident == plain.resident
    assert [line for line in tuned.lines if line.key != "overhead.context"] == [
        line for line in plain.lines if line.key != "overhead.context"
    ]
    assert tuned.peak.minimum_bytes == plain.peak.minimum_bytes
    assert tuned.peak.device_bytes - plain.peak.device_bytes == context - CARD.context_bytes
    assert tuned.peak.reserved_bytes == int(plain.peak.reserved_bytes * factor)


# ---------------------------------------------------------------------------------------------------------- cache
@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "installed_versions", lambda card: dict(NOW))
    return tmp_path / "cache" / "calibration"


def test_what_was_saved_is_applied_and_said(cache: Path) -> None:
    assert calibration.apply(CARD) == (CARD, "", "")
    path = calibration.save(CALIBRATION, CARD)
    assert path == cache / "rtx306012gb-12288.json"
    card, note, warning = calibration.apply(CARD)
    assert (card.context_bytes, card.context_basis, card.reserved_factor, card.speed) == (
        333 * MIB, "measured", 1.05, TRUE,
    )  # fmt: skip
    assert note.startswith("calibrated on 2026-01-02") and warning == ""
    assert replace(card, context_bytes=CARD.context_bytes, context_basis=CARD.context_basis, reserved_factor=1.0,
                   speed=CARD.speed, sources=CARD.sources) == CARD  # fmt: skip
    smaller = replace(CARD, total_bytes=CARD.total_bytes // 2)
    assert calibration.apply(smaller) == (smaller, "", "")  # another card of that name


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON"),
        (lambda text: "\x00\xff", "not valid JSON"),
        (lambda text: "[]", "is not a Calibration record"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 2'), "schema_version 2"),
        (lambda text: text.replace("NVIDIA rtx-3060-12gb", "NVIDIA T4"), "is of another card, NVIDIA T4"),
        (lambda text: text.replace("1.05", "9.5"), "reserved_factor is 9.5"),
        (lambda text: text.replace('"matmul_share": 0.55', '"matmul_share": 40'), "speed.matmul_share is 40"),
        (lambda text: text.replace(str(333 * MIB), "-5"), "context_bytes is -5"),
        (lambda text: text.replace("2.11.0", "2.10.0"), "torch was 2.10.0 and is 2.11.0"),
        (lambda text: text.replace('"580"', '"570"'), "driver was 570 and is 580"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_left_aside(cache: Path, spoil: Any, said: str) -> None:
    path = calibration.save(CALIBRATION, CARD)
    text = path.read_text()
    assert spoil(text) != text
    path.write_text(spoil(text))
    card, note, warning = calibration.apply(CARD)
    assert card == CARD and note == ""
    assert said in warning and warning.startswith("the calibration is left aside")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"VRAMPLAN_CACHE": "/v", "XDG_CACHE_HOME": "/x"}, "/v/calibration"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/vramplan/calibration"),
        ({"HOME": "/h"}, "/h/.cache/vramplan/calibration"),
    ],
)
def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("VRAMPLAN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert calibration.folder().as_posix() == expected


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path / "file"))
    with pytest.raises(vramplan_error(), match="cannot be made"):
        calibration.save(CALIBRATION, CARD)


def vramplan_error() -> type[Exception]:
    from vramplan.errors import InputError

    return InputError


def test_real_versions_are_asked_of_the_installation() -> None:
    found = calibration.installed_versions(replace(CARD, driver=None))
    assert set(found) == {*calibration.LIBRARIES, "driver"} and found["driver"] == "unknown"


# ------------------------------------------------------------------------------------------------- who uses it
def test_live_cards_take_it_and_say_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "live_gpu", lambda index: CARD)
    calibration.save(CALIBRATION, CARD)
    commands = (
        ("check", "llama-3.2-1b"),
        ("fit", "llama-3.2-1b", "--effective-batch-size", "4"),
        ("estimate", "llama-3.2-1b", "--gpu", "live"),
    )
    for words in commands:
        assert run_cli([*words, "--json"]) == 0
        captured = capsys.readouterr()
        assert "note: calibrated on 2026-01-02" in captured.err
        assert str(333 * MIB) in captured.out
        assert run_cli([*words, "--json", "--no-calibration"]) == 0
        captured = capsys.readouterr()
        assert "calibrated" not in captured.err and str(333 * MIB) not in captured.out
    assert run_cli(["estimate", "llama-3.2-1b", "--gpu", "rtx-3060-12gb"]) == 0
    assert "calibrated" not in capsys.readouterr().err
    calibration.path_of(CARD).write_text("{")
    assert run_cli(["check"]) == 0
    assert "warning: the calibration is left aside" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- the set
def script(true: SpeedFactors, card: GpuProfile, **changes: str) -> str:
    """Children that are as fast as these factors say, with 500 MiB of context; `changes` by their turn."""
    known = rates(card)
    assert known is not None
    table = {}
    for case in CASES:
        model, run = case_model(case)[0], case_run(case)
        seconds = seconds_of(work(model, run, played_step(model, run, card)), true, *known)
        peak = estimate(model, run, card).peak
        key = str([run.micro_batch_size, run.seq_len, run.recipe, case.graphs, case.checkpointing, model.hidden_size])
        table[key] = [run.micro_batch_size * run.seq_len / seconds, peak.allocated_bytes, peak.reserved_bytes]
    lines = "".join(f"if turn == {turn[1:]}: {what}\n" for turn, what in changes.items())
    return (
        f"table = {table!r}\n"
        "config = json.loads(Path(folder, 'model', 'config.json').read_text())\n"
        "key = str([run['micro_batch_size'], run['seq_len'], run['recipe'], run['schedule']['cuda_graphs'],\n"
        "           run['levers']['checkpointing'], config['hidden_size']])\n"
        "speed, allocated, reserved = table[key]\n"
        f"{lines}"
        "finish(allocated / MIB, reserved / MIB, reserved / MIB + 500, speed)\n"
    )


INTEGERS = (
    "\n_write = write\ndef write(ended, a, r, p, s): _write(ended, int(a), int(r), p if p is None else int(p), s)\n"
)


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """calibrated(script, *flags): `vramplan calibrate` with these children; `.bench` is the card."""
    bench = Bench(tmp_path, monkeypatch)
    bench.usable(40 * 2**30)
    monkeypatch.setattr(calibration, "installed_versions", lambda card: dict(NOW))

    def call(text: str, *flags: str) -> Any:
        bench.children(INTEGERS + text)
        capsys.readouterr()
        code = run_cli(["calibrate", *flags])
        captured = capsys.readouterr()
        return SimpleNamespace(
            code=code, out=captured.out, err=captured.err, error=(captured.err.splitlines() or [""])[-1]
        )

    call.bench = bench  # type: ignore[attr-defined]
    return call


def kept() -> Calibration:
    return records.read_json(calibration.path_of(CARD), Calibration)


def test_the_whole_command_finds_what_the_card_is_like(calibrated: Any) -> None:
    result = calibrated(script(TRUE, CARD))
    assert result.code == 0, result.err
    found = kept()
    assert max(off(found.speed, TRUE).values()) < 0.03 and found.error is not None and found.error < 0.01
    assert abs(found.context_bytes - 500 * MIB) <= 2 * MIB and found.reserved_factor <= 1.001
    assert (found.card, found.rows, dict(found.versions)) == (CARD.name, len(CASES), NOW)
    assert calibrated.bench.count() == len(CASES)
    assert "1/10  wide 1 x 2048, lean, checkpointing all  0:03:20 left" in result.err
    assert "calibrated on" in result.out and "55%" in result.out and "kept in  " in result.out
    assert [path.name for path in calibration.folder().iterdir()] == ["rtx306012gb-12288.json"]


def test_an_earlier_calibration_has_no_part_in_it(calibrated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.save(CALIBRATION, CARD)
    seen: list[Measurement] = []
    monkeypatch.setattr(core, "calibrate", lambda rows, *_: seen.extend(rows) or CALIBRATION)
    assert calibrated(script(TRUE, CARD)).code == 0 and len(seen) == len(CASES)
    for row, case in zip(seen, CASES, strict=True):
        assert row.gpu == calibrated.bench.card and row.prediction is not None
        assert row.prediction.peak == estimate(case_model(case)[0], case_run(case), CARD).peak


def test_an_interrupted_set_goes_on_where_it_was(calibrated: Any) -> None:
    stop = "end('interrupted', 130, 'stopped')"
    result = calibrated(script(TRUE, CARD, t3=stop))
    assert result.code == 130 and "the same command goes on" in result.error
    assert not calibration.path_of(CARD).exists()
    assert len(records.read_jsonl(calibration.rows_path(CARD), Measurement)) == 3
    result = calibrated(script(TRUE, CARD))
    assert result.code == 0 and kept().rows == len(CASES)
    assert calibrated.bench.count() == len(CASES) + 1  # the interrupted one alone was played again
    assert "4/10  " in result.err and "3/10  " not in result.err


def test_ctrl_c_while_waiting_for_the_card(calibrated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(*_: Any) -> None:
        raise KeyboardInterrupt  # a signal itself may be ignored, as in a shell's background

    monkeypatch.setattr(calibrating, "wait_until_quiet", wait)
    assert calibrated(script(TRUE, CARD)).code == 130


def test_rows_of_other_versions_or_cards_are_measured_again(calibrated: Any) -> None:
    stop = "end('interrupted', 130, 'stopped')"
    calibrated(script(TRUE, CARD, t2=stop))
    path = calibration.rows_path(CARD)
    path.write_text(path.read_text().replace("2.11.0", "2.10.0"))
    assert calibrated(script(TRUE, CARD)).code == 0
    assert calibrated.bench.count() == 3 + len(CASES)


def test_rows_that_cannot_be_read_are_left_aside(calibrated: Any) -> None:
    calibration.make_folder()
    calibration.rows_path(CARD).write_text('{"schema_version": 1}\n{}\n')
    result = calibrated(script(TRUE, CARD))
    assert result.code == 0 and "what was measured before cannot be used" in result.err


def test_what_others_disturb_is_left_out(calibrated: Any) -> None:
    intruder = "card(sizes={'77': 150 * MIB, str(os.getpid()): MIB, '999': 300 * MIB})"
    result = calibrated(script(TRUE, CARD, t1=intruder))
    assert result.code == 0 and kept().rows == len(CASES) - 1
    assert f"left out, process 999 (program-999) appeared on the card: {CASES[1].name}" in result.err


def test_too_few_rows_teach_nothing(calibrated: Any) -> None:
    result = calibrated("oom() if turn >= 4 else None\n" + script(TRUE, CARD))
    assert result.code == 1
    assert f"only 4 of {len(CASES)} cases could be measured" in result.error
    assert "left out, out of memory: " in result.err
    assert not calibration.path_of(CARD).exists()


def test_it_ends_when_its_time_is_over(calibrated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "LIMIT_S", 0.0)
    result = calibrated(script(TRUE, CARD))
    assert result.code == 0 and kept().rows == FEWEST
    assert f"{len(CASES) - FEWEST} of {len(CASES)} cases are left out" in result.err


def test_what_is_too_large_for_the_card_is_left_out(calibrated: Any) -> None:
    calibrated.bench.usable(2 * 2**30)
    result = calibrated(script(TRUE, CARD))
    assert "left out, too large for this card: " in result.err
    small = [case for case in CASES if estimate(case_model(case)[0], case_run(case), CARD).peak.device_bytes <= 2**31]
    assert calibrated.bench.count() == len(small)


def test_show_and_forget(calibrated: Any) -> None:
    assert "no card is calibrated" in calibrated("", "--show").err
    calibration.save(CALIBRATION, CARD)
    (calibration.folder() / "broken.json").write_text("{")
    shown = calibrated("", "--show")
    assert shown.code == 0 and "333" in shown.out and "broken.json is not valid JSON" in shown.err
    payload = json.loads(calibrated("", "--show", "--json").out)
    assert payload["calibrations"][0]["calibration"]["context_bytes"] == 333 * MIB
    assert "exclude each other" in calibrated("", "--show", "--forget").error
    assert calibrated("", "--forget").out.startswith("2 files deleted")
    assert list(calibration.folder().iterdir()) == []
    assert calibrated.bench.count() == 0


def test_without_a_card_it_is_exit_2(calibrated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.errors import VramplanError

    def refuse() -> Any:
        raise VramplanError("no NVIDIA driver library", "a hint")

    monkeypatch.setattr(gpu, "Nvml", refuse)
    result = calibrated("")
    assert (result.code, result.err) == (
        2, "error: there is no CUDA GPU to calibrate: no NVIDIA driver library (a hint)\n",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ on a card
@pytest.mark.cuda
def test_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three cases of the set, so that it is short."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("VRAMPLAN_CACHE", str(tmp_path))
    monkeypatch.setattr(calibrating, "FEWEST", 2)
    monkeypatch.setattr(calibrating.measure_set, "__defaults__", (CASES[:3],))
    assert run_cli(["calibrate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["calibration"]
    assert 200 * MIB < found["context_bytes"] < 1500 * MIB
    assert found["error"] is not None and found["error"] < 0.2
    assert run_cli(["check", "llama-3.2-1b", "--json"]) == 0
    assert "note: calibrated on" in capsys.readouterr().err
