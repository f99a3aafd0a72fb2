"""The loaded model made trainable: casts, checkpointing, adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from vramplan.core import experts
from vramplan.core.fused import SKIPS_LAST
from vramplan.core.types import Levers, Lora
from vramplan.errors import InputError
from vramplan.train.fast.install import Fused, install, why_not

Warn = Callable[[str], None]
NO_OFFLOAD = "checkpoint offload has no effect on a CPU: the checkpoints are in host memory already"


def prepare(model: Any, levers: Levers, device: torch.device, warn: Warn) -> Any:
    """Freeze the model, cast what `levers.upcast` says to float32, switch checkpointing on.

    "all" is `peft.prepare_model_for_kbit_training` itself; "norms" casts only the norms; "none" nothing.
    """
    if levers.upcast == "all":  # checkpointing is switched on below: PEFT cannot pass on every_n_layers
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model.requires_grad_(False)
        if levers.upcast == "norms":
            for module in model.modules():
                if "norm" in type(module).__name__.lower():
                    module.to(torch.float32)
    checkpoint_every(levers.checkpointing)  # says what is wrong with it before anything is done
    if levers.kernels == "stock":
        checkpoint(model, levers, device, warn)
    return model


def checkpoint_every(checkpointing: str) -> int:
    """ "none" -> 0, "all" -> 1, "every-K" -> K."""
    if checkpointing in ("none", "all"):
        return int(checkpointing == "all")
    prefix, _, number = checkpointing.partition("-")
    if prefix != "every" or not number.isdecimal() or int(number) < 1:
        raise InputError(f"checkpointing {checkpointing!r} is none of none, all, every-K")
    return int(number)


def checkpoint(model: Any, levers: Levers, device: torch.device, warn: Warn) -> None:
    """Switch transformers' own checkpointing on, as the levers say."""
    every, offload = checkpoint_every(levers.checkpointing), levers.checkpoint_offload
    if not every:
        return
    if offload and device.type == "cpu":
        warn(NO_OFFLOAD)
        offload = False
    if every > 1 and not any(isinstance(m, GradientCheckpointingLayer) for m in model.modules()):
        raise InputError(
            f"{type(model).__name__} cannot checkpoint every {every}th layer", "--checkpointing all or none work"
        )
    try:  # also makes the embeddings' output require a gradient, without which checkpoints have no backward
        model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=every, offload=offload)
    except ValueError as error:
        raise InputError(str(error), "train with --checkpointing none") from None


def fuse(model: Any, levers: Levers, device: torch.device, warn: Warn) -> Fused | None:
    """Fuse the layers of the wrapped model, if the levers say so and it can be done; else its own checkpointing."""
    if levers.kernels == "stock":
        return None
    base = model.get_base_model()
    reason = why_not(model, levers, device)
    if reason:
        warn(f"the layers are not fused: {reason}")
        checkpoint(base, levers, device, warn)
        return None
    if levers.checkpoint_offload and device.type == "cpu":
        warn(NO_OFFLOAD)
    text = base.config.get_text_config()
    return install(model, levers, device, text.model_type in SKIPS_LAST, stochastic(base))


def stochastic(model: nn.Module) -> bool:
    """Whether a forward in training draws random numbers."""
    return bool(getattr(model.config.get_text_config(), "attention_dropout", 0)) or any(
        isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()
    )


def add_lora(model: Any, lora: Lora) -> Any:
    """The model wrapped by PEFT, its LoRA parameters the only trainable ones."""
    targets: str | list[str] = "all-linear" if lora.targets == ("all-linear",) else list(lora.targets)
    if isinstance(targets, list):
        check_targets(model, targets)
    elif any(getattr(model.config, name, None) for name in experts.COUNTS):
        targets = linear_names(model)  # PEFT 0.21 would adapt experts and router too (`_convert_peft_config_moe`)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"PEFT refuses this adapter: {error}") from error
    dtype = getattr(torch, lora.dtype, None)
    if dtype not in (torch.float32, torch.bfloat16):
        raise InputError(f"LoRA dtype {lora.dtype!r} is neither float32 nor bfloat16")
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return wrapped


def linear_names(model: Any) -> list[str]:
    """The last parts of the names of every linear layer but the output embedding: what all-linear means."""
    head = model.get_output_embeddings()
    linears = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    return sorted({n.rpartition(".")[2] for n in linears})


def check_targets(model: nn.Module, targets: list[str]) -> None:
    """InputError if a target names no linear layer; PEFT itself is content when any one of them does."""
    names = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
    lost = [t for t in targets if not any(n == t or n.endswith("." + t) for n in names)]
    if lost:
        known = ", ".join(sorted({n.rpartition(".")[2] for n in names}))
        patterns = any(set(target) & set("*+?[](){}|^$\\") for target in lost)
        raise InputError(
            f"no linear layer of {type(model).__name__} is called {', '.join(lost)}",
            f"{'names, not patterns; ' if patterns else ''}there are: {known}",
        )
