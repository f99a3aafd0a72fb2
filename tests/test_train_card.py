"""The adapter's card: its numbers are the measurement's, its code runs, nothing in it is of this machine."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from factories import make_gpu, make_ledger, make_measurement, make_plan  # noqa: E402
from huggingface_hub import ModelCard  # noqa: E402
from test_train_finetune import tune  # noqa: E402
from train_tools import make_model, make_run, make_text, measurement  # noqa: E402

from vramplan.core.types import DataSpec, Measurement, RunSpec  # noqa: E402
from vramplan.sources import records  # noqa: E402
from vramplan.train.card import Card, prediction_in  # noqa: E402
from vramplan.train.data import Examples, Splits, TokenStore  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("secret-user")
    make_model(root / "my base", make_text(root / "rows.jsonl", 40))
    (root / "run").mkdir()
    records.write_json(root / "run" / "prediction.json", make_ledger())
    tune(make_run(root / "my base", root / "rows.jsonl"), root / "run")
    return root


def rows(card: str) -> dict[str, str]:
    """The cells of all tables, by their first one."""
    found = (re.match(r"\| (.+?) \| (.+) \|$", line) for line in card.splitlines())
    return {match[1]: match[2] for match in found if match}


def test_numbers_are_those_of_the_measurement(trained: Path) -> None:
    card, result = (trained / "run" / "adapter" / "README.md").read_text(), measurement(trained / "run")
    cells = rows(card)
    assert cells["tokens/s"] == f"{result.tokens_per_s:,.1f}"
    assert cells["steps"] == f"{result.steps} ({result.tokens:,} tokens)"
    assert cells["trainable parameters"] == f"{result.trainable_parameters:,}"
    assert cells["training loss, first and last"] == f"{result.first_loss:.4f}, {result.last_loss:.4f}"
    assert cells["held-out loss, before and after"] == f"{result.eval_loss_before:.4f}, {result.eval_loss_after:.4f}"
    assert cells["batch"].startswith("4 = 2 x 2")
    assert all(f"{name} {version}" in card for name, version in result.versions)
    assert "32 text rows to train on, 8 held out" in cells["data"]
    assert make_ledger().peak.allocated_bytes == bytes_in(cells["allocated at the peak"].split(" | ")[0])


def bytes_in(cell: str) -> int:
    match = re.search(r"\(([\d,]+) bytes\)", cell)
    assert match is not None, cell
    return int(match[1].replace(",", ""))


def test_nothing_of_this_machine_is_in_it(trained: Path) -> None:
    card = (trained / "run" / "adapter" / "README.md").read_text()
    assert "secret-user" not in card and str(Path.home()) not in card
    assert "my-base" in card and "rows.jsonl" in card
    assert not list((trained / "run" / "checkpoints").rglob("README.md"))  # PEFT's own names the base by its path


def test_the_hub_can_read_its_head(trained: Path) -> None:
    data = ModelCard.load(trained / "run" / "adapter" / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("my-base", "peft", "text-generation")
    assert data.tags == ["qlora", "lora", "vramplan"]
    assert data.license is None and data.datasets is None


def test_its_code_loads_the_adapter(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (trained / "run" / "adapter" / "README.md").read_text()
    match = re.search(r"```python\n(.+?)```", card, re.DOTALL)
    assert match is not None
    monkeypatch.chdir(trained / "run" / "adapter")
    code = match[1].replace("'my-base'", repr(str(trained / "my base")))
    space: dict[str, Any] = {}
    exec(code, space)
    model = space["model"]
    lora = dict(model.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"]
    assert lora.abs().max() > 0
    assert type(model.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert space["tokenizer"]("the cat")["input_ids"]


# --------------------------------------------------------------------------------------------- cards made by hand
def splits() -> Splits:
    store = TokenStore()
    store.append([1, 2, 3], [True] * 3)
    return Splits(
        train=Examples(store, [0]),
        eval=None,
        longest=3,
        longest_index=0,
        examples=1,
        truncated=2,
        skipped=1,
        kind="messages",
    )  # fmt: skip


def card(run: RunSpec, folder: Path, result: Measurement, **more: Any) -> str:
    return Card(run, splits(), folder, **more).text(result)


def test_memory_of_a_card_stands_beside_the_plans(tmp_path: Path) -> None:
    plan, result = make_plan(gpu=make_gpu()), make_measurement()
    records.write_json(tmp_path / "plan.json", plan)
    records.write_json(tmp_path / "prediction.json", make_ledger(trainable_parameters=1))
    assert prediction_in(tmp_path) == plan.ledger
    cells = rows(card(plan.run, tmp_path, result))
    step = next(phase for phase in result.phases if phase.name == "step")
    for name, predicted, measured in (
        ("allocated at the peak", plan.ledger.peak.allocated_bytes, step.peak_bytes),
        ("reserved", plan.ledger.peak.reserved_bytes, step.reserved_bytes),
        ("device, with the CUDA context", plan.ledger.peak.device_bytes, step.process_bytes),
    ):
        left, right = cells[name].split(" | ")
        assert (bytes_in(left), bytes_in(right)) == (predicted, measured)


def test_a_prediction_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    assert prediction_in(tmp_path) is None
    (tmp_path / "plan.json").write_text("{}")
    assert prediction_in(tmp_path) is None
    assert rows(card(RunSpec(model="a/b"), tmp_path, make_measurement()))["reserved"].startswith("- | ")


def test_a_data_set_of_the_hub_is_in_the_head(tmp_path: Path) -> None:
    run = RunSpec(model="org/base", data=DataSpec(path="org/rows"))
    text = card(run, tmp_path, make_measurement(ended="interrupted"), best_step=7)
    data = ModelCard(text).data
    assert (data.base_model, data.datasets) == ("org/base", ["org/rows"])
    assert "The run was interrupted after step 60." in text
    assert "that of step 7, which had the lowest held-out loss" in text


def test_a_random_model_says_so(tmp_path: Path) -> None:
    run = RunSpec(model="llama-2-7b", model_path="/runs/x/model", random_weights=True)
    text = card(run, tmp_path, make_measurement(device="cpu", phases=()))
    assert "base weights were random" in text and "# QLoRA adapter for llama-2-7b" in text
    assert "no GPU memory to measure" in text


def test_a_data_file_cannot_break_the_table(tmp_path: Path) -> None:
    file = tmp_path / "a | b\n.jsonl"
    file.write_text("x")
    cells = rows(card(replace(RunSpec(model="a/b"), data=DataSpec(path=str(file))), tmp_path, make_measurement()))
    assert cells["data"].startswith("a \\| b .jsonl: 1 messages rows")
