"""Killed at any moment, out of disk at any file: --resume goes on as if nothing had happened."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from guard_tools import OOM_TEXT, cheap_collections, make_trainer  # noqa: E402
from train_tools import events, make_model, make_run, make_text, measurement  # noqa: E402

from vramplan.core.types import DataSpec, Lora, RunSpec, Schedule  # noqa: E402
from vramplan.errors import DiskFull, InputError, OutOfMemory  # noqa: E402
from vramplan.train.finetune import finetune  # noqa: E402
from vramplan.train.outcome import Interrupted, outcome_of  # noqa: E402
from vramplan.train.progress import Progress  # noqa: E402
from vramplan.train.saving import newest_checkpoint  # noqa: E402
from vramplan.train.splitting import rows_of, width_of  # noqa: E402
from vramplan.train.trainer import QloraTrainer  # noqa: E402

FILES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}  # audit events of saving


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with cheap_collections():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunSpec:
    root = tmp_path_factory.mktemp("tiny")
    text = make_text(root / "text.jsonl", lines=40)
    schedule = Schedule(max_steps=7, learning_rate=5e-3, save_steps=1, warmup_ratio=0.0)
    data = DataSpec(path=str(text), kind="text")
    return make_run(
        make_model(root / "model", text), text, lora=Lora(r=8, dropout=0.1), schedule=schedule, data=data
    )  # 10 steps make an epoch: data order and dropout must both go on where they were


def tune(run: RunSpec, run_dir: Path, *, resume: bool = False, stop_after: int = -1) -> str:
    run_dir.mkdir(exist_ok=True)
    stop = SimpleNamespace(asked=False, training=False)

    class Stopping(Progress):
        def report(self, fields: dict[str, Any]) -> None:
            super().report(fields)
            stop.asked = stop.asked or fields.get("step") == stop_after

    return finetune(run, run_dir, resume=resume, progress=Stopping(run_dir / "progress.jsonl"), stop=stop)  # type: ignore[arg-type]


def curve(run_dir: Path) -> dict[int, float]:
    """The loss of every step, of the last process that made it."""
    return {event["step"]: event["loss"] for event in events(run_dir, "step")}


@pytest.fixture(scope="module")
def whole(run: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tune(run, folder)
    return folder


# ------------------------------------------------------------------------------------------------------ kill -9
def forked(work: Callable[[], Any], kill_at: int) -> int:
    """Do `work` in a copy of this process, which kills itself at the `kill_at`-th operation on a file of the
    checkpoints; returns how it ended as a shell would (-9, or 0)."""
    pid = os.fork()
    if pid == 0:
        seen = [0]

        def look(event: str, arguments: tuple[Any, ...]) -> None:
            if event in FILES and "checkpoint" in str(arguments[0]):
                seen[0] += 1
                if seen[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(look)
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError("the copy hangs")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_killed_again_and_again_the_curve_is_that_of_an_uninterrupted_run(
    run: RunSpec, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each life ends somewhere inside a save: before its first file, between files, between renames, while pruning."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr("vramplan.train.data._on_all_cores", nullcontext)  # a copy has no threads
    ended = []
    for kill_at in (4, 21, 23, 33, 13, 70, 18, 45, 0):
        resume = newest_checkpoint(tmp_path / "checkpoints", lambda _: None) is not None
        ended.append(forked(lambda resume=resume: tune(run, tmp_path, resume=resume), kill_at))  # type: ignore[misc]
        if ended[-1] == 0:
            break
    assert ended.count(-signal.SIGKILL) >= 5, ended
    assert ended[-1] == 0, ended
    assert curve(tmp_path) == pytest.approx(curve(whole), abs=1e-6)
    assert measurement(tmp_path).tokens == measurement(whole).tokens
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-6", "checkpoint-7"]
    one, other = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (tmp_path, whole))
    assert one == other


def test_the_rehearsal_does_not_change_what_is_resumed(run: RunSpec, whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="stopped after step 3"):
        tune(run, tmp_path, stop_after=3)
    tune(run, tmp_path, resume=True)
    assert len(events(tmp_path, "rehearsal")) == 2
    assert curve(tmp_path) == pytest.approx(curve(whole), abs=1e-6)


# ---------------------------------------------------------------------------------------------- the guard's state
class Small:
    """QloraTrainer._micro_step on a card that holds so many tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        self.failures: list[int] = []
        stock = QloraTrainer._micro_step

        def step(trainer: QloraTrainer, model: Any, inputs: dict[str, Any], items: Any) -> Any:
            if rows_of(inputs) * width_of(inputs) > tokens:
                self.failures.append(trainer.state.global_step + 1)
                raise torch.OutOfMemoryError(OOM_TEXT)
            return stock(trainer, model, inputs, items)

        monkeypatch.setattr(QloraTrainer, "_micro_step", step)


def test_a_shrunk_micro_batch_stays_shrunk(run: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Small(monkeypatch, tokens=24)
    with pytest.raises(Interrupted):
        tune(run, tmp_path, stop_after=3)
    assert small.failures == [1]  # in the rehearsal
    (event,) = events(tmp_path, "rehearsal")
    assert (event["rows"], event["micro_batch_size"], event["accumulation"]) == (2, 1, 4)
    tune(run, tmp_path, resume=True)
    assert small.failures == [1]
    assert [e["action"] for e in events(tmp_path, "oom")] == ["split", "shrink"]
    result = measurement(tmp_path)
    assert (result.ended, result.steps, result.oom_events, result.micro_batch_size) == ("finished", 7, 1, 1)


def test_what_cannot_fit_ends_with_4_and_names_the_checkpoint(
    run: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        tune(run, tmp_path, stop_after=3)
    Small(monkeypatch, tokens=4)
    with pytest.raises(OutOfMemory, match=r"does not fit by itself.*; checkpoint-3 is the last checkpoint") as caught:
        tune(run, tmp_path, resume=True)
    outcome = outcome_of(caught.value)
    assert (outcome.ended, outcome.exit_code) == ("oom", 4)
    assert measurement(tmp_path).ended == "oom"
    assert curve(tmp_path).keys() == {1, 2, 3}


# -------------------------------------------------------------------------------------------------- disk full
PARTS = (
    "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
    "trainer_state.json", "guard.json",
)  # fmt: skip


class FullDisk:
    """Writing a file of this name leaves half of it and says that there is no space left, so many times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
        self.name, self.left = name, times
        import peft.peft_model
        import transformers.trainer_callback

        from vramplan.train.guard import Guard

        for place, attribute, position in (
            (torch, "save", 1),
            (peft.peft_model, "safe_save_file", 1),
            (transformers.trainer_callback.TrainerState, "save_to_json", 1),
        ):
            self._patch(monkeypatch, place, attribute, lambda a, position=position: Path(a[position]))
        self._patch(monkeypatch, peft.config.PeftConfigMixin, "save_pretrained", lambda a: Path(a[1]) / PARTS[0])
        self._patch(monkeypatch, Guard, "save", lambda a: a[1] / "guard.json")

    def _patch(
        self, monkeypatch: pytest.MonkeyPatch, place: Any, attribute: str, file: Callable[[tuple[Any, ...]], Path]
    ) -> None:
        stock = getattr(place, attribute)

        def write(*arguments: Any, **keywords: Any) -> Any:
            path = file(arguments)
            if path.name == self.name and self.left:
                self.left -= 1
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return stock(*arguments, **keywords)

        monkeypatch.setattr(place, attribute, write)


@pytest.mark.parametrize("name", PARTS)
def test_a_disk_that_is_full_at_any_file_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made = make_trainer(tmp_path, steps=1)
    trainer, folder = made.trainer, tmp_path / "checkpoints"
    trainer.train()
    trainer._save_checkpoint(trainer.model, None)
    trainer.state.global_step = 2
    disk = FullDisk(monkeypatch, name, times=1)
    with pytest.raises(DiskFull, match=r"the disk is full: .*checkpoint-2 could not be saved") as caught:
        trainer._save_checkpoint(trainer.model, None)
    assert disk.left == 0
    assert caught.value.exit_code == 1
    assert [p.name for p in folder.iterdir()] == ["checkpoint-1"]
    assert newest_checkpoint(folder, print) == folder / "checkpoint-1"
    trainer._save_checkpoint(trainer.model, None)  # there is space again
    assert newest_checkpoint(folder, print) == folder / "checkpoint-2"


def test_older_checkpoints_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_trainer(tmp_path, steps=1)
    trainer, folder = made.trainer, tmp_path / "checkpoints"
    trainer.train()
    for step in (1, 2):
        trainer.state.global_step = step
        trainer._save_checkpoint(trainer.model, None)
    trainer.state.global_step = 3
    FullDisk(monkeypatch, "optimizer.pt", times=1)
    trainer._save_checkpoint(trainer.model, None)
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert newest_checkpoint(folder, print) == folder / "checkpoint-3"


# ------------------------------------------------------------------------------------------- optimizer state, events
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit", "adamw_torch"])
def test_loaded_state_is_where_it_was(tmp_path: Path, optimizer: str) -> None:
    made = make_trainer(tmp_path, optimizer=optimizer, steps=2)
    made.trainer.train()
    made.trainer._save_checkpoint(made.trainer.model, None)
    before = made.trainer.optimizer.optimizer
    other = make_trainer(tmp_path, optimizer=optimizer, steps=2)
    other.trainer.create_optimizer()
    other.trainer.optimizer = other.trainer.accelerator.prepare(other.trainer.optimizer)
    other.trainer.create_scheduler(2)
    other.trainer._load_optimizer_and_scheduler(str(tmp_path / "checkpoints" / "checkpoint-2"))
    after = other.trainer.optimizer.optimizer
    assert str(after.state_dict()["state"]) == str(before.state_dict()["state"])
    assert "load_state_dict" not in vars(after)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
def test_paged_state_is_paged_again_and_tables_are_shared(tmp_path: Path) -> None:
    """bitsandbytes itself loads paged states onto the card, and gives every parameter its own copy of the tables."""
    import bitsandbytes as bnb

    from vramplan.train.resume import state_where_it_belongs

    def make() -> tuple[list[Any], Any]:
        parameters = [torch.nn.Parameter(torch.ones(512, 512, device="cuda")) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 0.5)
        return parameters, bnb.optim.PagedAdamW8bit(parameters, lr=1e-3)

    parameters, optimizer = make()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    others, resumed = make()
    with torch.no_grad():
        for one, other in zip(parameters, others, strict=True):
            other.copy_(one)
    with state_where_it_belongs(resumed):
        resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", map_location="cpu", weights_only=True))
    states = [resumed.state[parameter] for parameter in others]
    for state in states:
        assert state["state1"].is_paged and state["state2"].is_paged
        assert state["absmax1"].is_cuda and state["qmap1"].is_cuda
    assert len({state["qmap2"].data_ptr() for state in states}) == 1
    optimizer.step()
    resumed.step()
    torch.cuda.synchronize()
    for one, other in zip(parameters, others, strict=True):
        assert torch.equal(one, other)


def test_half_a_line_of_a_killed_run_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    path.write_bytes(b'{"event": "step", "step": 1}\n{"event": "st')
    Progress(path).phase("data", "again")
    Progress(path).phase("data", "and again")
    lines = path.read_text().splitlines()
    assert len(lines) == 4
    assert lines[1] == '{"event": "st'


# ------------------------------------------------------------------------------------------------- fused layers
def test_fused_layers_go_on_too_but_not_as_stock_ones(run: RunSpec, tmp_path: Path) -> None:
    fused = replace(run, lora=Lora(r=8))
    assert fused.levers.kernels == "fused"
    tune(fused, tmp_path / "whole")
    with pytest.raises(Interrupted):
        tune(fused, tmp_path / "cut", stop_after=3)
    with pytest.raises(InputError, match=r"checkpoint-3 does not fit .*") as told:
        tune(replace(fused, levers=replace(fused.levers, kernels="stock")), tmp_path / "cut", resume=True)
    assert "--kernels" in told.value.hint
    tune(fused, tmp_path / "cut", resume=True)
    assert curve(tmp_path / "cut") == pytest.approx(curve(tmp_path / "whole"), abs=1e-6)
