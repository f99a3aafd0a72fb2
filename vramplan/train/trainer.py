"""`transformers.Trainer` with three changes: fused loss, events instead of logs, checkpoints whole or not at all."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from vramplan.core.types import RunSpec
from vramplan.errors import InputError
from vramplan.train.fused_loss import Head, decoder_of, fused_cross_entropy, labelled_rows
from vramplan.train.meter import Meter, count_lines
from vramplan.train.outcome import first_line
from vramplan.train.parallel import Stop
from vramplan.train.progress import Progress
from vramplan.train.saving import whole_folder

KEPT_CHECKPOINTS = 2


class AlreadyDone(Exception):
    """The checkpoint to resume from has all the steps."""


def training_arguments(run: RunSpec, run_dir: Path, device: torch.device, optimizer: str) -> TrainingArguments:
    """What the run says, in the words of transformers. bf16 autocast on both devices, so that both compute the same."""
    s = run.schedule
    try:
        return TrainingArguments(
            output_dir=str(run_dir / "checkpoints"),
            per_device_train_batch_size=run.micro_batch_size,
            per_device_eval_batch_size=run.micro_batch_size,
            gradient_accumulation_steps=run.accumulation,
            max_steps=-1 if s.max_steps is None else s.max_steps,
            num_train_epochs=s.num_train_epochs,
            optim=optimizer,
            learning_rate=s.learning_rate,
            lr_scheduler_type=s.lr_scheduler_type,
            warmup_steps=s.warmup_ratio,  # below 1 it is a ratio
            weight_decay=s.weight_decay,
            max_grad_norm=s.max_grad_norm,
            seed=s.seed,
            bf16=True,
            use_cpu=device.type == "cpu",
            gradient_checkpointing=False,  # `lora.prepare` has switched it on, with what it can pass on
            save_strategy="steps" if s.save_steps > 0 else "no",
            save_steps=max(s.save_steps, 1),
            save_total_limit=KEPT_CHECKPOINTS,
            eval_strategy="no",
            logging_strategy="no",  # `Reporter` writes the events
            logging_nan_inf_filter=False,  # it hides NaN, and waits for the GPU at every micro-step
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=device.type == "cuda",
            average_tokens_across_devices=False,
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"transformers refuses this run: {first_line(error)}") from error


def usable_optimizer(name: str, device: torch.device, progress: Progress) -> str:
    """`name`, or adamw_torch with a warning where bitsandbytes cannot step it on a CPU."""
    if device.type != "cpu" or name.startswith(("adamw_torch", "adafactor", "sgd")):
        return name
    parameter = torch.nn.Parameter(torch.ones(8192))  # from 4096 elements on, 8-bit state is really 8-bit
    parameter.grad = torch.ones_like(parameter)
    arguments = TrainingArguments(output_dir="unused", optim=name, use_cpu=True, report_to="none")
    cls, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "paged optimizers are not supported on CPU": it then uses plain state
            cls([parameter], **keywords).step()
    except Exception as error:
        progress.warning(f"{name} does not run on a CPU ({first_line(error, 120)}): adamw_torch is used instead")
        return "adamw_torch"
    return name


class QloraTrainer(Trainer):  # type: ignore[misc]
    """`head` None: the stock loss with full logits. Else the decoder runs alone and the fused loss takes over."""

    def __init__(self, *, head: Head | None, meter: Meter, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.head = head
        self.meter = meter
        self.step_loss: Tensor | float = 0.0
        self.step_tokens: Tensor | int = 0
        if head is not None:
            self.model_accepts_loss_kwargs = True  # ours divides by num_items_in_batch whatever the model does
            self._loss_shifts_labels = True
        self.remove_callback(PrinterCallback)

    # -------------------------------------------------------------------------------------------------- loss
    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if self.head is None:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            loss = self.fused_loss(inputs, num_items_in_batch)
            result = (loss, {"loss": loss}) if return_outputs else loss
        if model.training:
            self.meter.close("forward")
        return result

    def fused_loss(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        assert self.head is not None
        causal_lm = self.accelerator.unwrap_model(self.model).get_base_model()
        with self.accelerator.autocast():
            return fused_loss(causal_lm, self.head, inputs, num_items)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.meter.open()
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.meter.close("backward")
        self.step_loss = self.step_loss + loss
        return loss

    def evaluation_loss(self, dataset: Any) -> float:
        """Mean loss over all labelled tokens of a data set, each token counting the same."""
        total, count = 0.0, 0
        self.model.eval()
        loader = DataLoader(dataset, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)
        with torch.no_grad(), self.accelerator.autocast():
            for batch in loader:
                inputs = self._prepare_inputs(batch)
                labelled = int((inputs["labels"][:, 1:] != -100).sum())
                loss = self.compute_loss(self.model, inputs, num_items_in_batch=torch.tensor(max(labelled, 1)))
                total, count = total + float(loss) * labelled, count + labelled
        return total / count if count else float("nan")

    # ------------------------------------------------------------------------------------------------ counting
    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        self.step_tokens = self.step_tokens + inputs["attention_mask"].sum()  # on the device: nothing waits here

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the stock one walks all parameters at every micro-step

    def take_step(self) -> tuple[float, int]:
        """Loss and non-padding input tokens since the last call. Waits for the device."""
        loss, tokens = float(self.step_loss), int(self.step_tokens)
        self.step_loss, self.step_tokens = 0.0, 0
        return loss, tokens

    # -------------------------------------------------------------------------------------------------- saving
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        with whole_folder(folder / f"checkpoint-{self.state.global_step}") as temporary:
            self._save(str(temporary))
            self._save_optimizer_and_scheduler(str(temporary))
            self._save_rng_state(str(temporary))
            self.state.save_to_json(str(temporary / "trainer_state.json"))
        rotate_checkpoints(str(folder), save_total_limit=KEPT_CHECKPOINTS)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir, save_embedding_layers=False)


def fused_loss(causal_lm: Any, head: Head, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
    """The loss of a right-padded batch {input_ids, labels} as a scalar, without full logits.

    The attention mask stays out: attention is causal and padding comes last, so no real token can see it, and its own
    positions carry no label. That spares the [batch, 1, seq, seq] mask and keeps the flash kernel.
    `num_items` None: the mean over the batch.
    """
    rows, targets = labelled_rows(inputs["labels"])
    hidden = decoder_of(causal_lm)(input_ids=inputs["input_ids"], use_cache=False)[0]
    normaliser = max(rows.numel(), 1) if num_items is None else num_items
    return fused_cross_entropy(hidden, rows, targets, head, normaliser)


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Writes the events of a training, counts, and ends it when a signal asks for that."""

    def __init__(self, trainer: QloraTrainer, progress: Progress, stop: Stop, examples: int) -> None:
        self.trainer, self.progress, self.stop = trainer, progress, stop
        self.examples = examples
        self.learning_rate = 0.0
        self.begun: float | None = None
        self.done = 0  # optimizer steps of this process

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        fields = {"total_steps": state.max_steps, "effective_batch_size": batch, "examples": self.examples}
        self.progress("start", **fields, resumed_from=state.global_step)
        self.trainer.meter.tokens = state.num_input_tokens_seen
        self.trainer.meter.steps = state.global_step
        if state.global_step >= state.max_steps:
            raise AlreadyDone

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.begun is None:
            self.begun = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.trainer.meter.close("optimizer")
        self.learning_rate = float(optimizer.param_groups[0]["lr"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop_if_asked(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        meter = self.trainer.meter
        meter.end_step()
        meter.steps = state.global_step
        self.done += 1
        if self.done == 1:
            meter.lines = count_lines(self.trainer.model, optimizer, meter.device)
        self._report(state)
        self._stop_if_asked(state, control)

    def _report(self, state: Any) -> None:
        meter = self.trainer.meter
        loss, tokens = self.trainer.take_step()
        seconds = time.perf_counter() - (self.begun or 0.0)
        self.begun = None
        meter.tokens += tokens
        state.num_input_tokens_seen = meter.tokens  # travels in the checkpoint
        if self.done > 1:
            meter.busy_s += seconds
            meter.busy_tokens += tokens
        finite = abs(loss) < float("inf")
        if finite:
            meter.first_loss = loss if meter.first_loss is None else meter.first_loss
            meter.last_loss = loss
        else:
            self.progress.warning(f"the loss of step {state.global_step} is {loss}: lower the learning rate")
        mean = meter.busy_s / (self.done - 1) if self.done > 1 else seconds
        self.progress(
            "step",
            step=state.global_step,
            loss=loss,
            learning_rate=self.learning_rate,
            tokens=meter.tokens,
            tokens_per_s=round(tokens / seconds, 1),
            peak_bytes=meter.peak_bytes(),
            reserved_bytes=meter.reserved_bytes(),
            eta_s=round(mean * max(state.max_steps - state.global_step, 0), 1),
        )

    def _stop_if_asked(self, state: Any, control: Any) -> None:
        if self.stop.asked:
            control.should_training_stop = True
            control.should_save = state.global_step > 0
