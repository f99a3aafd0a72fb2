"""Core values as the JSON of `--json`. Its shape is a contract: fields are added, never renamed. No rich here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vramplan.core.types import SCHEMA_VERSION, GpuProfile, GpuVerdict, Ledger, Measurement, ModelSpec
from vramplan.report.compare import Pair, compare

Payload = dict[str, Any]


def estimate_payload(ledger: Ledger, verdicts: Sequence[GpuVerdict]) -> Payload:
    """The payload of `estimate --json`."""
    return {"schema_version": SCHEMA_VERSION, **asdict(ledger), "gpus": [asdict(verdict) for verdict in verdicts]}


def check_payload(card: GpuProfile, ledger: Ledger | None, verdict: GpuVerdict | None) -> Payload:
    """The payload of `check --json`: the live card, and the estimate where a model was named."""
    payload = {"schema_version": SCHEMA_VERSION, "card": asdict(card)}
    if ledger is not None and verdict is not None:
        payload |= {"verdict": verdict.verdict, "estimate": estimate_payload(ledger, (verdict,))}
    return payload


def gpus_payload(stored: Sequence[GpuProfile], live: Sequence[GpuProfile]) -> Payload:
    """The payload of `gpus --json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "gpus": [asdict(card) for card in stored],
        "live": [asdict(card) for card in live],
    }


def models_payload(rows: Sequence[tuple[str, ModelSpec, int, str]]) -> Payload:
    """The payload of `models --json`, from (name, spec, parameters, Hub id)."""
    models = [
        {"name": name, "parameters": total, "hub_id": hub, "model": asdict(spec)} for name, spec, total, hub in rows
    ]
    return {"schema_version": SCHEMA_VERSION, "models": models}


def train_payload(
    run_dir: str, ended: str, exit_code: int, ledger: Ledger, measurement: Measurement | None, message: str = ""
) -> Payload:
    """The payload of `train --json`: how it ended, and prediction beside measurement."""
    payload: Payload = {
        "schema_version": SCHEMA_VERSION,
        "run_dir": run_dir,
        "adapter": f"{run_dir}/adapter" if exit_code == 0 else None,
        "ended": ended,
        "exit_code": exit_code,
        "message": message,
        "predicted": estimate_payload(ledger, ()),
        "measurement": asdict(measurement) if measurement else None,
        "comparison": {"moments": [], "lines": []},
    }
    if measurement is not None:
        moments, lines = compare(ledger, measurement)
        payload["comparison"] = {"moments": [_pair(p) for p in moments], "lines": [_pair(p) for p in lines]}
    return payload


def _pair(pair: Pair) -> Payload:
    return {**asdict(pair), "difference": pair.difference}
