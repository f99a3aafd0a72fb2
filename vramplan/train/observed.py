"""A trainer that somebody else has set up, read as a run: from its arguments, its model and the batches it plays."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vramplan.core.ledger import NO_CARD
from vramplan.core.types import OPTIMIZERS, GpuProfile, Levers, Lora, ModelSpec, RunSpec, Schedule, Unplannable
from vramplan.sources.foreign_fields import OPTIMIZER_ALIASES
from vramplan.sources.hf_config import parse_config

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
OUTER = ("embed", "lm_head", "wte", "embed_out")  # of a model: no Linear of a layer


@dataclass(frozen=True)
class Shape:
    """A micro-batch: rows, tokens of each, and whether some are padding."""

    rows: int
    tokens: int
    padded: bool = False

    @property
    def size(self) -> int:
        return self.rows * self.tokens


def observed(model: Any, args: Any, shape: Shape) -> tuple[ModelSpec, RunSpec]:
    """The model and the run that this is. Raises Unplannable, or InputError of a model's config, where it is no QLoRA
    run that is described here."""
    config = getattr(model, "peft_config", None)
    if not config:
        raise Unplannable("the model has no LoRA adapter of PEFT")
    base = model.get_base_model()
    settings = base.config.to_dict()
    name = str(settings.get("_name_or_path") or base.config._name_or_path or type(base).__name__)
    spec = parse_config(settings, name=name, source="the model in memory")
    if getattr(args, "n_gpu", 1) > 1:
        raise Unplannable("DataParallel is not described here", "start it with torchrun, or show it one card")
    gpus = int(args.world_size)
    run = RunSpec(
        model=name,
        micro_batch_size=shape.rows,
        seq_len=shape.tokens,
        accumulation=args.gradient_accumulation_steps,
        lora=_lora(model, config[model.active_adapter]),
        double_quant=_double_quant(base),
        recipe="peft",
        levers=_levers(base, args),
        padding=shape.padded,
        gpus=gpus,
        parallel="none" if gpus == 1 else "fsdp" if args.fsdp else "ddp",
        schedule=Schedule(seed=args.seed, learning_rate=args.learning_rate),
    )
    return spec, run


def _lora(model: Any, config: Any) -> Lora:
    targets = config.target_modules
    if isinstance(targets, str) or getattr(config, "use_dora", False):
        raise Unplannable("DoRA and target modules given as a pattern are not described here")
    names = {str(target).rpartition(".")[2] for target in targets}
    if any(name.startswith(OUTER) for name in names):
        raise Unplannable("an adapter of the vocabulary is not described here")
    dtypes = {parameter.dtype for name, parameter in model.named_parameters() if ".lora_A." in name}
    dtype = "float32" if torch.float32 in dtypes or not dtypes else "bfloat16"
    return Lora(r=config.r, alpha=int(config.lora_alpha), targets=tuple(sorted(names)), dropout=config.lora_dropout,
                dtype=dtype)  # fmt: skip


def _double_quant(base: nn.Module) -> bool:
    """Whether the constants of the 4-bit weights are quantised too."""
    states = [getattr(getattr(module, "weight", None), "quant_state", None) for module in base.modules()]
    found = next((state for state in states if state is not None), None)
    if found is None:
        raise Unplannable("the base is not quantised to 4 bits by bitsandbytes")
    return bool(found.nested)


def _levers(base: Any, args: Any) -> Levers:
    return Levers(
        upcast=_upcast(base),
        loss="fused" if args.use_liger_kernel or getattr(args, "loss_type", None) == "chunked_nll" else "full",
        checkpointing="all" if base.is_gradient_checkpointing else "none",
        optimizer=_optimizer(str(getattr(args.optim, "value", args.optim))),
        attention=_attention(str(base.config._attn_implementation)),
        allocator=_allocator(),
        kernels="stock",
    )


def _upcast(base: Any) -> str:
    """What of the unquantised parameters is float32; prepare_model_for_kbit_training makes all of them."""
    embedding = base.get_input_embeddings().weight
    norms = [p for name, p in base.named_parameters() if "norm" in name.lower() and "lora_" not in name]
    if embedding.dtype == torch.float32:
        return "all"
    return "norms" if any(p.dtype == torch.float32 for p in norms) else "none"


def _optimizer(name: str) -> str:
    plain = OPTIMIZER_ALIASES.get(name, name)
    if plain not in OPTIMIZERS:
        raise Unplannable(f"the optimizer {name} is not described here")
    return plain


def _attention(name: str) -> str:
    if name in ("sdpa", "eager"):
        return name
    if "flash" not in name:
        raise Unplannable(f"attention by {name} is not described here")
    return "flash_attention_2"


def _allocator() -> str:
    said = " ".join(os.environ.get(name, "") for name in ALLOCATOR_VARIABLES).replace(" ", "").lower()
    return "expandable" if "expandable_segments:true" in said else "native"


def card_of(device: torch.device) -> GpuProfile | None:
    """The card's chip and size as torch says them; None on a CPU."""
    if device.type != "cuda":
        return None
    about = torch.cuda.get_device_properties(device)
    return GpuProfile(
        key="live", name=about.name, total_bytes=about.total_memory, usable_bytes=about.total_memory,
        compute_capability=(about.major, about.minor), sm_count=about.multi_processor_count,
        context_bytes=NO_CARD.context_bytes, source="nvml",
    )  # fmt: skip
