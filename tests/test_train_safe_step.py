"""Lack of memory in the optimizer: a step happens once and whole, or not at all. The rehearsal leaves nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

import numpy as np  # noqa: E402
from guard_tools import (  # noqa: E402
    OOM_TEXT,
    Made,
    changed,
    cheap_collections,
    make_trainer,
    ragged_rows,
    same_parameters,
    stumbling,
)

from vramplan.core.types import OPTIMIZERS, Levers, Schedule  # noqa: E402
from vramplan.errors import OutOfMemory  # noqa: E402
from vramplan.train.rehearsal import Rehearsal, worst_rows  # noqa: E402
from vramplan.train.safe_step import Snapshot, allocates_nothing  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with cheap_collections():
        yield


# These copy parameters and state before every step; the others only before the first, which makes their state.
COPYING = ("adamw_torch", "adafactor")
IN_PLACE = tuple(name for name in OPTIMIZERS if name not in COPYING)


@pytest.mark.parametrize("how", ["nothing", "half"])
@pytest.mark.parametrize(
    ("optimizer", "call"), [*((name, 2) for name in COPYING), *((name, 1) for name in OPTIMIZERS if name != "sgd")]
)
def test_a_step_that_failed_is_taken_once(tmp_path: Path, optimizer: str, call: int, how: str) -> None:
    clean = make_trainer(tmp_path, optimizer=optimizer, guarded=False)
    before = clean.parameters()
    clean.trainer.train()
    assert changed(before, clean.parameters())
    made = stumbling(make_trainer(tmp_path, optimizer=optimizer), {call: how})
    made.trainer.train()
    same_parameters(clean.parameters(), made.parameters(), rtol=0)
    assert [(e["where"], e["action"], e["step"]) for e in made.of("oom")] == [("optimizer", "retry", call)]


@pytest.mark.parametrize("failing", [{2: "half"}, {2: "half", 3: "half"}])
def test_a_step_goes_without_graphs_first(tmp_path: Path, failing: dict[int, str]) -> None:
    clean = make_trainer(tmp_path, optimizer="adamw_torch", guarded=False)
    clean.trainer.train()
    made, held = make_trainer(tmp_path, optimizer="adamw_torch"), [True]
    assert made.trainer.guard is not None
    made.trainer.guard.drop_graphs = lambda: bool(held) and held.pop()
    stumbling(made, failing).trainer.train()
    same_parameters(clean.parameters(), made.parameters(), rtol=0 if len(failing) == 1 else 1e-5)
    assert [e["action"] for e in made.of("oom")] == ["drop_graphs", "one_by_one"][: len(failing)]


@pytest.mark.parametrize("optimizer", COPYING)
def test_one_parameter_at_a_time(tmp_path: Path, optimizer: str) -> None:
    clean = make_trainer(tmp_path, optimizer=optimizer, guarded=False)
    clean.trainer.train()
    made = stumbling(make_trainer(tmp_path, optimizer=optimizer), {2: "half", 3: "half"})
    made.trainer.train()
    same_parameters(clean.parameters(), made.parameters())
    assert [e["action"] for e in made.of("oom")] == ["retry", "one_by_one"]


def test_a_step_that_cannot_be_taken_changes_nothing(tmp_path: Path) -> None:
    made = stumbling(make_trainer(tmp_path, optimizer="adamw_torch", steps=1), {1: "half", 2: "half", 9: "half"})
    before = made.parameters()
    with pytest.raises(OutOfMemory, match="step 1 does not fit, not even one parameter at a time") as caught:
        made.trainer.train()
    assert caught.value.exit_code == 4
    assert not changed(before, made.parameters())
    assert not made.trainer.optimizer.optimizer.state


def test_a_step_that_may_be_half_done_is_not_repeated(tmp_path: Path) -> None:
    """Without a copy there is nothing to go back to: the run ends rather than update twice."""
    made = stumbling(make_trainer(tmp_path, optimizer="adamw_8bit"), {2: "half"})
    with pytest.raises(torch.OutOfMemoryError):
        made.trainer.train()


def test_which_optimizers_allocate_nothing(tmp_path: Path) -> None:
    found = {}
    for name in OPTIMIZERS:
        made = make_trainer(tmp_path, optimizer=name)
        found[name] = allocates_nothing(made.trainer.create_optimizer())
    assert {name for name, nothing in found.items() if nothing} == set(IN_PLACE)
    schedule = Schedule(max_steps=1, weight_decay=0.1)
    decayed = make_trainer(tmp_path, optimizer="sgd", schedule=schedule)
    assert not allocates_nothing(decayed.trainer.create_optimizer())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
@pytest.mark.parametrize("name", IN_PLACE)
def test_they_really_allocate_nothing(tmp_path: Path, name: str) -> None:
    device = torch.device("cuda", 0)
    made = make_trainer(tmp_path, optimizer=name, device=device)
    optimizer = made.trainer.create_optimizer()
    for _ in range(2):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.ones_like(parameter)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats(device)["allocation.all.allocated"]
        optimizer.step()
        torch.cuda.synchronize()
        allocations = torch.cuda.memory_stats(device)["allocation.all.allocated"] - before
    assert allocations == 0


# ----------------------------------------------------------------------------------------------------- rehearsal
def rehearsed(made: Made, evaluation: Any = None) -> Made:
    made.trainer.add_callback(Rehearsal(made.trainer, made.trainer.guard, made.events.append, evaluation))
    return made


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_after_a_rehearsal_is_training_without(tmp_path: Path, optimizer: str) -> None:
    """To the last bit, optimizer state and data order included."""
    found = []
    for first in (False, True):
        made = make_trainer(tmp_path, optimizer=optimizer, accumulation=2)
        if first:
            rehearsed(made, ragged_rows(6))
        made.trainer.train()
        found.append((made.parameters(), made.trainer.optimizer.state_dict()["state"], made.trainer))
    (one, state, clean), (other, state_after, trainer) = found
    same_parameters(one, other, rtol=0)
    assert str(state) == str(state_after)
    assert int(clean.window.open_tokens) == int(trainer.window.open_tokens)
    assert trainer.meter.phases[-1].name == "rehearsal"


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, optimizer="adamw_8bit", accumulation=2)
    trainer = made.trainer
    trainer.state.max_steps = 1
    trainer.create_optimizer_and_scheduler(1)
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    before, drawn = made.parameters(), (random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist())
    rate = trainer.lr_scheduler.get_last_lr()
    layer = trainer.model.get_base_model().model.layers[0]  # whatever draws, dropout say
    layer.register_forward_pre_hook(lambda *_: (random.random(), torch.rand(1), np.random.rand(), None)[-1])
    Rehearsal(trainer, trainer.guard, made.events.append).on_train_begin(trainer.args, trainer.state, trainer.control)
    same_parameters(before, made.parameters(), rtol=0)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), drawn[1])
    assert all(p.grad is None for p in trainer.model.parameters())
    assert trainer.lr_scheduler.get_last_lr() == rate
    assert trainer.window.open_tokens == 0
    states = trainer.optimizer.optimizer.state.values()
    assert len(states) == len(before)  # made, and as new
    assert all(state["step"] == 0 and not state["state1"].any() for state in states)


def test_it_plays_the_longest_rows_of_both_sets(tmp_path: Path) -> None:
    shapes: list[tuple[bool, tuple[int, ...]]] = []
    made = rehearsed(make_trainer(tmp_path, rows=3, accumulation=2, steps=1), ragged_rows(5, longest=24))
    layer = made.trainer.model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda _, a: shapes.append((torch.is_grad_enabled(), tuple(a[0].shape[:2]))))
    made.trainer.train()
    assert shapes[:3] == [(True, (3, 40)), (True, (3, 40)), (False, (3, 24))]  # two micro-batches, then evaluation
    assert len(shapes) == 5
    event = made.of("rehearsal")[0]
    assert (event["rows"], event["tokens"], event["micro_batch_size"], event["oom_events"]) == (3, 40, 3, 0)


def test_worst_rows_by_length_and_then_by_place() -> None:
    rows = [{"input_ids": [0] * n} for n in (3, 9, 9, 1, 7)]
    assert worst_rows(rows, 3) == [1, 2, 4]
    assert worst_rows(rows, 99) == [1, 2, 4, 0, 3]

    class Known(list[Any]):
        def length(self, index: int) -> int:
            return -index

    assert worst_rows(Known(rows), 2) == [0, 1]


def test_what_does_not_fit_is_split_from_the_start(tmp_path: Path) -> None:
    clean = make_trainer(tmp_path, guarded=False)
    clean.trainer.train()
    made = rehearsed(make_trainer(tmp_path))
    layer = made.trainer.model.get_base_model().model.layers[1]
    tokens: list[int] = []

    def refuse(_: Any, arguments: Any) -> None:
        tokens.append(arguments[0].shape[0] * arguments[0].shape[1])
        if tokens[-1] > 100:
            raise torch.OutOfMemoryError(OOM_TEXT)

    layer.register_forward_pre_hook(refuse)
    made.trainer.train()
    assert sum(size > 100 for size in tokens) == 1  # in the rehearsal, never again
    assert [e["action"] for e in made.of("oom")] == ["split", "shrink"]
    event = made.of("rehearsal")[0]
    assert (event["micro_batch_size"], event["accumulation"], event["oom_events"]) == (2, 2, 1)
    same_parameters(clean.parameters(), made.parameters())


def test_what_will_never_fit_ends_before_the_first_step(tmp_path: Path) -> None:
    made = rehearsed(make_trainer(tmp_path))

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError(OOM_TEXT)

    made.trainer.model.get_base_model().model.layers[1].register_forward_pre_hook(refuse)
    before = made.parameters()
    with pytest.raises(OutOfMemory, match="40 tokens"):
        made.trainer.train()
    assert not changed(before, made.parameters())
    assert made.trainer.state.global_step == 0


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_torch", "adafactor"])
def test_loaded_state_is_put_back(tmp_path: Path, optimizer: str) -> None:
    """As on --resume: the state is there before the rehearsal, and the same after it."""
    made = make_trainer(tmp_path, optimizer=optimizer)
    made.trainer.train()
    inner = made.trainer.optimizer.optimizer
    before = str(inner.state_dict()["state"])
    snapshot = Snapshot(inner)
    for group in inner.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    inner.step()
    assert str(inner.state_dict()["state"]) != before
    snapshot.restore(keep_new_state=True)
    assert str(inner.state_dict()["state"]) == before


def test_levers_of_a_run_without_rehearsal() -> None:
    assert Schedule().rehearsal
    assert Levers().optimizer in IN_PLACE  # the default needs no copies
