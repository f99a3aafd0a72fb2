"""The rows measured on an H200 (docs/measurements), as runs that the planner can play."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from vramplan.core.types import GpuProfile, Levers, Lora, ModelSpec, RunSpec
from vramplan.sources.hf_config import load_model
from vramplan.sources.profiles import load_gpu
from vramplan.sources.records import decode

FOLDER = Path(__file__).parent.parent / "docs" / "measurements"
MIB = 2**20


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


@cache
def model(name: str) -> ModelSpec:
    return load_model(name)


@cache
def h200() -> GpuProfile:
    return load_gpu("h200")


def targets(row: dict[str, Any]) -> tuple[str, ...]:
    chosen = row["lora_targets"]
    return (chosen,) if isinstance(chosen, str) else tuple(chosen)


def step_run(row: dict[str, Any]) -> RunSpec:
    """The run of one row of h200-step-memory.jsonl: the stock recipe, random weights, native allocator."""
    return RunSpec(
        model=row["model"],
        micro_batch_size=row["batch"],
        seq_len=row["seq"],
        accumulation=row["accumulation"],
        lora=Lora(r=row["lora_r"], targets=targets(row), dropout=row["lora_dropout"]),
        double_quant=row["double_quant"],
        driver=row["driver"],
        random_weights=True,
        levers=Levers(
            upcast="all" if row["prepare_for_kbit"] else "none",
            loss="full",
            checkpointing="all" if row["gradient_checkpointing"] else "none",
            optimizer=row["optim"],
            attention=row["attn"],
            allocator="native",
        ),
    )


def trained(row: dict[str, Any]) -> tuple[RunSpec, dict[str, dict[str, int]]]:
    """The run of one row of h200-first-runs.jsonl (`vramplan train` itself), and its measured phases by name."""
    run = decode({"schema_version": 1, "type": "RunSpec", **row["run"]}, RunSpec)
    return run, {phase["name"]: phase for phase in row["measurement"]["phases"]}


# The one run on real text, whose batches are shorter than the length it was planned for.
TRAINED = [row for row in rows("h200-first-runs.jsonl") if row["name"] != "smol-train"]


def case_id(row: dict[str, Any]) -> str:
    parts = [
        row["model"],
        f"{row['batch']}x{row['seq']}",
        f"r{row['lora_r']}",
        row["optim"],
        row["attn"],
        row["driver"],
    ]
    parts += [] if row["gradient_checkpointing"] else ["no-checkpointing"]
    parts += [] if row["prepare_for_kbit"] else ["not-prepared"]
    parts += [] if row["double_quant"] else ["single-quant"]
    return "-".join(parts)
