"""`trainer.add_callback(vramplan.VramplanCallback())`: anybody's Trainer measured as `vramplan train` measures its own.

It writes the same records (`run.json`, `prediction.json`, `progress.jsonl`, `measurement.jsonl`), so that `vramplan
watch` and `vramplan diagnose` read them; at the end it prints what was predicted beside what was measured, and where
memory runs out it says why. It changes nothing of the training, and a failure of its own never ends one.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from transformers import TrainerCallback

from vramplan.core.diagnose import diagnose
from vramplan.core.ledger import estimate
from vramplan.core.types import Ledger, ModelSpec, RunSpec, Unplannable
from vramplan.core.units import human
from vramplan.errors import VramplanError
from vramplan.report.compare import compare
from vramplan.sources import records
from vramplan.sources.oom_text import parse
from vramplan.train.meter import Meter, count_lines
from vramplan.train.observed import Shape, card_of, observed
from vramplan.train.outcome import outcome_of
from vramplan.train.place import place_in
from vramplan.train.progress import Progress
from vramplan.train.reporting import Window

FIXES = 3  # that are printed
F = TypeVar("F", bound=Callable[..., Any])


def quietly(method: F) -> F:
    """What fails in it is told once and switches the callback off: the training is not ours to end."""

    @wraps(method)
    def tried(self: VramplanCallback, *args: Any, **kwargs: Any) -> Any:
        if not self.alive:
            return None
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            self.alive = False
            self.detach()
            self.say(f"measuring has stopped: {type(error).__name__}: {error}")
            return None

    return cast(F, tried)


class VramplanCallback(TrainerCallback):  # type: ignore[misc]
    """Meters each step of a transformers Trainer, or of what is made from it (TRL's SFTTrainer).

    folder: where the records go; the trainer's output_dir by default. say: who prints a line.
    """

    def __init__(self, folder: Path | str | None = None, *, say: Callable[[str], None] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.alive = True
        self._say = say or (lambda text: print(f"vramplan: {text}", flush=True))
        self._undo: list[Callable[[], None]] = []
        self.ledger: Ledger | None = None
        self.spec: ModelSpec | None = None
        self.run: RunSpec | None = None
        self.unplanned = "no batch was seen"
        self.largest: Shape | None = None

    def say(self, text: str) -> None:
        if self.place.main if hasattr(self, "place") else True:
            self._say(text)

    # -------------------------------------------------------------------------------------------------- the steps
    @quietly
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.place = place_in(os.environ)
        self.home = self.folder or Path(args.output_dir)
        self.home.mkdir(parents=True, exist_ok=True)
        self.args, self.model = args, model
        self.meter = Meter(args.device)
        self.window = Window(self.meter)
        self.meter.trainable_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.meter.steps = state.global_step
        self.progress = Progress(self.place.file(self.home, "progress.jsonl"))
        self.done = 0
        self.progress("process", rank=self.place.rank, local_rank=self.place.local_rank, pid=os.getpid())
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.progress("start", total_steps=state.max_steps, effective_batch_size=batch,
                      resumed_from=state.global_step)  # fmt: skip
        self._attach()

    @quietly
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.window.begin_step()
        self.meter.open()

    @quietly
    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.close("backward")

    @quietly
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.close("backward")

    @quietly
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.close("optimizer")

    @quietly
    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.meter.end_step()
        self.window.end_step()
        self.meter.steps = state.global_step
        self.done += 1
        if self.done == 1:
            self.meter.lines = count_lines(self.model, optimizer, self.meter.device)
            self.meter.look()

    @quietly
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.meter.loss(loss)
        said = self.window.close()
        left = max(state.max_steps - state.global_step, 0)
        self.progress(
            "step", step=state.global_step, loss=loss, learning_rate=logs.get("learning_rate"),
            grad_norm=_number(logs.get("grad_norm")), tokens=self.meter.tokens,
            tokens_per_s=said["tokens_per_second"], peak_bytes=said.get("peak_memory_bytes"),
            reserved_bytes=said.get("reserved_memory_bytes"), eta_s=round(self.window.seconds_per_step() * left, 1),
        )  # fmt: skip

    @quietly
    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        loss = _number((metrics or {}).get("eval_loss"))
        if loss is not None:
            self.progress("eval", step=state.global_step, loss=loss, perplexity=None)

    @quietly
    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.window.settle()
        self.detach()
        message = f"{state.global_step} steps"
        measurement = self.meter.measurement("finished", message)
        records.append_jsonl(self.place.file(self.home, "measurement.jsonl"), measurement)
        self.progress("end", ended="finished", exit_code=0, message=message, hint="")
        self._compare()

    # --------------------------------------------------------------------------------------- what is being trained
    def _attach(self) -> None:
        """Look at each batch, and be there when something fails; `detach` takes all of it back."""
        self.detach()
        hook = self.model.register_forward_pre_hook(self._batch, with_kwargs=True)
        self._undo.append(hook.remove)
        self._watch_trainer()
        before = sys.excepthook

        def ended(kind: Any, error: BaseException, trace: Any) -> None:
            self.failed(error)
            before(kind, error, trace)

        sys.excepthook = ended
        self._undo.append(lambda: _give_back(ended, before))

    def _watch_trainer(self) -> None:
        """The trainer, which transformers does not hand to a callback, found among its callers. Its loop is watched, so
        that a failure is seen also where somebody catches it, as a notebook does."""
        trainer = _calling_trainer(self)
        name = "_run_epoch" if hasattr(trainer, "_run_epoch") else "training_step"
        play = getattr(trainer, name, None)
        if trainer is None or play is None:
            return

        @wraps(play)
        def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return play(*args, **kwargs)
            except BaseException as error:
                self.failed(error)
                raise

        setattr(trainer, name, watched)
        self._undo.append(lambda: trainer.__dict__.pop(name, None) and None)

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()

    @quietly
    def _batch(self, module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else args[0] if args else None
        if not module.training or ids is None or ids.dim() != 2:
            return
        self.window.add_tokens(ids.numel())
        shape = Shape(*ids.shape)
        if self.largest is None or shape.size > self.largest.size:
            mask = kwargs.get("attention_mask")
            padded = mask is not None and mask.dim() == 2 and bool((mask == 0).any())
            self.largest = Shape(shape.rows, shape.tokens, padded)
            self._predict(self.largest)

    def _predict(self, shape: Shape) -> None:
        """What a run of batches like the largest so far needs; why nobody can say, where nobody can."""
        try:
            self.spec, self.run = observed(self.model, self.args, shape)
            self.ledger = estimate(self.spec, self.run, card_of(self.meter.device))
        except (Unplannable, VramplanError) as error:
            self.ledger, self.unplanned = None, error.message
            return
        if self.place.main:
            records.write_json(self.home / "run.json", self.run)
            records.write_json(self.home / "prediction.json", self.ledger)

    # ---------------------------------------------------------------------------------------------- how it ended
    @quietly
    def failed(self, error: BaseException) -> None:
        """The records of a run that an exception ends, and of one out of memory the diagnosis."""
        if not self._undo:  # told already, or over
            return
        self.detach()
        outcome = outcome_of(error)
        text = "".join(traceback.format_exception(error))
        with self.place.file(self.home, "log.txt").open("a", encoding="utf-8") as log:
            log.write(text)
        measurement = self.meter.measurement(outcome.ended, outcome.message)
        records.append_jsonl(self.place.file(self.home, "measurement.jsonl"), measurement)
        self.progress("end", ended=outcome.ended, exit_code=outcome.exit_code, message=outcome.message, hint="")
        if outcome.ended == "oom":
            self._explain(text)

    def _explain(self, text: str) -> None:
        evidence = parse(text)
        if evidence is None:
            return
        card = card_of(self.meter.device)
        known = self.ledger is not None
        found = diagnose(evidence, self.spec if known else None, self.run if known else None, card)
        records.write_json(self.home / "diagnosis.json", found)
        self._say("out of memory: " + " ".join(found.causes[:1]))
        for fix in found.fixes[:FIXES]:
            self._say(f"  {fix.title}: {human(fix.device_bytes)}, {human(fix.saves_bytes)} less")
        self._say(f"more: vramplan diagnose {self.home}")

    def _compare(self) -> None:
        """Predicted beside measured, in MiB."""
        speed = f"{self.meter.tokens_per_s():,.0f} tokens/s, " if self.meter.busy_s else ""
        self.say(f"{self.meter.steps} steps, {speed}records in {self.home}")
        if self.ledger is None:
            self.say(f"no prediction: {self.unplanned}")
            return
        measurement = self.meter.measurement("finished")
        pairs = [pair for part in compare(self.ledger, measurement) for pair in part]
        width = max((len(pair.label) for pair in pairs), default=0)
        self.say(f"{'MiB':<{width}} {'predicted':>11} {'measured':>11}")
        for pair in pairs:
            off = "" if pair.difference is None else f"  {pair.difference:+.2%}"
            self.say(f"{pair.label:<{width}} {_mib(pair.predicted_bytes)} {_mib(pair.measured_bytes)}{off}")
        if self.meter.device.type == "cpu":
            self.say("on a CPU only tensors can be counted: no GPU memory was measured")


def _mib(size: int | None) -> str:
    return f"{'-' if size is None else f'{size / 2**20:,.1f}':>11}"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _give_back(ours: Any, before: Any) -> None:
    if sys.excepthook is ours:
        sys.excepthook = before


def _calling_trainer(callback: VramplanCallback) -> Any:
    """The first caller that is a trainer with this callback; None if there is none."""
    frame: Any = sys._getframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        handler = getattr(trainer, "callback_handler", None)
        if handler is not None and callback in getattr(handler, "callbacks", ()):
            return trainer
        frame = frame.f_back
    return None
