"""Prediction and measurement, paired by name. No rich: the JSON of `train` and its table both start here."""

from __future__ import annotations

from dataclasses import dataclass

from vramplan.core.types import Ledger, MeasuredPhase, Measurement

# The ledger counts the gradients alive at the peak; after a step, when tensors are counted, they are gone.
NOT_COMPARED = ("adapter.gradients",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One quantity, predicted and measured. None: that side does not have it."""

    key: str
    label: str
    predicted_bytes: int | None
    measured_bytes: int | None

    @property
    def difference(self) -> float | None:
        """Measured over predicted, minus one; None unless both are there and something was predicted."""
        if self.measured_bytes is None or not self.predicted_bytes:
            return None
        return self.measured_bytes / self.predicted_bytes - 1


def compare(ledger: Ledger, measurement: Measurement) -> tuple[list[Pair], list[Pair]]:
    """(moments, lines): the totals at named moments, and the resident tensors line by line, keys matched.

    Lines that only the prediction has (activations, say, which are gone when tensors are counted) are left out;
    lines that only the measurement has are kept, with no prediction.
    """
    return _moments(ledger, measurement), _lines(ledger, measurement)


def _moments(ledger: Ledger, measurement: Measurement) -> list[Pair]:
    phases = {phase.name: phase for phase in measurement.phases}
    resident, peak = ledger.resident, ledger.peak
    step = phases.get("step")
    outside = sum(line.bytes for line in ledger.lines if line.key in ("overhead.context", "overhead.nccl"))
    pairs = [
        _moment("resident.loaded", "after the 4-bit load", resident.loaded_bytes, _allocated(phases, "loaded")),
        _moment("resident.prepared", "after preparing", resident.prepared_bytes, _allocated(phases, "prepared")),
        _moment("resident.with_lora", "after adding LoRA", resident.with_lora_bytes, _allocated(phases, "with_lora")),
    ]
    for phase in ledger.phases:
        measured = phases.get(phase.name)
        if measured is not None and phase.name not in ("loaded", "prepared", "with_lora", "step"):
            label = f"peak of the {phase.name}"
            pairs.append(_moment(f"phase.{phase.name}", label, phase.peak_bytes, measured.peak_bytes))
    if step is not None:
        pairs += [
            _moment("peak.allocated", "allocated at the peak", peak.allocated_bytes, step.peak_bytes),
            _moment("peak.reserved", "reserved by PyTorch", peak.reserved_bytes, step.reserved_bytes),
            _moment("process", "process, says the driver", peak.reserved_bytes + outside, step.process_bytes),
        ]
    return [pair for pair in pairs if pair.measured_bytes is not None]


def _allocated(phases: dict[str, MeasuredPhase], name: str) -> int | None:
    return phases[name].allocated_bytes if name in phases else None


def _moment(key: str, label: str, predicted: int, measured: int | None) -> Pair:
    return Pair(key=key, label=label, predicted_bytes=predicted, measured_bytes=measured)


def _lines(ledger: Ledger, measurement: Measurement) -> list[Pair]:
    predicted = {line.key: line for line in ledger.lines}
    # Without a card nothing is paged: the whole state is counted, of which the prediction has what stays on the card.
    paged = "paged" in ledger.run.levers.optimizer and measurement.device != "cuda"
    left_out = {*NOT_COMPARED, "optimizer.state"} if paged else NOT_COMPARED
    pairs = []
    for line in measurement.lines:
        if line.key in left_out:
            continue
        expected = predicted.get(line.key)
        pairs.append(
            Pair(
                key=line.key,
                label=(expected.label if expected else line.label) or line.key,
                predicted_bytes=expected.bytes if expected else None,
                measured_bytes=line.bytes,
            )
        )
    return pairs
