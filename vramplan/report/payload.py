"""Core values as the JSON of `--json`. Its shape is a contract: fields are added, never renamed. No rich here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vramplan.core.recipes import lever_flags
from vramplan.core.types import (
    SCHEMA_VERSION,
    CardCheck,
    Choice,
    GpuProfile,
    GpuVerdict,
    Ledger,
    Measurement,
    ModelSpec,
    Offer,
    RunSpec,
)
from vramplan.report.compare import Pair, compare

if TYPE_CHECKING:
    from vramplan.core.explain import Explanation
    from vramplan.core.lock import Drift

Payload = dict[str, Any]


def estimate_payload(ledger: Ledger, verdicts: Sequence[GpuVerdict]) -> Payload:
    """The payload of `estimate --json`."""
    return {"schema_version": SCHEMA_VERSION, **asdict(ledger), "gpus": [asdict(verdict) for verdict in verdicts]}


def explain_payload(found: Explanation) -> Payload:
    """The payload of `estimate --explain --json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "line": asdict(found.line),
        "formula": found.formula,
        "source": found.source,
        "numbers": dict(found.numbers),
        "tensors": [part._asdict() for part in found.parts],
    }


def guide_payload(ledger: Ledger, offers: Sequence[Offer]) -> Payload:
    """The payload of `estimate --gpu all --json`: that of `estimate`, with what each card can do in "gpus"."""
    return {**estimate_payload(ledger, ()), "gpus": [offer_payload(offer, ledger.run) for offer in offers]}


def choice_payload(model: ModelSpec, run: RunSpec, choice: Choice) -> Payload:
    """The payload of `gpus --for MODEL --json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "model": asdict(model),
        "run": asdict(run),
        "memory_gb": choice.memory_gb,
        "as_asked_gb": choice.as_asked_gb,
        "gpus": [offer_payload(offer, run) for offer in choice.offers],
        "smaller": offer_payload(choice.smaller, run) if choice.smaller else None,
        "priced": [offer_payload(offer, run) for offer in choice.priced],
        "cheapest": next((offer.gpu for offer in choice.priced if offer.cheapest), None),
    }


def offer_payload(offer: Offer, run: RunSpec) -> Payload:
    """One card; `flags` are what must be added to the command as it was."""
    return {**asdict(offer), "flags": lever_flags(offer.levers, run.levers)}


def check_payload(found: CardCheck) -> Payload:
    """The payload of `check --json`: the live card and who holds what of it; with a model, verdict, remedies, estimate.

    The segments add up to the card's total and `missing_bytes`.
    """
    payload = {
        "schema_version": SCHEMA_VERSION,
        "card": asdict(found.card),
        "segments": [asdict(segment) for segment in found.segments],
        "missing_bytes": found.missing_bytes,
        "notes": list(found.notes),
    }
    if found.ledger is not None and found.judged is not None:
        payload |= {
            "verdict": found.judged.verdict,
            "remedies": [asdict(remedy) for remedy in found.remedies],
            "estimate": estimate_payload(found.ledger, (found.judged,)),
        }
    return payload


def lock_payload(drift: Drift) -> Payload:
    """The payload of `lock --check --json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "rose": drift.is_too_much,
        "share": drift.share,
        "tolerance": drift.tolerance,
        "groups": [{"group": name, "locked_bytes": then, "bytes": now} for name, then, now in drift.rows()],
        "changes": [{"what": what, "locked": then, "now": now} for what, then, now in drift.changes()],
        "locked": asdict(drift.then),
        "now": asdict(drift.now),
    }


def gpus_payload(stored: Sequence[GpuProfile], live: Sequence[GpuProfile]) -> Payload:
    """The payload of `gpus --json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "gpus": [asdict(card) for card in stored],
        "live": [asdict(card) for card in live],
    }


def saved_payload(card: GpuProfile, path: str) -> Payload:
    """The payload of `gpus --save --json`: the card as it was written, and where."""
    return {"schema_version": SCHEMA_VERSION, "saved": path, "card": asdict(card)}


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
    return {
        "schema_version": SCHEMA_VERSION,
        "run_dir": run_dir,
        "adapter": f"{run_dir}/adapter" if exit_code == 0 else None,
        "ended": ended,
        "exit_code": exit_code,
        "message": message,
        "predicted": estimate_payload(ledger, ()),
        "measurement": asdict(measurement) if measurement else None,
        "comparison": _comparison(ledger, measurement),
    }


def measure_payload(
    ledger: Ledger,
    measurement: Measurement | None,
    ended: str,
    exit_code: int,
    message: str,
    diagnosis: str | None,
    output: str | None,
) -> Payload:
    """The payload of `measure --json`. The measurement's `prediction` is left to "predicted"; `output` is the file."""
    measured = asdict(measurement) if measurement else None
    if measured is not None:
        del measured["prediction"]
    return {
        "schema_version": SCHEMA_VERSION,
        "output": output,
        "ended": ended,
        "exit_code": exit_code,
        "message": message,
        "diagnosis": diagnosis,
        "predicted": estimate_payload(ledger, ()),
        "measurement": measured,
        "comparison": _comparison(ledger, measurement),
    }


def _comparison(ledger: Ledger, measurement: Measurement | None) -> Payload:
    """Prediction and measurement in pairs; empty where nothing was measured."""
    moments, lines = compare(ledger, measurement) if measurement is not None else ([], [])
    return {"moments": [_pair(p) for p in moments], "lines": [_pair(p) for p in lines]}


def _pair(pair: Pair) -> Payload:
    return {**asdict(pair), "difference": pair.difference}
