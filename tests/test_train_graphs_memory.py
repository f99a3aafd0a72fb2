"""Graphs when memory is short: they go first, what failed is played again whole, and they come back a few times."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

import transformers  # noqa: E402
from graph_tools import Noted, loss_of_labelled_rows, make, rows  # noqa: E402, F401
from guard_tools import CPU, OOM_TEXT, Faults, make_peft_model, same_parameters, stumbling  # noqa: E402
from test_train_finetune import tune  # noqa: E402
from train_tools import events, make_model, make_run, make_text, measurement  # noqa: E402

from vramplan.core.types import Levers, RunSpec, Schedule  # noqa: E402
from vramplan.core.units import MIB  # noqa: E402
from vramplan.train import building  # noqa: E402
from vramplan.train.fast import graphs as graphs_module  # noqa: E402
from vramplan.train.fast.graphs import SPARE_BYTES, TRIES, WATCHED, CudaGraphs, Graphs  # noqa: E402
from vramplan.train.fast.install import install  # noqa: E402
from vramplan.train.gradients import Gradients  # noqa: E402
from vramplan.train.guard import State  # noqa: E402
from vramplan.train.meter import Meter  # noqa: E402
from vramplan.train.progress import Progress  # noqa: E402
from vramplan.train.trainer import QloraTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("loss_of_labelled_rows")


class Alike:
    """A run of micro-batches of one shape but for one, `other`, which runs out of memory once; in two per step."""

    def __init__(self, folder: Path, noted: Noted | None, other: int, fused: bool = False, **options: Any) -> None:
        self.said: list[str] = []
        self.played: list[str] = []  # what micro-steps were, in order
        self.faults = Faults()
        lengths = tuple(24 if number == other else 16 for number in range(16))
        options = {"steps": 8, "dataset": rows(32, lengths), **options}
        if fused:
            model, levers = make_peft_model(in_4_bits=True), Levers(checkpointing="all", optimizer="adamw_torch")
            self.fused = install(model, levers, CPU, skips_last=True, stochastic=False)
            options |= {"model": model, "fused": self.fused, "levers": levers}
        self.made = make(folder, noted, self.said, **options)
        self.trainer = self.made.trainer
        self.trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(self.trainer.train_dataset)
        self.one_by_one, self.trainer._started_one_by_one = self.trainer._started_one_by_one, self.ordinary
        self.width = 0
        if noted is not None:
            replay = noted.replayed
            noted.replayed = lambda: (self.played.append("replay"), replay())[1]

    def ordinary(self, model: Any, inputs: Any, items: Any) -> Any:
        count, width = inputs["input_ids"].shape
        self.width, told = width, f"{count} x {width} fails"
        try:
            loss = self.one_by_one(model, inputs, items)
            told = f"{count} x {width}"
        finally:
            self.width = 0
            self.played.append(told)
        return loss

    def train(self, where: str = "", failures: int = 0) -> dict[str, Any]:
        """The parameters at the end; the first `failures` passes of the other shape through `where` fail."""
        self.faults.when = lambda number: self.width == 24 and self.faults.raised < failures
        try:
            with self.faults.at(where, self.trainer.model) if where else nullcontext():
                self.trainer.train()
        finally:
            if self.trainer.fused is not None:
                self.fused.uninstall()
        return self.made.parameters()

    @property
    def actions(self) -> list[tuple[str, int, int]]:
        return [(event["action"], event["rows"], event["micro_batch_size"]) for event in self.made.of("oom")]


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, bool], dict[str, Any]]:
    """Parameters of a run without graphs and without failures."""

    @cache
    def parameters(other: int, fused: bool) -> dict[str, Any]:
        return Alike(tmp_path_factory.mktemp("unharmed"), None, other, fused).train()

    return parameters


ONE_SHAPE = "micro-batches of 2 x 16 tokens run as one CUDA graph from now on"
DROPPED = "CUDA graphs are dropped, memory is short: shapes that come back may get one again"


@pytest.mark.parametrize("fused", [False, True], ids=["stock", "fused"])
@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
@pytest.mark.parametrize("other", [4, 5], ids=["first", "second"])
def test_without_graphs_the_same_is_tried_whole_and_they_come_back(
    tmp_path: Path, unharmed: Any, other: int, where: str, fused: bool
) -> None:
    """The update is that of a run without failures and without graphs, to the last bit: also where the gradients so
    far are a replay's, and half of a backward is taken back."""
    noted = Noted()
    run = Alike(tmp_path, noted, other, fused)
    found = run.train(where, failures=1)
    assert run.faults.raised == 1
    before = ["2 x 16"] * 2 + ["replay"] * (other - 2)
    after = ["2 x 16"] * (3 if other == 4 else 2)  # between two steps alone one is made
    assert run.played == [*before, "2 x 24 fails", "2 x 24", *after, *["replay"] * (16 - other - 1 - len(after))]
    assert run.actions == [("drop_graphs", 2, 2)]
    assert run.said == [ONE_SHAPE, DROPPED, ONE_SHAPE] and noted.dropped == 1
    same_parameters(unharmed(other, fused), found, rtol=0, atol=0)
    assert run.trainer.guard is not None
    assert run.trainer.guard.state == State(oom_events=1)  # nothing shrinks, nothing waits


def test_what_a_failed_backward_left_beside_a_replay_would_show(
    tmp_path: Path, unharmed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gradients, "restore", lambda self: None)
    found = Alike(tmp_path, Noted(), 5).train("backward", failures=1)
    with pytest.raises(AssertionError):
        same_parameters(unharmed(5, False), found)


def test_what_does_not_fit_without_graphs_either_is_split(tmp_path: Path) -> None:
    run = Alike(tmp_path, Noted(), 5, optimizer="sgd")
    found = run.train("backward", failures=2)
    assert run.played[4:8] == ["replay", "2 x 24 fails", "2 x 24 fails", "1 x 24"]
    assert run.actions == [("drop_graphs", 2, 2), ("split", 2, 1)]
    assert run.said == [ONE_SHAPE, DROPPED, ONE_SHAPE]
    same_parameters(Alike(tmp_path, None, 5, optimizer="sgd").train(), found)


@pytest.mark.parametrize("between", [False, True], ids=["within a step", "between steps"])
def test_an_evaluation_is_played_whole_without_graphs(tmp_path: Path, between: bool) -> None:
    noted = Noted()
    run = Alike(tmp_path, noted, -1, steps=4)
    trainer, data = run.trainer, rows(5, (24,))
    expected, losses = trainer.evaluation_loss(data), list[float]()

    def refuse(module: Any, inputs: Any) -> None:
        if not module.training and trainer.graphs.made:
            raise torch.OutOfMemoryError(OOM_TEXT)

    trainer.model.get_base_model().model.layers[1].register_forward_pre_hook(refuse)

    class Evaluates(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and between:
                losses.append(trainer.evaluation_loss(data))

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2 and not between:
                losses.append(trainer.evaluation_loss(data))

    trainer.add_callback(Evaluates())
    found = run.train()
    assert losses and losses[0] != expected and len(run.actions) == 1
    assert run.actions == [("drop_graphs", 2, 2)] and run.made.of("oom")[0]["where"] == "evaluation"
    assert run.trainer.guard is not None and run.trainer.guard.state.evaluation_rows is None
    clean = Alike(tmp_path, None, -1, steps=4)
    same_parameters(clean.train(), found, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["clip", "step"])
def test_a_step_is_taken_again_without_graphs(tmp_path: Path, place: str) -> None:
    """Clipping, and the optimizer: at the same size, with the gradients of the replays."""
    run, clean = (Alike(tmp_path, noted, -1, steps=5) for noted in (Noted(), None))
    if place == "step":
        stumbling(run.made, {3: "half"})
    else:
        stock, calls = run.trainer.accelerator.clip_grad_norm_, list[int]()

        def clip(*arguments: Any) -> Any:
            calls.append(1)
            if len(calls) == 3:
                raise torch.OutOfMemoryError(OOM_TEXT)
            return stock(*arguments)

        run.trainer.accelerator.clip_grad_norm_ = clip
    found = run.train()
    assert run.actions == [("drop_graphs", 2, 2)] and run.made.of("oom")[0]["where"] == "optimizer"
    assert run.said == [ONE_SHAPE, DROPPED, ONE_SHAPE]
    same_parameters(clean.train(), found, rtol=0, atol=0)


class Alone:
    """Graphs of one parameter; `step` plays a micro-batch of `size` tokens between two optimizer steps."""

    def __init__(self, noted: Noted) -> None:
        self.parameter, self.said, self.noted = torch.nn.Parameter(torch.ones(2)), list[str](), noted
        step: Any = lambda inputs, items: self.parameter.sum()  # noqa: E731
        self.graphs = Graphs(step, [self.parameter], lambda: None, self.said.append, noted)

    def step(self, size: int = 4) -> bool:
        """Whether it was a graph."""
        before, self.parameter.grad = self.noted.played, None
        self.graphs.run({"input_ids": torch.ones(1, size)}, torch.ones(()), lambda: torch.zeros(()))
        return self.noted.played > before


def test_graphs_come_back_a_few_times_only() -> None:
    alone = Alone(Noted())
    for turn in range(TRIES):
        assert [alone.step() for _ in range(WATCHED + 2)] == [False] * WATCHED + [True] * 2
        assert alone.graphs.drop("memory is short")
        assert (alone.noted.dropped, alone.graphs.gradients) == (turn + 1, [])
    assert not any(alone.step() for _ in range(20))
    made = "micro-batches of 1 x 4 tokens run as one CUDA graph from now on"
    last = "CUDA graphs are dropped, memory is short: no more are made"
    assert alone.said == [*[made, DROPPED] * (TRIES - 1), made, last]
    assert not alone.graphs.drop("memory is short") and len(alone.said) == 2 * TRIES


def test_room_is_asked_for_again_since_what_is_cached_was_given_back() -> None:
    alone = Alone(Noted())
    alone.noted.has_room = False
    assert not any(alone.step() for _ in range(WATCHED + 1))
    assert (alone.noted.asked, alone.said) == (1, [])
    alone.noted.has_room = True
    assert [alone.step() for _ in range(WATCHED)] == [False] * (WATCHED - 1) + [True]
    alone.graphs.drop("memory is short")
    alone.noted.has_room = False
    assert not any(alone.step() for _ in range(20))
    assert alone.noted.asked == TRIES  # twice refused and once dropped
    assert alone.said[-1] == "no more CUDA graphs are made: the card has no memory to spare for one"


def test_a_shape_counts_from_when_the_cache_was_last_given_back() -> None:
    """Else what is cached would not tell what it takes: by another shape's graph, or since memory ran out."""
    alone = Alone(Noted())
    for size in (4, 5, 4, 5, 4):
        alone.step(size)
    assert alone.noted.asked == 1
    assert [alone.step(5) for _ in range(WATCHED + 1)] == [False] * WATCHED + [True]
    other = Alone(Noted())
    other.step(), other.step()
    assert not other.graphs.drop("memory is short") and other.said == [] and other.graphs.tries == TRIES
    assert [other.step() for _ in range(WATCHED + 1)] == [False] * WATCHED + [True]


def test_the_guard_of_a_run_drops_its_graphs(tmp_path: Path) -> None:
    made = make(tmp_path, Noted())
    trainer, progress = made.trainer, Progress(tmp_path / "progress.jsonl")
    guard = building.make_guard(trainer, RunSpec(model="tiny", levers=Levers()), SimpleNamespace(longest=16), progress)
    trainer.graphs.made[()] = None
    guard.card.free()
    assert trainer.graphs.made and guard.drop_graphs() and not trainer.graphs.made and not guard.drop_graphs()
    trainer.graphs = None
    assert not guard.drop_graphs()


def test_a_whole_run_with_an_evaluation_that_does_not_fit_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = make_text(tmp_path / "rows.jsonl")
    model, curves, noted = make_model(tmp_path / "model", text), list[list[float]](), Noted()
    schedule = Schedule(max_steps=11, save_steps=1000, eval_strategy="steps", eval_steps=5, warmup_ratio=0.0)
    run = make_run(model, text, schedule=schedule, packing=True, seq_len=48)
    evaluated, trainers = list[bool](), list[QloraTrainer]()
    stock = QloraTrainer._evaluate_piece

    def piece(trainer: QloraTrainer, inputs: Any) -> Any:
        held = trainer.graphs is not None and bool(trainer.graphs.made)
        evaluated.append(held)
        if held and evaluated.count(True) == 1:
            raise torch.OutOfMemoryError(OOM_TEXT)
        return stock(trainer, inputs)

    def make_graphs(trainer: QloraTrainer, run: RunSpec, progress: Progress) -> Graphs | None:
        trainers.append(trainer)
        tell = lambda line: progress.phase("graphs", line)  # noqa: E731
        return Graphs(trainer.static_micro_step, trainer.trained, lambda: None, tell, noted) if curves else None

    monkeypatch.setattr(QloraTrainer, "_evaluate_piece", piece)
    monkeypatch.setattr(building, "make_graphs", make_graphs)
    for name in ("without", "with"):
        evaluated.clear()
        tune(run, tmp_path / name)
        curves.append([event["loss"] for event in events(tmp_path / name, "step")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)
    line = "micro-batches of 2 x 48 tokens run as one CUDA graph from now on"
    told = [event["message"] for event in events(tmp_path / "with", "phase") if event["name"] == "graphs"]
    assert told == [line, DROPPED, line] and noted.played == 2 * 4 + 2 * 5
    assert [(e["action"], e["where"], e["step"]) for e in events(tmp_path / "with", "oom")] == [
        ("drop_graphs", "evaluation", 5)
    ]
    assert evaluated.count(True) > 1  # at step 10, beside a graph; none is held when training is over
    assert trainers[-1].graphs is None
    result = measurement(tmp_path / "with")
    assert (result.oom_events, result.micro_batch_size) == (1, 2)


class Cache:
    """torch's allocator, in numbers: `stuck` cannot be given back, since something resident lies beside it."""

    def __init__(self, patch: pytest.MonkeyPatch, *, allowed: int, resident: int, cached: int, stuck: int = 0) -> None:
        self.allowed, self.resident, self.cached, self.stuck, self.pool = allowed, resident, cached, stuck, 0
        patch.setattr(torch.cuda, "memory_allocated", lambda device: self.resident)
        patch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        patch.setattr(torch.cuda, "empty_cache", self.empty)
        patch.setattr(graphs_module, "room_bytes", lambda device: self.allowed - self.resident)

    @property
    def reserved(self) -> int:
        return self.resident + self.cached + self.stuck + self.pool

    def empty(self) -> None:
        self.cached = 0


@pytest.mark.parametrize("stuck", [0, 30 * MIB])
@pytest.mark.parametrize("earlier", [0, 700 * MIB])
@pytest.mark.parametrize("beside", [0, 50 * MIB])
def test_room_for_the_activations_once(monkeypatch: pytest.MonkeyPatch, stuck: int, earlier: int, beside: int) -> None:
    """Once given back, what was cached must go into a pool, beside an earlier graph's and what cannot be given back."""
    for short, wanted in ((0, True), (1, False)):
        needed = 1000 * MIB + earlier + stuck + (500 * MIB + stuck) + beside + SPARE_BYTES
        cache = Cache(monkeypatch, allowed=needed - short, resident=1000 * MIB, cached=500 * MIB, stuck=stuck)
        recorder = CudaGraphs(CPU, lambda: beside)
        cache.pool = recorder.reserved_bytes = earlier
        assert recorder.room() == wanted
        assert cache.cached == 0


def test_what_a_step_takes_beside_them_is_no_evaluations_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step that was graphs alone the counters of the allocator go back to before an evaluation."""
    meter, peaks = Meter(CPU), iter([900, 130, 900])
    meter.cuda = True
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    for name in ("memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 100)
    meter.close("backward")
    meter.close("optimizer")
    meter.end_step()
    meter.close("optimizer")
    assert meter.temporary_bytes == 30
