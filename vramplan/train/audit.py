"""After loading and preparing: what is really there, by kind and dtype, against the plan."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vramplan.core.types import Ledger, Plan
from vramplan.sources import records
from vramplan.train.audit_causes import CHECKS, Loaded
from vramplan.train.meter import LABELS, distinct, model_tensors


def read_prediction(run_dir: Path) -> Ledger | None:
    """What the launcher predicted for this run; None if it wrote nothing."""
    if (run_dir / "prediction.json").is_file():
        return records.read_json(run_dir / "prediction.json", Ledger)
    if (run_dir / "plan.json").is_file():
        return records.read_json(run_dir / "plan.json", Plan).ledger
    return None


def audit(loaded: Loaded) -> dict[str, Any]:
    """The `audit` event: `rows` by kind, which add up to `counted_bytes`, and `findings`.

    `allocated_bytes` is what torch counts on a card; what it has more than the rows belongs to no module.
    """
    rows = _rows(loaded)
    event: dict[str, Any] = {"event": "audit", "rows": rows, "counted_bytes": sum(row["bytes"] for row in rows)}
    if loaded.prediction is not None:
        event["planned_bytes"] = sum(row["planned_bytes"] for row in rows)
    if loaded.device.type == "cuda":
        event["allocated_bytes"] = torch.cuda.memory_allocated(loaded.device)
    return event | {"findings": [asdict(finding) for check in CHECKS for finding in check(loaded)]}


def _rows(loaded: Loaded) -> list[dict[str, Any]]:
    """One row a kind; a kind that only the plan has stands there with nothing counted."""
    sizes: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for key, tensor, size in distinct(model_tensors(loaded.model), loaded.device):
        sizes[key][str(tensor.dtype).removeprefix("torch.")] += size
    planned = {line.key: line.bytes for line in loaded.prediction.lines} if loaded.prediction else {}
    keys = [key for key in LABELS if key.startswith("weights.") or key == "adapter.lora"]
    return [
        {
            "key": key,
            "label": LABELS[key],
            "dtypes": dict(sizes[key]),
            "bytes": sum(sizes[key].values()),
            "planned_bytes": planned.get(key, 0) if loaded.prediction else None,
        }
        for key in keys
        if sizes[key] or planned.get(key)
    ]
