"""The tables of `fit`: the verdict, the chosen levers, and what else was priced."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.dialects import Rewritten
from vramplan.core.lengths import real_share
from vramplan.core.recipes import checkpointing_text
from vramplan.core.types import Candidate, Levers, Plan
from vramplan.core.units import GIB, human
from vramplan.report import tables
from vramplan.report.estimate import VERDICT_STARTS
from vramplan.report.probe import show_probes
from vramplan.report.rewritten import show_rewritten

SHOWN = 8  # candidates in the table


def show_fit(
    stream: TextIO,
    plan: Plan,
    *,
    written: str | None = None,
    compared_at: int | None = None,
    words: Rewritten | None = None,
    width: int | None = None,
) -> None:
    """Verdict first; then what was chosen and what else there was, or the smallest changes that would fit.

    compared_at: the tokens of a row with which the combinations were priced, where the plan may have others.
    words: the plan as a change of the file that it was made from.
    """
    screen = tables.console(stream, width)
    tables.sentence(screen, headline(plan), plan.verdict)
    if plan.reason:
        screen.print(Text(plan.reason, style="dim"))
    if plan.lengths is not None:
        screen.print(Text(rows_text(plan), style="dim"))
    show_probes(screen, plan)
    if plan.verdict == "does_not_fit":
        if plan.advice:
            screen.print()
            tables.sentence(screen, "What would fit, smallest change first:")
            for advice in plan.advice:
                screen.print(Text(f"  - {advice}"))
        if others_are_the_cause(plan):
            held = (
                f"It would fit without the {human(plan.gpu.used_by_others_bytes)} that others hold now. Who they are:"
            )
            tables.command(screen, held, f"vramplan check {shlex.quote(plan.run.model)} --seq-len {plan.run.seq_len}")
    else:
        screen.print()
        tables.put(screen, choice_table(screen, plan), 1)
    if plan.candidates:
        screen.print()
        tables.put(screen, candidate_table(screen, plan.candidates, plan), 2)
        left = len(plan.candidates) - len(shown(plan.candidates, plan))
        more = f"; {left} more {'was' if left == 1 else 'were'} priced, slower or no smaller" if left > 0 else ""
        screen.print(Text(f"~ tokens/s is modelled, not measured{more}", style="dim"))
        if compared_at is not None and compared_at != plan.run.seq_len:
            screen.print(Text(f"compared with rows of {compared_at:,} tokens", style="dim"))
    if words is not None:
        show_rewritten(screen, words)
    elif plan.verdict != "does_not_fit":
        data = "" if plan.run.data is not None else " --data FILE"
        tables.command(screen, "To run it:", f"vramplan train {written or 'plan.json'}{data}")
        if written is None:
            screen.print(Text("(-o plan.json writes the plan)", style="dim"))


def others_are_the_cause(plan: Plan) -> bool:
    """Whether a live card would hold the leanest plan if it were free; what a probe has refuted is another matter."""
    missing = plan.ledger.peak.device_bytes - plan.budget_bytes
    return plan.gpu.source == "nvml" and not plan.probes and 0 < missing <= plan.gpu.used_by_others_bytes


def headline(plan: Plan) -> str:
    """The sentence to act on."""
    need, usable = plan.ledger.peak.device_bytes, plan.budget_bytes
    if plan.verdict == "does_not_fit" and plan.probes:
        return f"Does not fit {plan.gpu.key}: {human(need)} predicted, but the card refutes it."
    if plan.verdict == "does_not_fit":
        return f"Does not fit {plan.gpu.key}: the leanest plan needs {human(need)}, {human(usable)} usable."
    batch = f"{plan.run.micro_batch_size} x {plan.run.accumulation} = {plan.effective_batch_size}"
    start = f"{VERDICT_STARTS[plan.verdict]} {plan.gpu.key}"
    return f"{start}: batch {batch}, needs {human(need)}, {human(usable)} usable."


def rows_text(plan: Plan) -> str:
    """What of the data decided: the longest row the memory, padding the speed."""
    lengths = plan.lengths
    assert lengths is not None
    text = (
        f"{lengths.rows:,} rows of {lengths.tokens / lengths.rows:,.0f} tokens on average, {lengths.longest:,} at most"
    )
    if plan.run.packing:
        return f"{text}, packed into rows of {plan.run.seq_len:,}"
    return f"{text}: batches are {tables.percent(1 - real_share(plan.run, lengths))} padding, which tokens/s leave out"


def choice_table(screen: Console, plan: Plan) -> Table:
    """What was chosen, by the flags that would say it."""
    run, levers = plan.run, plan.run.levers
    table = tables.plain_table(screen)
    tables.add_text(table, "chosen", screen)
    tables.add_text(table, "", screen)
    rows = (
        ("--batch-size", str(run.micro_batch_size)),
        ("--accumulation", str(run.accumulation)),
        ("--seq-len", f"{run.seq_len}"),
        ("--checkpointing", checkpointing_text(levers)),
        ("--loss", levers.loss),
        ("--optim", levers.optimizer),
        ("--attn", levers.attention),
        ("--upcast", levers.upcast),
        ("--allocator", levers.allocator),
        ("--kernels", levers.kernels),
        ("--lora-r", f"{run.lora.r} on {','.join(run.lora.targets)}"),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table


def candidate_table(screen: Console, candidates: Sequence[Candidate], plan: Plan) -> Table:
    """The combinations that were priced, the chosen one marked; levers are named where they differ from it."""
    table = tables.plain_table(screen)
    tables.add_text(table, "", screen)
    tables.add_number(table, "batch")
    tables.add_text(table, "levers", screen)
    tables.add_number(table, "GiB")
    tables.add_text(table, "verdict", screen)
    tables.add_number(table, "tokens/s")
    for candidate in shown(candidates, plan):
        chosen = is_chosen(candidate, plan)
        speed = "-" if candidate.tokens_per_s is None else f"~{candidate.tokens_per_s:,}"
        table.add_row(
            ">" if chosen else "",
            f"{candidate.micro_batch_size} x {candidate.accumulation}",
            levers_text(candidate.levers),
            f"{candidate.device_bytes / GIB:.2f}",
            tables.verdict_text(candidate.verdict),
            speed,
            style="bold" if chosen else "",
        )
    return table


def shown(candidates: Sequence[Candidate], plan: Plan) -> list[Candidate]:
    """The first few of the frontier in the search's order, the chosen one always among them."""
    head = [candidate for candidate in candidates if not is_beaten(candidate, candidates)][:SHOWN]
    chosen = next((candidate for candidate in candidates if is_chosen(candidate, plan)), None)
    if chosen is not None and chosen not in head:
        head[-1] = chosen
    return head


def is_beaten(candidate: Candidate, others: Sequence[Candidate]) -> bool:
    """Whether another one is at least as fast and needs less: nobody would take this one."""
    speed = candidate.tokens_per_s or 0
    return candidate.verdict != "does_not_fit" and any(
        (other.tokens_per_s or 0) >= speed and other.device_bytes < candidate.device_bytes for other in others
    )


def is_chosen(candidate: Candidate, plan: Plan) -> bool:
    """True for the combination that the plan took."""
    run = plan.run
    same = (run.levers, run.micro_batch_size, run.accumulation)
    taken = (candidate.levers, candidate.micro_batch_size, candidate.accumulation) == same
    return taken and plan.verdict != "does_not_fit"


def levers_text(levers: Levers) -> str:
    """The levers that a search turns, in few words."""
    offload = " offload" if levers.checkpoint_offload else ""
    return f"ckpt {levers.checkpointing}{offload}, {levers.loss} loss"
