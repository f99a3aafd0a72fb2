"""Evaluation during training: the held-out loss alone, the best checkpoint, when to stop early."""

from __future__ import annotations

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vramplan.core.types import Schedule
from vramplan.train.schedule import BEST


class AlreadyDone(Exception):
    """The checkpoint to resume from is where the training ends."""


class EvaluationStopped(Exception):
    """A signal asked to stop in the middle of an evaluation."""


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that is no number a float can hold."""
    return math.inf if loss > 700 else math.exp(loss)


class Evaluating(Trainer):  # type: ignore[misc]
    """A Trainer that evaluates by `evaluation_loss` alone: no logits are kept, and no metric but the loss is computed.

    `load_best`: the best adapter is wanted at the end, so every evaluation that finds a better one is saved.
    """

    control: Any
    load_best = False
    evaluated: tuple[int, float] | None = None  # (optimizer step, loss) of the last evaluation

    def evaluation_loss(self, dataset: Any) -> float:
        raise NotImplementedError

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss, perplexity and seconds; logged, and told to the callbacks."""
        begun = time.perf_counter()
        loss = self.evaluation_loss(self.eval_dataset if eval_dataset is None else eval_dataset)
        self.evaluated = self.state.global_step, loss
        numbers = {"loss": loss, "perplexity": perplexity(loss), "runtime": round(time.perf_counter() - begun, 3)}
        metrics = {f"{metric_key_prefix}_{name}": number for name, number in numbers.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        try:
            metrics: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationStopped:  # half an evaluation says nothing
            return {}
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not metrics:
            return True  # stopped: with save_strategy "best" this is what saves the state
        better = bool(super()._determine_best_metric(metrics, trial))
        if better and self.load_best:
            self.control.should_save = True
        return better

    def best_checkpoint(self) -> Path | None:
        """The folder of the checkpoint with the lowest held-out loss, if it was saved."""
        if self.state.best_global_step is None:
            return None
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        return folder if folder.is_dir() else None

    def load_best_adapter(self) -> int | None:
        """Go back to the best adapter; its step, or None where the last one is the best or none was evaluated."""
        best, step = self.best_checkpoint(), self.state.best_global_step
        if best is None or step == self.state.global_step:
            return None
        self._load_from_checkpoint(str(best))
        return int(step)


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]
    """transformers' own, which remembers across `--resume` how long the loss has not improved."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule.early_stopping_patience or 1, schedule.early_stopping_threshold)

    def is_over(self) -> bool:
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        best: float | None = None
        for loss in (entry[BEST] for entry in state.log_history if BEST in entry):
            self.check_metric_value(args, SimpleNamespace(best_metric=best), control, loss)
            best = loss if best is None or loss < best else best
        if self.is_over():
            raise AlreadyDone

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **keywords: Any) -> None:
        super().on_evaluate(args, state, control, metrics, **keywords)
        if control.should_training_stop and args.save_strategy != "no":
            control.should_save = True  # where it ended, for --resume
