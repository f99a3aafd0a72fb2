"""Whole runs on a tiny model: both recipes, the adapter reloaded by plain PEFT, kill and resume, every bad ending."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

import train_tools  # noqa: E402
from train_tools import events, make_model, make_run, make_text, measurement, write_rows  # noqa: E402

from vramplan.core.types import DataSpec, Levers, Lora, RunSpec, Schedule  # noqa: E402
from vramplan.errors import InputError, VramplanError  # noqa: E402
from vramplan.sources import records  # noqa: E402
from vramplan.train.finetune import finetune  # noqa: E402
from vramplan.train.outcome import Interrupted, outcome_of  # noqa: E402
from vramplan.train.progress import Progress  # noqa: E402
from vramplan.train.trainer import QloraTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    make_model(root / "model", make_text(root / "text.jsonl"))
    return root


def spec(root: Path, recipe: str = "lean", **changes: Any) -> RunSpec:
    return make_run(root / "model", root / "text.jsonl", recipe, **changes)


class StopAfter(Progress):
    """Asks the training to stop when an event of a step arrives, as SIGTERM would."""

    def __init__(self, path: Path, stop: SimpleNamespace, step: int) -> None:
        super().__init__(path)
        self.stop, self.step = stop, step

    def report(self, fields: dict[str, Any]) -> None:
        super().report(fields)
        self.stop.asked = self.stop.asked or fields.get("step") == self.step


def tune(run: RunSpec, run_dir: Path, *, resume: bool = False, stop_after: int = -1) -> str:
    """The run in this process: much quicker than a child that imports torch again."""
    run_dir.mkdir(exist_ok=True)
    stop = SimpleNamespace(asked=False, training=False)
    progress = StopAfter(run_dir / "progress.jsonl", stop, stop_after)
    return finetune(run, run_dir, resume=resume, progress=progress, stop=stop)  # type: ignore[arg-type]


def losses(run_dir: Path) -> list[float]:
    return [e["loss"] for e in events(run_dir, "step")]


# ------------------------------------------------------------------------------------------ the child, for real
@pytest.fixture(scope="module")
def finished(root: Path) -> tuple[Path, int, str]:
    run = spec(root, schedule=Schedule(max_steps=20, learning_rate=5e-3, save_steps=8, warmup_ratio=0.0))
    code, console = train_tools.train(run, root / "finished", VRAMPLAN_SAMPLE_PROMPT="the cat")
    return root / "finished", code, console


def test_the_child_trains_and_the_loss_falls(finished: tuple[Path, int, str]) -> None:
    run_dir, code, console = finished
    assert code == 0, (run_dir / "log.txt").read_text()
    assert console.startswith("done: 20 steps")
    assert len(console.strip().splitlines()) == 1
    result = measurement(run_dir)
    assert result.ended == "finished"
    assert result.last_loss is not None
    assert result.first_loss is not None
    assert result.last_loss < result.first_loss - 0.5
    assert result.eval_loss_before is not None
    assert result.eval_loss_after is not None
    assert result.eval_loss_after < result.eval_loss_before - 0.5
    assert result.steps == 20
    assert result.tokens_per_s > 0
    assert {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "python"} <= set(dict(result.versions))


def test_the_events_tell_the_story(finished: tuple[Path, int, str]) -> None:
    run_dir, _, _ = finished
    phases = [e["name"] for e in events(run_dir, "phase")]
    assert [p for i, p in enumerate(phases) if p not in phases[:i]] == [
        *("data", "load", "prepare", "lora", "eval", "train", "save")
    ]
    start = events(run_dir, "start")[0]
    assert (start["total_steps"], start["effective_batch_size"], start["resumed_from"]) == (20, 4, 0)
    steps = events(run_dir, "step")
    assert [e["step"] for e in steps] == list(range(1, 21))
    assert steps[0]["learning_rate"] == pytest.approx(5e-3)
    assert steps[-1]["learning_rate"] < 1e-4
    assert steps[-1]["tokens"] == measurement(run_dir).tokens > 20 * 4 * 10
    assert steps[-1]["eta_s"] == 0
    assert [e["step"] for e in events(run_dir, "eval")] == [0, 20]
    assert "the cat" in events(run_dir, "sample")[0]["text"]
    end = events(run_dir, "end")
    assert [(e["ended"], e["exit_code"]) for e in end] == [("finished", 0)]
    assert not (run_dir / "lock").exists()


def test_two_checkpoints_are_kept(finished: tuple[Path, int, str]) -> None:
    run_dir, _, _ = finished
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["checkpoint-16", "checkpoint-20"]


def test_plain_peft_reproduces_the_loss(root: Path, finished: tuple[Path, int, str]) -> None:
    """The adapter on a base loaded as the tutorials load it, without anything of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from vramplan.train import data

    run_dir, _, _ = finished
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    adapter = run_dir / "adapter"
    base = AutoModelForCausalLM.from_pretrained(root / "model", quantization_config=config, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, adapter).eval()
    assert model.peft_config["default"].base_model_name_or_path == str(root / "model")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    splits = data.build(records.read_json(run_dir / "run.json", RunSpec), tokenizer, report=lambda _: None)
    total = count = 0.0
    for example in splits.eval or ():
        ids = torch.tensor([example["input_ids"]], device=model.device)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total, count = total + float(loss) * (ids.numel() - 1), count + ids.numel() - 1
    after = measurement(run_dir).eval_loss_after
    before = measurement(run_dir).eval_loss_before
    assert before is not None
    assert after is not None
    assert total / count == pytest.approx(after, abs=0.01)
    assert abs(total / count - before) > 0.5


def test_kill_and_resume_ends_where_the_whole_run_ends(root: Path, tmp_path: Path) -> None:
    schedule = Schedule(max_steps=14, learning_rate=5e-3, save_steps=3, warmup_ratio=0.0)
    run = spec(root, schedule=schedule, lora=Lora(r=8, dropout=0.1), data=DataSpec(path=str(root / "text.jsonl")))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tune(run, whole)
    killed.mkdir()
    records.write_json(killed / "run.json", run)
    process = train_tools.child(killed)
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoints/checkpoint-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (killed / "lock").exists()  # the dead process could not remove it
    broken = killed / "checkpoints" / "checkpoint-13"
    broken.mkdir()
    (broken / "trainer_state.json").write_text("{}")

    code, console = train_tools.train(run, killed, "--resume")
    assert code == 0, console
    resumed_from = events(killed, "start")[-1]["resumed_from"]
    assert resumed_from in (3, 6, 9)
    assert any("checkpoint-13" in e["message"] for e in events(killed, "warning"))
    tail = [e["loss"] for e in events(killed, "step")][-(14 - resumed_from) :]
    assert tail == pytest.approx(losses(whole)[resumed_from:], abs=2e-3)
    assert measurement(killed).tokens == measurement(whole).tokens


def test_sigterm_saves_and_ends_with_130(root: Path, tmp_path: Path) -> None:
    run = spec(root, schedule=Schedule(max_steps=400, save_steps=1000))
    tmp_path.mkdir(exist_ok=True)
    records.write_json(tmp_path / "run.json", run)
    process = train_tools.child(tmp_path)
    deadline = time.monotonic() + 120
    while not ((tmp_path / "progress.jsonl").exists() and events(tmp_path, "step")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, console = process.communicate(timeout=120)
    assert process.returncode == 130, console
    end = events(tmp_path, "end")[-1]
    assert (end["ended"], end["exit_code"]) == ("interrupted", 130)
    assert "saved" in end["message"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert len(list((tmp_path / "checkpoints").glob("checkpoint-*"))) == 1
    assert measurement(tmp_path).ended == "interrupted"


# ------------------------------------------------------------------------------------------------ in this process
def test_both_recipes_learn_the_same(root: Path, tmp_path: Path) -> None:
    """One computes full logits in float32-upcast layers, the other chunks in bf16: the losses must agree closely."""
    for recipe in ("lean", "peft"):
        levers = replace(spec(root, recipe).levers, optimizer="adamw_torch")
        tune(spec(root, recipe, levers=levers), tmp_path / recipe)
    assert losses(tmp_path / "lean") == pytest.approx(losses(tmp_path / "peft"), abs=0.05)
    assert losses(tmp_path / "lean")[-1] < losses(tmp_path / "lean")[0] - 0.2
    wide, narrow = ({line.key: line.bytes for line in measurement(tmp_path / r).lines} for r in ("peft", "lean"))
    assert wide["weights.lm_head"] == 2 * narrow["weights.lm_head"]
    assert wide["weights.nf4"] == narrow["weights.nf4"]


@pytest.mark.parametrize("loss", ["fused", "full"])
def test_accumulation_does_not_change_the_step(root: Path, tmp_path: Path, loss: str) -> None:
    """One batch of four and four of one weigh every token alike, whatever the lengths."""
    text = write_rows(tmp_path / "uneven.jsonl", ["the cat sat on a mat " * (1 + i % 4) + str(i) for i in range(12)])
    levers = Levers(loss=loss, optimizer="sgd")
    data = DataSpec(path=str(text))
    for size in (4, 1):
        run = spec(root, micro_batch_size=size, accumulation=4 // size, levers=levers, data=data)
        tune(run, tmp_path / str(size))
    assert losses(tmp_path / "4") == pytest.approx(losses(tmp_path / "1"), abs=5e-3)


def test_random_weights_train_on_bytes(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((root / "model" / "config.json").read_bytes())
    tune(spec(root, random_weights=True, model_path=str(folder)), tmp_path / "run")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()


def test_every_lever_at_once(root: Path, tmp_path: Path) -> None:
    levers = Levers(upcast="norms", checkpointing="every-2", optimizer="adamw_8bit", attention="eager")
    run = spec(root, levers=levers, lora=Lora(r=4, targets=("q_proj", "up_proj"), dropout=0.1))
    tune(run, tmp_path / "run")
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_interrupted_run_resumes_to_the_same_loss(root: Path, tmp_path: Path) -> None:
    run = spec(root)
    tune(run, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped after step 3"):
        tune(run, tmp_path / "cut", stop_after=3)
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-3").is_dir()
    assert (tmp_path / "cut" / "adapter" / "adapter_model.safetensors").exists()
    tune(run, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), abs=2e-3)


def test_resuming_a_finished_run_only_saves(root: Path, tmp_path: Path) -> None:
    run = spec(root)
    tune(run, tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    assert tune(run, tmp_path, resume=True).startswith("6 steps")
    assert [e["step"] for e in events(tmp_path, "step")] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    assert measurement(tmp_path).eval_loss_after == pytest.approx(events(tmp_path, "eval")[1]["loss"], abs=1e-3)


def test_a_folder_with_checkpoints_is_not_started_over(root: Path, tmp_path: Path) -> None:
    tune(spec(root), tmp_path)
    with pytest.raises(InputError, match="already holds checkpoint-6") as caught:
        tune(spec(root), tmp_path)
    assert "--resume" in caught.value.hint


# ------------------------------------------------------------------------------------------------------ bad ends
def test_out_of_memory_leaves_a_measurement(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = QloraTrainer.training_step

    def step(self: QloraTrainer, *arguments: Any, **keywords: Any) -> Any:
        if self.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
        return stock(self, *arguments, **keywords)

    monkeypatch.setattr(QloraTrainer, "training_step", step)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        tune(spec(root), tmp_path)
    assert outcome_of(caught.value).exit_code == 4
    result = measurement(tmp_path)
    assert (result.ended, result.steps) == ("oom", 2)
    assert result.message == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert result.lines


@pytest.mark.parametrize("where", ["checkpoint", "adapter"])
def test_disk_full_leaves_nothing_half_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from peft import PeftModel

    stock = PeftModel.save_pretrained

    def save(self: Any, target: str, **keywords: Any) -> None:
        if ("checkpoint-4" if where == "checkpoint" else "adapter") in Path(target).name:
            (Path(target) / "adapter_model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stock(self, target, **keywords)

    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    with pytest.raises(VramplanError, match="the disk is full") as caught:
        tune(spec(root), tmp_path)
    assert caught.value.exit_code == 1
    assert measurement(tmp_path).ended == "error"
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == (["checkpoint-2"] if where == "checkpoint" else ["checkpoint-4", "checkpoint-6"])
    assert not (tmp_path / "adapter").exists()
    assert not list(tmp_path.glob(".*"))


def wild(root: Path, **changes: Any) -> RunSpec:
    """One step of this and the adapter's outputs are not finite any more."""
    wild = {"max_steps": 8, "learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_ratio": 0.0, "save_steps": 1}
    return spec(root, schedule=Schedule(**{**wild, **changes}))


def test_losses_that_are_no_number_end_the_run_and_keep_the_checkpoint_before(root: Path, tmp_path: Path) -> None:
    with pytest.raises(VramplanError, match="3 steps in a row, up to step 4, have no finite gradient") as caught:
        tune(wild(root), tmp_path)
    assert "the learning rate of 1e+30 is far too high" in caught.value.message
    assert caught.value.message.endswith("; checkpoint-1 is the last checkpoint")
    assert losses(tmp_path) == [pytest.approx(losses(tmp_path)[0]), None, None]
    assert [e["kind"] for e in events(tmp_path, "health")] == ["nan"]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert (measurement(tmp_path).ended, measurement(tmp_path).skipped_steps) == ("error", 3)


def test_losses_that_are_no_number_can_be_skipped(root: Path, tmp_path: Path) -> None:
    tune(wild(root, on_nan="skip"), tmp_path)
    assert losses(tmp_path)[1:] == [None] * 7
    assert measurement(tmp_path).skipped_steps == 7
    assert measurement(tmp_path).eval_loss_after is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_path": "/nowhere/model"}, "no model folder"),
        ({"data": None}, "data"),
        ({"data": DataSpec(path="/nowhere/data.jsonl")}, "/nowhere/data.jsonl"),
        ({"lora": Lora(targets=("query",))}, "is called query"),
        ({"lora": Lora(targets=("q_proj", "lm_head"))}, "fused loss needs a plain frozen lm_head"),
        ({"lora": Lora(r=0)}, "PEFT refuses"),
        ({"levers": Levers(resident_layers=2)}, "streaming"),
        ({"levers": Levers(checkpointing="sometimes")}, "sometimes"),
    ],
)
def test_bad_input_is_one_sentence(root: Path, tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        tune(spec(root, **changes), tmp_path)
    assert "\n" not in caught.value.message
    assert measurement(tmp_path).ended == "error"
    assert not (tmp_path / "adapter").exists()


def test_a_head_that_does_more_than_its_config_says_is_noticed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vramplan.train import finetune as module
    from vramplan.train.fused_loss import head_of

    monkeypatch.setattr(module, "head_of", lambda model, fused: replace(head_of(model, fused), multiplier=30.0))
    with pytest.raises(InputError, match="does not reproduce LlamaForCausalLM's own"):
        tune(spec(root), tmp_path)
