"""Lack of memory in a run with fused 4-bit layers: the update is that of the clean run.

Their backward adds into one flat gradient a layer: a failure half-way leaves a layer's gradient half added. Their
q_proj computes k and v ahead: one in between leaves results that nobody fetched. Their checkpoints run a layer twice.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from guard_tools import (  # noqa: E402
    CPU,
    Faults,
    Made,
    changed,
    cheap_collections,
    make_peft_model,
    make_trainer,
    same_parameters,
    stumbling,
)

from vramplan.core.types import Levers  # noqa: E402
from vramplan.train import pressure  # noqa: E402
from vramplan.train.fast import kernels  # noqa: E402
from vramplan.train.fast.flat import FlatLora  # noqa: E402
from vramplan.train.fast.install import Fused, decoder_layers, install, why_not  # noqa: E402
from vramplan.train.gradients import Gradients  # noqa: E402
from vramplan.train.rehearsal import Rehearsal  # noqa: E402
from vramplan.train.relief import FusedRelief  # noqa: E402

CHECKPOINTING = ("none", "all", "every-2")
PLACES = ("forward", "loss", "backward")
PRODUCTS = 2 + 3 + 2 + 4  # a layer's additions to its flat gradient: down, gate and up, o, and q with k and v
WHOLE = 3 * PRODUCTS  # of a backward
MIDDLE = PRODUCTS + 2  # layer 2 is done, and A of layer 1's down_proj is added, B is not


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with cheap_collections():
        yield


class Endless(FusedRelief):
    """Relief that never runs out."""

    def take(self) -> str:
        return super().take() or "again"


class Runs:
    """Makes trainers of fused models; what belongs to transformers is given back at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fused: list[Fused] = []

    def make(self, checkpointing: str, **options: Any) -> Made:
        model = make_peft_model(in_4_bits=True, targets=options.pop("targets", "all-linear"))
        chosen = {"optimizer": "sgd", **{name: options.pop(name) for name in ("optimizer", "loss") if name in options}}
        levers = Levers(checkpointing=checkpointing, **chosen)
        assert why_not(model, levers, CPU) == ""
        fused = install(model, levers, CPU, skips_last=True, stochastic=False)
        self.fused.append(fused)
        options["relief"] = options.get("relief", FusedRelief)(fused, levers, CPU)
        return make_trainer(self.folder, model=model, fused=fused, levers=levers, **{"steps": 2, **options})

    def undo(self) -> None:
        for fused in reversed(self.fused):
            fused.check()
            fused.uninstall()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    made = Runs(tmp_path)
    yield made
    made.undo()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """A run in which nothing fails, made once. It has no checkpoints: they change nothing either."""

    @cache
    def made(**options: Any) -> Made:
        runs = Runs(tmp_path_factory.mktemp("clean"))
        done = runs.make("none", guarded=False, **options)
        before = done.parameters()
        done.trainer.train()
        runs.undo()
        assert changed(before, done.parameters())
        return done

    return made


@contextmanager
def failing(faults: Faults, where: str, made: Made) -> Iterator[None]:
    """forward: before layer 1's k_proj takes what q_proj has computed for it; again: there, as a checkpointed layer is
    played a second time; loss; backward: before a product is added to the flat gradient."""
    with ExitStack() as stack:
        if where == "loss":
            stack.enter_context(faults.at("loss", made.trainer.model))
        elif where == "backward":
            stock = kernels.add_product_

            def add_product_(*arguments: Any) -> None:
                faults.visit()
                stock(*arguments)

            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(kernels, "add_product_", add_product_)
        else:
            k_proj = decoder_layers(made.trainer.model)[1].self_attn.k_proj

            def visit(*_: Any) -> None:
                if (torch._C._current_graph_task_id() != -1) == (where == "again"):
                    faults.visit()

            stack.callback(k_proj.register_forward_pre_hook(visit).remove)
        yield


# ------------------------------------------------------------------------------------------ the update is the same
CASES = [*((where, checkpointing) for where in PLACES for checkpointing in CHECKPOINTING), ("again", "all")]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("where", "checkpointing"), CASES)
def test_the_update_is_that_of_the_clean_run(
    runs: Runs, clean: Callable[..., Made], where: str, checkpointing: str, accumulation: int
) -> None:
    wanted = clean(accumulation=accumulation)
    made = runs.make(checkpointing, accumulation=accumulation)
    faults = Faults()
    # The first micro-batch, which finds no gradients; once its halves are through, the second and its half.
    numbers = (1, 4, 5) if where != "backward" else (MIDDLE, MIDDLE + 2 * WHOLE + MIDDLE, 3 * MIDDLE + 2 * WHOLE)
    faults.when = numbers.__contains__
    with failing(faults, where, made):
        made.trainer.train()
    assert faults.raised == 3
    same_parameters(wanted.parameters(), made.parameters())
    assert made.tokens == wanted.tokens
    assert made.loss == pytest.approx(wanted.loss, rel=1e-5)
    splits = [event["where"] for event in made.of("oom") if event["action"] == "split"]
    assert splits == ["backward" if where == "again" else where] * 3


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_no_schedule_of_failures_changes_the_result(runs: Runs, clean: Callable[..., Made], checkpointing: str) -> None:
    made = runs.make(checkpointing, relief=Endless, accumulation=3, steps=4)
    draw = random.Random(0)
    faults = {"forward": (Faults(), 0.1), "loss": (Faults(), 0.1), "backward": (Faults(), 0.005)}
    with ExitStack() as stack:
        for where, (fault, share) in faults.items():
            fault.when = lambda number, share=share: draw.random() < share  # type: ignore[misc]
            stack.enter_context(failing(fault, where, made))
        made.trainer.train()
    assert all(fault.raised > 1 for fault, _ in faults.values())
    assert made.trainer.meter.oom_events == sum(fault.raised for fault, _ in faults.values())
    same_parameters(clean(accumulation=3, steps=4).parameters(), made.parameters(), rtol=2e-5)


def test_without_the_copies_the_update_would_differ(
    runs: Runs, clean: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half of a backward that was done before it failed is really there, and really taken back."""
    monkeypatch.setattr(Gradients, "restore", lambda self: None)
    made = runs.make("all", accumulation=3)
    faults = Faults()
    faults.when = (WHOLE + MIDDLE).__eq__
    with failing(faults, "backward", made):
        made.trainer.train()
    assert faults.raised == 1
    with pytest.raises(AssertionError):
        same_parameters(clean(accumulation=3).parameters(), made.parameters())


@pytest.mark.parametrize("checkpointing", ["none", "every-2"])
def test_a_row_that_does_not_fit_gets_checkpoints(runs: Runs, clean: Callable[..., Made], checkpointing: str) -> None:
    made = runs.make(checkpointing)
    layer = decoder_layers(made.trainer.model)[1]
    faults = Faults()
    faults.when = lambda number: not layer.gradient_checkpointing
    with failing(faults, "backward", made):
        made.trainer.train()
    same_parameters(clean(accumulation=1).parameters(), made.parameters())
    assert [event["action"] for event in made.of("oom")] == ["split", "split", "checkpoint"]
    assert made.of("oom")[-1]["micro_batch_size"] == 4


# ------------------------------------------------------------------------------------------------ what is left over
@pytest.mark.parametrize(("where", "checkpointing"), [*CASES])
def test_what_failed_is_gone_before_the_next_try(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, where: str, checkpointing: str
) -> None:
    """Also what waits for k_proj and v_proj, and gradients of layers that had none before."""
    made = runs.make(checkpointing, steps=1)
    seen: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    layers, parameters = decoder_layers(made.trainer.model), runs.fused[-1].parameters
    hooks = [
        layers[number].self_attn.q_proj.register_forward_hook(lambda _, __, out: seen.append(weakref.ref(out)))
        for number in (0, 1)
    ]

    def collect() -> None:  # by itself a collection would find all that goes round in circles
        alive.extend(ref() is not None for ref in seen)
        assert all(not shared.waiting for shared in runs.fused[-1].shared)
        assert all(parameter.grad is None for parameter in parameters)

    stock = FlatLora.gradients

    def gradients(self: FlatLora, slot: Any) -> Any:
        views = stock(self, slot)
        assert self.parameter is not None
        seen.append(weakref.ref(self.parameter.grad))
        return views

    monkeypatch.setattr(FlatLora, "gradients", gradients)
    monkeypatch.setattr(pressure.gc, "collect", collect)
    faults = Faults()
    faults.when = (MIDDLE if where == "backward" else 1).__eq__
    with failing(faults, where, made):
        made.trainer.train()
    for hook in hooks:
        hook.remove()
    assert faults.raised == 1
    assert alive and not any(alive)


def test_the_flat_gradient_goes_back_in_place(runs: Runs) -> None:
    """Whoever holds the tensor, a captured graph or a bucket of several ranks, goes on holding the gradient."""
    made = runs.make("all", accumulation=2, steps=1)
    parameters = runs.fused[-1].parameters
    seen: list[list[int]] = []
    step = made.trainer.training_step

    def training_step(*arguments: Any) -> Any:
        loss = step(*arguments)
        seen.append([parameter.grad.data_ptr() for parameter in parameters])  # type: ignore[union-attr]
        return loss

    made.trainer.training_step = training_step
    faults = Faults()
    faults.when = (WHOLE + MIDDLE).__eq__
    with failing(faults, "backward", made):
        made.trainer.train()
    assert faults.raised == 1
    assert seen[0] == seen[1]


# ---------------------------------------------------------------------------------------- optimizer, and rehearsal
@pytest.mark.parametrize("how", ["nothing", "half"])
@pytest.mark.parametrize(("optimizer", "call"), [("adamw_torch", 2), ("adamw_8bit", 1)])
def test_a_step_that_failed_is_taken_once(
    runs: Runs, clean: Callable[..., Made], optimizer: str, call: int, how: str
) -> None:
    made = stumbling(runs.make("none", optimizer=optimizer), {call: how})
    made.trainer.train()
    same_parameters(clean(optimizer=optimizer).parameters(), made.parameters(), rtol=0, atol=0)
    assert [(e["where"], e["action"], e["step"]) for e in made.of("oom")] == [("optimizer", "retry", call)]


def test_one_flat_tensor_at_a_time(runs: Runs, clean: Callable[..., Made]) -> None:
    made = stumbling(runs.make("none", optimizer="adamw_torch"), {2: "half", 3: "half"})
    made.trainer.train()
    same_parameters(clean(optimizer="adamw_torch").parameters(), made.parameters())
    assert [e["action"] for e in made.of("oom")] == ["retry", "one_by_one"]


@pytest.mark.parametrize(("optimizer", "fails"), [("sgd", True), ("adamw_8bit", False), ("adamw_torch", False)])
def test_a_rehearsal_leaves_nothing_behind(runs: Runs, clean: Callable[..., Made], optimizer: str, fails: bool) -> None:
    """Training after it is training without, to the last bit; where only pieces fit, to their noise."""
    wanted = clean(optimizer=optimizer) if not fails else clean(accumulation=3)
    made = runs.make("none", optimizer=optimizer, accumulation=3 if fails else 1)
    assert made.trainer.guard is not None
    made.trainer.add_callback(Rehearsal(made.trainer, made.trainer.guard, made.events.append, None))
    faults = Faults()
    faults.when = lambda number: fails and number == WHOLE + MIDDLE
    with failing(faults, "backward", made):
        made.trainer.train()
    assert [event["oom_events"] for event in made.of("rehearsal")] == [int(fails)]
    same_parameters(wanted.parameters(), made.parameters(), rtol=1e-5 * fails, atol=1e-7 * fails)


# ------------------------------------------------------------------------------------------------ what health sees
def test_an_adapter_outside_the_layers_makes_nobody_miss_those_inside(runs: Runs) -> None:
    made = runs.make("all", targets=["q_proj", "lm_head"], loss="full")
    made.trainer.train()
    assert made.of("health") == []


def test_a_backward_that_is_not_finite_names_the_weights(runs: Runs) -> None:
    made = runs.make("all", steps=1)
    mlp = decoder_layers(made.trainer.model)[1].mlp
    mlp.register_full_backward_hook(lambda _, grads, __: tuple(grad * float("nan") for grad in grads))
    made.trainer.train()
    (event,) = made.of("health")
    assert event["reason"].startswith("the loss is finite, the backward is not, at model.layers.0.")
