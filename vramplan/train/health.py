"""Is the training learning? What goes wrong is said once, with the reason where it can be known.

Watched at every optimizer step, at the price of waiting for one number, the gradient's norm: a norm that is not finite
(the step is then left out: parameters and optimizer never see it), one far above the usual, one of exactly zero,
parameters that get no gradient at all; and over many steps a loss that does not fall.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import isfinite
from operator import attrgetter
from statistics import fmean, median
from typing import Any

from torch import Tensor, nn

from vramplan.core.types import RunSpec
from vramplan.errors import NotFinite
from vramplan.train.meter import Meter
from vramplan.train.nonfinite import Step, some_of, trained, why_not_finite
from vramplan.train.pressure import Report
from vramplan.train.splitting import Inputs

NAN_LIMIT = 3  # steps in a row without a finite gradient that end a run, unless --on-nan skip
EXPLOSION = 20.0  # times the running median of the gradient's norm
NORMS, FEWEST_NORMS = 50, 10  # of how many steps the median is taken
STUCK_STEPS, STUCK_WINDOW = 100, 20  # the mean of the last 20 losses against the first 20, from step 100 on
STUCK_SHARE = 0.005  # falling by less than half a percent is not falling
# Above these a rate is far too high: LoRA is trained with 1e-4 to 5e-4, by sign (Lion) with a tenth of that.
HIGH_RATES = {"sgd": 10.0, "lion": 2e-3, "": 1e-2}


class Health:
    """redo: the forward of a micro-batch once more, without gradients, to find where it stops being finite.

    `report` gets a `health` event for each thing that is found.
    """

    def __init__(self, run: RunSpec, model: nn.Module, redo: Callable[[Inputs], Any], meter: Meter, report: Report):
        self.run, self.model, self.redo, self.meter, self.report = run, model, redo, meter, report
        self.in_a_row = 0  # steps without a finite gradient
        # More than one process must leave out the same steps: whoever runs several says here what all of them found.
        self.agree: Callable[[bool], bool] = bool
        # Of fused layers the gradients are kept elsewhere: `Fused.gradient`.
        self.gradient: Callable[[Tensor], Tensor | None] = attrgetter("grad")
        self._step = Step()
        self._said: set[str] = set()
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=STUCK_WINDOW)
        self._losses = 0
        self._highest_rate = 0.0
        self._looked = False  # at which parameters get a gradient
        self._reason = ""

    # ------------------------------------------------------------------------------------- while a step is made
    def micro_step(self, inputs: Inputs, loss: Tensor) -> None:
        """A micro-step is done. Keeps references only; nothing waits."""
        self._step.add(inputs, loss)

    def forget(self) -> None:
        """The micro-steps so far belong to no step."""
        self._step = Step()

    def must_drop(self, norm: Tensor | float, step: int, rate: float) -> bool:
        """Whether the optimizer must leave out the step it is about to make. Waits for the gradient's norm.

        NotFinite after NAN_LIMIT such steps in a row, unless the run says skip.
        """
        value = float(norm)
        self._highest_rate = max(self._highest_rate, rate)
        try:
            if self.agree(not isfinite(value)):
                self._not_finite(step)
                return True
            self.in_a_row = 0
            self._look_at_parameters(step)
            if value == 0.0:
                self._say("zero_gradients", step, "all gradients are zero: nothing is learned", self._why_zero())
            self._compare(value, step)
            return False
        finally:
            self.forget()

    def _not_finite(self, step: int) -> None:
        self.in_a_row += 1
        self.meter.skipped_steps += 1
        if self.in_a_row == 1:
            why = why_not_finite(self.model, self._step, self.redo, self.gradient)
            self._reason = "; ".join(part for part in (why, self._rate_reason()) if part)
            self._say("nan", step, "the gradients are not finite: the step is left out", self._reason)
        if self.run.schedule.on_nan == "stop" and self.in_a_row >= NAN_LIMIT:
            why = f": {self._reason}" if self._reason else ""
            raise NotFinite(
                f"{NAN_LIMIT} steps in a row, up to step {step}, have no finite gradient{why}",
                "lower the learning rate and --resume from the checkpoint before; --on-nan skip goes on regardless",
            )

    # ------------------------------------------------------------------------------------------------- gradients
    def _look_at_parameters(self, step: int) -> None:
        """Once: what is trained but takes no part in the forward."""
        if self._looked:
            return
        self._looked = True
        tensors = trained(self.model)
        lost = [name for name, p in tensors if self.gradient(p) is None]
        if 0 < len(lost) < len(tensors):  # all: then their norm tells
            self._say(
                "no_gradient",
                step,
                f"{len(lost)} of {len(tensors)} trained tensors got no gradient: {some_of(lost)}",
                "the model does not use these modules on such data (an encoder, experts that no token reached)",
            )

    def _why_zero(self) -> str:
        if self._step.without_labels():
            return "no token is to be learned: all labels are -100"
        if self._highest_rate == 0.0:
            return ""
        return "the adapter's modules do not take part in the forward, or the loss does not depend on them"

    def _compare(self, norm: float, step: int) -> None:
        usual = median(self._norms) if len(self._norms) >= FEWEST_NORMS else 0.0
        if 0.0 < EXPLOSION * usual < norm:
            limit = self.run.schedule.max_grad_norm
            clipped = f", clipped to {limit:g}" if limit else ", and is not clipped (--max-grad-norm)"
            text = f"the gradient's norm is {norm:.3g}, usually {usual:.3g}{clipped}"
            self._say("explosion", step, text, self._rate_reason() or "one odd batch is the usual cause")
        self._norms.append(norm)

    def _rate_reason(self) -> str:
        name, rate = self.run.levers.optimizer, self.run.schedule.learning_rate
        limit = next(value for kind, value in HIGH_RATES.items() if kind in name)
        return f"the learning rate of {rate:g} is far too high for {name}" if rate > limit else ""

    # ------------------------------------------------------------------------------------------------------ loss
    def loss(self, loss: float, step: int) -> None:
        """The loss of a step that is done, or the mean of several."""
        if not isfinite(loss):
            return
        self._losses += 1
        if len(self._first) < STUCK_WINDOW:
            self._first.append(loss)
        self._last.append(loss)
        if self._losses < STUCK_STEPS:
            return
        before, now = fmean(self._first), fmean(self._last)
        if now > (1 - STUCK_SHARE) * before:
            self._say("stuck", step, f"the loss does not fall: {before:.3f} at first, {now:.3f} now", self._why_stuck())

    def _why_stuck(self) -> str:
        if self._highest_rate == 0.0:
            return "the learning rate is 0"
        if "zero_gradients" in self._said:
            return "all gradients are zero"
        if high := self._rate_reason():
            return high
        if not any(bool(p.any()) for name, p in self.model.named_parameters() if "lora_B" in name):
            return "the adapter has not changed at all"
        rate, targets = self.run.schedule.learning_rate, ", ".join(self.run.lora.targets)
        return f"a learning rate of {rate:g} may be too low, or too little is trained (--lora-targets {targets})"

    # -------------------------------------------------------------------------------------------------- recording
    def _say(self, kind: str, step: int, message: str, reason: str) -> None:
        if kind in self._said:
            return
        self._said.add(kind)
        event: dict[str, Any] = {"event": "health", "kind": kind, "step": step, "message": message}
        self.report(event | ({"reason": reason} if reason else {}))
