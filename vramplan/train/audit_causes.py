"""What a loaded and prepared model shows of the causes in docs/oom-playbook.md: 2, 3, 9, 10, 11, 13 and 14.

Each check says what it sees, what that costs in bytes, and the fix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from vramplan.core.ledger import estimate
from vramplan.core.resident import constants_bytes, moments, packed_bytes, state_tensor_bytes
from vramplan.core.types import Ledger, RunSpec, Unplannable
from vramplan.train.lora import checkpoint_every
from vramplan.train.meter import distinct, model_tensors

SMALL_BYTES = 16 * 2**20  # unquantised weights below this are not worth a warning


@dataclass(frozen=True)
class Loaded:
    """A model with its adapter, and what is known of it. `float32`: `float32_names` of it before it was prepared."""

    model: Any
    run: RunSpec
    device: torch.device
    prediction: Ledger | None
    float32: frozenset[str]


@dataclass(frozen=True)
class Finding:
    """Something that costs memory without need. `cause` is its number in the playbook, None for none of those.

    `bytes` is what the fix would save, None where nothing counts it.
    """

    cause: int | None
    key: str
    bytes: int | None
    message: str
    fix: str


def float32_names(model: nn.Module) -> frozenset[str]:
    """The parameters that are float32 now. To be asked right after loading: preparing may upcast more."""
    return frozenset(name for name, p in model.named_parameters() if p.dtype == torch.float32)


# ----------------------------------------------------------------------------------------------- 2: checkpointing
def checkpointing(loaded: Loaded) -> Iterator[Finding]:
    problem = checkpointing_problem(loaded.model, loaded.run)
    if problem:
        fix = "model.gradient_checkpointing_enable(), with enable_input_require_grads() where it is reentrant"
        yield Finding(2, "checkpointing", _bytes_without(loaded), f"checkpointing {problem}", fix)


def checkpointing_problem(model: Any, run: RunSpec) -> str:
    """Why the checkpointing that the run asks for does nothing; "" if it works, or none is asked for."""
    if not checkpoint_every(run.levers.checkpointing):
        return ""
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    if not layers:
        return "is off, though the run asks for it"
    function = getattr(layers[0], "_gradient_checkpointing_func", None)
    ours = getattr(function, "needs_no_input_gradient", False)
    if ours or getattr(function, "keywords", {}).get("use_reentrant") is False:
        return ""
    embedding = model.get_input_embeddings()  # reentrant checkpoints have a backward only if their input needs one
    with torch.enable_grad():
        output = embedding(torch.zeros((1, 1), dtype=torch.long, device=next(embedding.parameters()).device))
    return "" if output.requires_grad else "is on but inactive: no layer's input requires a gradient"


def _bytes_without(loaded: Loaded) -> int | None:
    """What the peak grows by without checkpointing."""
    if loaded.prediction is None:
        return None
    run = loaded.run
    bare = replace(run, levers=replace(run.levers, checkpointing="none", checkpoint_offload=False))
    try:
        return estimate(loaded.prediction.model, bare).peak.allocated_bytes - loaded.prediction.peak.allocated_bytes
    except Unplannable:  # traced rather than described
        return None


# -------------------------------------------------------------------------------------------- 3, 11: float32 weights
def float32_weights(loaded: Loaded) -> Iterator[Finding]:
    """What came from the file in float32, and what preparing made so."""
    named = ((_plain(n), p) for n, p in loaded.model.named_parameters() if not p.requires_grad)
    wide = [(n, p) for n, p in named if p.dtype == torch.float32]
    from_file = [p for n, p in wide if n in loaded.float32 and p.dim() >= 2]
    upcast = [p for n, p in wide if n not in loaded.float32]
    if from_file:
        text = f"{len(from_file)} matrices were loaded in float32"
        yield Finding(11, "base_float32", _bytes(from_file) // 2, text, "load the base with dtype=bfloat16")
    outer = {id(p) for module in _outer(loaded.model) for p in module.parameters()}
    if any(id(p) in outer for p in upcast):
        text = "embeddings and head were made float32 (prepare_model_for_kbit_training)"
        yield Finding(3, "upcast", _bytes(upcast) // 2, text, "--upcast none, as the lean recipe has it")


# ------------------------------------------------------------------------------------------------ 9: not quantised
def not_quantised(loaded: Loaded) -> Iterator[Finding]:
    """Experts, and Linears of another class (Falcon's), which transformers passes over as well."""
    found: dict[str, list[Tensor]] = {"experts": [], "plain": []}
    for key, tensor, _ in distinct(model_tensors(loaded.model), loaded.device):
        if key == "weights.experts" or (key == "weights.other" and tensor.dim() >= 3):
            found["experts"].append(tensor)
        elif key == "weights.plain":
            found["plain"].append(tensor)
    any_4bit = any(isinstance(p, bnb.nn.Params4bit) for p in loaded.model.parameters())
    experts, plain = ([] if any_4bit and _bytes(t) <= SMALL_BYTES else t for t in found.values())
    if experts:
        text = f"{len(experts)} weights of experts (3-D) are not quantised and stay {_dtype(experts)}"
        fix = "a model without experts, or room for them"
        yield Finding(9, "experts", _saved_by_4bit(experts, loaded.run), text, fix)
    if plain:
        text = f"{len(plain)} Linears are of a class that is not quantised and stay {_dtype(plain)}"
        yield Finding(None, "not_quantised", _saved_by_4bit(plain, loaded.run), text, "another model, or room for them")


def _saved_by_4bit(tensors: list[Tensor], run: RunSpec) -> int:
    small = (packed_bytes(t.numel()) + constants_bytes(t.numel(), run.double_quant) for t in tensors)
    return _bytes(tensors) - sum(small)


# ------------------------------------------------------------------------------- 10, 13, 14: the other named causes
def compute_dtype(loaded: Loaded) -> Iterator[Finding]:
    layers = (m for m in loaded.model.modules() if isinstance(m, bnb.nn.Linear4bit))
    wide = [m for m in layers if m.compute_dtype == torch.float32]
    if wide:
        largest = max(module.in_features * module.out_features for module in wide)
        text = f"{len(wide)} 4-bit layers compute in float32: a dequantised weight takes twice the memory"
        yield Finding(10, "float32_compute", 2 * largest, text, "bnb_4bit_compute_dtype=torch.bfloat16")


def trained_embeddings(loaded: Loaded) -> Iterator[Finding]:
    big: dict[int, Tensor] = {}
    for module in _outer(loaded.model):
        largest = max(p.numel() for p in module.parameters())  # not the small matrices of LoRA on an embedding
        big |= {id(p): p for p in module.parameters() if p.requires_grad and p.numel() == largest}
    if big:
        optimizer = loaded.run.levers.optimizer
        state = sum(moments(optimizer) * state_tensor_bytes(optimizer, p.numel()) for p in big.values())
        text = "embeddings or head are trained: whole gradients and optimizer state for the vocabulary"
        fix = "freeze them; for new tokens PEFT has trainable_token_indices"
        yield Finding(13, "trained_embeddings", _bytes(big.values()) + state, text, fix)


def device_map(loaded: Loaded) -> Iterator[Finding]:
    places = {str(place) for place in (getattr(loaded.model, "hf_device_map", None) or {}).values()}
    if len(places) > 1:
        elsewhere = [p for p in loaded.model.parameters() if p.device != loaded.device]
        text = f"the model is split over {', '.join(sorted(places))} (device_map)"
        yield Finding(14, "device_map", _bytes(elsewhere), text, "one device per process, or FSDP")


CHECKS: tuple[Callable[[Loaded], Iterator[Finding]], ...] = (
    checkpointing, float32_weights, not_quantised, compute_dtype, trained_embeddings, device_map,
)  # fmt: skip


def _outer(model: Any) -> list[nn.Module]:
    """Input embedding and output head, where there are such."""
    return [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _dtype(tensors: list[Tensor]) -> str:
    return str(tensors[0].dtype).removeprefix("torch.")


def _plain(name: str) -> str:
    """A parameter's name as it was before PEFT wrapped the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
