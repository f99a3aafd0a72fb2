"""The tables of `estimate`: a verdict, the ledger that adds up, and cards held against it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.rows import LINE, SUBTOTAL, TOTAL, Row, Scale, ledger_rows
from vramplan.core.types import GpuVerdict, Ledger, ModelSpec, Offer, RunSpec
from vramplan.core.units import human
from vramplan.report import tables
from vramplan.report.fields import one_line

VERDICT_STARTS = {"fits": "Fits", "tight": "Tight on", "does_not_fit": "Does not fit"}


def show_estimate(
    stream: TextIO,
    ledger: Ledger,
    verdicts: Sequence[GpuVerdict] = (),
    *,
    source: str | None = None,
    width: int | None = None,
) -> None:
    """Verdict first, then the ledger, then the cards. `source`: the file that the run is from."""
    screen = tables.console(stream, width)
    put_ledger(screen, ledger, *headline(ledger, verdicts), speeds=bool(verdicts))
    if verdicts:
        screen.print()
        tables.put(screen, gpu_table(screen, verdicts))
        if any(verdict.tokens_per_s is not None for verdict in verdicts):
            screen.print(Text("~ tokens/s is modelled, not measured", style="dim"))
    tables.command(screen, *next_step(ledger, verdicts, source))


def put_ledger(screen: Console, ledger: Ledger, text: str, verdict: str, *, speeds: bool) -> None:
    """The sentence to act on, what was asked, and the ledger with what it must be read with."""
    tables.sentence(screen, text, verdict)
    screen.print(Text(run_line(ledger), style="dim"))
    screen.print()
    tables.put(screen, *ledger_table(screen, ledger))
    if ledger.run.gpus > 1:
        speed = f"; tokens/s are of all {ledger.run.gpus} together" if speeds else ""
        screen.print(Text("per card" + speed, style="dim"))
    if any(line.basis == "modelled" and line.bytes for line in ledger.lines):
        screen.print(Text("~ modelled; everything else is counted exactly", style="dim"))


def headline(ledger: Ledger, verdicts: Sequence[GpuVerdict]) -> tuple[str, str]:
    """The one sentence to act on, and the verdict that colours it ("" without a single card)."""
    need = ledger.peak.device_bytes
    if not verdicts:
        of = "one GPU" if ledger.run.gpus == 1 else f"each of {ledger.run.gpus} GPUs"
        return f"Needs {human(need)} of {of}, {human(ledger.peak.allocated_bytes)} of it tensors at the peak.", ""
    if len(verdicts) > 1:
        fitting = [verdict for verdict in verdicts if verdict.verdict != "does_not_fit"]
        if not fitting:
            return f"Does not fit: none of the {len(verdicts)} cards holds {human(need)}.", "does_not_fit"
        smallest = min(fitting, key=lambda verdict: verdict.usable_bytes)
        tail = f"the smallest that does is {smallest.gpu} ({human(smallest.usable_bytes)} usable)."
        return f"Fits {len(fitting)} of {len(verdicts)} cards: {tail}", "fits"
    return one_card(need, verdicts[0]), verdicts[0].verdict


def one_card(need: int, verdict: GpuVerdict) -> str:
    """The verdict on one card as a sentence."""
    usable = verdict.usable_bytes
    numbers = f"needs {human(need)}, {human(usable)} usable"
    if verdict.verdict == "does_not_fit":
        change = (
            f"batch {verdict.max_batch_size} fits"
            if verdict.max_batch_size
            else f"{verdict.max_seq_len} tokens fit"
            if verdict.max_seq_len
            else "nor does batch 1"
        )
        if verdict.max_batch_size is None:
            change = "its largest batch is not known"
        return f"Does not fit {verdict.gpu}: {numbers}; {change}."
    return f"{VERDICT_STARTS[verdict.verdict]} {verdict.gpu}: {numbers}, {human(max(usable - need, 0))} to spare."


def run_line(ledger: Ledger) -> str:
    """What was asked, on one line."""
    return asked(ledger.model, ledger.run)


def asked(model: ModelSpec, run: RunSpec) -> str:
    """A run on one line."""
    accumulation = f" x {run.accumulation} accumulated" if run.accumulation > 1 else ""
    gpus = f" on each of {run.gpus} GPUs ({run.parallel})" if run.gpus > 1 else ""
    targets = ",".join(run.lora.targets)
    packed = " packed" if run.packing else ""
    return (
        f"{model.name}, {run.micro_batch_size} x {run.seq_len} tokens{packed}{accumulation}{gpus}, "
        f"r={run.lora.r} on {targets}, recipe {run.recipe}"
    )


def next_step(ledger: Ledger, verdicts: Sequence[GpuVerdict | Offer], source: str | None = None) -> tuple[str, str]:
    """The command that goes on from here, and what it is for."""
    run = ledger.run
    what = run.model if source is None else f"--from {shlex.quote(one_line(source))}"
    if not verdicts and run.gpus == 1:
        return "Which cards hold it:", f"vramplan estimate {what} --gpu all"
    if source is not None and run.gpus == 1:
        return "Levers and micro-batch for a card:", f"vramplan fit {what} --gpu {smallest(verdicts)}"
    return fit_command(run, verdicts)


def smallest(verdicts: Sequence[GpuVerdict | Offer]) -> str:
    """The smallest card that holds the run; of none that does, the smallest."""
    fitting = [verdict for verdict in verdicts if verdict.verdict != "does_not_fit"]
    return min(fitting or verdicts, key=lambda verdict: verdict.usable_bytes).gpu


def fit_command(run: RunSpec, verdicts: Sequence[GpuVerdict | Offer]) -> tuple[str, str]:
    """The command that plans the run for the smallest card that holds it, or trains it on several; what it is for."""
    if run.gpus > 1:
        return "To train it:", f"vramplan train {run.model} --gpus {run.gpus} --parallel {run.parallel} --data FILE"
    batch = max(run.micro_batch_size * run.accumulation, 16)
    card = smallest(verdicts)
    length = "" if run.seq_len == RunSpec(model="").seq_len else f" --seq-len {run.seq_len}"
    packing = " --packing" if run.packing else ""
    command = f"vramplan fit {run.model} --effective-batch-size {batch}{length} --gpu {card}{packing}"
    return "Levers and micro-batch for a card:", command


def ledger_table(screen: Console, ledger: Ledger) -> tuple[Table, int]:
    """The ledger: a bar per line, subtotals that are the sums of what is printed, formulas where there is room.

    And the column that may be cut.
    """
    scale, rows = ledger_rows(ledger)
    wide = screen.width >= tables.WIDE
    table = tables.plain_table(screen)
    tables.add_text(table, f"at the peak ({ledger.peak.phase})", screen)
    tables.add_number(table, scale.unit)
    tables.add_number(table, "share")
    tables.add_text(table, "", screen)
    if wide:
        tables.add_text(table, "formula", screen)
    barred = [row for row in rows if row.basis]
    longest = max((row.share for row in barred), default=0.0) or 1.0
    bar_width = 12 if wide else _bar_width(screen, rows)
    for row in rows:
        if row.kind in (SUBTOTAL, TOTAL):
            table.add_section()
        drawn = tables.bar(row.share / longest, bar_width, ascii_only=tables.is_ascii(screen)) if row.basis else ""
        cells = [
            _label(row),
            _number(row, scale),
            Text(tables.percent(row.share), style=_weight(row)),
            Text(drawn, style=tables.GROUP_COLOURS.get(row.group, "")),
        ]
        table.add_row(*cells, *([Text(row.formula, style="dim")] if wide else []))
    return table, 4 if wide else 0


def _bar_width(screen: Console, rows: list[Row]) -> int:
    label = max(len(row.label) for row in rows) + 3
    return max(min(screen.width - label - 22, 30), 6)


def _weight(row: Row) -> str:
    return "" if row.kind == LINE else "bold"


def _label(row: Row) -> Text:
    if row.kind == LINE:
        return Text("  " + row.label)
    return Text(row.label, style=f"bold {tables.GROUP_COLOURS.get(row.group, '')}".strip())


def _number(row: Row, scale: Scale) -> Text:
    mark = "~" if row.basis == "modelled" else ""
    return Text(mark + scale.text(row.steps), style=_weight(row))


def gpu_table(screen: Console, verdicts: Sequence[GpuVerdict]) -> Table:
    """Cards against the run, smallest first."""
    table = tables.plain_table(screen)
    tables.add_text(table, "card", screen)
    tables.add_number(table, "usable GiB")
    tables.add_text(table, "verdict", screen)
    for title in ("max batch", "max seq", "tokens/s"):
        tables.add_number(table, title)
    for verdict in sorted(verdicts, key=lambda verdict: (verdict.usable_bytes, verdict.gpu)):
        speed = "-" if verdict.tokens_per_s is None else f"~{verdict.tokens_per_s:,}"
        table.add_row(
            verdict.gpu,
            f"{verdict.usable_bytes / 2**30:.2f}",
            tables.verdict_text(verdict.verdict),
            tables.count(verdict.max_batch_size),
            tables.count(verdict.max_seq_len),
            speed,
        )
    return table
