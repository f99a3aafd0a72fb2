"""The tables of `diagnose`: what happened, why, what to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.types import Diagnosis, Fix, OomEvidence
from vramplan.core.units import human
from vramplan.report import tables

SHOWN_CAUSES, SHOWN_FIXES = 5, 8
KINDS = {
    "host": "Out of host memory",
    "shm": "Out of shared memory",
    "vllm": "No memory for vLLM's cache",
    "bitsandbytes": "Out of memory in bitsandbytes",
    "nccl": "Out of memory in NCCL",
    "cublas": "Out of memory in cuBLAS",
    "cudnn": "Failed in cuDNN",
    "triton": "Out of memory in Triton",
    "cuda": "Out of memory in the CUDA driver",
}


def show_diagnosis(stream: TextIO, diagnosis: Diagnosis, *, width: int | None = None) -> None:
    """Headline, numbers, causes, fixes, the command of the best one, and what else would help."""
    screen = tables.console(stream, width)
    evidence = diagnosis.evidence
    tables.sentence(screen, headline(evidence), "does_not_fit")
    screen.print(Text(evidence.message, style="dim"))
    table = numbers_table(screen, diagnosis)
    if table.row_count:
        screen.print()
        tables.put(screen, table)
    if diagnosis.causes:
        screen.print()
        screen.print(Text("Why, likeliest first", style="bold"))
        screen.print(listing([f"{n}." for n in range(1, SHOWN_CAUSES + 1)], diagnosis.causes[:SHOWN_CAUSES]))
        _left(screen, len(diagnosis.causes) - SHOWN_CAUSES)
    if diagnosis.fixes:
        _show_fixes(screen, diagnosis.fixes)
    if diagnosis.more:
        screen.print()
        screen.print(Text("What would help", style="dim"))
        screen.print(listing(["-"] * len(diagnosis.more), diagnosis.more, style="dim"))


def headline(evidence: OomEvidence) -> str:
    """What happened, in one sentence."""
    start = KINDS.get(evidence.kind, "Out of memory")
    where = f" on rank {evidence.rank}" if evidence.rank is not None else ""
    if evidence.requested_bytes is None:
        return f"{start}{where}: the report does not say how much was asked for."
    text = f"{start}{where}: {human(evidence.requested_bytes)} asked for"
    if evidence.allowed_bytes is not None and evidence.allocated_bytes is not None:
        left = max(evidence.allowed_bytes - evidence.allocated_bytes - (evidence.reserved_unallocated_bytes or 0), 0)
        return f"{text}, {human(left)} left under the allocator's cap."
    return text + ("." if evidence.free_bytes is None else f", {human(evidence.free_bytes)} free.")


def numbers_table(screen: Console, diagnosis: Diagnosis) -> Table:
    """The sizes of the report, then the prediction and what it was held against; unknown ones are left out."""
    evidence = diagnosis.evidence
    table = tables.plain_table(screen)
    tables.add_text(table, "what happened", screen)
    tables.add_number(table, "")
    index = "" if evidence.gpu_index is None else f" {evidence.gpu_index}"
    rows: list[tuple[str, int | None]] = [
        (f"GPU{index}, total", evidence.total_bytes),
        ("free", evidence.free_bytes),
        ("this process", evidence.process_bytes),
        ("  allocated to tensors", evidence.allocated_bytes),
        ("    in private pools", evidence.private_pools_bytes),
        ("  reserved, not allocated", evidence.reserved_unallocated_bytes),
        ("  allowed (allocator's cap)", evidence.allowed_bytes),
        *((f"process {process.pid}", process.used_bytes) for process in evidence.others),
    ]
    for label, size in rows:
        if size is not None:
            table.add_row(label, human(size))
    if diagnosis.predicted_bytes is not None:
        table.add_section()
        table.add_row("predicted for this run", human(diagnosis.predicted_bytes))
        if diagnosis.budget_bytes is not None:
            table.add_row("there for it", human(diagnosis.budget_bytes))
    return table


def listing(marks: Sequence[str], texts: Sequence[str], style: str = "") -> Table:
    """Wrapped sentences with a hanging indent."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for mark, text in zip(marks, texts, strict=False):
        grid.add_row(Text(f"  {mark}", style=style), Text(text, style=style))
    return grid


def _show_fixes(screen: Console, fixes: Sequence[Fix]) -> None:
    screen.print()
    tables.put(screen, fixes_table(screen, fixes[:SHOWN_FIXES]))
    _left(screen, len(fixes) - SHOWN_FIXES)
    if any(fix.changes_training for fix in fixes[:SHOWN_FIXES]):
        screen.print(Text("* changes what is trained", style="dim"))
    best = fixes[0]
    if best.fits is False:
        screen.print()
        tables.sentence(screen, "None of these fits alone or together.")
    tables.command(screen, f"To run it with {best.title}:" if best.saves_bytes else "To run it again:", best.command)


def fixes_table(screen: Console, fixes: Sequence[Fix]) -> Table:
    """Each change with what it saves, what the run then needs and whether that fits."""
    table = tables.plain_table(screen)
    table.add_column("what to change", overflow="fold")
    for title in ("saves", "then needs"):
        tables.add_number(table, title)
    tables.add_text(table, "", screen)
    for fix in fixes:
        verdict = "" if fix.fits is None else "fits" if fix.fits else "does_not_fit"
        saves = human(fix.saves_bytes) if fix.saves_bytes else "-"
        title = fix.title + (" *" if fix.changes_training else "")
        table.add_row(title, saves, human(fix.device_bytes), TRIED.get(fix.tried or "") or tables.verdict_text(verdict))
    return table


TRIED = {  # how a short run of a fix ended on a card
    "finished": Text("runs", style=tables.VERDICT_STYLES["fits"]),
    "oom": Text("ran out", style=tables.VERDICT_STYLES["does_not_fit"]),
}


def _left(screen: Console, count: int) -> None:
    if count > 0:
        screen.print(Text(f"  {count} more in --json", style="dim"))
