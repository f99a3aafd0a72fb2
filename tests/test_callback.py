"""`VramplanCallback` in a stock Trainer: records, a prediction of what is really there, and the end of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bitsandbytes")
import torch
import transformers
from peft import LoraConfig, get_peft_model
from train_tools import events, make_model, make_text, measurement

import vramplan
from vramplan.core.types import Diagnosis, Ledger, RunSpec
from vramplan.sources.records import read_json
from vramplan.train.callback import VramplanCallback

pytestmark = pytest.mark.usefixtures("one_thread")
OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.00 GiB is free."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("model")
    return make_model(home / "tiny", make_text(home / "text.jsonl"))


def load(folder: Path, *, four_bits: bool = True) -> Any:
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantised if four_bits else None, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))


def rows(count: int = 12) -> list[dict[str, Any]]:
    long = torch.arange(2, 34)
    return [{"input_ids": long[: 24 + i % 2 * 8], "labels": long[: 24 + i % 2 * 8]} for i in range(count)]


class Same:
    """Rows of a batch cut to the shortest: no padding. `seen` are the lengths of all batches."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        least = min(len(example["input_ids"]) for example in examples)
        self.seen.append(least)
        return {name: torch.stack([e[name][:least] for e in examples]) for name in ("input_ids", "labels")}


def make_trainer(model: Any, output: Path, callback: VramplanCallback, cls: Any = transformers.Trainer) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(output), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, bf16=True,
        use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", optim="adamw_torch", disable_tqdm=True,
        remove_unused_columns=False, eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    return cls(model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(2), data_collator=Same(),
               callbacks=[callback])  # fmt: skip


def test_a_run_leaves_the_records_of_our_own(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    hooked = sys.excepthook
    trainer = make_trainer(load(folder), tmp_path / "out", VramplanCallback(say=said.append))
    trainer.train()
    out = tmp_path / "out"
    found = measurement(out)
    run, ledger = read_json(out / "run.json", RunSpec), read_json(out / "prediction.json", Ledger)
    lengths = trainer.data_collator.seen[:6]  # those of evaluation follow
    assert {24, 32} == set(lengths)
    assert (run.micro_batch_size, run.accumulation, run.seq_len) == (2, 2, 32)
    assert found.tokens == 2 * sum(lengths)
    assert (run.lora.r, run.lora.targets, run.lora.dropout, run.double_quant) == (4, ("q_proj", "v_proj"), 0.1, True)
    assert (run.levers.loss, run.levers.checkpointing, run.levers.upcast, run.levers.optimizer) == (
        "full", "none", "none", "adamw_torch")  # fmt: skip
    assert (found.ended, found.steps) == ("finished", 3) and found.trainable_parameters == ledger.trainable_parameters
    measured = {line.key: line.bytes for line in found.lines}
    predicted = {line.key: line.bytes for line in ledger.lines}
    for key in ("weights.nf4", "weights.embeddings", "weights.lm_head", "adapter.lora", "optimizer.state"):
        assert measured[key] == predicted[key], key
    assert [event["event"] for event in events(out)] == ["process", "start", "step", "step", "step", "eval", "end"]
    assert said[0].startswith("3 steps, ") and f"records in {out}" in said[0]
    assert said[1].split() == ["MiB", "predicted", "measured"]
    assert any(text.startswith("4-bit weights") and text.endswith("+0.00%") for text in said)
    assert sys.excepthook is hooked and "_run_epoch" not in vars(trainer)


class Fails(transformers.Trainer):  # type: ignore[misc]
    error: BaseException = torch.OutOfMemoryError(OOM)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 1:
            raise self.error
        return super().training_step(*args, **kwargs)


def test_out_of_memory_leaves_the_record_and_the_diagnosis(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out, hooked = tmp_path / "out", sys.excepthook
    trainer = make_trainer(load(folder), out, VramplanCallback(say=said.append), Fails)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert (measurement(out).ended, measurement(out).steps) == ("oom", 1)
    assert events(out, "end")[0]["exit_code"] == 4
    diagnosis = read_json(out / "diagnosis.json", Diagnosis)
    assert diagnosis.evidence.requested_bytes == 2 * 2**30 and diagnosis.causes
    assert OOM in (out / "log.txt").read_text()
    assert said[0].startswith("out of memory: ") and "vramplan diagnose" in said[-1]
    assert sys.excepthook is hooked
    assert vars(trainer).get("_run_epoch") is None
    Fails.error = ValueError("no")
    try:
        with pytest.raises(ValueError, match="no"):
            make_trainer(load(folder), tmp_path / "other", VramplanCallback(say=said.append), Fails).train()
    finally:
        Fails.error = torch.OutOfMemoryError(OOM)
    assert measurement(tmp_path / "other").ended == "error" and not (tmp_path / "other" / "diagnosis.json").exists()


def test_an_end_that_nobody_catches_is_seen_too(folder: Path, tmp_path: Path) -> None:
    """Of the optimizer, say, in a transformers whose loop cannot be watched."""
    out = tmp_path / "out"
    callback = VramplanCallback(say=lambda text: None)
    trainer = make_trainer(load(folder), out, callback)
    callback._watch_trainer = lambda: None  # type: ignore[method-assign]
    before, shown = sys.excepthook, []
    sys.excepthook = lambda *args: shown.append(args)
    try:
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
        error = torch.OutOfMemoryError(OOM)
        sys.excepthook(type(error), error, None)
    finally:
        sys.excepthook = before
    assert measurement(out).ended == "oom" and len(shown) == 1


def test_what_is_no_qlora_run_is_measured_without_a_prediction(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    make_trainer(load(folder, four_bits=False), tmp_path / "out", VramplanCallback(say=said.append)).train()
    assert said[-1] == "no prediction: the base is not quantised to 4 bits by bitsandbytes"
    assert measurement(tmp_path / "out").steps == 3 and not (tmp_path / "out" / "prediction.json").exists()


def test_a_failure_of_its_own_ends_no_training(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    callback = VramplanCallback(say=said.append)
    monkeypatch.setattr("vramplan.train.callback.count_lines", lambda *_: 1 / 0)
    result = make_trainer(load(folder), tmp_path / "out", callback).train()
    assert result.global_step == 3
    assert said == ["measuring has stopped: ZeroDivisionError: division by zero"]


def test_it_is_there_without_being_imported() -> None:
    assert vramplan.VramplanCallback is VramplanCallback
    with pytest.raises(AttributeError, match="nonsense"):
        vramplan.nonsense  # noqa: B018
    code = "import sys, vramplan; print(json.dumps(sorted(sys.modules)))".replace("json", "__import__('json')")
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert not {"torch", "transformers"} & set(loaded) and "vramplan.train" not in loaded
