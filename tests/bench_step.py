"""Predicted against measured peaks, beside public estimators: python tests/bench_step.py [--no-trace] [--write FILE]

Prints one table: for every tool the error of the peak of `torch.cuda.max_memory_allocated()` over the rows of
docs/measurements/h200-step-memory.jsonl, the error of its own total, and the time of one estimate in process. A peer
that is not installed is left out with a line; `--write` keeps the raw rows.

A peer is asked through its documented Python function, with the settings nearest to the case; `Answer.note` says what
it could not be told. Its tensors are its total without what it adds for context, fragmentation and safety.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from measured import MIB, h200, model, rows, step_run

import vramplan
from vramplan.core.architecture import total_parameters
from vramplan.core.ledger import estimate
from vramplan.sources.hf_config import raw_config

Row = dict[str, Any]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CONSUMER_GIB = 16.0  # the card for which canifinetune's share for the context was set
REPEATED = 5


class NotSaid(Exception):
    """The tool refuses this case; the message is why."""


@dataclass
class Answer:
    """MiB: `peak` is the sum of tensors, `total` what the tool calls its total (None: no such number)."""

    peak: float
    total: float | None = None
    note: str = ""


# ---------------------------------------------------------------------------------------------------------- ours
def closed_form(row: Row) -> Answer:
    found = estimate(model(row["model"]), step_run(row), h200()).peak
    return Answer(found.allocated_bytes / MIB, (found.reserved_bytes + h200().context_bytes) / MIB)


def trace(row: Row) -> Answer:
    from vramplan.trace.unrolling import traced

    found = traced(raw_config(row["model"]), step_run(row), h200())
    return Answer(found.allocated_bytes / MIB, (found.reserved_bytes + h200().context_bytes) / MIB)


# --------------------------------------------------------------------------------------------------------- peers
def unsaid(row: Row, dropout: bool = False, accumulation: bool = False) -> str:
    """What of the case neither peer can be told."""
    parts = [] if row["prepare_for_kbit"] else ["always prepares for k-bit training"]
    parts += ["takes no dropout"] if row["lora_dropout"] and dropout else []
    parts += ["counts no second micro-batch"] if row["accumulation"] > 1 and accumulation else []
    return "; ".join(parts)


def fitcheck(row: Row) -> Answer:
    """fitcheck-llm: `estimate(ModelConfig, TrainingConfig, GpuSpec)`, with the true number of parameters."""
    import fitcheck as tool
    from fitcheck.gpu_db import get_gpu

    spec = model(row["model"])
    if not spec.gated_mlp:
        raise NotSaid("its Hub reader refuses models whose MLP has no gate (parameter count off by over 2 %)")
    asked = tool.ModelConfig(
        name=spec.name,
        num_params=total_parameters(spec),
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        head_dim=spec.head_dim,
        tie_word_embeddings=spec.tie_word_embeddings,
    )
    training = tool.TrainingConfig(
        precision="bf16",
        quantization="nf4",
        double_quant=row["double_quant"],
        optimizer="adam8bit" if "8bit" in row["optim"] else "adamw",
        batch_size=row["batch"],
        seq_len=row["seq"],
        lora_rank=row["lora_r"],
        lora_targets=LINEAR if row["lora_targets"] == "all-linear" else row["lora_targets"],
        grad_checkpoint=row["gradient_checkpointing"],
        flash_attn=row["attn"] != "eager",
        grad_accum_steps=row["accumulation"],
    )
    found = tool.estimate(asked, training, get_gpu("h200"))
    return Answer(found.total_mib - found.overhead_mib, found.total_mib, unsaid(row, dropout=True, accumulation=True))


def canifinetune(row: Row) -> Answer:
    """canifinetune: `estimate(EstimateRequest)`, the model given as an override with its true number of parameters."""
    from canifinetune.estimator import EstimateRequest
    from canifinetune.estimator import estimate as ask

    spec = model(row["model"])
    shape = {
        "family": spec.model_type,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "intermediate_size": spec.intermediate_size,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
        "total_params": total_parameters(spec),
    }
    request = EstimateRequest(
        model_id=f"{spec.name}-by-its-shape",
        method="qlora",
        override=shape,
        use_network=False,
        gpu_vram_gb=CONSUMER_GIB,
        quantization="nf4_double_quant" if row["double_quant"] else "nf4",
        seq_len=row["seq"],
        micro_batch_size=row["batch"],
        gradient_accumulation_steps=row["accumulation"],
        lora_rank=row["lora_r"],
        lora_dropout=row["lora_dropout"],
        lora_target_scope="all_linear" if row["lora_targets"] == "all-linear" else "attention",
        optimizer=row["optim"],
        gradient_checkpointing=row["gradient_checkpointing"],
        attention_implementation=row["attn"],
    )
    try:
        memory = ask(request).memory
    except ValueError as error:
        raise NotSaid(str(error).splitlines()[0]) from error
    total = (memory.total_estimated_gb - memory.safety_margin_gb) * 1024
    note = unsaid(row)
    if spec.head_dim * spec.num_heads != spec.hidden_size:
        note = "; ".join(filter(None, [note, "takes no head_dim"]))
    return Answer(total - memory.cuda_overhead_gb * 1024, total, note)


def qmemcalc(row: Row) -> Answer:
    """qmemcalc: `estimate_memory(...)` on a folder that holds the config; its one number is a total in MB of 10^6."""
    from qmemcalc import estimate_memory

    spec = model(row["model"])
    known = {"adamw_torch": "adamw"}
    if row["optim"] != "adamw_torch":
        known[row["optim"]] = "paged_adamw_32bit"  # it has no 8-bit optimizer
    with contextlib.redirect_stdout(io.StringIO()):
        found = estimate_memory(
            model_name=config_folder(row["model"]),
            batch_size=row["batch"],
            seq_len=row["seq"],
            precision="bf16",
            quantization="4bit",
            optimizer=known[row["optim"]],
            num_trainable_params=row["trainable"],
            hidden_size=spec.hidden_size,
            num_layers=spec.num_layers,
            gradient_checkpointing=row["gradient_checkpointing"],
        )
    total = found["total_MB"] * 1e6 / MIB
    return Answer(total - found["buffers_MB"] * 1e6 / MIB, total, "takes no vocabulary, targets or attention")


@cache
def config_folder(name: str) -> str:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(raw_config(name)))
    return str(folder)


# --------------------------------------------------------------------------------------------------------- table
@dataclass
class Tool:
    name: str
    package: str
    ask: Callable[[Row], Answer]
    meant: Callable[[Row], float]  # what its total stands for, measured, MiB
    once: bool = False  # too slow to be timed several times


def process_mib(row: Row) -> float:
    return row["mib"]["reserved"] + h200().context_bytes / MIB


def reserved_mib(row: Row) -> float:
    return row["mib"]["reserved"]


TOOLS = [
    Tool("vramplan", "", closed_form, process_mib),
    Tool("vramplan, trace", "torch", trace, process_mib, once=True),
    Tool("fitcheck-llm", "fitcheck-llm", fitcheck, process_mib),
    Tool("canifinetune", "canifinetune", canifinetune, reserved_mib),
    Tool("qmemcalc", "qmemcalc", qmemcalc, reserved_mib),
]


def installed(tool: Tool) -> str | None:
    try:
        return vramplan.__version__ if tool.package in ("", "torch") else version(tool.package)
    except PackageNotFoundError:
        return None


def answers(tool: Tool, number: str) -> Iterator[dict[str, Any]]:
    """One raw row per case."""
    for at, row in enumerate(rows("h200-step-memory.jsonl")):
        out = {"tool": tool.name, "version": number, "row": at, "model": row["model"],
               "measured_peak_mib": row["mib"]["peak"], "measured_total_mib": round(tool.meant(row), 2)}  # fmt: skip
        try:
            if not tool.once or at == 0:
                tool.ask(row)  # imports, caches
            took = []
            for _ in range(1 if tool.once else REPEATED):
                begun = time.perf_counter()
                found = tool.ask(row)
                took.append(time.perf_counter() - begun)
        except NotSaid as refused:
            yield {**out, "refused": str(refused)}
            continue
        total = None if found.total is None else round(found.total, 2)
        yield {**out, "peak_mib": round(found.peak, 2), "total_mib": total,
               "ms": round(1e3 * statistics.median(took), 3), "note": found.note}  # fmt: skip


def summary(name: str, found: list[dict[str, Any]]) -> str:
    said = [r for r in found if "refused" not in r]
    cells = [name, f"{len(said)} of {len(found)}"]
    for kind in ("peak", "total"):
        errors = [r[f"{kind}_mib"] / r[f"measured_{kind}_mib"] - 1 for r in said]
        mean = sum(map(abs, errors)) / len(errors)
        cells += [f"{mean:.2%}", f"{min(errors):+.2%} to {max(errors):+.2%}"]
    cells.append(f"{statistics.median(r['ms'] for r in said):.3g}")
    return "| " + " | ".join(cells) + " |"


def main(words: list[str]) -> None:
    target = Path(words[words.index("--write") + 1]) if "--write" in words else None
    print("| tool | rows answered | peak, mean error | worst | its total, mean error | worst | ms an estimate |")
    print("|---|---|---|---|---|---|---|")
    raw: list[dict[str, Any]] = []
    missing = []
    for tool in TOOLS:
        number = installed(tool)
        if number is None:
            missing.append(tool.package)
            continue
        if tool.once and "--no-trace" in words:
            continue
        found = list(answers(tool, number))
        raw += found
        print(summary(f"{tool.name} {number}", found), flush=True)
    for name in missing:
        print(f"\n{name} is not installed: left out (pip install {name})")
    if target is not None:
        target.write_text("".join(json.dumps(r) + "\n" for r in raw))


if __name__ == "__main__":
    main(sys.argv[1:])
