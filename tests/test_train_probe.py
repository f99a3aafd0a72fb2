"""The child of `fit --probe`: worst batch, evaluation, the last steps timed; on a CPU, and, marked, on a card."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from probe_tools import Bench  # noqa: E402
from test_measure import CONFIG  # noqa: E402

from vramplan.cli import run as run_cli  # noqa: E402
from vramplan.core.recipes import RECIPES  # noqa: E402
from vramplan.core.types import Measurement, Plan, RunSpec, Schedule  # noqa: E402
from vramplan.launch import child  # noqa: E402
from vramplan.launch.probing import STEPS, probe_run  # noqa: E402
from vramplan.sources import records  # noqa: E402
from vramplan.train import measure as measuring  # noqa: E402
from vramplan.train import probe as probing  # noqa: E402
from vramplan.train.meter import Meter  # noqa: E402
from vramplan.train.progress import Progress  # noqa: E402
from vramplan.train.reporting import Window  # noqa: E402
from vramplan.train.trainer import QloraTrainer  # noqa: E402

CPU = torch.device("cpu")
NEVER: Any = SimpleNamespace(asked=False, training=False)


class Played:
    """One probe on a CPU: its events, its measurement, and what the trainer was given."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.batches, self.evaluated = tmp_path, [], []
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
        monkeypatch.setattr(probing, "HELD_S", 0.0)
        micro_step, evaluate = QloraTrainer._micro_step, QloraTrainer.evaluate_batch

        def spy_step(trainer: Any, model: Any, inputs: dict[str, Any], items: Any) -> Any:
            self.batches.append(inputs)
            return micro_step(trainer, model, inputs, items)

        def spy_evaluate(trainer: Any, batch: dict[str, Any]) -> Any:
            self.evaluated.append((len(self.batches), batch, trainer.meter.steps))
            return evaluate(trainer, batch)

        monkeypatch.setattr(QloraTrainer, "_micro_step", spy_step)
        monkeypatch.setattr(QloraTrainer, "evaluate_batch", spy_evaluate)

    def __call__(self, **changes: Any) -> Measurement:
        run = RunSpec(model="tiny", micro_batch_size=3, accumulation=4, seq_len=32, levers=RECIPES["lean"])
        run = replace(probe_run(replace(run, **changes)), model_path=str(self.folder / "model"))
        progress = Progress(self.folder / "progress.jsonl")
        probing.probe(run, self.folder, CPU, progress=progress, stop=NEVER)
        (row,) = records.read_jsonl(self.folder / "measurement.jsonl", Measurement)
        return row

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "progress.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(tmp_path, monkeypatch)


@pytest.mark.parametrize("recipe", ["lean", "peft"])
def test_the_worst_batch_and_an_evaluation(played: Played, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    monkeypatch.delattr(measuring, "_hold")  # the memory is held once, not at the end again
    row = played(recipe=recipe, levers=RECIPES[recipe])
    assert (row.ended, row.steps) == ("finished", STEPS)
    assert len(played.batches) == 2 * STEPS  # two micro-batches stand for all four
    for batch in (*played.batches, *(batch for _, batch, _ in played.evaluated)):
        assert batch["input_ids"].shape == (3, 32)
        assert (batch["labels"] == batch["input_ids"]).all()
    assert [(before, steps) for before, _, steps in played.evaluated] == [(4, 2)]  # after the second step, once
    assert [phase.name for phase in row.phases] == ["loaded", "prepared", "with_lora", "evaluation"]
    assert len(played.events("held")) == 1
    left = {path.name for path in played.folder.rglob("*")}
    assert not {name for name in left if "adapter" in name or name.startswith("checkpoint-")}


def test_only_the_last_steps_are_timed(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 0.4, 5.0, 5.0, 5.0, 5.0, 0.5, 0.5, 0.5, 0.5])
    close = Window.close

    def timed(window: Window) -> dict[str, Any]:
        window.begun = probing.time.perf_counter() - next(seconds)
        return close(window)

    monkeypatch.setattr(Window, "close", timed)
    assert played().tokens_per_s == pytest.approx(2 * 3 * 32 / 0.5, rel=0.02)


def test_long_steps_are_timed_as_they_are(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "LONG_STEP_S", 0.0)
    row = played()
    assert (row.steps, row.tokens) == (2, 2 * 2 * 3 * 32)
    assert row.tokens_per_s > 0 and len(played.evaluated) == 1


def test_graphs_come_after_the_memory_was_looked_at(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make(trainer: Any, run: RunSpec, progress: Progress) -> None:
        made.append(trainer.meter.steps)
        assert run.schedule.cuda_graphs == wanted and played.events("held")

    monkeypatch.setattr(probing, "make_graphs", make)
    wanted = False
    played(schedule=Schedule(cuda_graphs=wanted))
    assert made == [2]


def test_room_for_graphs_is_asked_for_once(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = SimpleNamespace(run=lambda inputs, items, ordinary: ordinary(), recorder=SimpleNamespace(reserved_bytes=0))
    monkeypatch.setattr(probing, "make_graphs", lambda *_: graphs)
    assert played().steps == STEPS and graphs.tries == 1


def test_lack_of_memory_ends_it(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(trainer: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(QloraTrainer, "evaluate_batch", full)
    with pytest.raises(torch.OutOfMemoryError):
        played()
    (row,) = records.read_jsonl(played.folder / "measurement.jsonl", Measurement)
    assert (row.ended, row.steps) == ("oom", 2)


def test_the_cap_is_set_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setenv(probing.CAP_VARIABLE, "1000")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 4000))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: calls.append(share))
    monkeypatch.setattr(probing, "measure", lambda *_, **__: calls.append("measured") or "")
    probing.probe(RunSpec(model="m"), tmp_path, torch.device("cuda"), progress=Progress(tmp_path / "p"), stop=NEVER)
    assert calls == [0.25, "measured"]


def test_a_measure_holds_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Meter] = []
    monkeypatch.setattr(measuring, "_hold", held.append)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    run = RunSpec(model="tiny", model_path=str(tmp_path), seq_len=16, random_weights=True,
                  schedule=Schedule(max_steps=2, save_steps=0))  # fmt: skip
    measuring.measure(run, tmp_path, CPU, progress=Progress(tmp_path / "p"), stop=NEVER)
    assert len(held) == 1


REAL_CHILD = """
import sys, torch
import vramplan.train.measure as measuring
import vramplan.train.probe as probing
measuring.cuda_device = lambda: torch.device("cpu")
probing.HELD_S = 0.5
from vramplan.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_whole_command_with_the_real_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(tmp_path, monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    command = [sys.executable, "-c", REAL_CHILD]
    monkeypatch.setattr(child, "_command", lambda folder, resume: [*command, str(folder)])
    words = ["fit", str(tmp_path / "config.json"), "--effective-batch-size", "8", "--seq-len", "32", "--probe"]
    assert run_cli([*words, "-o", str(tmp_path / "plan.json")]) == 0, capsys.readouterr().err
    plan = records.read_json(tmp_path / "plan.json", Plan)
    (probe,) = plan.probes
    assert plan.verified and probe.tokens_per_s is not None and bench.count() == 0
    assert probe.micro_batch_size * probe.accumulation == 8


# ------------------------------------------------------------------------------------------------------- on a card
@pytest.mark.cuda
def test_on_a_card_a_plan_is_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    target = tmp_path / "plan.json"
    words = ["fit", "qwen2.5-0.5b", "--effective-batch-size", "2", "--seq-len", "512", "--probe", "--no-calibration"]
    assert run_cli([*words, "-o", str(target)]) == 0, capsys.readouterr().err
    plan = records.read_json(target, Plan)
    (probe,) = plan.probes
    assert plan.verified and probe.fits and probe.tokens_per_s is not None and probe.tokens_per_s > 0
    assert probe.allocated_bytes is not None and probe.process_bytes is not None
    assert abs(probe.allocated_bytes / probe.predicted_bytes - 1) < 0.01
    assert probe.process_bytes > (probe.reserved_bytes or 0) >= probe.allocated_bytes


@pytest.mark.cuda
def test_on_a_card_a_cap_that_is_too_small_refutes(tmp_path: Path) -> None:
    """A plan that needs more than the cap it is given ends out of memory, not in an error."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    import vramplan
    from vramplan.launch.probing import Place, play
    from vramplan.sources.gpu import Nvml

    plan = vramplan.plan("qwen2.5-0.5b", gpu="rtx-4090", effective_batch_size=2)
    cap = plan.ledger.peak.allocated_bytes // 2
    with Nvml() as nvml:
        played = play(probe_run(plan.run), Place(card=nvml.gpu(0), nvml=nvml), cap_bytes=cap)
    assert not played.finished and "out of memory" in played.message.lower()
