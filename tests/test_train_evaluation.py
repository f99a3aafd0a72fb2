"""Evaluation while training, the best adapter, early stopping, who is reported to, seeds."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from test_train_finetune import losses, tune  # noqa: E402
from train_tools import events, make_model, make_run, make_text, measurement  # noqa: E402
from transformers.integrations import integration_utils  # noqa: E402

from vramplan.core.types import LR_SCHEDULERS, Lora, RunSpec, Schedule  # noqa: E402
from vramplan.errors import InputError, VramplanError  # noqa: E402
from vramplan.train.evaluation import EarlyStopping, perplexity  # noqa: E402
from vramplan.train.outcome import Interrupted  # noqa: E402
from vramplan.train.reporting import usable_reporters  # noqa: E402
from vramplan.train.schedule import check_schedule, schedule_arguments  # noqa: E402
from vramplan.train.trainer import QloraTrainer  # noqa: E402

FAST = Schedule(max_steps=6, learning_rate=5e-3, save_steps=100, warmup_ratio=0.0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "model", make_text(root / "text.jsonl", 40))
    return root


def spec(root: Path, **schedule: Any) -> RunSpec:
    """With dropout, so that every number that is drawn shows."""
    dropout = Lora(r=8, dropout=0.1)
    return make_run(root / "model", root / "text.jsonl", schedule=replace(FAST, **schedule), lora=dropout)


@pytest.fixture
def plain(root: Path, tmp_path: Path) -> list[float]:
    """The losses of six steps without any evaluation between them."""
    tune(spec(root), tmp_path / "plain")
    return losses(tmp_path / "plain")


# --------------------------------------------------------------------------------------------------- evaluation
def test_evaluations_come_when_asked_and_change_nothing(root: Path, tmp_path: Path, plain: list[float]) -> None:
    tune(spec(root, eval_strategy="steps", eval_steps=2), tmp_path / "run")
    found = events(tmp_path / "run", "eval")
    assert [e["step"] for e in found] == [0, 2, 4, 6]  # not a second time after the last step
    assert all(e["perplexity"] == pytest.approx(math.exp(e["loss"])) for e in found)
    assert found[-1]["loss"] < found[0]["loss"] - 0.3
    assert measurement(tmp_path / "run").eval_loss_after == found[-1]["loss"]
    assert losses(tmp_path / "run") == plain


def test_epochs_are_evaluated_and_saved_at_their_end(root: Path, tmp_path: Path) -> None:
    run = spec(root, max_steps=None, num_train_epochs=2, eval_strategy="epoch", save_strategy="epoch")
    tune(run, tmp_path)
    steps = len(losses(tmp_path))
    assert [e["step"] for e in events(tmp_path, "eval")] == [0, steps // 2, steps]
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {
        f"checkpoint-{steps // 2}",
        f"checkpoint-{steps}",
    }


def test_the_evaluation_batch_is_the_micro_batch_unless_said(root: Path) -> None:
    assert schedule_arguments(spec(root))["per_device_eval_batch_size"] == 2
    assert schedule_arguments(spec(root, per_device_eval_batch_size=5))["per_device_eval_batch_size"] == 5


def script(monkeypatch: pytest.MonkeyPatch, after: dict[int, float]) -> list[int]:
    """Held-out losses by step in place of measured ones; returns the steps that were asked for."""
    asked: list[int] = []

    def loss(self: QloraTrainer, dataset: Any) -> float:
        asked.append(self.state.global_step)
        return after[self.state.global_step]

    monkeypatch.setattr(QloraTrainer, "evaluation_loss", loss)
    return asked


WORSE_FROM_3 = {0: 9.0, 1: 5.0, 2: 4.0, 3: 4.5, 4: 4.2, 5: 4.3, 6: 4.4}


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_the_best_adapter_is_the_one_that_is_saved(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves every 100 steps would have missed step 2: what is best is saved when it is found, and kept."""
    script(monkeypatch, WORSE_FROM_3)
    run = spec(root, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, save_total_limit=2)
    tune(run, tmp_path / "best")
    checkpoints = tmp_path / "best" / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"checkpoint-2", "checkpoint-6"}
    saved, best, last = (
        weights(f) for f in (tmp_path / "best" / "adapter", checkpoints / "checkpoint-2", checkpoints / "checkpoint-6")
    )
    assert all(torch.equal(saved[name], best[name]) for name in best)
    assert any(not torch.equal(last[name], best[name]) for name in best)
    assert "step 2, which had the lowest held-out loss" in (tmp_path / "best" / "adapter" / "README.md").read_text()
    assert events(tmp_path / "best", "eval")[-1]["step"] == 2


def test_save_strategy_best_saves_only_what_is_better(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, WORSE_FROM_3)
    tune(spec(root, eval_strategy="steps", eval_steps=1, save_strategy="best", save_total_limit=0), tmp_path)
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-1", "checkpoint-2"}


def test_early_stopping_counts_across_a_resume(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = script(monkeypatch, WORSE_FROM_3)
    run = spec(root, eval_strategy="steps", eval_steps=1, save_steps=1, early_stopping_patience=2)
    tune(run, tmp_path / "whole")
    assert asked == [0, 1, 2, 3, 4]
    assert any("stopped early at step 4" in e["message"] for e in events(tmp_path / "whole", "phase"))
    with pytest.raises(Interrupted):
        tune(run, tmp_path / "cut", stop_after=3)
    asked.clear()
    tune(run, tmp_path / "cut", resume=True)
    assert asked == [4]  # step 3 was worse already: this is the second in a row
    asked.clear()
    tune(run, tmp_path / "whole", resume=True)
    assert asked == [4]  # nothing is trained; only the held-out loss of the saved adapter is measured


def test_a_better_loss_resets_the_patience() -> None:
    stopping = EarlyStopping(Schedule(early_stopping_patience=2, early_stopping_threshold=0.1))
    history = [{"eval_loss": loss} for loss in (5.0, 4.0, 3.95, 3.0, 2.99)]
    state = transformers.TrainerState(log_history=[{"loss": 1.0}, *history])
    arguments = transformers.TrainingArguments(output_dir="x", greater_is_better=False, report_to="none", use_cpu=True)
    stopping.on_train_begin(arguments, state, transformers.TrainerControl())
    assert stopping.early_stopping_patience_counter == 1


def test_a_stop_in_an_evaluation_saves_and_says_no_loss(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = QloraTrainer.evaluation_loss

    def loss(self: QloraTrainer, dataset: Any) -> float:
        reporter = self.watch_evaluation.__self__  # type: ignore[attr-defined]
        reporter.stop.asked = self.state.global_step == 2
        return stock(self, dataset)

    monkeypatch.setattr(QloraTrainer, "evaluation_loss", loss)
    for strategy in ("steps", "best"):
        run = spec(root, eval_strategy="steps", eval_steps=2, save_strategy=strategy)
        with pytest.raises(Interrupted, match="after step 2"):
            tune(run, tmp_path / strategy)
        assert [e["step"] for e in events(tmp_path / strategy, "eval")] == [0]
        assert (tmp_path / strategy / "checkpoints" / "checkpoint-2").is_dir()
        assert events(tmp_path / strategy, "eval_progress")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"load_best_model_at_end": True}, "--load-best-model-at-end needs evaluations"),
        ({"early_stopping_patience": 1}, "--early-stopping-patience needs evaluations"),
        ({"save_strategy": "best"}, "--save-strategy best needs evaluations"),
        ({"lr_scheduler_type": "greedy"}, "--lr-scheduler-type greedy needs evaluations"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "no"},
            "--load-best-model-at-end needs checkpoints",
        ),
        ({"lr_scheduler_kwargs": "[1]"}, "is not a JSON object"),
        ({"lr_scheduler_kwargs": '{"cycles": 2}'}, "the schedule cosine cannot be made"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "the schedule cosine_with_min_lr cannot be made"),
        ({"optim_args": "momentum=0.9"}, "--optim-args has no effect on paged_adamw_8bit"),
        ({"report_to": ("comet",)}, "--report-to comet is not known"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(
    root: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        tune(spec(root, **changes), tmp_path)
    assert not (tmp_path / "progress.jsonl").exists()


def test_evaluation_needs_rows_that_are_held_out(root: Path, tmp_path: Path) -> None:
    run = spec(root, eval_strategy="epoch")
    assert run.data is not None
    with pytest.raises(InputError, match="--eval-strategy epoch needs rows"):
        tune(replace(run, data=replace(run.data, eval_fraction=0.0)), tmp_path)
    assert [e["name"] for e in events(tmp_path, "phase")][-1] == "data"  # no model was loaded


def test_perplexity_has_no_overflow() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(float("nan")))


# ------------------------------------------------------------------------------------------------------ schedules
KEYWORDS = {
    "cosine_with_min_lr": '{"min_lr": 1e-5}',
    "cosine_warmup_with_min_lr": '{"min_lr": 1e-5}',
    "warmup_stable_decay": '{"num_decay_steps": 2}',
}


def test_the_schedules_are_those_of_transformers() -> None:
    assert set(LR_SCHEDULERS) == {s.value for s in transformers.SchedulerType}


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_schedule_can_be_made(root: Path, name: str) -> None:
    evaluates = "steps" if name in ("reduce_lr_on_plateau", "greedy") else "no"
    run = spec(root, lr_scheduler_type=name, lr_scheduler_kwargs=KEYWORDS.get(name), eval_strategy=evaluates)
    check_schedule(run)
    arguments = transformers.TrainingArguments(output_dir="unused", use_cpu=True, **schedule_arguments(run))
    assert arguments.lr_scheduler_type == name


def test_a_plateau_follows_the_held_out_loss(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, {step: 1.0 for step in range(7)})
    keywords = '{"patience": 0, "factor": 0.5}'
    run = spec(root, eval_strategy="steps", eval_steps=2, lr_scheduler_type="reduce_lr_on_plateau",
               lr_scheduler_kwargs=keywords)  # fmt: skip
    tune(run, tmp_path)
    assert [e["learning_rate"] for e in events(tmp_path, "step")] == pytest.approx([5e-3] * 4 + [2.5e-3] * 2)


def warmup(root: Path, steps: int, **schedule: Any) -> int:
    arguments = transformers.TrainingArguments(
        output_dir="unused", use_cpu=True, **schedule_arguments(spec(root, **schedule))
    )
    return int(arguments.get_warmup_steps(steps))


def test_warmup_is_a_share_or_a_number_of_steps(root: Path) -> None:
    assert warmup(root, 100, warmup_ratio=0.03) == 3
    assert warmup(root, 100, warmup_ratio=1.0) == 100  # transformers alone would read one step
    assert warmup(root, 100, warmup_ratio=0.5, warmup_steps=7) == 7
    assert warmup(root, 100, warmup_ratio=0.5, warmup_steps=0) == 0
    assert warmup(root, 100, warmup_steps=0.2) == 20


# ----------------------------------------------------------------------------------------------- logs and reports
def test_logging_steps_are_means(root: Path, tmp_path: Path, plain: list[float]) -> None:
    tune(spec(root, logging_steps=3, max_steps=5), tmp_path / "run")
    found = events(tmp_path / "run", "step")
    assert [e["step"] for e in found] == [1, 3, 5]
    short = spec(root, max_steps=5)
    tune(short, tmp_path / "short")
    each = losses(tmp_path / "short")
    assert [e["loss"] for e in found] == pytest.approx([each[0], sum(each[1:3]) / 2, sum(each[3:5]) / 2])
    assert (
        found[-1]["tokens"] == events(tmp_path / "short", "step")[-1]["tokens"] == measurement(tmp_path / "run").tokens
    )
    assert found[-1]["eta_s"] == 0


def test_a_checkpoint_between_two_logs_knows_its_tokens(root: Path, tmp_path: Path) -> None:
    run = spec(root, logging_steps=4, save_steps=2)
    tune(run, tmp_path / "whole")
    with pytest.raises(Interrupted):
        tune(run, tmp_path / "cut", stop_after=2)
    tune(run, tmp_path / "cut", resume=True)
    assert measurement(tmp_path / "cut").tokens == measurement(tmp_path / "whole").tokens


def stop_at(monkeypatch: pytest.MonkeyPatch, micro_batch: int) -> None:
    """Ask to stop in this micro-batch of the training; before the first there are two of a rehearsal."""
    stock, calls = QloraTrainer.training_step, itertools.count(-1)

    def training_step(self: QloraTrainer, *arguments: Any) -> Any:
        self.watch_evaluation.__self__.stop.asked = next(calls) == micro_batch  # type: ignore[attr-defined]
        return stock(self, *arguments)

    monkeypatch.setattr(QloraTrainer, "training_step", training_step)


def test_a_step_that_is_given_up_takes_no_tokens_of_others_with_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle of step 4: steps 2 and 3, which nobody has logged, count."""
    stop_at(monkeypatch, 7)
    with pytest.raises(Interrupted, match="after step 3"):
        tune(spec(root, logging_steps=10), tmp_path)
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    assert measurement(tmp_path).steps == 3
    assert measurement(tmp_path).tokens == state["num_input_tokens_seen"] > events(tmp_path, "step")[-1]["tokens"]


def test_a_stop_before_the_first_step_leaves_no_checkpoint(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers saves at the end of an epoch, which a stop in the middle of a step is too."""
    stop_at(monkeypatch, 1)
    with pytest.raises(Interrupted, match="before the first step; nothing to save"):
        tune(spec(root, save_strategy="epoch"), tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


class Listener(transformers.TrainerCallback):  # type: ignore[misc]
    """Stands in for a reporter's callback."""

    heard: list[tuple[int, dict[str, float]]]
    name: str

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        type(self).name = args.run_name

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        type(self).heard.append((state.global_step, dict(logs)))


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> type[Listener]:
    for name in ("tensorboard", "trackio"):
        module = ModuleType(name)
        module.__spec__ = __import__("importlib.machinery").machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Listener)
    Listener.heard = []
    return Listener


def test_reporters_hear_what_a_step_was(
    root: Path, tmp_path: Path, listener: type[Listener], plain: list[float]
) -> None:
    run = spec(root, report_to=("tensorboard",), logging_steps=2, eval_strategy="steps", eval_steps=3)
    tune(run, tmp_path / "my-run")
    assert listener.name == "my-run"
    steps = [(step, logs) for step, logs in listener.heard if "loss" in logs]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 6]
    assert sum(logs["loss"] * n for (_, logs), n in zip(steps, (1, 1, 1, 1, 2), strict=True)) == pytest.approx(
        sum(plain)
    )
    assert {"learning_rate", "grad_norm", "tokens_per_second", "num_input_tokens_seen", "oom_events", "epoch"} <= set(
        steps[0][1]
    )
    assert steps[-1][1]["num_input_tokens_seen"] == measurement(tmp_path / "my-run").tokens
    assert all(logs["grad_norm"] > 0 for _, logs in steps)
    told = {step: logs["eval_loss"] for step, logs in listener.heard if "eval_loss" in logs}
    assert told == {e["step"]: e["loss"] for e in events(tmp_path / "my-run", "eval")}
    assert [*told] == [0, 3, 6]


def test_all_is_everyone_installed(tmp_path: Path, listener: type[Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", "mine")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    found = usable_reporters(Schedule(report_to=("all",)), tmp_path)
    assert {"tensorboard", "trackio"} <= set(found)
    import os

    assert os.environ["WANDB_DIR"] == "mine"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "runs")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")


def test_a_reporter_that_is_not_installed_is_said_first(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vramplan.train.reporting.find_spec", lambda name: None)
    with pytest.raises(VramplanError, match="--report-to wandb needs a library") as error:
        tune(spec(root, report_to=("wandb",)), tmp_path)
    assert error.value.hint == "pip install wandb"
    assert error.value.exit_code == 1
    assert not (tmp_path / "progress.jsonl").exists()


def test_tensorboard_writes_below_the_run_folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    tune(spec(root, report_to=("tensorboard",), max_steps=2), tmp_path)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "runs"))
    board.Reload()
    assert [scalar.value for scalar in board.Scalars("train/loss")] == pytest.approx(losses(tmp_path))


# ---------------------------------------------------------------------------------------------------------- seeds
def first_adapter(root: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """The adapter as it is before step 1: the learning rate is too small to move it."""
    run = replace(spec(root, max_steps=1, learning_rate=1e-30), **changes)
    tune(run, run_dir)
    return {name: tensor for name, tensor in weights(run_dir / "adapter").items() if "lora_A" in name}


def test_the_adapter_starts_from_the_seed_alone(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = first_adapter(root, tmp_path / "a", monkeypatch)
    from vramplan.train import building as module

    stock = module.load_model
    monkeypatch.setattr(module, "load_model", lambda *a: (torch.rand(7), stock(*a))[1])  # something draws before it
    again = first_adapter(root, tmp_path / "b", monkeypatch, micro_batch_size=1)
    other = first_adapter(root, tmp_path / "c", monkeypatch, schedule=replace(FAST, max_steps=1, seed=7))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_the_same_seed_gives_the_same_losses(root: Path, tmp_path: Path, plain: list[float]) -> None:
    for name, seed, data_seed in (("a", 42, None), ("b", 42, None), ("c", 42, 7), ("d", 7, None)):
        tune(spec(root, seed=seed, data_seed=data_seed), tmp_path / name)
    first, again, order, other = (losses(tmp_path / name) for name in "abcd")
    assert first == again == plain
    assert len({tuple(x) for x in (first, order, other)}) == 3


def test_full_determinism_is_switched_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC",
                 "FLASH_ATTENTION_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, "")
    try:
        for name in "ab":
            tune(spec(root, full_determinism=True, max_steps=3), tmp_path / name)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
