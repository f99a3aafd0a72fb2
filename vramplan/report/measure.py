"""Measured beside predicted, in MiB: the table of `vramplan measure`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.types import Ledger, Measurement
from vramplan.core.units import MIB
from vramplan.report import tables
from vramplan.report.compare import Pair, compare
from vramplan.report.train import difference_text

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def show_measurement(
    stream: TextIO, ledger: Ledger, measurement: Measurement, written: str, *, width: int | None = None
) -> None:
    """What was measured, the phases, the resident tensors, and where the line was written."""
    screen = tables.console(stream, width)
    run = ledger.run
    moments, lines = compare(ledger, measurement)
    tables.sentence(screen, headline(moments, measurement))
    shape = f"{run.micro_batch_size} x {run.seq_len} tokens"
    shape += f", {run.accumulation} micro-steps" if run.accumulation > 1 else ""
    what = f"{ledger.model.name}, {ledger.model.num_layers} layers, {shape}, recipe {run.recipe}, driver {run.driver}"
    screen.print(Text(what))
    versions = dict(measurement.versions)
    where = [measurement.device_name, *(f"{name} {versions[name]}" for name in LIBRARIES if name in versions)]
    screen.print(Text(", ".join(where), style="dim"))
    if moments or lines:
        screen.print()
        tables.put(screen, measured_table(screen, moments, lines))
    counted, planned = measurement.trainable_parameters, ledger.trainable_parameters
    if counted != planned:
        screen.print(Text(f"Trainable parameters: {planned:,} predicted, {counted:,} counted."))
    screen.print()
    screen.print(Text("appended to  " + written), soft_wrap=True)


def headline(moments: Sequence[Pair], measurement: Measurement) -> str:
    """The peak in one sentence; after an out-of-memory end, that there is none."""
    steps = f"{measurement.steps:,} step{'s' if measurement.steps != 1 else ''}"
    if measurement.ended != "finished":
        return f"Out of memory after {steps}: the peaks below are those reached until then."
    peak = next((pair for pair in moments if pair.key == "peak.allocated"), None)
    if peak is None:
        return f"{steps} played; this device has no allocator to ask."
    return (
        f"Peak of a steady step: {_mib(peak.measured_bytes)} MiB measured, {_mib(peak.predicted_bytes)} predicted "
        f"({difference_text(peak)})."
    )


def measured_table(screen: Console, moments: Sequence[Pair], lines: Sequence[Pair]) -> Table:
    """Predicted, measured, measured minus predicted in MiB and in percent: the moments, then the resident tensors."""
    table = tables.plain_table(screen)
    tables.add_text(table, "MiB", screen)
    for title in ("predicted", "measured", "difference", "%"):
        tables.add_number(table, title)
    for index, pairs in enumerate((moments, lines)):
        if index and moments and lines:
            table.add_section()
        for pair in pairs:
            table.add_row(
                pair.label,
                _mib(pair.predicted_bytes),
                _mib(pair.measured_bytes),
                _difference(pair),
                difference_text(pair),
            )
    return table


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:,.2f}"


def _difference(pair: Pair) -> str:
    if pair.predicted_bytes is None or pair.measured_bytes is None:
        return "-"
    return f"{(pair.measured_bytes - pair.predicted_bytes) / MIB:+,.2f}"
