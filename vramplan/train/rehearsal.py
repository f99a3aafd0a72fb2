"""The worst batch comes first: before step 1 the largest micro-batch that can occur is played, and nothing remains.

Lengths are known before the run, so what would fail after hours fails now, and goes through the guard's measures: the
micro-batch is split from the start, or the run ends before it has cost anything. What is played is a whole optimizer
step (with accumulation its second micro-batch too, which finds gradients there) and the worst evaluation batch.
Parameters, gradients and random numbers are as before afterwards; the optimizer's state stays allocated, but as new.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from vramplan.train.guard import Guard
from vramplan.train.pressure import Report
from vramplan.train.randomness import random_state, set_random_state
from vramplan.train.safe_step import Snapshot


def length_of(dataset: Any, index: int) -> int:
    """Tokens of one row, without making its lists where the data set knows."""
    ask = getattr(dataset, "length", None)
    return int(ask(index)) if ask is not None else len(dataset[index]["input_ids"])


def worst_rows(dataset: Any, rows: int) -> list[int]:
    """The `rows` longest rows, longest first: of all batches a sampler could form, none has more padded tokens."""
    return heapq.nlargest(rows, range(len(dataset)), key=lambda index: (length_of(dataset, index), -index))


class Rehearsal(TrainerCallback):  # type: ignore[misc]
    """Plays the worst batches when training begins, then reports one `rehearsal` event.

    trainer: a QloraTrainer with a guard. evaluation: the data set it will be evaluated on, or None.
    """

    def __init__(self, trainer: Any, guard: Guard, report: Report, evaluation: Any = None) -> None:
        self.trainer, self.guard, self.report, self.evaluation = trainer, guard, report, evaluation

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        begun = time.perf_counter()
        before = self.guard.state.oom_events
        batch = self._batch(self.trainer.train_dataset, args.per_device_train_batch_size)
        rows, width = batch["input_ids"].shape
        with nothing_happened(self.trainer):
            self._step(batch, args)
            if self.evaluation is not None:
                self.trainer.evaluate_batch(self._batch(self.evaluation, args.eval_batch_size))
        peak = self.trainer.meter.rehearsed()
        self.report(
            {
                "event": "rehearsal",
                "rows": int(rows),
                "tokens": int(width),
                "micro_batch_size": min(self.guard.micro_batch_size, int(rows)),
                "accumulation": self.guard.accumulation * -(-self.guard.rows // self.guard.micro_batch_size),
                "oom_events": self.guard.state.oom_events - before,
                "relief": list(self.guard.relief.taken),
                "peak_bytes": peak,
                "seconds": round(time.perf_counter() - begun, 2),
            }
        )

    def _batch(self, dataset: Any, rows: int) -> dict[str, Any]:
        examples = [dataset[index] for index in worst_rows(dataset, rows)]
        return dict(self.trainer._prepare_inputs(self.trainer.data_collator(examples)))

    def _step(self, batch: dict[str, Any], args: Any) -> None:
        trainer, model = self.trainer, self.trainer.model_wrapped
        micro_batches = min(args.gradient_accumulation_steps, 2)
        trainer.current_gradient_accumulation_steps = micro_batches
        items = trainer._get_num_items_in_batch([batch] * micro_batches, args.device)
        self.guard.at_once = True
        try:
            for _ in range(micro_batches):
                trainer.training_step(model, batch, items)
        finally:
            self.guard.at_once = False
        if args.max_grad_norm > 0:
            trainer._clip_grad_norm(model)
        trainer.optimizer.step()


@contextmanager
def nothing_happened(trainer: Any) -> Iterator[None]:
    """What is done inside leaves parameters, optimizer, gradients, counters and random numbers as they were."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    before, numbers = Snapshot(optimizer, trainer.trained), random_state(trainer.args.device)
    try:
        yield
    finally:
        trainer.model.zero_grad()
        before.restore(keep_new_state=True)
        set_random_state(numbers, trainer.args.device)
        trainer.forget_step()
