"""A float32 model small enough to train in milliseconds, a trainer with a guard, and failures on schedule."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, get_peft_model

from vramplan.core.types import Levers, Lora, RunSpec, Schedule
from vramplan.train import trainer as trainer_module
from vramplan.train.data import Collator
from vramplan.train.fast.install import Fused
from vramplan.train.fused_loss import head_of
from vramplan.train.guard import Guard
from vramplan.train.health import Health
from vramplan.train.meter import Meter
from vramplan.train.pressure import Card
from vramplan.train.relief import CheckpointRelief, Relief
from vramplan.train.trainer import QloraTrainer, training_arguments

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OOM_TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB."


def make_peft_model(
    device: torch.device = CPU, in_4_bits: bool = False, targets: str | list[str] = "all-linear", **changes: Any
) -> Any:
    """Llama with random weights and LoRA on every linear layer, whose B is not zero: every gradient is there."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **changes})).float()
    base.requires_grad_(False)
    if in_4_bits:
        quantise(base.model.layers)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model.to(device)


def quantise(layers: Any) -> None:
    """Put every Linear below into 4 bits, as `from_pretrained` would."""
    for name, linear in list(layers.named_modules()):
        if type(linear) is torch.nn.Linear:
            quantised = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
            quantised.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            layers.set_submodule(name, quantised.to(linear.weight.device))


def ragged_rows(count: int, longest: int = 40, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of many lengths; the first third of each is a prompt without labels, and one row has almost no label."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        length = longest if index == count // 2 else draw.randint(3, longest)
        ids = [draw.randint(3, 63) for _ in range(length)]
        labels = [-100] * (length // 3) + ids[length // 3 :]
        if index == 1:
            labels = [-100] * (length - 1) + ids[-1:]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * length})
    return rows


@dataclass
class Made:
    """A trainer, and what it reported."""

    trainer: QloraTrainer
    events: list[dict[str, Any]] = field(default_factory=list)
    loss: float = 0.0  # the sum over all micro-batches

    @property
    def tokens(self) -> int:
        """Of all micro-batches: nobody ends a step here."""
        return int(self.trainer.window.open_tokens)

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    def parameters(self) -> dict[str, torch.Tensor]:
        named = self.trainer.model.named_parameters()
        return {name: p.detach().cpu().clone() for name, p in named if p.requires_grad}


def make_trainer(
    folder: Path,
    *,
    rows: int = 4,
    accumulation: int = 1,
    steps: int = 3,
    loss: str = "fused",
    optimizer: str = "sgd",
    dataset: list[dict[str, list[int]]] | None = None,
    model: Any = None,
    fused: Fused | None = None,
    relief: Relief | None = None,
    guarded: bool = True,
    schedule: Schedule | None = None,
    levers: Levers | None = None,
    device: torch.device = CPU,
) -> Made:
    """A QloraTrainer in float32 without dropout: what it computes does not depend on how its batches are split."""
    schedule = schedule or Schedule(max_steps=steps, learning_rate=0.05, lr_scheduler_type="constant", save_steps=1000)
    levers = levers or Levers(loss=loss, optimizer=optimizer, checkpointing="none")
    run = RunSpec(model="tiny", micro_batch_size=rows, accumulation=accumulation, lora=Lora(r=4), levers=levers,
                  schedule=schedule)  # fmt: skip
    model = make_peft_model(device) if model is None else model
    dataset = ragged_rows(rows * accumulation * max(steps, 1)) if dataset is None else dataset
    arguments = training_arguments(run, folder, device, levers.optimizer)
    arguments = transformers.TrainingArguments(**{**arguments_of(arguments), "bf16": False, "save_strategy": "no"})
    meter = Meter(device)
    width = max(len(row["input_ids"]) for row in dataset)
    trainer = QloraTrainer(
        head=head_of(model.get_base_model()) if levers.loss == "fused" else None,
        meter=meter,
        fused=fused,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(0, width),
    )
    made = Made(trainer)
    training_step = trainer.training_step

    def summed(*arguments: Any) -> Any:
        loss = training_step(*arguments)
        made.loss += float(loss)
        return loss

    trainer.training_step = summed

    class Clears(transformers.TrainerCallback):
        """What `Reporter` does."""

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            trainer.clear_gradients()

    trainer.add_callback(Clears())
    if guarded:
        trainer.guard = Guard(
            rows=rows,
            accumulation=accumulation,
            width=width,
            parameters=lambda: trainer.trained,
            card=Card(device, fused.forget) if fused is not None else Card(device),
            relief=relief or Relief(),
            report=made.events.append,
            meter=meter,
            drop_graphs=trainer.drop_graphs,
        )

        def redo(inputs: dict[str, Any]) -> Any:
            with torch.no_grad():
                return trainer.compute_loss(model, inputs)

        trainer.health = Health(run, model, redo, meter, made.events.append)
        if fused is not None:
            trainer.health.gradient = fused.gradient
    return made


def arguments_of(arguments: Any) -> dict[str, Any]:
    """The constructor's arguments of a TrainingArguments that differ from its defaults, to change one of them."""
    names = (
        *("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("max_steps", "num_train_epochs", "optim", "learning_rate", "lr_scheduler_type", "warmup_steps"),
        *("weight_decay", "max_grad_norm", "seed", "bf16", "use_cpu", "save_strategy", "save_steps"),
        *("logging_strategy", "logging_nan_inf_filter", "report_to", "disable_tqdm", "remove_unused_columns"),
        *("label_names", "dataloader_pin_memory", "average_tokens_across_devices"),
    )
    return {name: getattr(arguments, name) for name in names}


def relief_of(model: Any, levers: Levers, device: torch.device = CPU) -> CheckpointRelief:
    return CheckpointRelief(model.get_base_model(), levers, device)


# ------------------------------------------------------------------------------------------------------- failures
class Faults:
    """Raises where it is hooked into, when `when` says so for the number of the pass."""

    def __init__(self, error: Callable[[], Exception] | None = None) -> None:
        self.error = error or (lambda: torch.OutOfMemoryError(OOM_TEXT))
        self.raised = 0
        self.passes = 0
        self.when: Callable[[int], bool] = lambda number: False  # by the number of the pass, from 1

    def visit(self) -> None:
        self.passes += 1
        if self.when(self.passes):
            self.raised += 1
            raise self.error()

    @contextmanager
    def at(self, where: str, model: Any) -> Iterator[None]:
        """Hooked into the forward of layer 1, the loss, or the backward of layer 1, after layer 2's gradients."""
        layer = model.get_base_model().model.layers[1]
        if where == "forward":
            hook = layer.register_forward_pre_hook(lambda *_: self.visit() if torch.is_grad_enabled() else None)
        elif where == "backward":
            hook = layer.register_full_backward_hook(lambda *_: self.visit())
        else:
            with self._in_the_loss(model):
                yield
            return
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def _in_the_loss(self, model: Any) -> Iterator[None]:
        stock = trainer_module.fused_cross_entropy

        def fused_cross_entropy(*arguments: Any) -> Any:
            self.visit()
            return stock(*arguments)

        head = model.get_base_model().lm_head  # with whole logits the head runs: as near to the loss as a hook gets
        hook = head.register_forward_pre_hook(lambda *_: self.visit() if torch.is_grad_enabled() else None)
        trainer_module.fused_cross_entropy = fused_cross_entropy  # type: ignore[assignment]
        try:
            yield
        finally:
            trainer_module.fused_cross_entropy = stock  # type: ignore[assignment]
            hook.remove()


class Stumbles:
    """Stands in for an optimizer's own step: some calls take half of it, or nothing, and then run out of memory."""

    def __init__(self, optimizer: Any, stock: Callable[..., Any], failing: dict[int, str]) -> None:
        self.optimizer, self.stock, self.failing = optimizer, stock, failing
        self.calls = 0

    def __call__(self, closure: Any = None) -> Any:
        self.calls += 1
        how = self.failing.get(self.calls)
        if how is None:
            return self.stock(closure)
        if how == "half":
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            aside = [(p, p.grad) for p in parameters[len(parameters) // 2 :]]
            for parameter, _ in aside:
                parameter.grad = None
            self.stock(closure)
            for parameter, gradient in aside:
                parameter.grad = gradient
        raise torch.OutOfMemoryError(OOM_TEXT)


def stumbling(made: Made, failing: dict[int, str]) -> Made:
    create = made.trainer.create_optimizer

    def create_optimizer(model: Any = None) -> Any:
        optimizer = create(model)
        safe = made.trainer.safe_step
        assert safe is optimizer.step.safe
        if not isinstance(safe.stock, Stumbles):
            safe.stock = Stumbles(optimizer, safe.stock, failing)
        return optimizer

    made.trainer.create_optimizer = create_optimizer
    return made


def same_parameters(
    one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float = 1e-5, atol: float = 1e-7
) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(value, other[name]) for name, value in one.items())


@contextmanager
def cheap_collections() -> Iterator[None]:
    """One thread, and what is imported left out of garbage collections, which take half a second with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        torch.set_num_threads(threads)
