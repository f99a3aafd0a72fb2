"""What is not healthy is said once, with the reason; a step without a finite gradient never reaches the parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

import transformers  # noqa: E402
from guard_tools import CPU, Made, changed, cheap_collections, make_trainer, ragged_rows, same_parameters  # noqa: E402
from torch import nn  # noqa: E402

from vramplan.core.types import Levers, Lora, RunSpec, Schedule  # noqa: E402
from vramplan.errors import VramplanError  # noqa: E402
from vramplan.train.health import EXPLOSION, NAN_LIMIT, STUCK_STEPS, Health  # noqa: E402
from vramplan.train.meter import Meter  # noqa: E402
from vramplan.train.nonfinite import first_not_finite  # noqa: E402

NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with cheap_collections():
        yield


def schedule(steps: int, **changes: Any) -> Schedule:
    plain = Schedule(max_steps=steps, learning_rate=0.05, lr_scheduler_type="constant", save_steps=1000)
    return replace(plain, **changes)


def spoil(made: Made, steps: set[int], value: float = NAN, where: str = "forward") -> list[int]:
    """Make layer 1's output (or its gradient) `value` times itself in these optimizer steps; returns those seen."""
    seen: list[int] = []

    def now() -> bool:
        step = made.trainer.state.global_step + 1
        if step in steps:
            seen.append(step)
        return step in steps

    up = made.trainer.model.get_base_model().model.layers[1].mlp.up_proj
    if where == "forward":
        up.register_forward_hook(lambda _, __, output: output * value if now() else None)
    else:
        up.register_full_backward_hook(lambda _, g, __: tuple(x * value for x in g) if now() else None)
    return seen


# ------------------------------------------------------------------------------------------------- not finite
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_8bit"])
def test_a_step_without_a_finite_gradient_is_left_out(tmp_path: Path, optimizer: str) -> None:
    parameters: dict[int, Any] = {}
    made = make_trainer(tmp_path, accumulation=2, optimizer=optimizer, schedule=schedule(4))
    spoil(made, {2})

    class Look(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            parameters[state.global_step] = made.parameters()

    made.trainer.add_callback(Look())
    made.trainer.train()
    assert not changed(parameters[1], parameters[2])
    assert changed(parameters[2], parameters[3])
    (event,) = made.of("health")
    assert (event["kind"], event["step"]) == ("nan", 2)
    assert "model.layers.1.mlp.up_proj" in event["reason"]
    assert made.trainer.meter.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in made.parameters().values())
    if optimizer == "adamw_8bit":
        assert {state["step"] for state in made.trainer.optimizer.optimizer.state.values()} == {3}


def test_it_is_left_out_without_a_guard_too(tmp_path: Path) -> None:
    """As with sharded weights, where nobody can do a micro-batch again."""
    made = make_trainer(tmp_path, steps=1, optimizer="adamw_torch")
    made.trainer.guard = None
    before = made.parameters()
    spoil(made, {1})
    made.trainer.train()
    assert not changed(before, made.parameters())
    assert [event["kind"] for event in made.of("health")] == ["nan"]


def test_three_in_a_row_end_the_run(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, schedule=schedule(9))
    seen = spoil(made, {2, 4, 5, 6, 7})
    with pytest.raises(VramplanError, match=f"{NAN_LIMIT} steps in a row, up to step 6") as caught:
        made.trainer.train()
    assert caught.value.exit_code == 1
    assert "--on-nan skip" in caught.value.hint
    assert "up_proj" in caught.value.message
    assert "\n" not in caught.value.message
    assert 7 not in seen
    assert [e["step"] for e in made.of("health")] == [2]  # said once


def test_skip_goes_on_regardless(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, schedule=schedule(8, on_nan="skip"))
    before = made.parameters()
    spoil(made, {2, 3, 4, 5, 6, 7})
    made.trainer.train()
    assert made.trainer.state.global_step == 8
    assert made.trainer.meter.skipped_steps == 6
    assert changed(before, made.parameters())


def test_other_processes_decide_too(tmp_path: Path) -> None:
    """Where one of several processes finds a gradient that is not finite, all leave the step out."""
    made = make_trainer(tmp_path, steps=1)
    assert made.trainer.health is not None
    made.trainer.health.agree = lambda bad: True
    before = made.parameters()
    made.trainer.train()
    assert not changed(before, made.parameters())


def test_a_backward_that_is_not_finite_names_the_weights(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, steps=1)
    spoil(made, {1}, where="backward")
    made.trainer.train()
    (event,) = made.of("health")
    assert event["reason"].startswith("the loss is finite, the backward is not, at model.layers.0.")


def test_labels_that_teach_nothing_are_the_reason(tmp_path: Path) -> None:
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in ragged_rows(4)]
    made = make_trainer(tmp_path, steps=1, dataset=rows)
    made.trainer.train()
    (event,) = made.of("health")
    assert event["reason"] == "no token is to be learned: all labels are -100"


def test_broken_weights_are_the_reason(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, steps=1)
    trained = next(p for n, p in made.trainer.model.named_parameters() if "layers.2" in n and "lora_A" in n)
    with torch.no_grad():
        trained[0, 0] = float("inf")
    made.trainer.train()
    assert "the adapter's own weights are not finite" in made.of("health")[0]["reason"]
    assert "model.layers.2" in made.of("health")[0]["reason"]


def test_a_rate_far_too_high_is_part_of_the_reason(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, schedule=schedule(9, learning_rate=1e30, max_grad_norm=0.0))
    with pytest.raises(VramplanError, match=r"the learning rate of 1e\+30 is far too high for sgd"):
        made.trainer.train()


class Overflows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8).half(), nn.Linear(8, 8).half()

    def forward(self, x: Any) -> Any:
        return {"out": (self.second(self.first(x)),)}


def test_the_first_module_is_named_and_why() -> None:
    model, x = Overflows(), torch.ones(1, 8, dtype=torch.float16)
    assert first_not_finite(model, lambda: model(x)) == ""
    with torch.no_grad():
        model.first.weight.fill_(60_000)
    assert first_not_finite(model, lambda: model(x)).startswith("first (Linear) is the first whose output is not")
    assert "float16 overflows" in first_not_finite(model, lambda: model(x))
    with torch.no_grad():
        model.first.weight.fill_(0)
        model.second.weight[0, 0] = NAN
    assert "second (Linear)" in first_not_finite(model, lambda: model(x))
    assert "its own weight holds NaN" in first_not_finite(model, lambda: model(x))
    assert not any(m._forward_hooks for m in model.modules())


# ------------------------------------------------------------------------------------------- gradients that are odd
def test_gradients_of_zero_are_said(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, steps=3)
    made.trainer.model.get_base_model().model.norm.register_forward_hook(lambda _, __, output: output * 0)
    made.trainer.train()
    (event,) = made.of("health")
    assert (event["kind"], event["step"]) == ("zero_gradients", 1)
    assert "do not take part" in event["reason"]


def test_what_gets_no_gradient_is_named(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, steps=2)
    base = made.trainer.model.get_base_model()
    base.vision_tower = nn.Linear(4, 4)
    made.trainer.train()
    (event,) = made.of("health")
    assert event["kind"] == "no_gradient"
    assert "2 of 44 trained tensors got no gradient: vision_tower.weight, vision_tower.bias" in event["message"]


def health_of(run: RunSpec | None = None) -> tuple[Health, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return Health(run or RunSpec(model="m"), model, lambda inputs: None, Meter(CPU), events.append), events


def test_an_explosion_is_told_from_a_warm_up() -> None:
    health, events = health_of()
    norms = [5.0, 4.0, 3.0, *[1.0 + 0.1 * (i % 3) for i in range(20)]]
    for step, norm in enumerate(norms, start=1):
        assert not health.must_drop(norm, step, 1e-4)
    assert events == []
    assert not health.must_drop(EXPLOSION * 1.5, 24, 1e-4)
    health.must_drop(EXPLOSION * 3, 25, 1e-4)
    (event,) = events
    assert (event["kind"], event["step"]) == ("explosion", 24)
    assert "usually 1.1, clipped to 1" in event["message"]
    assert "one odd batch" in event["reason"]


def test_an_explosion_at_a_wild_rate_blames_the_rate() -> None:
    run = RunSpec(model="m", schedule=Schedule(learning_rate=0.5, max_grad_norm=0.0))
    health, events = health_of(run)
    for step in range(1, 12):
        health.must_drop(1.0, step, 0.5)
    health.must_drop(1e6, 12, 0.5)
    assert "is not clipped (--max-grad-norm)" in events[0]["message"]
    assert "far too high" in events[0]["reason"]


# ------------------------------------------------------------------------------------------------ a loss that stays
@pytest.mark.parametrize(
    ("rate", "set_rate", "reason"),
    [(0.0, 2e-4, "the learning rate is 0"), (1e-2, 0.5, "far too high"), (1e-4, 1e-4, "the adapter has not changed")],
)
def test_a_loss_that_does_not_fall(rate: float, set_rate: float, reason: str) -> None:
    run = RunSpec(model="m", levers=Levers(), schedule=Schedule(learning_rate=set_rate))
    health, events = health_of(run)
    for step in range(1, STUCK_STEPS + 30):
        health.must_drop(1.0, step, rate)
        health.loss(2.0 + 0.05 * (step % 5), step)
    (event,) = events
    assert (event["kind"], event["step"]) == ("stuck", STUCK_STEPS)
    assert reason in event["reason"]


def test_a_loss_that_falls_is_no_news() -> None:
    health, events = health_of(RunSpec(model="m", lora=Lora()))
    for step in range(1, 300):
        health.loss(2.0 - 0.001 * step + 0.2 * (step % 4), step)
        health.loss(NAN, step)
    assert events == []


def test_nothing_is_said_of_a_healthy_run(tmp_path: Path) -> None:
    made = make_trainer(tmp_path, steps=6, accumulation=2)
    bare = make_trainer(tmp_path, steps=6, accumulation=2, guarded=False)
    made.trainer.train()
    bare.trainer.train()
    assert made.events == []
    same_parameters(bare.parameters(), made.parameters(), rtol=0)  # and watching changes nothing
