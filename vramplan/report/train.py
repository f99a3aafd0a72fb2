"""The end of a run: what it used beside what was predicted. The live display is in `report/live.py`."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.rows import Scale, scale_for
from vramplan.core.types import Ledger, Measurement
from vramplan.core.units import human
from vramplan.report import tables
from vramplan.report.compare import Pair, compare
from vramplan.report.survival import survived


def show_start(stream: TextIO, ledger: Ledger, text: str, *, width: int | None = None) -> None:
    """One line before the run starts: what is predicted, and where the run lives."""
    screen = tables.console(stream, width)
    peak, gpus = ledger.peak, ledger.run.gpus
    where = "the device" if gpus == 1 else f"each of {gpus} GPUs"
    tables.sentence(screen, f"Predicted: {human(peak.device_bytes)} on {where}, peak in {peak.phase}. {text}")


def show_result(
    stream: TextIO, ledger: Ledger, measurement: Measurement, adapter: str, *, width: int | None = None
) -> None:
    """What came out, then prediction beside measurement, then where the adapter is."""
    screen = tables.console(stream, width)
    screen.print()
    for text in (summary(measurement), *survived(ledger, measurement)):
        tables.sentence(screen, text)
    moments, lines = compare(ledger, measurement)
    if moments or lines:
        screen.print()
        tables.put(screen, comparison_table(screen, moments, lines))
    if measurement.rank_peak_bytes:
        peaks = ", ".join(human(peak) for peak in measurement.rank_peak_bytes)
        screen.print(Text(f"Measured is the most of {measurement.gpus} GPUs; their peaks: {peaks}", style="dim"))
    if measurement.device == "cpu":
        note = "On a CPU only tensors can be counted: no GPU memory was measured."
        screen.print(Text(note, style="dim"))
    counted, planned = measurement.trainable_parameters, ledger.trainable_parameters
    if counted != planned:
        screen.print(Text(f"Trainable parameters: {planned:,} predicted, {counted:,} counted."))
    screen.print()
    screen.print(Text("adapter  " + adapter), soft_wrap=True)


def summary(measurement: Measurement) -> str:
    """How it ended, in one sentence."""
    words = {"finished": "Done", "interrupted": "Interrupted", "oom": "Out of memory", "error": "Failed"}
    steps = f"{measurement.steps:,} step{'s' if measurement.steps != 1 else ''}"
    text = f"{words.get(measurement.ended, measurement.ended)}: {steps}, {measurement.tokens_per_s:,.0f} tokens/s"
    if measurement.first_loss is not None and measurement.last_loss is not None:
        text += f", loss {measurement.first_loss:.3f} -> {measurement.last_loss:.3f}"
    if measurement.eval_loss_before is not None and measurement.eval_loss_after is not None:
        text += f", held out {measurement.eval_loss_before:.3f} -> {measurement.eval_loss_after:.3f}"
        before, after = (_perplexity(x) for x in (measurement.eval_loss_before, measurement.eval_loss_after))
        text += f" (perplexity {before} -> {after})"
    return text + "."


def _perplexity(loss: float) -> str:
    return f"{exp(loss):.4g}" if loss < 700 else "beyond all numbers"


def comparison_table(screen: Console, moments: Sequence[Pair], lines: Sequence[Pair]) -> Table:
    """Predicted, measured, difference: first the moments, then the resident tensors."""
    scale = scale_for(0)  # MiB, in which a difference shows
    table = tables.plain_table(screen)
    tables.add_text(table, scale.unit, screen)
    for title in ("predicted", "measured", "difference"):
        tables.add_number(table, title)
    for index, pairs in enumerate((moments, lines)):
        if index and moments and lines:
            table.add_section()
        for pair in pairs:
            table.add_row(
                pair.label,
                _size(pair.predicted_bytes, scale),
                _size(pair.measured_bytes, scale),
                difference_text(pair),
            )
    return table


def _size(size: int | None, scale: Scale) -> str:
    return "-" if size is None else scale.text(scale.steps(size))


def difference_text(pair: Pair) -> str:
    """ "+0.12 %", "exact" where both are the same number of bytes, "-" where there is nothing to compare."""
    if pair.difference is None:
        return "-"
    return "exact" if pair.predicted_bytes == pair.measured_bytes else f"{pair.difference:+.2%}"
