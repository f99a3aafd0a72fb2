"""The adapter's model card: what was planned, what was measured, how to load it. Nothing of the user's machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from vramplan.core.names import public_name
from vramplan.core.types import Ledger, Measurement, Plan, RunSpec
from vramplan.core.units import human
from vramplan.errors import VramplanError
from vramplan.sources import records
from vramplan.train.data import Splits
from vramplan.train.evaluation import perplexity

_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?\Z")

Rows = list[tuple[str, str]]


class Card:
    """The card of one run. `best_step`: the step whose adapter was kept, if it is not the last."""

    def __init__(self, run: RunSpec, splits: Splits, run_dir: Path, best_step: int | None = None) -> None:
        self.run, self.splits, self.best_step = run, splits, best_step
        self.prediction = prediction_in(run_dir)
        self.base = public_name(run.model if run.random_weights else run.model_path or run.model)

    def text(self, measurement: Measurement) -> str:
        """The whole README.md."""
        parts = (
            f"# QLoRA adapter for {self.base}",
            self._opening(measurement),
            "## How to use it\n\n" + self._usage(),
            "## Training\n\n" + _table("", "value", self._training(measurement)),
            "## Memory\n\n" + _memory(self.prediction, measurement),
            "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in measurement.versions),
        )
        return f"---\n{self._metadata()}\n---\n\n" + "\n\n".join(parts) + "\n"

    def _metadata(self) -> str:
        """YAML for the Hub. No licence: that is the user's to choose, within the base model's."""
        data = self.run.data
        dataset = data is not None and not Path(data.path).expanduser().exists() and _HUB_ID.match(data.path)
        return ModelCardData(
            base_model=self.base,
            library_name="peft",
            pipeline_tag="text-generation",
            tags=["qlora", "lora", "vramplan"],
            datasets=[data.path] if data is not None and dataset else None,
        ).to_yaml()

    def _opening(self, measurement: Measurement) -> str:
        lora = self.run.lora
        quantised = "NF4, double quantisation" if self.run.double_quant else "NF4"
        text = (
            f"LoRA of rank {lora.r} (alpha {lora.alpha}, dropout {lora.dropout:g}) on {', '.join(lora.targets)}, "
            f"trained with vramplan on the model in 4 bits ({quantised})."
        )
        if self.run.random_weights:
            text += " The base weights were random: this adapter was made to measure memory and speed."
        if measurement.ended != "finished":
            text += f" The run was {measurement.ended} after step {measurement.steps}."
        if self.best_step is not None:
            text += f" The adapter is that of step {self.best_step}, which had the lowest held-out loss."
        return text

    def _usage(self) -> str:
        return f"""```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

BASE, ADAPTER = {self.base!r}, "."  # "." is this folder; the name of its repository will do as well
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant={self.run.double_quant},
    bnb_4bit_compute_dtype=torch.bfloat16,
)
base = AutoModelForCausalLM.from_pretrained(BASE, quantization_config=quantization, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, ADAPTER)
tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
```

`vramplan merge . --base {self.base} -o merged` writes a model without an adapter."""

    def _training(self, measurement: Measurement) -> Rows:
        run, s, levers = self.run, self.run.schedule, self.run.levers
        splits = self.splits
        held_out = len(splits.eval) if splits.eval is not None else 0
        recipe = (
            f"{run.recipe}: upcast {levers.upcast}, loss {levers.loss}, checkpointing {levers.checkpointing}"
            f"{' (offloaded)' if levers.checkpoint_offload else ''}, attention {levers.attention}, "
            f"allocator {levers.allocator}"
        )
        effective = run.micro_batch_size * run.accumulation
        rate = f"{s.learning_rate:g}, {s.lr_scheduler_type}, weight decay {s.weight_decay:g}"
        return [
            ("data", f"{_data_name(run)}: {splits.examples:,} {splits.kind} rows to train on, {held_out:,} held out"),
            ("rows cut or left out", f"{splits.truncated:,} cut, {splits.skipped:,} left out"),
            ("sequence length", f"{run.seq_len:,} tokens; the longest row has {splits.longest:,}"),
            ("batch", f"{effective} = {run.micro_batch_size} x {run.accumulation} (micro-batch x accumulation)"),
            ("recipe", recipe),
            ("optimizer", f"{levers.optimizer}, learning rate {rate}"),
            ("seed", str(s.seed) + ("" if s.data_seed is None else f", data {s.data_seed}")),
            ("trainable parameters", f"{measurement.trainable_parameters:,}"),
            ("steps", f"{measurement.steps:,} ({measurement.tokens:,} tokens)"),
            ("tokens/s", f"{measurement.tokens_per_s:,.1f}"),
            ("training loss, first and last", _losses(measurement.first_loss, measurement.last_loss)),
            ("held-out loss, before and after", _losses(measurement.eval_loss_before, measurement.eval_loss_after)),
            ("held-out perplexity, before and after", _perplexities(measurement)),
            ("device", measurement.device_name),
        ]


# ----------------------------------------------------------------------------------------------------- its parts
def prediction_in(run_dir: Path) -> Ledger | None:
    """The ledger that the run was started with: of its plan, else the launcher's own. None if there is none to read."""
    try:
        if (run_dir / "plan.json").is_file():
            return records.read_json(run_dir / "plan.json", Plan).ledger
        if (run_dir / "prediction.json").is_file():
            return records.read_json(run_dir / "prediction.json", Ledger)
    except VramplanError:  # from another version: the card does without
        pass
    return None


def _data_name(run: RunSpec) -> str:
    if run.data is None:
        return "none"
    path = run.data.path
    return _cell(Path(path).name if Path(path).expanduser().exists() else path)


def _memory(prediction: Ledger | None, measurement: Measurement) -> str:
    """Predicted beside measured, of the step with the highest point."""
    step: Any = next((phase for phase in measurement.phases if phase.name == "step"), None)
    peak = prediction.peak if prediction is not None else None
    names = ("allocated at the peak", "reserved", "device, with the CUDA context")
    predicted = (peak.allocated_bytes, peak.reserved_bytes, peak.device_bytes) if peak else (None, None, None)
    measured = (step.peak_bytes, step.reserved_bytes, step.process_bytes) if step else (None, None, None)
    rows = [(n, f"{_size(p)} | {_size(m)}") for n, p, m in zip(names, predicted, measured, strict=True)]
    note = "" if step else "\n\nTrained on a CPU, where there is no GPU memory to measure."
    return _table("", "predicted | measured", rows) + note


def _table(title: str, columns: str, rows: Rows) -> str:
    rule = "|".join("---" for _ in range(columns.count("|") + 2))
    lines = [f"| {title} | {columns} |", f"|{rule}|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)


def _size(size: int | None) -> str:
    return "-" if size is None else f"{human(size)} ({size:,} bytes)"


def _losses(first: float | None, last: float | None) -> str:
    return f"{_loss(first)}, {_loss(last)}"


def _loss(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"


def _perplexities(measurement: Measurement) -> str:
    losses = (measurement.eval_loss_before, measurement.eval_loss_after)
    return ", ".join("-" if loss is None else f"{perplexity(loss):.4g}" for loss in losses)


def _cell(text: str) -> str:
    """Text that cannot break a row of a table."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split()).replace("|", "\\|")
