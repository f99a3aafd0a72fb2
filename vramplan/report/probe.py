"""What `fit --probe` found: a sentence, and the probes beside what was predicted of them."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.recipes import checkpointing_text
from vramplan.core.types import Plan, Probe
from vramplan.core.units import GIB, human
from vramplan.report import tables

UNVERIFIED = "Unverified: predicted, not tried; --probe tries it on this machine's card."


def show_probes(screen: Console, plan: Plan) -> None:
    """Whether the plan is verified, and by what. Nothing of a plan that was never possible."""
    if not plan.probes:
        if plan.verdict != "does_not_fit":
            screen.print(Text(UNVERIFIED, style="dim"))
        return
    screen.print(Text(found(plan), style="" if plan.verified else "bold"))
    screen.print()
    tables.put(screen, probe_table(screen, plan.probes), 1)


def found(plan: Plan) -> str:
    """The last probe in a sentence."""
    last = plan.probes[-1]
    if last.disturbances:
        return f"Unverified: {'; '.join(last.disturbances)} during the probe, which proves nothing. Try again."
    if not plan.verified and plan.verdict != "does_not_fit":
        return "Unverified: what was tried on the card did not fit, and this plan was not tried."
    if not plan.verified:
        return "Refuted: no plan that was tried on the card fits it."
    parts = []
    if last.process_bytes is not None:
        parts.append(f"{human(last.process_bytes)} for the process, {human(last.predicted_process_bytes)} predicted")
    elif last.allocated_bytes is not None:
        parts.append(f"{human(last.allocated_bytes)} allocated, {human(last.predicted_bytes)} predicted")
    if last.tokens_per_s is not None:
        modelled = f", ~{last.predicted_tokens_per_s:,} modelled" if last.predicted_tokens_per_s else ""
        parts.append(f"{last.tokens_per_s:,} tokens/s{modelled}")
    where = "" if last.cap_bytes is None else f" held to {human(last.cap_bytes)} for PyTorch"
    return f"Verified on this machine's card{where}: {'; '.join(parts) or 'it ran'}."


def probe_table(screen: Console, probes: tuple[Probe, ...]) -> Table:
    """Peak allocated and tokens/s, predicted and measured, of every probe."""
    table = tables.plain_table(screen)
    tables.add_number(table, "probed")
    tables.add_text(table, "checkpoints", screen)
    tables.add_number(table, "GiB")
    tables.add_number(table, "measured")
    tables.add_number(table, "tokens/s")
    tables.add_number(table, "measured")
    tables.add_text(table, "", screen)
    for probe in probes:
        modelled = "-" if probe.predicted_tokens_per_s is None else f"~{probe.predicted_tokens_per_s:,}"
        table.add_row(
            f"{probe.micro_batch_size} x {probe.accumulation}",
            checkpointing_text(probe.levers),
            f"{probe.predicted_bytes / GIB:.2f}",
            "-" if probe.allocated_bytes is None else f"{probe.allocated_bytes / GIB:.2f}",
            modelled,
            tables.count(probe.tokens_per_s),
            Text(_result(probe), style=tables.VERDICT_STYLES["fits" if probe.fits else "does_not_fit"]),
        )
    return table


def _result(probe: Probe) -> str:
    if probe.disturbances:
        return "unreliable"
    return "fits" if probe.fits else "out of memory" if probe.ended == "oom" else "too large"
