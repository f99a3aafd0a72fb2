"""The schedule in transformers' words, and what of it can be refused before a model is loaded."""

from __future__ import annotations

import json
from typing import Any

import torch
import transformers
from transformers import TrainingArguments
from transformers.trainer_utils import enable_full_determinism

from vramplan.core.types import RunSpec, Schedule
from vramplan.errors import InputError
from vramplan.train.outcome import first_line

ON_PLATEAU = ("reduce_lr_on_plateau", "greedy")  # they follow the held-out loss
BEST = "eval_loss"  # the one metric there is; lower is better
ALL_STEPS = 1 - 1e-9  # a warm-up of 1 would be one step, not the whole run
SGD_ARGUMENTS = ("momentum", "dampening", "weight_decay", "nesterov")


def schedule_arguments(run: RunSpec) -> dict[str, Any]:
    """`run.schedule` as keywords of `TrainingArguments`.

    Two things stay out: logs, which `Reporter` asks for, and `load_best_model_at_end`, which `Evaluating` does without
    transformers' demand that saves and evaluations fall together.
    """
    s = run.schedule
    evaluates = s.eval_strategy != "no"
    return {
        "max_steps": -1 if s.max_steps is None else s.max_steps,
        "num_train_epochs": s.num_train_epochs,
        "learning_rate": s.learning_rate,
        "lr_scheduler_type": s.lr_scheduler_type,
        "lr_scheduler_kwargs": scheduler_keywords(s),
        "warmup_steps": min(s.warmup_ratio, ALL_STEPS) if s.warmup_steps is None else s.warmup_steps,
        "weight_decay": s.weight_decay,
        "max_grad_norm": s.max_grad_norm,
        "adam_beta1": s.adam_beta1,
        "adam_beta2": s.adam_beta2,
        "adam_epsilon": s.adam_epsilon,
        "optim_args": s.optim_args,
        "seed": s.seed,
        "data_seed": s.data_seed,
        "full_determinism": s.full_determinism,
        "logging_strategy": "no",
        "logging_steps": s.logging_steps,
        "save_strategy": s.save_strategy if s.save_steps > 0 else "no",
        "save_steps": max(s.save_steps, 1),
        "save_total_limit": s.save_total_limit or None,
        "eval_strategy": s.eval_strategy,
        "eval_steps": (s.eval_steps or max(s.save_steps, 1)) if evaluates else None,
        "per_device_eval_batch_size": s.per_device_eval_batch_size or run.micro_batch_size,
        "metric_for_best_model": BEST if evaluates else None,
        "greater_is_better": False if evaluates else None,
        "report_to": list(s.report_to) or "none",
        "run_name": s.run_name,
    }


def seed_everything(schedule: Schedule) -> None:
    """Python, NumPy and torch, as transformers does it; with `full_determinism` deterministic kernels too."""
    (enable_full_determinism if schedule.full_determinism else transformers.set_seed)(schedule.seed)


def scheduler_keywords(schedule: Schedule) -> dict[str, Any] | None:
    """`lr_scheduler_kwargs` as a dict. InputError if it is not a JSON object."""
    if schedule.lr_scheduler_kwargs is None:
        return None
    try:
        value = json.loads(schedule.lr_scheduler_kwargs)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(
            f"--lr-scheduler-kwargs {schedule.lr_scheduler_kwargs!r} is not a JSON object", "like '{\"min_lr\": 1e-5}'"
        )
    return value


def check_schedule(run: RunSpec) -> None:
    """InputError for a schedule, or optimizer arguments, that would fail once the model is loaded."""
    s = run.schedule
    _check_evaluations(s)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=s.learning_rate)
    keywords = scheduler_keywords(s)
    try:
        transformers.get_scheduler(s.lr_scheduler_type, optimizer, 1, 100, scheduler_specific_kwargs=keywords)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the schedule {s.lr_scheduler_type} cannot be made: {first_line(error)}", "see --lr-scheduler-kwargs"
        ) from error
    if s.optim_args is not None:
        _check_optim_args(run.levers.optimizer, s.optim_args)


def _check_optim_args(optimizer: str, text: str) -> None:
    """transformers hands them to SGD, leaves them out for the others, and fails late where one cannot be read."""
    if optimizer != "sgd":
        raise InputError(f"--optim-args has no effect on {optimizer}", "leave it out: betas and epsilon are --adam-*")
    names = [part.partition("=")[0] for part in text.replace(" ", "").split(",")]
    unknown = [name for name in names if name not in SGD_ARGUMENTS]
    if unknown:
        raise InputError(f"--optim-args: sgd has no argument {unknown[0]!r}", f"one of {', '.join(SGD_ARGUMENTS)}")
    try:
        arguments = TrainingArguments(output_dir="unused", optim=optimizer, optim_args=text, report_to="none")
        transformers.Trainer.get_optimizer_cls_and_kwargs(arguments)
    except ValueError as error:
        raise InputError(f"--optim-args {text!r} cannot be read: {first_line(error)}", "like momentum=0.9") from error


def _check_evaluations(s: Schedule) -> None:
    """What needs evaluations during training, or checkpoints, is refused without them."""
    needs = {
        "--load-best-model-at-end": s.load_best_model_at_end,
        "--early-stopping-patience": s.early_stopping_patience is not None,
        "--save-strategy best": s.save_strategy == "best",
        f"--lr-scheduler-type {s.lr_scheduler_type}": s.lr_scheduler_type in ON_PLATEAU,
    }
    asked = [flag for flag, wanted in needs.items() if wanted]
    if asked and s.eval_strategy == "no":
        raise InputError(f"{asked[0]} needs evaluations during training", "add --eval-strategy steps or epoch")
    if s.load_best_model_at_end and s.save_strategy == "no":
        raise InputError("--load-best-model-at-end needs checkpoints", "leave out --save-strategy no")


def check_held_out(schedule: Schedule, held_out: Any) -> None:
    """InputError if there is nothing to evaluate on during training."""
    if schedule.eval_strategy != "no" and held_out is None:
        flag = f"--eval-strategy {schedule.eval_strategy}"
        raise InputError(f"{flag} needs rows that are held out", "for instance --eval-fraction 0.05")
