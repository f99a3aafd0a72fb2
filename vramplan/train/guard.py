"""A micro-batch that does not fit is freed, split and redone inside the same optimizer step.

The gradients go back to what they were before the micro-step, and every piece's loss is divided by the same number of
tokens, so the update is that of the unsplit step. Order of measures: CUDA graphs are dropped where there are any, and
the same rows tried again, which says nothing about the micro-batch; half the rows, down to single rows; then the next
lever of `relief.py`, with which all rows are tried again; when none is left the run ends, saying what was tried.

How much runs at a time is remembered in tokens (rows x width), since that is what activations grow with: batches of
short rows stay whole although those of long rows are split. "The micro-batch shrinks for good" means that this limit
is set: after repeated pressure, or at once by the rehearsal. The effective batch never changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from vramplan.errors import OutOfMemory
from vramplan.train.gradients import Gradients
from vramplan.train.meter import Meter
from vramplan.train.pressure import Card, Failure, Report, let_go
from vramplan.train.relief import MEASURES, Relief, retake
from vramplan.train.splitting import Inputs, pieces_of, rows_of, width_of

PRESSURE_OOMS = 2  # so many micro-batches that had to be split ...
PRESSURE_STEPS = 20  # ... within so many optimizer steps shrink the micro-batch for good
QUIET_STEPS = 50  # optimizer steps without one before it may grow again; doubled whenever growing was a mistake
STATE_FILE = "guard.json"

T = TypeVar("T")


@dataclass
class State:
    """What goes into a checkpoint. `limit_tokens` None: no micro-batch is split before it has failed."""

    limit_tokens: int | None = None
    evaluation_rows: int | None = None
    quiet_steps: int = QUIET_STEPS
    quiet_since: int = 0  # the optimizer step of the last failure or change
    grown_from: int | None = None  # the limit before the last growth, while that may still prove a mistake
    oom_events: int = 0


class Guard:
    """rows, accumulation: the planned micro-batch, and how many make a step; width: tokens of the longest row.

    `parameters` is asked once for what may get a gradient. `report` gets an `oom` event for everything that is done.
    `drop_graphs` gives up CUDA graphs and says whether there were any.
    """

    def __init__(
        self,
        *,
        rows: int,
        accumulation: int,
        width: int,
        parameters: Callable[[], Iterable[Tensor]],
        card: Card,
        relief: Relief,
        report: Report,
        meter: Meter,
        drop_graphs: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rows, self.accumulation, self.width = rows, accumulation, width
        self.gradients, self.drop_graphs = Gradients(parameters), drop_graphs
        self.card, self.relief, self.report, self.meter = card, relief, report, meter
        self.state = State()
        self.at_once = False  # one failure is enough to shrink: in the rehearsal, whose batch will come again
        self._failed_at: list[int] = []  # optimizer steps in which a micro-batch had to be split
        self._peak_bytes: int | None = None  # the most since the last change
        self._piece = 0, 0  # first row and width of what is being played

    # ------------------------------------------------------------------------------------------------ training
    def micro_step(self, inputs: Inputs, work: Callable[[Inputs], Tensor], step: int) -> Tensor:
        """Forward and backward of one micro-batch, whatever that takes; the sum of its pieces' losses.

        work: forward and backward of a piece, its loss divided by something that does not depend on the piece.
        step: the optimizer step in progress, from 1. OutOfMemory if a single row does not fit with all relief taken.
        """
        self.gradients.save()
        planned = rows = self._rows_at_once(inputs)
        failures = 0
        while True:
            try:
                loss = self._play(inputs, rows, work)
                break
            except Exception as error:
                failure = self.card.failure(error)
                if failure is None:
                    raise
                if self.drop_graphs():
                    self._tell(failure, step, "drop_graphs", rows, self._piece[1], self.micro_batch_size)
                else:
                    rows, failures = self._less(failure, rows, planned, step, error), failures + 1
                let_go(error)
            self.gradients.restore()
            self.card.free()
        if failures:
            self.state.quiet_since = step
        if rows < planned:
            self._shrink_if_pressed(inputs, rows, step)
        return loss

    def _rows_at_once(self, inputs: Inputs) -> int:
        return self._rows_for(width_of(inputs), rows_of(inputs))

    def _rows_for(self, width: int, rows: int) -> int:
        limit = self.state.limit_tokens
        return rows if limit is None else max(min(rows, limit // width), 1)

    def _play(self, inputs: Inputs, rows: int, work: Callable[[Inputs], Tensor]) -> Tensor:
        total: Tensor | None = None
        first = 0
        for piece in pieces_of(inputs, rows):
            self._piece = first, width_of(piece)
            loss = work(piece)
            total = loss if total is None else total + loss
            first += rows_of(piece)
        assert total is not None
        return total

    def _less(self, failure: Failure, rows: int, planned: int, step: int, error: Exception) -> int:
        """The next measure after a failure of `rows` rows at a time; how many to try next."""
        if rows > 1:
            smaller = (rows + 1) // 2
            self._tell(failure, step, "split", rows, self._piece[1], smaller)
            return smaller
        measure = self.relief.take()
        if measure is None:
            first, width = self._piece
            tried = ["one row at a time", *(MEASURES.get(name, name) for name in self.relief.taken)]
            raise OutOfMemory(
                f"row {first + 1} of a micro-batch of step {step} ({width:,} tokens) does not fit by itself, tried "
                f"{', '.join(tried)}; out of memory in {failure.where}: {failure.message}",
                "cut rows with --seq-len, or ask `vramplan diagnose RUN_DIR`",
            ) from error
        self._tell(failure, step, measure, rows, self._piece[1], planned)
        return planned

    # ------------------------------------------------------------------------------------ shrinking and growing
    def _shrink_if_pressed(self, inputs: Inputs, rows: int, step: int) -> None:
        state = self.state
        self._failed_at = [at for at in self._failed_at if step - at < PRESSURE_STEPS] + [step]
        mistaken = state.grown_from is not None
        if mistaken:
            state.quiet_steps *= 2
        if mistaken or self.at_once or len(self._failed_at) >= PRESSURE_OOMS:
            fits = rows * width_of(inputs)
            state.limit_tokens = min(state.grown_from or fits, fits)
            self._changed(step)
            self._tell(None, step, "shrink", rows_of(inputs), width_of(inputs), self._rows_at_once(inputs))

    def end_step(self, step: int) -> None:
        """An optimizer step is done: grow again after a quiet time, if the card shows room."""
        state = self.state
        self._peak_bytes = max(self._peak_bytes or 0, self.meter.peak_bytes() or 0) or None
        if step - state.quiet_since >= PRESSURE_STEPS:
            state.grown_from = None  # it has proved itself
        if state.limit_tokens is None or step - state.quiet_since < state.quiet_steps:
            return
        state.quiet_since = step
        if not self.card.has_room(self._peak_bytes):
            return
        before, width = self.micro_batch_size, self.width
        limit = state.limit_tokens
        self._changed(step)
        state.grown_from = limit
        state.limit_tokens = None if 2 * limit >= self.rows * width else 2 * limit
        self._tell(None, step, "grow", before, width, self.micro_batch_size)

    def _changed(self, step: int) -> None:
        self.state.quiet_since, self.state.grown_from = step, None
        self._failed_at.clear()
        self._peak_bytes = None

    @property
    def micro_batch_size(self) -> int:
        """How many of the longest rows run at a time now."""
        return self._rows_for(self.width, self.rows)

    # ---------------------------------------------------------------------------------- evaluation, and the rest
    def evaluate(self, inputs: Inputs, work: Callable[[Inputs], T], step: int) -> list[T]:
        """`work` of each piece of an evaluation batch. One that does not fit, graphs or not, halves them for good."""
        total = rows_of(inputs)
        while True:
            rows = min(self.state.evaluation_rows or total, total)
            try:
                return [work(piece) for piece in pieces_of(inputs, rows)]
            except Exception as error:
                failure = self.card.failure(error, "evaluation")
                if failure is None:
                    raise
                if self.drop_graphs():
                    self._tell(failure, step, "drop_graphs", rows, width_of(inputs), rows)
                elif rows == 1:
                    raise OutOfMemory(
                        f"a row of {width_of(inputs):,} tokens does not fit by itself in an evaluation: "
                        f"{failure.message}",
                        "cut rows with --seq-len, or train without an evaluation",
                    ) from error
                else:
                    self.state.evaluation_rows = (rows + 1) // 2
                    self._tell(failure, step, "split", rows, width_of(inputs), self.state.evaluation_rows)
                let_go(error)
            self.card.free()

    def once_more(self, work: Callable[[], T], where: str, step: int) -> T:
        """`work`, and once more with the cache emptied if memory ran out. For what changes nothing until it is done."""
        try:
            return work()
        except Exception as error:
            failure = self.card.failure(error, where)
            if failure is None:
                raise
            self.tell_retry(failure, step)
            let_go(error)
        self.card.free()
        return work()

    # ------------------------------------------------------------------------------------------------- recording
    def tell(self, failure: Failure, step: int, action: str) -> None:
        """Record a failure that leaves the micro-batch as it is."""
        self._tell(failure, step, action, self.micro_batch_size, self.width, self.micro_batch_size)

    def tell_retry(self, failure: Failure, step: int) -> None:
        """The same is tried once more: drop what graphs there are and record that, or else that only the cache goes."""
        self.tell(failure, step, "drop_graphs" if self.drop_graphs() else "retry")

    def _tell(self, failure: Failure | None, step: int, action: str, rows: int, width: int, now: int) -> None:
        """rows: at a time so far, of this width; now: from now on."""
        self.state.oom_events += failure is not None
        self.meter.oom_events = self.state.oom_events
        self.meter.micro_batch_size = self.micro_batch_size
        event: dict[str, Any] = {"event": "oom", "step": step, "action": action, "rows": rows, "tokens": width}
        event["micro_batch_size"] = now
        if failure is None or failure.where != "evaluation":
            event["accumulation"] = self.accumulation * -(-self.rows // now)
        self.report(event | (failure.fields() if failure else {}))

    def save(self, folder: Path) -> None:
        """Write the state into a checkpoint."""
        state = {**asdict(self.state), "relief": self.relief.taken, "skipped_steps": self.meter.skipped_steps}
        (folder / STATE_FILE).write_text(json.dumps(state) + "\n")

    def load(self, folder: Path) -> None:
        """Go on as the checkpoint was: same limit, same levers. A checkpoint without a state changes nothing."""
        try:
            stored: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
        except FileNotFoundError:
            return
        retake(self.relief, stored["relief"])
        self.state = State(**{field.name: stored[field.name] for field in fields(State) if field.name in stored})
        self.meter.oom_events, self.meter.micro_batch_size = self.state.oom_events, self.micro_batch_size
        self.meter.skipped_steps = stored.get("skipped_steps", 0)
