"""A run's worst batch on the real card: the child of `vramplan fit --probe` and of `vramplan calibrate`. Saves nothing.

Plays `measure.py`'s steps on rows of exactly the longest length, all tokens labelled. After `MEMORY_STEPS` an
evaluation batch is played and the memory held until the launcher has looked at it. Where steps are short some more
follow, as CUDA graphs where training would make them, and only the last few are timed.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from vramplan.core.types import RunSpec
from vramplan.train.building import make_graphs
from vramplan.train.measure import HELD_S, measure
from vramplan.train.outcome import StopSignal
from vramplan.train.progress import Progress
from vramplan.train.trainer import QloraTrainer

MEMORY_STEPS = 2  # the first makes the optimizer's state, the second is a steady one
TIMED_STEPS = 4
LONG_STEP_S = 1.0  # such a step is timed as it is: nothing that starts or warms up can matter
CAP_VARIABLE = "VRAMPLAN_CAP_BYTES"  # what PyTorch may reserve, as on a smaller card


def probe(run: RunSpec, run_dir: Path, device: torch.device, *, progress: Progress, stop: StopSignal) -> str:
    """Build, prepare, wrap, play. Every ending leaves a Measurement, failures raise."""
    cap = os.environ.get(CAP_VARIABLE)
    if cap and device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(int(cap) / total, 1.0), device)

    def also(trainer: QloraTrainer) -> Probing:
        return Probing(trainer, run, progress)

    return measure(run, run_dir, device, progress=progress, stop=stop, also=also)


class Probing(TrainerCallback):  # type: ignore[misc]
    """Plays the evaluation, holds the memory, and ends the steps when enough of them were timed."""

    def __init__(self, trainer: QloraTrainer, run: RunSpec, progress: Progress) -> None:
        self.trainer, self.run, self.progress = trainer, run, progress

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """After every step, when its time has been taken."""
        meter = self.trainer.meter
        if "loss" not in (logs or {}):
            return
        if state.global_step == MEMORY_STEPS:
            self._evaluate()
            self._hold()
            if meter.busy_s >= LONG_STEP_S:
                control.should_training_stop = True
            else:
                self._make_graphs()
        elif state.global_step == state.max_steps - TIMED_STEPS:
            meter.busy_s, meter.busy_tokens = 0.0, 0

    def _make_graphs(self) -> None:
        """Room is asked for once: a second time would fall within the steps that are timed."""
        if self.trainer.meter.cuda:
            torch.cuda.empty_cache()  # of the evaluation: what is cached from here on is a micro-step's
        self.trainer.graphs = graphs = make_graphs(self.trainer, self.run, self.progress)
        if graphs is not None:
            graphs.tries = 1

    def _evaluate(self) -> None:
        trainer = self.trainer
        rows = [trainer.train_dataset[index] for index in range(trainer.args.eval_batch_size)]
        trainer.evaluate_batch(dict(trainer.data_collator(rows)))
        trainer.meter.phase("evaluation")

    def _hold(self) -> None:
        """Keep what was reserved until the launcher has looked at the card."""
        meter = self.trainer.meter
        meter.look()
        self.progress("held", reserved_bytes=meter.reserved_bytes())
        time.sleep(HELD_S)
