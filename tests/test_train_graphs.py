"""Micro-steps as graphs: the same training, whether a graph plays them or not.

Here a graph is a piece of work that is noted down and done later; on a card (test_train_graphs_cuda.py) it is real.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from graph_tools import Noted, loss_of_labelled_rows, make, rows  # noqa: E402, F401
from guard_tools import same_parameters  # noqa: E402

from vramplan.train.collate import Collator, of_one_shape  # noqa: E402
from vramplan.train.fast.graphs import MOST, TRIES, WATCHED, Graphs, key_of  # noqa: E402
from vramplan.train.fused_loss import every_row, labelled_rows  # noqa: E402
from vramplan.train.rehearsal import Rehearsal  # noqa: E402

pytestmark = pytest.mark.usefixtures("loss_of_labelled_rows")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[int, ...]], dict[str, Any]]:
    known: dict[tuple[int, ...], dict[str, Any]] = {}

    def parameters(lengths: tuple[int, ...]) -> dict[str, Any]:
        if lengths not in known:
            made = make(tmp_path_factory.mktemp("plain"), None, dataset=rows(16, lengths))
            made.trainer.train()
            known[lengths] = made.parameters()
        return known[lengths]

    return parameters


@pytest.mark.parametrize("lengths", [(16,), (16, 24)])
def test_a_graph_trains_as_ordinary_micro_steps_do(tmp_path: Path, plain: Any, lengths: tuple[int, ...]) -> None:
    noted, said = Noted(), list[str]()
    made = make(tmp_path, noted, said, dataset=rows(16, lengths))
    made.trainer.train()
    assert len(said) == len(made.trainer.graphs.made) == noted.asked > 0
    assert 0 < noted.played <= 8 - WATCHED * len(said)
    assert all("tokens run as one CUDA graph" in line for line in said)
    same_parameters(plain(lengths), made.parameters())


def test_a_graph_with_old_inputs_would_show(tmp_path: Path, plain: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = Noted()
    made = make(tmp_path, noted)
    record = noted.record
    monkeypatch.setattr(noted, "record", lambda work: (lambda first: lambda: first)(record(work)()))
    made.trainer.train()
    with pytest.raises(AssertionError):
        same_parameters(plain((16,)), made.parameters())


@pytest.mark.parametrize("change", [{"has_room": False}, {"waits": False}, {"error": RuntimeError("cannot capture")}])
def test_no_graph_is_made_where_it_would_not_do(tmp_path: Path, plain: Any, change: dict[str, Any]) -> None:
    noted, said = Noted(), list[str]()
    for name, value in change.items():
        setattr(noted, name, value)
    made = make(tmp_path, noted, said)
    made.trainer.train()
    assert noted.played == 0 and not made.trainer.graphs.made
    assert noted.asked == (TRIES if "has_room" in change else "waits" not in change)  # and never again
    assert made.trainer.graphs.gradients == []
    assert said == ([] if "waits" in change else [f"no CUDA graph is made: {made.trainer.graphs.off}"])
    same_parameters(plain((16,)), made.parameters())


def test_what_is_captured_is_training(tmp_path: Path) -> None:
    """After an evaluation, a rehearsal's for one, the model is not in training mode, and checkpoints nothing."""
    made, modes = make(tmp_path, Noted(), steps=0), list[bool]()
    model = made.trainer.model
    model.get_base_model().model.register_forward_pre_hook(lambda *_: modes.append(model.training))
    batch = made.trainer.data_collator(made.trainer.train_dataset[:2])
    model.eval()
    made.trainer.static_micro_step({k: v for k, v in batch.items() if k != "attention_mask"}, torch.tensor(9.0))
    assert modes == [True]


def test_the_first_step_is_an_ordinary_one_whatever_was_rehearsed(tmp_path: Path) -> None:
    """It alone can be measured: the inside of a graph is not seen by the allocator."""
    noted, ordinary = Noted(), list[int]()
    made = make(tmp_path, noted)
    trainer = made.trainer
    assert trainer.guard is not None
    trainer.add_callback(Rehearsal(trainer, trainer.guard, made.events.append))
    one_by_one = trainer._started_one_by_one

    def counted(*inputs: Any) -> Any:
        ordinary.append(trainer.state.global_step)
        return one_by_one(*inputs)

    trainer._started_one_by_one = counted
    trainer.train()
    rehearsed, first = 2, 2
    assert ordinary == [0] * (rehearsed + first) and noted.played == 6


def test_only_between_steps_and_not_for_ever_new_shapes(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    noted = Noted()
    graphs = Graphs(lambda inputs, items: parameter.sum(), [parameter], lambda: None, lambda _: None, noted)

    def play(size: int) -> None:
        graphs.run({"input_ids": torch.ones(1, size)}, torch.ones(()), lambda: torch.zeros(()))

    parameter.grad = torch.ones(2)
    for _ in range(WATCHED + 2):
        play(4)
    assert noted.asked == 0  # half a step is there
    parameter.grad = None
    play(4)
    assert noted.asked == noted.played == 1
    for size in range(5, 5 + 2 * MOST):
        for _ in range(WATCHED + 1):
            parameter.grad = None
            play(size)
    assert len(graphs.made) == MOST


def test_what_a_backward_must_wait_for_is_waited_for_before_a_replay_alone() -> None:
    """An ordinary micro-step waits itself, after its forward: what is copied meanwhile costs no time."""
    parameter, said = torch.nn.Parameter(torch.ones(2)), list[str]()
    step: Any = lambda inputs, items: (said.append("replayed"), parameter.sum())[1]  # noqa: E731
    ready: Any = lambda: said.append("ready")  # noqa: E731
    graphs = Graphs(step, [parameter], lambda: None, lambda _: None, Noted(), ready)
    for _ in range(WATCHED + 2):
        parameter.grad = None
        graphs.run({"input_ids": torch.ones(1, 4)}, torch.ones(()), lambda: torch.zeros(()))
    assert said == ["ready", "replayed"] * 2


def test_gradients_made_elsewhere_come_back_into_the_graphs_own() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    graphs = Graphs(lambda inputs, items: parameter.sum(), [parameter], lambda: None, lambda _: None, Noted())
    graphs._hold_gradients()
    (kept,) = graphs.gradients
    parameter.grad = torch.tensor([2.0, 3.0])
    graphs._hold_gradients()
    assert parameter.grad is kept and kept.tolist() == [2.0, 3.0]
    parameter.grad = None
    graphs._hold_gradients()
    assert parameter.grad is kept and kept.tolist() == [0.0, 0.0]


def test_every_row_has_the_labelled_ones_and_their_targets() -> None:
    labels = torch.tensor([[-100, 5, 6, -100], [7, -100, 8, 9]])
    places, targets = every_row(labels)
    some, wanted = labelled_rows(labels)
    found = dict(zip(places.tolist(), targets.tolist(), strict=True))
    assert {place: target for place, target in found.items() if target != -100} == dict(
        zip(some.tolist(), wanted.tolist(), strict=True)
    )
    assert len(places) == 6


def test_packed_batches_of_other_documents_have_one_shape() -> None:
    def batch(*lengths: int) -> dict[str, Any]:
        ids = list(range(sum(lengths)))
        made = Collator(0, 64, packed=True)([{"input_ids": ids, "labels": ids, "lengths": list(lengths)}])
        return of_one_shape(made)

    assert key_of(batch(30, 34)) == key_of(batch(64)) != key_of(batch(64) | {"max_length_q": 32})
    assert batch(30, 34)["cu_seq_lens_q"].tolist()[:3] == [0, 30, 64]
