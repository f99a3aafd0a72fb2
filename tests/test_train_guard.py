"""Lack of memory inside a micro-step, an evaluation: what is computed is what the clean run computes."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from guard_tools import (  # noqa: E402
    CPU,
    OOM_TEXT,
    Faults,
    changed,
    cheap_collections,
    make_peft_model,
    make_trainer,
    ragged_rows,
    relief_of,
    same_parameters,
)
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from vramplan.core.types import Levers, Schedule  # noqa: E402
from vramplan.errors import OutOfMemory  # noqa: E402
from vramplan.train.gradients import Gradients  # noqa: E402
from vramplan.train.guard import PRESSURE_STEPS, QUIET_STEPS, Guard, State  # noqa: E402
from vramplan.train.meter import Meter  # noqa: E402
from vramplan.train.pressure import Card  # noqa: E402
from vramplan.train.relief import Relief  # noqa: E402
from vramplan.train.splitting import pieces_of, rows_of, width_of  # noqa: E402

PLACES = ("forward", "loss", "backward")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with cheap_collections():
        yield


class Endless:
    """Relief that never runs out."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def take(self) -> str:
        self.taken.append("checkpoint")
        return "checkpoint"


# ------------------------------------------------------------------------------------------ the update is the same
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("loss", ["fused", "full"])
@pytest.mark.parametrize("where", PLACES)
def test_the_update_is_that_of_the_clean_run(tmp_path: Path, where: str, loss: str, accumulation: int) -> None:
    clean = make_trainer(tmp_path, accumulation=accumulation, loss=loss, guarded=False)
    before = clean.parameters()
    clean.trainer.train()
    assert changed(before, clean.parameters())

    made = make_trainer(tmp_path, accumulation=accumulation, loss=loss)
    faults = Faults()
    faults.when = lambda number: number in (2, 4)  # the second micro-batch, then its second half
    with faults.at(where, made.trainer.model):
        made.trainer.train()
    assert faults.raised == 2
    same_parameters(clean.parameters(), made.parameters())
    assert made.tokens == clean.tokens
    assert made.loss == pytest.approx(clean.loss, rel=1e-5)
    splits = [e for e in made.of("oom") if e["action"] == "split"]
    assert len(splits) == made.trainer.meter.oom_events == 2
    expected = where if loss == "fused" or where != "loss" else "forward"  # the hook sits before the head
    assert {e["where"] for e in splits} == {expected}
    assert splits[0]["requested_bytes"] == 2 * 2**30
    assert (splits[0]["rows"], splits[0]["micro_batch_size"], splits[0]["accumulation"]) == (4, 2, 2 * accumulation)


def test_without_the_copies_the_update_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The half of a backward that was done before it failed is really there, and really taken back."""
    clean = make_trainer(tmp_path, accumulation=2, steps=1)
    clean.trainer.train()
    monkeypatch.setattr(Gradients, "restore", lambda self: None)
    made = make_trainer(tmp_path, accumulation=2, steps=1)
    faults = Faults()
    faults.when = lambda number: number == 2
    with faults.at("backward", made.trainer.model):
        made.trainer.train()
    with pytest.raises(AssertionError):
        same_parameters(clean.parameters(), made.parameters())


def test_means_are_weighted_by_their_tokens(tmp_path: Path) -> None:
    """A model that returns a mean over its batch: the pieces' means count as much as they have labels."""
    found = []
    for faulty in (False, True):
        made = make_trainer(tmp_path, loss="full", accumulation=2)
        made.trainer.model_accepts_loss_kwargs = False
        faults = Faults()
        faults.when = lambda number, faulty=faulty: faulty and number in (1, 3)  # type: ignore[misc]
        with faults.at("forward", made.trainer.model):
            made.trainer.train()
        assert bool(faults.raised) == faulty
        found.append(made.parameters())
    same_parameters(*found)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any], int, float]:
    """A model before training, the parameters after a clean run, and its tokens and summed loss."""
    made = make_trainer(tmp_path_factory.mktemp("clean"), accumulation=2, steps=2)
    before = made.parameters()
    made.trainer.train()
    return before, made.parameters(), made.tokens, made.loss


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    failing=st.sets(st.integers(1, 24), max_size=10),
    where=st.sampled_from(PLACES),
    limit=st.none() | st.integers(1, 200),
)
def test_no_schedule_of_failures_changes_the_result(
    tmp_path: Path, clean: tuple[Any, dict[str, Any], int, float], failing: set[int], where: str, limit: int | None
) -> None:
    _, expected, tokens, loss = clean
    made = make_trainer(tmp_path, accumulation=2, steps=2, relief=Endless())
    assert made.trainer.guard is not None
    made.trainer.guard.state.limit_tokens = limit
    faults = Faults()
    faults.when = failing.__contains__
    with faults.at(where, made.trainer.model):
        made.trainer.train()
    same_parameters(expected, made.parameters(), rtol=2e-5)
    assert made.tokens == tokens
    assert made.loss == pytest.approx(loss, rel=1e-5)
    assert made.trainer.meter.oom_events == faults.raised
    for event in made.of("oom"):
        assert event["micro_batch_size"] * event["accumulation"] >= 8 > (event["micro_batch_size"] - 1) * 2


@pytest.mark.slow
def test_two_hundred_steps_under_failures_end_where_the_clean_run_ends(tmp_path: Path) -> None:
    schedule = Schedule(max_steps=200, learning_rate=2e-3, lr_scheduler_type="cosine", save_steps=1000)
    options: dict[str, Any] = {"rows": 2, "schedule": schedule, "optimizer": "adamw_torch", "dataset": ragged_rows(64)}
    clean = make_trainer(tmp_path, guarded=False, **options)
    clean.trainer.train()
    made = make_trainer(tmp_path, relief=Endless(), **options)
    draw = random.Random(0)
    faults = {where: Faults() for where in PLACES}
    with ExitStack() as stack:
        for where, fault in faults.items():
            fault.when = lambda number: draw.random() < 0.04
            stack.enter_context(fault.at(where, made.trainer.model))
        made.trainer.train()
    assert all(fault.raised > 10 for fault in faults.values())
    assert made.trainer.meter.oom_events == sum(fault.raised for fault in faults.values())
    assert {"split", "shrink", "checkpoint"} <= {event["action"] for event in made.of("oom")}
    data = ragged_rows(20, seed=5)
    before = make_trainer(tmp_path).trainer.evaluation_loss(data)
    after, expected = made.trainer.evaluation_loss(data), clean.trainer.evaluation_loss(data)
    assert after == pytest.approx(expected, rel=1e-5)
    assert abs(after - before) > 100 * abs(after - expected)
    same_parameters(clean.parameters(), made.parameters(), rtol=1e-3, atol=1e-5)  # Adam enlarges noise step by step


def test_the_failed_graph_is_gone_before_the_next_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where somebody keeps the error: it is its frames that hold the tensors."""
    seen: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    kept: list[Exception] = []
    made = make_trainer(tmp_path, steps=1)
    up = made.trainer.model.get_base_model().model.layers[0].mlp.up_proj  # its output waits for a backward that fails
    hook = up.register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output)))
    monkeypatch.setattr(Card, "free", lambda self: alive.extend(ref() is not None for ref in seen))  # no collection
    faults = Faults(lambda: kept.append(torch.OutOfMemoryError(OOM_TEXT)) or kept[-1])  # type: ignore[func-returns-value]
    faults.when = lambda number: number == 1
    with faults.at("backward", made.trainer.model):
        made.trainer.train()
    hook.remove()
    assert len(kept) == 1
    assert alive == [False]


# --------------------------------------------------------------------------------------------- dialects, and others
class AcceleratorError(RuntimeError):
    pass


class OutOfResources(Exception):
    """triton.runtime.errors"""


DIALECTS = (
    torch.OutOfMemoryError(OOM_TEXT),
    torch.OutOfMemoryError("CUDA out of memory. Allocation was preemptively rejected because it would exceed "
                           "per_process_memory_fraction limit. Requested size: 20.00 MiB"),
    torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory. (out of memory)\nRequested : 2.0 GiB"),
    torch.OutOfMemoryError("HIP out of memory. Tried to allocate 512.00 MiB"),
    AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("HIP error: out of memory"),
)  # fmt: skip
OTHERS = (
    AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    OutOfResources("out of resource: shared memory, Required: 147456, Hardware limit: 101376."),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),  # only on a card that is full
    ValueError("the manual says: out of memory"),
)


@pytest.mark.parametrize("error", DIALECTS, ids=str)
def test_every_dialect_is_survived(tmp_path: Path, error: Exception) -> None:
    made = make_trainer(tmp_path, steps=1)
    faults = Faults(lambda: type(error)(str(error)))
    faults.when = lambda number: number == 1
    with faults.at("forward", made.trainer.model):
        made.trainer.train()
    assert [e["action"] for e in made.of("oom")] == ["split"]


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_no_other_error_is_tried_again(tmp_path: Path, error: Exception) -> None:
    made = make_trainer(tmp_path, steps=1)
    faults = Faults(lambda: error)
    faults.when = lambda number: number == 1
    with faults.at("forward", made.trainer.model), pytest.raises(type(error)) as caught:
        made.trainer.train()
    assert caught.value is error
    assert (faults.passes, made.of("oom")) == (1, [])


def test_host_memory_is_cured_by_pieces_only_on_a_cpu() -> None:
    errors = MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    card = Card(CPU)
    assert all(card.failure(error) for error in errors)
    card.cuda = True
    assert not any(card.failure(error) for error in errors)


def test_an_internal_error_is_lack_of_memory_only_on_a_full_card(monkeypatch: pytest.MonkeyPatch) -> None:
    error, card = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), Card(CPU)
    assert card.failure(error) is None
    monkeypatch.setattr(card, "is_full", lambda: True)
    assert card.failure(error) is not None


def test_an_error_from_lack_of_memory_counts_as_such() -> None:
    try:
        try:
            raise torch.OutOfMemoryError(OOM_TEXT)
        except torch.OutOfMemoryError as inner:
            raise RuntimeError("backend compiler failed") from inner
    except RuntimeError as outer:
        assert Card(CPU).failure(outer) is not None


# -------------------------------------------------------------------------------------------------- single rows
def test_a_row_that_does_not_fit_gets_checkpoints(tmp_path: Path) -> None:
    clean = make_trainer(tmp_path, guarded=False)
    clean.trainer.train()
    made = make_trainer(tmp_path)
    model = made.trainer.model
    assert made.trainer.guard is not None
    made.trainer.guard.relief = relief_of(model, Levers(checkpointing="none"))
    layer = model.get_base_model().model.layers[1]
    faults = Faults()
    faults.when = lambda number: not layer.gradient_checkpointing
    with faults.at("forward", model):
        made.trainer.train()
    same_parameters(clean.parameters(), made.parameters())
    assert [e["action"] for e in made.of("oom")] == ["split", "split", "checkpoint"]
    assert made.of("oom")[-1]["micro_batch_size"] == 4  # with checkpoints all rows are tried again, and fit
    assert made.trainer.guard.state.limit_tokens is None


def test_relief_in_its_order() -> None:
    model = make_peft_model()
    every_2 = relief_of(model, Levers(checkpointing="every-2"))
    assert [every_2.take(), every_2.take()] == ["checkpoint", None]
    assert relief_of(model, Levers(checkpointing="all")).take() is None  # offloading means nothing on a CPU
    card = relief_of(model, Levers(checkpointing="none"), torch.device("cuda"))
    assert [card.take(), card.take(), card.take()] == ["checkpoint", "offload", None]
    assert relief_of(model, Levers(checkpoint_offload=True), torch.device("cuda")).take() is None


def test_when_nothing_is_left_the_end_says_what_was_tried(tmp_path: Path) -> None:
    made = make_trainer(tmp_path)
    assert made.trainer.guard is not None
    made.trainer.guard.relief = relief_of(made.trainer.model, Levers(checkpointing="none"))
    faults = Faults()
    faults.when = lambda number: True
    with faults.at("backward", made.trainer.model), pytest.raises(OutOfMemory) as caught:
        made.trainer.train()
    error = caught.value
    assert error.exit_code == 4
    assert "\n" not in error.message
    for part in (
        "row 1 of",
        "step 1",
        "40 tokens",
        "one row at a time, every layer checkpointed",
        "backward",
        OOM_TEXT,
    ):
        assert part in error.message
    assert isinstance(error.__cause__, torch.OutOfMemoryError)  # the log shows its traceback to `diagnose`
    assert error.__cause__.__traceback__ is not None


# ---------------------------------------------------------------------------------- shrinking and growing for good
class Room:
    """A guard whose work fails above `capacity` tokens at a time; graphs hold `held` of them until they are dropped."""

    def __init__(self, capacity: int, held: int = 0) -> None:
        self.capacity, self.held = capacity, held
        self.events: list[dict[str, Any]] = []
        self.played: list[tuple[int, int]] = []
        self.card = Card(CPU)
        self.guard = Guard(
            rows=8, accumulation=2, width=100, parameters=lambda: [], card=self.card, relief=Relief(),
            report=self.events.append, meter=Meter(CPU), drop_graphs=self.drop,
        )  # fmt: skip
        self.step_number = 0

    def drop(self) -> bool:
        held, self.held = self.held, 0
        return held > 0

    def step(self, *widths: int) -> list[str]:
        """One optimizer step of micro-batches of 8 rows; what the guard did."""
        self.step_number += 1
        self.events.clear()
        self.played.clear()
        for width in widths:
            ones = torch.ones((8, width), dtype=torch.long)
            batch = {"input_ids": ones, "labels": ones, "attention_mask": ones}
            self.guard.micro_step(batch, self.work, self.step_number)
        self.guard.end_step(self.step_number)
        return [event["action"] for event in self.events]

    def work(self, piece: dict[str, Any]) -> Any:
        if rows_of(piece) * width_of(piece) > self.capacity - self.held:
            raise torch.OutOfMemoryError(OOM_TEXT)
        self.played.append((rows_of(piece), width_of(piece)))
        return torch.zeros(())


def test_repeated_pressure_shrinks_for_good_and_only_what_is_long() -> None:
    room = Room(capacity=450)
    assert room.step(100) == ["split"]
    assert room.guard.micro_batch_size == 8
    assert room.step(100) == ["split", "shrink"]
    assert room.events[-1] == {
        "event": "oom", "step": 2, "action": "shrink", "rows": 8, "tokens": 100, "micro_batch_size": 4,
        "accumulation": 4,
    }  # fmt: skip
    assert room.guard.micro_batch_size == room.guard.meter.micro_batch_size == 4
    assert room.step(100, 50) == []
    assert room.played == [(4, 100), (4, 100), (8, 50)]


def test_two_failures_far_apart_do_not_shrink() -> None:
    room = Room(capacity=450)
    assert room.step(100) == ["split"]
    for _ in range(PRESSURE_STEPS - 1):
        assert room.step(50) == []
    assert room.step(100) == ["split"]
    assert room.guard.state.limit_tokens is None


def test_it_grows_back_when_it_was_quiet_and_doubles_the_wait_after_a_mistake() -> None:
    room = Room(capacity=450)
    room.step(100, 100)
    assert room.guard.state.limit_tokens == 400
    waits = []
    for _ in range(3):
        count = 1
        while "grow" not in room.step(100):
            count += 1
        waits.append(count)
        assert room.events[-1]["micro_batch_size"] == 8
        assert room.step(100) == ["split", "shrink"]  # a mistake: at once back
        assert room.guard.state.limit_tokens == 400
    assert waits == [QUIET_STEPS, 2 * QUIET_STEPS, 4 * QUIET_STEPS]
    room.capacity = 10_000
    while "grow" not in room.step(100):
        pass
    for _ in range(3 * PRESSURE_STEPS):
        assert room.step(100) == []
    assert room.guard.micro_batch_size == 8
    assert room.guard.state.grown_from is None


def test_it_does_not_grow_where_the_card_shows_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(capacity=450)
    room.step(100, 100)
    monkeypatch.setattr(room.card, "has_room", lambda peak: False)
    for _ in range(3 * QUIET_STEPS):
        assert room.step(100) == []
    monkeypatch.setattr(room.card, "has_room", lambda peak: True)
    assert any("grow" in room.step(100) for _ in range(QUIET_STEPS))


def test_what_graphs_held_says_nothing_about_the_micro_batch() -> None:
    """However often they are made again: nothing is split, nothing shrinks, no growth was a mistake, none waits."""
    room = Room(capacity=800, held=100)
    assert room.step(100, 100) == ["drop_graphs"]
    assert room.events == [
        {"event": "oom", "step": 1, "action": "drop_graphs", "rows": 8, "tokens": 100, "micro_batch_size": 8,
         "accumulation": 2, "where": "forward", "message": OOM_TEXT, "requested_bytes": 2 * 2**30}
    ]  # fmt: skip
    assert room.played == [(8, 100)] * 2
    for _ in range(3):
        room.held = 100
        assert room.step(100, 100) == ["drop_graphs"]
    assert room.guard.state == State(oom_events=4)

    room = Room(capacity=450)
    room.step(100, 100)  # now 4 rows at a time
    room.capacity = 800
    for _ in range(QUIET_STEPS - 1):
        room.held = 500
        assert room.step(100) == ["drop_graphs"]
        assert room.events[0]["rows"] == room.events[0]["micro_batch_size"] == 4
    assert room.step(100) == ["grow"]
    room.held = 100
    assert room.step(100) == ["drop_graphs"]
    assert (room.guard.micro_batch_size, room.guard.state.quiet_steps) == (8, QUIET_STEPS)


def test_what_fails_without_graphs_too_counts_as_ever() -> None:
    room = Room(capacity=450, held=100)
    assert room.step(100) == ["drop_graphs", "split"]
    assert room.step(100) == ["split", "shrink"]
    room.guard.at_once = True
    room.guard.state.limit_tokens, room.held = None, 100
    assert room.step(100) == ["drop_graphs", "split", "shrink"]


def test_graphs_go_before_any_relief_is_taken() -> None:
    room = Room(capacity=100, held=50)
    relief = room.guard.relief = Endless()  # type: ignore[assignment]
    assert room.step(100) == ["drop_graphs", "split", "split", "split"] and relief.taken == []
    room.guard.state.limit_tokens, room.held = 100, 50
    assert room.step(100) == ["drop_graphs"] and relief.taken == []


def test_an_evaluation_goes_without_graphs_before_it_is_halved() -> None:
    room = Room(capacity=800, held=100)
    ones = torch.ones((8, 100), dtype=torch.long)
    batch = {"input_ids": ones, "labels": ones, "attention_mask": ones}
    evaluate = lambda: len(room.guard.evaluate(batch, room.work, 3))  # noqa: E731
    assert evaluate() == 1 and room.guard.state == State(oom_events=1)
    (event,) = room.events
    assert (event["action"], event["where"], event["rows"], event["micro_batch_size"]) == (
        "drop_graphs", "evaluation", 8, 8,
    )  # fmt: skip
    room.capacity, room.held = 400, 100
    assert evaluate() == 2
    room.capacity, room.held, room.guard.state.evaluation_rows = 100, 50, 1
    assert evaluate() == 8
    assert [event["action"] for event in room.events] == ["drop_graphs", "drop_graphs", "split", "drop_graphs"]


def test_the_same_once_more_without_graphs() -> None:
    room = Room(capacity=800)
    for held, action in ((100, "drop_graphs"), (0, "retry")):
        room.held, failing = held, [torch.OutOfMemoryError(OOM_TEXT)]

        def work(failing: Any = failing) -> int:
            if failing:
                raise failing.pop()
            return 7

        assert room.guard.once_more(work, "optimizer", 5) == 7
        assert (room.events[-1]["action"], room.events[-1]["where"], room.held) == (action, "optimizer", 0)


def test_the_state_survives_a_checkpoint(tmp_path: Path) -> None:
    room = Room(capacity=450)
    room.step(100, 100)
    room.guard.relief.taken = ["checkpoint"]
    room.guard.meter.skipped_steps = 3
    room.guard.save(tmp_path)
    other = Room(capacity=450)
    relief = Endless()
    other.guard.relief = relief
    other.guard.load(tmp_path)
    assert other.guard.state == room.guard.state != State()
    assert relief.taken == ["checkpoint"]
    assert (other.guard.meter.oom_events, other.guard.meter.micro_batch_size) == (2, 4)
    assert other.guard.meter.skipped_steps == 3
    other.guard.load(tmp_path / "an older checkpoint")
    assert other.guard.state == room.guard.state


# ---------------------------------------------------------------------------------------------------- evaluation
def test_an_evaluation_that_does_not_fit_is_halved_for_good(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, rows=4)
    data = ragged_rows(10)
    expected = made.trainer.evaluation_loss(data)
    rows: list[int] = []

    def refuse(_: Any, arguments: Any) -> None:
        rows.append(arguments[0].shape[0])
        if rows[-1] > 1:
            raise torch.OutOfMemoryError(OOM_TEXT)

    hook = made.trainer.model.get_base_model().model.layers[1].register_forward_pre_hook(refuse)
    assert made.trainer.evaluation_loss(data) == pytest.approx(expected, rel=1e-5)
    hook.remove()
    assert rows == [4, 2] + [1] * 10
    assert [(e["where"], e["action"], e["micro_batch_size"]) for e in made.of("oom")] == [
        ("evaluation", "split", 2),
        ("evaluation", "split", 1),
    ]


def test_a_row_without_labels_counts_for_nothing_in_an_evaluation(tmp_path: Path) -> None:
    """Also where a model returns the mean over its batch, which is then no number."""
    made = make_trainer(tmp_path, rows=1, loss="full")
    made.trainer.model_accepts_loss_kwargs = False
    data = ragged_rows(5)
    expected = made.trainer.evaluation_loss(data)
    bare = {**data[0], "labels": [-100] * len(data[0]["labels"])}
    assert made.trainer.evaluation_loss([*data, bare]) == pytest.approx(expected)


def test_an_evaluation_of_which_no_row_fits_ends_the_run(tmp_path: Path) -> None:
    made = make_trainer(tmp_path)

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError(OOM_TEXT)

    made.trainer.model.get_base_model().model.layers[1].register_forward_pre_hook(refuse)
    with pytest.raises(OutOfMemory, match="row of 40 tokens does not fit by itself in an evaluation"):
        made.trainer.evaluation_loss(ragged_rows(4))


# -------------------------------------------------------------------------------------------------- its tools
def test_gradients_go_back_in_place() -> None:
    """Whoever keeps gradients in one flat tensor must find them there again."""
    flat = torch.arange(6.0)
    parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = flat[:3], flat[3:]
    gradients = Gradients(lambda: parameters)
    gradients.save()
    flat.zero_()
    parameters[2].grad = torch.ones(3)
    gradients.restore()
    assert flat.tolist() == [0, 1, 2, 3, 4, 5]
    assert parameters[0].grad is not None
    assert parameters[0].grad.data_ptr() == flat.data_ptr()
    assert parameters[2].grad is None


def test_pieces_are_even_and_without_common_padding() -> None:
    mask = torch.tensor([[1] * length + [0] * (32 - length) for length in (9, 3, 30, 2, 1)])
    batch = {"input_ids": mask * 7, "labels": mask * 7, "attention_mask": mask, "note": "x", "scale": torch.ones(3)}
    pieces = pieces_of(batch, 2)
    assert [p["input_ids"].shape for p in pieces] == [(1, 16), (2, 32), (2, 2)]
    assert all(p["note"] == "x" and p["scale"].shape == (3,) for p in pieces)
    assert pieces_of(batch, 5) == [batch]
    assert sum(int(p["attention_mask"].sum()) for p in pieces) == int(mask.sum())


def test_packed_rows_keep_their_documents() -> None:
    """Borders of the documents count over the flattened batch: a piece's begin at 0 again, rows stay whole."""
    ids = torch.arange(24).view(3, 8)
    borders = torch.tensor([0, 5, 8, 16, 18, 24], dtype=torch.int32)
    batch = {"input_ids": ids, "labels": ids, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 8}
    first, second = pieces_of(batch, 2)
    assert first["cu_seq_lens_q"].tolist() == [0, 5, 8]
    assert first["cu_seq_lens_q"].dtype == torch.int32
    assert second["cu_seq_lens_k"].tolist() == [0, 8, 10, 16]
    assert (second["input_ids"].shape, second["max_length_q"]) == ((2, 8), 8)
