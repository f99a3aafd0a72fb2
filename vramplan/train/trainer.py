"""`transformers.Trainer` with these changes: fused loss, events instead of logs, checkpoints whole or not at all, and
steps that survive a lack of memory (`guard.py`) and leave out gradients that are not finite (`health.py`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from vramplan.core.types import RunSpec
from vramplan.errors import InputError
from vramplan.train.collate import input_tokens, of_one_shape
from vramplan.train.evaluation import Evaluating
from vramplan.train.fast.graphs import Graphs
from vramplan.train.fast.install import Fused
from vramplan.train.fused_loss import Head, decoder_of, every_row, fused_cross_entropy, labelled_rows
from vramplan.train.guard import Guard
from vramplan.train.health import Health
from vramplan.train.lengths import LengthGrouped
from vramplan.train.meter import Meter
from vramplan.train.outcome import first_line
from vramplan.train.progress import Progress
from vramplan.train.reporting import Window
from vramplan.train.resume import state_where_it_belongs
from vramplan.train.safe_step import SafeStep, guard_steps
from vramplan.train.saving import save_checkpoint
from vramplan.train.schedule import schedule_arguments
from vramplan.train.splitting import labelled_in
from vramplan.train.varlen import arguments

EVALUATION_NEWS_S = 1.0  # between two events of an evaluation's progress


def training_arguments(run: RunSpec, run_dir: Path, device: torch.device, optimizer: str) -> TrainingArguments:
    """What the run says, in the words of transformers. bf16 autocast on both devices, so that both compute the same."""
    try:
        return TrainingArguments(
            output_dir=str(run_dir / "checkpoints"),
            per_device_train_batch_size=run.micro_batch_size,
            gradient_accumulation_steps=run.accumulation,
            optim=optimizer,
            **schedule_arguments(run),
            bf16=True,
            use_cpu=device.type == "cpu",
            gradient_checkpointing=False,  # `lora.prepare` has switched it on, with what it can pass on
            logging_nan_inf_filter=False,  # it hides NaN, and waits for the GPU at every micro-step
            disable_tqdm=True,
            remove_unused_columns=False,
            train_sampling_strategy=run.data.train_sampling_strategy if run.data else "random",
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


class QloraTrainer(Evaluating):
    """`head` None: the stock loss with full logits. Else the decoder runs alone and the fused loss takes over.

    Without a guard lack of memory ends the training; without health nothing is looked after. They are set before
    `train`, since they need the trainer.
    """

    def __init__(self, *, head: Head | None, meter: Meter, fused: Fused | None = None, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.head = head
        self.fused = fused
        self.trained = trained_parameters(self.model, fused)
        self.meter = meter
        self.window = Window(meter)
        self.watch_evaluation: Callable[[int, int], None] = lambda done, total: None
        self.guard: Guard | None = None
        self.health: Health | None = None
        self.graphs: Graphs | None = None
        self.safe_step: SafeStep | None = None
        self._share = 1.0  # what a piece of a micro-batch has of its labelled tokens, where losses are means
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
            if self.guard is not None:
                self.guard.gradients.ready()
            if self._share != 1.0:
                result = result * self._share
        return result

    def fused_loss(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        assert self.head is not None
        causal_lm = self.accelerator.unwrap_model(self.model).get_base_model()
        with self.accelerator.autocast():
            return fused_loss(causal_lm, self.head, inputs, num_items)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        inputs = self._prepare_inputs(inputs)
        means = num_items_in_batch is None or not self.model_accepts_loss_kwargs

        def play(piece: dict[str, Any]) -> Tensor:
            self._share = labelled_in(piece) / max(labelled_in(inputs), 1) if means and piece is not inputs else 1.0
            if not self._share:  # a mean over nothing is no number
                return torch.zeros((), device=self.args.device)
            return self._micro_step(model, piece, num_items_in_batch)

        guard = self.guard
        loss = play(inputs) if guard is None else guard.micro_step(inputs, play, self.state.global_step + 1)
        if self.health is not None:
            self.health.micro_step(inputs, loss)
        return loss

    def _micro_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Forward and backward of a whole micro-batch or a piece of one."""

        def ordinary() -> Tensor:
            return self._started_one_by_one(model, inputs, num_items_in_batch)

        if self.graphs is None or num_items_in_batch is None:
            return ordinary()
        items = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=self.args.device)
        tensors = {name: value for name, value in of_one_shape(inputs).items() if name != "attention_mask"}
        loss = self.graphs.run(tensors, items, ordinary)
        self.meter.graph_bytes = self.graphs.recorder.reserved_bytes
        return loss

    def static_micro_step(self, inputs: dict[str, Any], items: Tensor) -> Tensor:
        """What of a micro-step can be captured: no shape and no branch depends on the data."""
        assert self.head is not None
        self.model.train()  # after an evaluation it is not: then layers would be captured without their checkpoints
        causal_lm = self.accelerator.unwrap_model(self.model).get_base_model()
        half = self.args.bf16
        with torch.autocast(self.args.device.type, dtype=torch.bfloat16, enabled=half, cache_enabled=False):
            loss = fused_loss(causal_lm, self.head, inputs, items, every_row)
        loss.backward()
        return loss

    def drop_graphs(self) -> bool:
        """Memory is short: do without CUDA graphs; whether there were any."""
        return self.graphs is not None and self.graphs.drop("memory is short")

    def _started_one_by_one(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        self.meter.open()
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.meter.close("backward")
        return loss

    def evaluation_loss(self, dataset: Any) -> float:
        """Mean loss over all labelled tokens of a data set, each token counting the same."""
        total, count = 0.0, 0
        own = torch.Generator()  # a loader draws a number as it starts: not from the one that training draws from
        size = self.args.eval_batch_size
        loader = DataLoader(dataset, batch_size=size, collate_fn=self.data_collator, generator=own)
        for done, batch in enumerate(loader):
            self.watch_evaluation(done, len(loader))
            loss, labelled = self.evaluate_batch(batch)
            total, count = total + loss, count + labelled
        return total / count if count else float("nan")

    def evaluate_batch(self, batch: dict[str, Any]) -> tuple[float, int]:
        """(sum of the losses, labelled tokens) of one batch."""
        inputs = self._prepare_inputs(batch)
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            if self.guard is None:
                return self._evaluate_piece(inputs)
            pieces = self.guard.evaluate(inputs, self._evaluate_piece, self.state.global_step)
        return sum(loss for loss, _ in pieces), sum(labelled for _, labelled in pieces)

    def _evaluate_piece(self, inputs: dict[str, Any]) -> tuple[float, int]:
        labelled = labelled_in(inputs)
        loss = self.compute_loss(self.model, inputs, num_items_in_batch=torch.tensor(max(labelled, 1)))
        return (float(loss) * labelled if labelled else 0.0), labelled  # a mean over nothing is no number

    # --------------------------------------------------------------------------------------------- optimizer step
    def create_optimizer(self, model: Any = None) -> Any:
        """As transformers', on what is really trained: of a fused layer its one flat tensor."""
        if self.optimizer is None:
            cls, keywords = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            group = {"params": self.trained, "weight_decay": self.args.weight_decay}
            self.optimizer: Any = cls([group], **keywords)
            if self.guard is not None or self.health is not None:
                self.safe_step = guard_steps(self.optimizer, self.guard, lambda: self.state.global_step + 1)
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            with state_where_it_belongs(self.optimizer.optimizer):
                super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # of fused layers, where these are stock, or the other way round
            raise InputError(
                f"the optimizer state of {Path(str(checkpoint)).name} does not fit this run's parameters: "
                f"{first_line(error)}",
                "resume with the --kernels, and on the kind of device, that it was started with",
            ) from error

    def _clip_grad_norm(self, model: Any) -> Any:
        return self._clip(self.args.max_grad_norm)

    def _clip(self, most: float) -> Any:
        """The gradients' norm, of at most `most` from now on."""

        def clip() -> Any:
            return self.accelerator.clip_grad_norm_(self.trained, most)

        return clip() if self.guard is None else self.guard.once_more(clip, "optimizer", self.state.global_step + 1)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, self._clip(float("inf")) if grad_norm is None else grad_norm)
        if self.health is not None and self.safe_step is not None:
            step, rate = self.state.global_step + 1, self._get_learning_rate()
            self.safe_step.drop_next = self.health.must_drop(norm, step, rate)
        return norm

    # ------------------------------------------------------------------------------------------------ counting
    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        self.window.add_tokens(input_tokens(inputs))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # the stock one walks all parameters at every micro-step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """What transformers logs, with speed and memory; its own token rate would count evaluations in."""
        if "loss" in logs:  # the mean over the steps since the last log, for which the device was waited for
            logs |= self.window.close()
        super().log(logs)

    def clear_gradients(self) -> None:
        """Of what is trained: Trainer clears those of the model's parameters, of which flat tensors are none."""
        for parameter in self.trained:
            parameter.grad = None

    def forget_step(self) -> None:
        """What was played so far counts for no step."""
        self.clear_gradients()
        self.window.forget()
        if self.graphs is not None:  # the first step is an ordinary one, which alone can be measured
            self.graphs.seen.clear()
        if self.health is not None:
            self.health.forget()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGrouped(dataset.lengths(), rows, self._data_seed())

    def _data_seed(self) -> int:
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    # -------------------------------------------------------------------------------------------------- saving
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.state.num_input_tokens_seen = self.window.tokens_seen()
        self._store_checkpoint()

    def _store_checkpoint(self) -> None:
        folder = Path(self.args.output_dir)
        save_checkpoint(folder / f"checkpoint-{self.state.global_step}", self._write_checkpoint)
        best = self.best_checkpoint()
        rotate_checkpoints(str(folder), self.args.save_total_limit, None if best is None else str(best))

    def _write_checkpoint(self, folder: Path) -> None:
        self._save(str(folder))
        self._save_optimizer_and_scheduler(str(folder))
        self._save_rng_state(str(folder))
        self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.guard is not None:
            self.guard.save(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir, save_embedding_layers=False)
        (Path(output_dir or "") / "README.md").unlink(missing_ok=True)  # PEFT's card, with paths of this machine


def trained_parameters(model: Any, fused: Fused | None) -> list[torch.nn.Parameter]:
    """What the optimizer steps: the flat tensors of fused layers, and what else requires a gradient."""
    flat = [] if fused is None else fused.parameters
    views = set() if fused is None else fused.views
    return [*flat, *(p for p in model.parameters() if p.requires_grad and id(p) not in views)]


def fused_loss(
    causal_lm: Any,
    head: Head,
    inputs: dict[str, Any],
    num_items: Tensor | int | None,
    rows_of: Callable[[Tensor], tuple[Tensor, Tensor]] = labelled_rows,
) -> Tensor:
    """The loss of a right-padded or packed batch as a scalar, without full logits.

    The attention mask stays out: attention is causal and padding comes last, so no real token can see it, and its own
    positions carry no label. That spares the [batch, 1, seq, seq] mask and keeps the flash kernel.
    `num_items` None: the mean over the batch. `rows_of` chooses the rows that the loss is taken of.
    """
    rows, targets = rows_of(inputs["labels"])
    hidden = decoder_of(causal_lm)(input_ids=inputs["input_ids"], use_cache=False, **arguments(inputs))[0]
    normaliser = max(rows.numel(), 1) if num_items is None else num_items
    return fused_cross_entropy(hidden, rows, targets, head, normaliser)
