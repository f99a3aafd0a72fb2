"""A traced run as a ledger: the same answer as `core.ledger.estimate`, from the real libraries."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Any

from vramplan.core.caps import MARGIN
from vramplan.core.expandable import allocator
from vramplan.core.ledger import LABELS, step_lines
from vramplan.core.types import GpuProfile, Ledger, Line, ModelSpec, Peak, PhasePeak, Resident, RunSpec
from vramplan.trace import known
from vramplan.trace import model as models
from vramplan.trace.unrolling import STEP, Traced, survives, traced

TRACED_LABELS = LABELS | {
    "weights.nf4": "4-bit weights (NF4)",
    "weights.constants": "quantisation constants",
    "weights.embeddings": "input embedding",
    "weights.lm_head": "output head",
    "weights.other": "everything not quantised",
    "adapter.lora": "LoRA adapter",
    "optimizer.state": "optimizer state",
    "workspace.libraries": LABELS["workspace.cublas"],
}
RUNGS = 6  # caps tried between what is pinned and what is reserved, native allocator


def estimate(
    config: dict[str, Any], spec: ModelSpec | None, run: RunSpec, gpu: GpuProfile, *, full_depth: bool = False
) -> Ledger:
    """What every byte of `run` will be, for any causal language model that transformers knows.

    `config` is the model's config.json, `spec` our description of it where there is one. Raises Unplannable for an
    architecture that transformers does not know, targets that PEFT refuses and an operation that `known` does not list.
    """
    # as `core.ledger.estimate`: with the native allocator, the layout of a model built layer by layer
    built = replace(run, random_weights=run.random_weights or run.levers.allocator == "native")
    result = traced(config, built, gpu, spec=spec, full_depth=full_depth)
    kind = run.levers.allocator
    least = minimum_bytes(result, kind)
    reserved = max(result.reserved_bytes, result.loading_reserved_bytes)
    loading = max(result.peak[phase] for phase in ("load", "prepare", "lora"))
    needed = max(least, min(int(loading * (1 + MARGIN[kind])), reserved))
    reserved = max(reserved, needed)
    return Ledger(
        model=spec or described(config),
        run=run,
        trainable_parameters=trainable(result),
        total_parameters=result.parameters,
        resident=Resident(
            loaded_bytes=result.after["load"],
            prepared_bytes=result.after["prepare"],
            with_lora_bytes=result.after["lora"],
        ),
        peak=Peak(
            allocated_bytes=result.allocated_bytes,
            phase=result.phase,
            reserved_bytes=reserved,
            minimum_bytes=needed,
            device_bytes=needed + gpu.context_bytes,
        ),
        phases=tuple(PhasePeak(name=name, peak_bytes=result.peak[name]) for name in ("load", *STEP)),
        lines=_lines(result, least, needed, gpu),
        warnings=_warnings(result, spec, gpu, loading),
    )


def described(config: dict[str, Any]) -> ModelSpec:
    """What transformers' own config object says of a model that we have no description of."""
    text = models.configuration(config, None)
    heads = text.num_attention_heads
    return ModelSpec(
        name=str(config.get("_name_or_path") or text.model_type),
        architecture=str((config.get("architectures") or [type(text).__name__])[0]),
        model_type=text.model_type,
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocab_size=text.vocab_size,
        max_position_embeddings=getattr(text, "max_position_embeddings", None) or 2**20,
        tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        source="transformers",
    )


def trainable(result: Traced) -> int:
    """Parameters of the adapter at full depth."""
    layers = [len(result.unrolled.real_layers(layer)) for layer in range(result.unrolled.played)]
    return sum(n * (layers[layer] if layer >= 0 else 1) for layer, n in result.adapter)


def minimum_bytes(result: Traced, kind: str) -> int:
    """The smallest cap that the run survives, with the margin of `core.ledger`."""
    most = result.reserved_bytes
    pinned = result.pinned_bytes
    if kind == "expandable":
        return int(pinned * (1 + MARGIN[kind]))
    low = max(result.allocated_bytes, pinned)
    for rung in range(RUNGS):
        cap = low + (most - low) * rung // RUNGS
        if survives(result, allocator(kind, cap)):
            return min(int(cap * (1 + MARGIN[kind])), most)
    return most


def _lines(result: Traced, least: int, needed: int, gpu: GpuProfile) -> tuple[Line, ...]:
    lines = step_lines(result.unrolled, result.live, TRACED_LABELS)
    order = ("weights", "adapter", "optimizer", "workspace", "activations", "loss")
    lines.sort(key=lambda line: (order.index(line.key.split(".")[0]), -line.bytes))
    allocated = result.allocated_bytes
    lines += [
        Line(key="overhead.rounding", label="tails of blocks too small to split",
             bytes=allocated - sum(line.bytes for line in lines), formula="allocator replay minus the tensors",
             group="overhead"),
        Line(key="overhead.allocator", label="fragmentation that cannot be avoided", bytes=least - allocated,
             formula="smallest cap that the replay survives, with a margin", basis="modelled", group="overhead"),
        Line(key="overhead.loading", label="loading needs more than training", bytes=needed - least,
             formula="peak of loading and preparing, with a margin", basis="modelled", group="overhead"),
        Line(key="overhead.context", label="CUDA context", bytes=gpu.context_bytes,
             formula="per process and card", basis=gpu.context_basis, group="overhead"),
    ]  # fmt: skip
    return tuple(line for line in lines if line.bytes)


def _warnings(result: Traced, spec: ModelSpec | None, gpu: GpuProfile, loading: int) -> tuple[str, ...]:
    out = []
    others = [
        f"{name} {version(name)}"
        for name, tested in known.TESTED.items()
        if not version(name).startswith(tested + ".") and version(name) != tested
    ]
    if others:
        tested = ", ".join(f"{name} {number}" for name, number in known.TESTED.items())
        out.append(f"traced with {', '.join(others)}, which the tracer was not tested with ({tested})")
    if result.plain_bytes:
        out.append(f"{result.plain_bytes / 2**30:.2f} GiB of layer weights could not be quantised and stay bf16")
    if loading > result.allocated_bytes:
        out.append("loading or preparing, not training, is the highest point of this run")
    if gpu.compute_capability < (8, 0):
        out.append(f"{gpu.name} has no bf16 tensor cores: this plan assumes bf16")
    return tuple(out)
