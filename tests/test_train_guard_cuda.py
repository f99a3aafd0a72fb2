"""The guard on a card: a real cap, real failures. Needs a CUDA device; float32, so that results can be compared."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from guard_tools import Faults, Made, make_peft_model, make_trainer, ragged_rows, relief_of, same_parameters  # noqa: E402

from vramplan.core.types import Levers  # noqa: E402
from vramplan.errors import OutOfMemory  # noqa: E402
from vramplan.train.gradients import Gradients  # noqa: E402
from vramplan.train.pressure import Card  # noqa: E402
from vramplan.train.rehearsal import Rehearsal  # noqa: E402

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card"),
]
DEVICE = torch.device("cuda", 0)
WIDTH, ROWS = 512, 8
# Large enough that activations are hundreds of MiB: a cap between two sizes of micro-batch is far from both.
LARGE = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": WIDTH,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    gc.collect()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    torch.cuda.empty_cache()


@contextmanager
def capped(size: int) -> Iterator[None]:
    """This process may reserve no more than `size` bytes beside what is resident now."""
    gc.collect()
    torch.cuda.empty_cache()
    most = torch.cuda.memory_reserved(DEVICE) + size
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.mem_get_info(DEVICE)[1], DEVICE)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)


def large(tmp_path: Path, steps: int = 2, **options: Any) -> Made:
    rows = [{**row, "labels": list(row["input_ids"])} for row in ragged_rows(ROWS * 2 * steps, longest=WIDTH)]
    options = {"rows": ROWS, "accumulation": 2, "steps": steps, "loss": "full", "dataset": rows, **options}
    return make_trainer(tmp_path, model=make_peft_model(DEVICE, **LARGE), device=DEVICE, **options)


def need_of(work: Callable[[], Any]) -> int:
    """The most bytes that `work` allocates beside what is there before."""
    gc.collect()  # what an earlier test has left would be freed meanwhile
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    with patch.object(torch.cuda, "reset_peak_memory_stats"):  # the meter does it at every phase of a step
        work()
    return torch.cuda.max_memory_allocated(DEVICE) - before


@pytest.mark.parametrize("share", [0.6, 0.3])
def test_a_real_cap_does_not_change_the_update(tmp_path: Path, share: float) -> None:
    clean = large(tmp_path, guarded=False)
    need = need_of(clean.trainer.train)
    expected, tokens = clean.parameters(), clean.tokens
    del clean
    made = large(tmp_path)
    with capped(int(share * need)):
        made.trainer.train()
    splits = [event for event in made.of("oom") if event["action"] == "split"]
    assert splits
    assert all(event["requested_bytes"] > 0 for event in splits)
    assert {event["where"] for event in splits} <= {"forward", "loss", "backward"}
    assert made.tokens == tokens
    same_parameters(expected, made.parameters(), rtol=1e-4)


def test_uncapped_there_is_nothing_to_survive(tmp_path: Path) -> None:
    made = large(tmp_path)
    made.trainer.train()
    assert made.events == []


@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_failures_in_the_backward_thread_too(tmp_path: Path, where: str) -> None:
    clean = make_trainer(tmp_path, accumulation=3, device=DEVICE, guarded=False)
    clean.trainer.train()
    made = make_trainer(tmp_path, accumulation=3, device=DEVICE)
    faults = Faults()
    faults.when = lambda number: number in (2, 4, 9)
    with faults.at(where, made.trainer.model):
        made.trainer.train()
    assert faults.raised == 3
    same_parameters(clean.parameters(), made.parameters(), rtol=1e-4)


def test_the_rehearsal_finds_the_size_that_fits(tmp_path: Path) -> None:
    need = need_of(large(tmp_path, guarded=False).trainer.train)
    made = large(tmp_path, steps=4)
    made.trainer.add_callback(Rehearsal(made.trainer, made.trainer.guard, made.events.append, None))
    with capped(int(0.7 * need)):
        made.trainer.train()
    (event,) = made.of("rehearsal")
    assert event["micro_batch_size"] < ROWS
    assert event["peak_bytes"] > 0.2 * need
    failures = [e for e in made.of("oom") if "where" in e]
    assert len(failures) == event["oom_events"]  # all of them before step 1


def test_a_row_that_does_not_fit_gets_checkpoints(tmp_path: Path) -> None:
    whole = [{"input_ids": list(range(3, WIDTH + 3)), "labels": list(range(3, WIDTH + 3)),
              "attention_mask": [1] * WIDTH}] * 4  # fmt: skip
    levers = Levers(loss="full", optimizer="sgd", checkpointing="none")
    options: dict[str, Any] = {"rows": 1, "accumulation": 1, "levers": levers, "dataset": whole}
    clean = large(tmp_path, **options)
    bare = need_of(clean.trainer.train)
    expected = clean.parameters()
    clean.trainer.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    less = need_of(clean.trainer.train)
    assert less < 0.8 * bare
    del clean
    made = large(tmp_path, **options)
    assert made.trainer.guard is not None
    made.trainer.guard.relief = relief_of(made.trainer.model, levers, DEVICE)
    with capped(int(less + 0.6 * (bare - less))):
        made.trainer.train()
    assert made.trainer.guard.relief.taken[:1] == ["checkpoint"]
    same_parameters(expected, made.parameters(), rtol=1e-4)


def test_when_nothing_fits_it_ends(tmp_path: Path) -> None:
    made = large(tmp_path)
    with capped(24 * 2**20), pytest.raises(OutOfMemory, match="does not fit by itself"):
        made.trainer.train()


def test_an_evaluation_under_a_cap(tmp_path: Path) -> None:
    made = large(tmp_path)
    data = made.trainer.train_dataset
    expected = made.trainer.evaluation_loss(data)
    need = need_of(lambda: made.trainer.evaluation_loss(data))
    with capped(need // 2):
        assert made.trainer.evaluation_loss(data) == pytest.approx(expected, rel=1e-4)
    assert {event["where"] for event in made.of("oom")} == {"evaluation"}


def test_gradients_come_back_from_pinned_memory() -> None:
    """Saved on a stream of their own while the forward runs; overwritten in place by what follows; and put back."""
    parameters = [torch.nn.Parameter(torch.zeros(1024, 1024, device=DEVICE)) for _ in range(8)]
    gradients = Gradients(lambda: parameters)
    for turn in range(20):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.full_like(parameter, float(turn * 10 + number))
        gradients.save()
        busy = torch.ones(2048, 2048, device=DEVICE)
        for _ in range(4):
            busy = busy @ busy * 1e-4
        gradients.ready()
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.fill_(-1.0)
        gradients.restore()
        for number, parameter in enumerate(parameters):
            assert parameter.grad is not None
            assert bool((parameter.grad == float(turn * 10 + number)).all())
    assert all(copy.is_pinned() for copy in gradients._copies.values())


def test_room_is_what_is_free_under_the_cap() -> None:
    card = Card(DEVICE)
    with capped(64 * 2**20):
        resident = torch.cuda.memory_allocated(DEVICE)
        room = 64 * 2**20 + torch.cuda.memory_reserved(DEVICE) - resident
        assert card.has_room(resident + 2 * room // 5)
        assert not card.has_room(resident + 3 * room // 5)
    assert card.has_room(resident + 3 * room // 5)
    assert not card.has_room(None)
