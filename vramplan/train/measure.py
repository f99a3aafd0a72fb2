"""A few steps of a run on random tokens, measured phase by phase: the child of `vramplan measure`. Saves nothing.

The model has random weights, so nothing is downloaded; memory does not depend on the values. Who plays the step is
`RunSpec.driver`: "trainer" is `transformers.Trainer` with its forward and backward marked off (`trainer.py`; with the
stock recipe the loss is its own and PEFT's own `prepare_model_for_kbit_training` has run), "loop" is the loop that
tutorials write. The borders between phases read and reset counters of torch's allocator, and allocate nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vramplan.core.types import RunSpec
from vramplan.core.varlen import documents_per_row
from vramplan.errors import InputError
from vramplan.train.building import build_model, refuse_what_is_not_built
from vramplan.train.data import IGNORED, Collator, Example
from vramplan.train.fast.install import Fused, uninstalled
from vramplan.train.fused_loss import Head, head_of
from vramplan.train.load import resolve
from vramplan.train.meter import Meter, count_lines, recorded
from vramplan.train.outcome import StopSignal
from vramplan.train.progress import Progress
from vramplan.train.reporter import Reporter
from vramplan.train.trainer import (
    QloraTrainer,
    fused_loss,
    trained_parameters,
    training_arguments,
    usable_optimizer,
)

Also = Callable[[QloraTrainer], transformers.TrainerCallback]

DEFAULT_STEPS = 3
HELD_S = 1.5  # the launcher looks at the card every second: what the last step reserved stays that long


def cuda_device() -> torch.device:
    """The first visible card. InputError without one: then there is no memory to measure."""
    if not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__} sees no CUDA GPU, so there is nothing to measure",
            "does torch.cuda.is_available() hold? vramplan estimate needs no GPU",
        )
    return torch.device("cuda", 0)


def measure(
    run: RunSpec,
    run_dir: Path,
    device: torch.device,
    *,
    progress: Progress,
    stop: StopSignal,
    also: Also | None = None,
) -> str:
    """Build, prepare, wrap, play `run.schedule.max_steps` steps. Every ending leaves a Measurement, failures raise.

    `also` gives the trainer one more callback, which then says itself when the memory is looked at.
    """
    meter = Meter(device, last_step=True)
    return recorded(meter, run_dir / "measurement.jsonl", lambda: _measure(run, run_dir, meter, progress, stop, also))


def _measure(run: RunSpec, run_dir: Path, meter: Meter, progress: Progress, stop: StopSignal, also: Also | None) -> str:
    refuse_what_is_not_built(run)
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(run.schedule.seed)
    model, fused = build_model(run, resolve(run, run_dir), meter, progress)
    with uninstalled(fused):
        _play(run, run_dir, model, fused, meter, progress, stop, also)
    return f"{meter.steps} steps measured"


def _play(
    run: RunSpec,
    run_dir: Path,
    model: Any,
    fused: Fused | None,
    meter: Meter,
    progress: Progress,
    stop: StopSignal,
    also: Also | None,
) -> None:
    rows = RandomRows(run, model.get_input_embeddings().num_embeddings)
    head = head_of(model.get_base_model(), fused is not None) if run.levers.loss == "fused" else None
    optimizer = usable_optimizer(run.levers.optimizer, meter.device, progress)
    arguments = training_arguments(run, run_dir, meter.device, optimizer)
    progress.phase("train", f"driver {run.driver}, optimizer {optimizer}")
    if run.driver == "trainer":
        collator = Collator(0, run.seq_len, run.packing)
        trainer = QloraTrainer(
            head=head,
            fused=fused,
            meter=meter,
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=collator,
        )
        trainer.add_callback(Reporter(trainer, progress, stop, len(rows)))
        if also is not None:
            trainer.add_callback(also(trainer))
        trainer.train()
    else:
        Loop(run, model, head, trained_parameters(model, fused), rows, arguments, meter, progress).train()
    if also is None:
        _hold(meter)  # here, where the optimizer's state is still alive


def steps_of(run: RunSpec) -> int:
    return run.schedule.max_steps or DEFAULT_STEPS


def _hold(meter: Meter) -> None:
    """Keep what the steps reserved until the driver and the launcher have seen it."""
    if meter.cuda:
        meter.look()
        time.sleep(HELD_S)


class RandomRows(Sequence[Example]):
    """Rows of exactly `run.seq_len` random tokens, enough for all steps.

    With `run.padding` the last one is padding, with `run.packing` they are as many documents as there can be."""

    def __init__(self, run: RunSpec, vocab_size: int) -> None:
        self.run, self.vocab_size = run, vocab_size

    def __len__(self) -> int:
        return steps_of(self.run) * self.run.accumulation * self.run.micro_batch_size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        length = self.run.seq_len
        ids = random.Random(self.run.schedule.seed + index).choices(range(self.vocab_size), k=length)
        if self.run.packing:
            count = min(documents_per_row(length), length)
            lengths = [length // count] * (count - 1)
            return {"input_ids": ids, "labels": ids, "lengths": [*lengths, length - sum(lengths)]}
        labels, mask = list(ids), [1] * length
        if self.run.padding and length > 1:
            labels[-1], mask[-1] = IGNORED, 0
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


class Loop:
    """The tutorials' training loop: autocast, `loss.backward()`, `optimizer.step()`, `optimizer.zero_grad()`."""

    def __init__(
        self,
        run: RunSpec,
        model: Any,
        head: Head | None,
        trained: list[torch.nn.Parameter],
        rows: RandomRows,
        arguments: transformers.TrainingArguments,
        meter: Meter,
        progress: Progress,
    ) -> None:
        self.run, self.model, self.head, self.meter, self.progress = run, model, head, meter, progress
        self.rows = iter(rows)
        self.steps, self.examples = steps_of(run), len(rows)
        cls, keywords = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
        self.optimizer = cls(trained, **keywords)

    def train(self) -> None:
        batch = self.run.micro_batch_size * self.run.accumulation
        self.progress("start", total_steps=self.steps, effective_batch_size=batch, examples=self.examples)
        self.model.train()
        if self.meter.cuda:
            torch.cuda.empty_cache()  # as Trainer does before its first step
        for _ in range(self.steps):
            begun = time.perf_counter()
            loss = self.step()
            self.report(loss, time.perf_counter() - begun)

    def step(self) -> float:
        """One optimizer step; its last loss. Waits for the device at the end."""
        loss: Tensor | None = None
        for _ in range(self.run.accumulation):
            loss = None
            loss = self.micro_step()
        self.optimizer.step()
        self.meter.close("optimizer")
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.end_step()
        return float(loss.detach()) if loss is not None else float("nan")

    def micro_step(self) -> Tensor:
        inputs = self.batch()
        self.meter.open()
        with torch.autocast(self.meter.device.type, dtype=torch.bfloat16):
            loss = self.loss(inputs)
        self.meter.close("forward")
        loss.backward()
        self.meter.close("backward")
        return loss

    def batch(self) -> dict[str, Any]:
        """The next batch on the device. Labels are the input itself, and no mask where nothing is padded."""
        examples = [next(self.rows) for _ in range(self.run.micro_batch_size)]
        if self.run.packing:
            packed = Collator(0, self.run.seq_len, packed=True)(examples)
            return {k: v.to(self.meter.device) if isinstance(v, Tensor) else v for k, v in packed.items()}

        def tensor(name: str) -> Tensor:
            return torch.tensor([example[name] for example in examples]).to(self.meter.device)

        ids = tensor("input_ids")
        if not self.run.padding:
            return {"input_ids": ids, "labels": ids}
        return {"input_ids": ids, "labels": tensor("labels"), "attention_mask": tensor("attention_mask")}

    def loss(self, inputs: dict[str, Any]) -> Tensor:
        if self.head is not None:
            return fused_loss(self.model.get_base_model(), self.head, inputs, None)
        loss: Tensor = self.model(**inputs, use_cache=False).loss
        return loss

    def report(self, loss: float, seconds: float) -> None:
        meter, run = self.meter, self.run
        tokens = run.micro_batch_size * run.accumulation * run.seq_len
        meter.steps += 1
        meter.tokens += tokens
        if meter.steps == 1:
            meter.lines = count_lines(self.model, self.optimizer, meter.device)
        else:
            meter.busy_s += seconds
            meter.busy_tokens += tokens
        meter.loss(loss)
        self.progress(
            "step",
            step=meter.steps,
            loss=loss,
            tokens=meter.tokens,
            tokens_per_s=round(tokens / seconds, 1),
            peak_bytes=meter.peak_bytes(),
            reserved_bytes=meter.reserved_bytes(),
            eta_s=round(seconds * (self.steps - meter.steps), 1),
        )
