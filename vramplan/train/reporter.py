"""Says what a training is doing: its events, when to log, and that a signal asks it to end."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from vramplan.train.evaluation import AlreadyDone, EvaluationStopped, perplexity
from vramplan.train.meter import count_lines
from vramplan.train.parallel import Stop
from vramplan.train.progress import Progress
from vramplan.train.randomness import random_state, set_random_state
from vramplan.train.trainer import QloraTrainer

EVALUATION_NEWS_S = 1.0  # between two events of an evaluation's progress


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Writes the events of a training, says when to log, and ends it when a signal asks for that."""

    def __init__(self, trainer: QloraTrainer, progress: Progress, stop: Stop, examples: int) -> None:
        self.trainer, self.progress, self.stop = trainer, progress, stop
        self.examples = examples
        self.done = 0  # optimizer steps of this process
        self.random: dict[str, Any] = {}  # the generators as the step in progress found them
        self.told = 0.0  # when the progress of an evaluation was last told
        trainer.watch_evaluation = self._evaluating

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.fused is not None:
            self.trainer.fused.check()
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        fields = {"total_steps": state.max_steps, "effective_batch_size": batch, "examples": self.examples}
        self.progress("start", **fields, resumed_from=state.global_step)
        self.trainer.meter.tokens = state.num_input_tokens_seen
        self.trainer.meter.steps = state.global_step
        if state.global_step >= state.max_steps:
            raise AlreadyDone

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.window.begin_step()
        self.random = random_state(args.device)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.meter.close("optimizer")
        self.trainer.clear_gradients()

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stop.asked:  # half a step is given up: who resumes draws for it again
            set_random_state(self.random, args.device)
        self._stop_if_asked(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        meter = self.trainer.meter
        meter.end_step()
        meter.steps = state.global_step
        self.trainer.window.end_step()
        if self.trainer.guard is not None:
            self.trainer.guard.end_step(state.global_step)
        if self.trainer.health is not None and self.trainer.health.in_a_row:
            control.should_save = False  # the checkpoint before it stays the newest
        self.done += 1
        if self.done == 1:
            meter.lines = count_lines(self.trainer.model, optimizer, meter.device)
        self._stop_if_asked(state, control)
        step = state.global_step
        control.should_log = self.done == 1 or step % args.logging_steps == 0 or step >= state.max_steps
        self._log_first(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stop.asked:  # what should be logged was; half a step is not
            control.should_evaluate = control.should_log = False
            control.should_save = control.should_save and state.global_step > 0
        else:
            self._log_first(control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.window.settle()

    def _log_first(self, control: Any) -> None:
        """No evaluation and no save falls between the steps of a log: its rate and its tokens are of training alone."""
        control.should_log = control.should_log or control.should_save or control.should_evaluate

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """The event of the steps since the last one; `loss` is their mean."""
        if "loss" not in logs:
            return
        trainer, meter = self.trainer, self.trainer.meter
        loss = logs["loss"]
        meter.loss(loss)
        if self.trainer.health is not None:
            self.trainer.health.loss(loss, state.global_step)
        elif not abs(loss) < float("inf"):
            self.progress.warning(f"the loss of step {state.global_step} is {loss}: lower the learning rate")
        left = max(state.max_steps - state.global_step, 0)
        self.progress(
            "step",
            step=state.global_step,
            loss=loss,
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            tokens=meter.tokens,
            tokens_per_s=logs["tokens_per_second"],
            peak_bytes=logs.get("peak_memory_bytes"),
            reserved_bytes=logs.get("reserved_memory_bytes"),
            eta_s=round(trainer.window.seconds_per_step() * left, 1),
        )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.evaluated(state.global_step, metrics["eval_loss"])

    def evaluated(self, step: int, loss: float) -> None:
        """The event of an evaluation of the adapter as it is after `step`."""
        self.progress("eval", step=step, loss=loss, perplexity=perplexity(loss))
        if not abs(loss) < float("inf"):
            self.progress.warning(f"the held-out loss is {loss}")

    def _evaluating(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.told >= EVALUATION_NEWS_S:
            self.told = now
            self.progress("eval_progress", done=done, total=total)
        if self.stop.asked:
            self._stop_if_asked(self.trainer.state, self.trainer.control)
            raise EvaluationStopped

    def _stop_if_asked(self, state: Any, control: Any) -> None:
        if self.stop.asked:
            control.should_training_stop = True
            control.should_save = state.global_step > 0
            control.should_evaluate = False
