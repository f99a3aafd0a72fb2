"""Whole runs of packed rows and of rows of like length on a tiny model: losses, resuming, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

import train_tools  # noqa: E402
from test_train_finetune import losses, tune  # noqa: E402
from train_tools import events, make_model, make_run, make_text, measurement  # noqa: E402

from vramplan.core.recipes import RECIPES  # noqa: E402
from vramplan.core.types import DataSpec, Lora, RunSpec, Schedule  # noqa: E402
from vramplan.errors import InputError  # noqa: E402
from vramplan.train import varlen  # noqa: E402
from vramplan.train.checks import check_packing  # noqa: E402
from vramplan.train.outcome import Interrupted  # noqa: E402
from vramplan.train.progress import Progress  # noqa: E402
from vramplan.train.reading import look_at_data  # noqa: E402
from vramplan.train.trainer import QloraTrainer  # noqa: E402

SCHEDULE = Schedule(max_steps=6, learning_rate=5e-3, save_steps=2, warmup_ratio=0.0)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packed")
    make_model(root / "model", make_text(root / "text.jsonl"))
    return root


def packed(root: Path, recipe: str = "lean", **changes: Any) -> RunSpec:
    run = make_run(root / "model", root / "text.jsonl", recipe, packing=True, seq_len=128, schedule=SCHEDULE)
    return replace(run, **changes)


def test_packed_runs_of_both_recipes_learn_the_same(root: Path, tmp_path: Path) -> None:
    """Stock loss and fused loss, the stock model's attention kernel apart."""
    for recipe in ("lean", "peft"):
        # The recipes differ in rounding alone when nothing is upcast and nothing else is done otherwise.
        levers = replace(RECIPES[recipe], upcast="none", optimizer="adamw_torch", allocator="native")
        tune(packed(root, recipe, levers=levers), tmp_path / recipe)
    lean, peft = (losses(tmp_path / recipe) for recipe in ("lean", "peft"))
    assert lean == pytest.approx(peft, abs=0.02)
    assert lean[-1] < lean[0] - 0.3
    result = measurement(tmp_path / "lean")
    assert result.eval_loss_after is not None and result.eval_loss_before is not None
    assert result.eval_loss_after < result.eval_loss_before - 0.3
    (event,) = events(tmp_path / "lean", "data")
    assert event["packed_rows"] < event["examples"] / 3
    assert 0.4 * 6 * 2 * 2 * 128 < result.tokens < 0.8 * 6 * 2 * 2 * 128  # padding is not counted


def test_held_out_loss_does_not_depend_on_packing(root: Path, tmp_path: Path) -> None:
    """Before the first step: the same tokens, each once, whether alone or in company."""
    run = replace(packed(root), schedule=replace(SCHEDULE, max_steps=1))
    tune(run, tmp_path / "packed")
    tune(replace(run, packing=False), tmp_path / "alone")
    before = [measurement(tmp_path / name).eval_loss_before for name in ("packed", "alone")]
    assert before[0] == pytest.approx(before[1], abs=2e-3)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "group_by_length"])
def test_a_stopped_run_goes_on_with_the_rows_it_would_have_had(root: Path, tmp_path: Path, packing: bool) -> None:
    lines = (root / "text.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    data = root / f"uneven-{packing}.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join([t] * (1 + i % 5))}) + "\n" for i, t in enumerate(texts)))
    strategy = "random" if packing else "group_by_length"
    run = packed(
        root,
        packing=packing,
        lora=Lora(r=8, dropout=0.1),
        data=DataSpec(path=str(data), kind="text", train_sampling_strategy=strategy),
        # rows of two epochs: the second has an order of its own
        schedule=Schedule(num_train_epochs=2.0, learning_rate=5e-3, save_steps=3, warmup_ratio=0.0),
    )
    tune(run, tmp_path / "whole")
    whole = losses(tmp_path / "whole")
    stop = len(whole) // 2 + 1
    with pytest.raises(Interrupted, match=f"stopped after step {stop}"):
        tune(run, tmp_path / "halves", stop_after=stop)
    tune(run, tmp_path / "halves", resume=True)
    assert [event["cached"] for event in events(tmp_path / "halves", "data")] == [False, True]
    assert losses(tmp_path / "halves") == pytest.approx(whole, abs=2e-3)
    assert measurement(tmp_path / "halves").tokens == measurement(tmp_path / "whole").tokens


def test_documents_that_see_each_other_stop_the_run(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an architecture that does not hand the borders to its attention."""
    plain = varlen.attention

    def without_borders(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **{k: v for k, v in kwargs.items() if not k.startswith(("cu_seq", "max_length"))})

    monkeypatch.setattr(varlen, "attention", without_borders)
    with pytest.raises(InputError, match="LlamaForCausalLM lets documents in a packed row see each other"):
        tune(packed(root), tmp_path)


def test_the_check_of_packing_leaves_the_model_as_it_was(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    real = check_packing

    def spy(trainer: QloraTrainer, tokens: list[int]) -> None:
        real(trainer, tokens)
        real(trainer, [5])  # a row of one token is enough to look
        seen.append(all(parameter.grad is None for parameter in trainer.model.parameters()))

    monkeypatch.setattr("vramplan.train.checks.check_packing", spy)
    tune(packed(root, schedule=replace(SCHEDULE, max_steps=1)), tmp_path)
    assert seen == [True]


def test_data_can_be_looked_at_without_a_model(root: Path, tmp_path: Path) -> None:
    run = packed(root, data=DataSpec(path=str(root / "text.jsonl"), show_samples=2))
    message = look_at_data(run, tmp_path, Progress(tmp_path / "progress.jsonl"))
    assert message == "120 rows to train on; nothing was trained"
    assert [event["event"] for event in events(tmp_path)] == ["phase", "data", "sample_row", "sample_row"]
    assert not (tmp_path / "measurement.jsonl").exists()


def test_the_child_looks_at_data_alone(root: Path, tmp_path: Path) -> None:
    run = packed(root, model_path=str(root / "model"), data=DataSpec(path=str(root / "text.jsonl"), show_samples=1))
    code, console = train_tools.train(run, tmp_path, "--data-only")
    assert (code, console) == (0, "done: 120 rows to train on; nothing was trained\n")
    assert events(tmp_path, "end")[0]["ended"] == "finished"
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "adapter").exists()
