"""A ledger and a plan as HTML, which notebooks show in place of a value. Every text is escaped.

Only the page's own colours and those of the groups are used, so that it reads on a dark page as on a light one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .recipes import checkpointing_text
from .rows import LINE, Row, Scale, ledger_rows
from .types import Candidate, Ledger, Plan, RunSpec
from .units import GIB, human

# Okabe and Ito's, as in the tables of the terminal: told apart with any colour vision, and on black and white.
COLOURS = {"weights": "#0072B2", "activations": "#E69F00", "loss": "#CC79A7", "adapter": "#009E73",
           "optimizer": "#56B4E9", "overhead": "#999999"}  # fmt: skip
VERDICTS = {"fits": ("Fits", "#009E73"), "tight": ("Tight on", "#E69F00"), "does_not_fit": ("Does not fit", "#D55E00")}
BAR_EM, SHOWN = 8, 8
CELL = "padding:2px 10px;border:0"
RULE = "border-top:1px solid currentColor"


def ledger_html(ledger: Ledger) -> str:
    """What the run needs, and every line of it with its formula."""
    peak = ledger.peak
    scale, rows = ledger_rows(ledger)
    longest = max((row.share for row in rows if row.basis), default=0.0) or 1.0
    head = ("", scale.unit, "share", "", "formula")
    note = "~ modelled; everything else is counted exactly" if any(r.basis == "modelled" for r in rows) else ""
    text = f"<b>Needs {human(peak.device_bytes)}</b>: {human(peak.allocated_bytes)} of it tensors at the peak"
    return _page(
        f"{text} ({escape(peak.phase)}).<br>{escape(_run_text(ledger.run, ledger.model.name))}",
        _table(head, (_ledger_row(row, scale, longest) for row in rows), numbers=(1, 2)),
        note,
        *ledger.warnings,
    )


def plan_html(plan: Plan) -> str:
    """The verdict, what was chosen, and what else was priced."""
    word, colour = VERDICTS.get(plan.verdict, (plan.verdict, "inherit"))
    run, need = plan.run, human(plan.ledger.peak.device_bytes)
    head = (
        f'<b style="color:{colour}">{escape(word)}</b> {escape(plan.gpu.key)}: batch {run.micro_batch_size} x '
        f"{run.accumulation} = {plan.effective_batch_size}, needs {need}, {human(plan.budget_bytes)} usable."
        f"<br>{escape(_run_text(run, plan.ledger.model.name))}<br>{escape(plan.reason)}"
    )
    rows = (_candidate_row(candidate, plan) for candidate in plan.candidates[:SHOWN])
    table = _table(("batch", "checkpointing", "GiB", "verdict", "tokens/s"), rows, numbers=(2, 4))
    more = len(plan.candidates) - SHOWN
    note = "~ tokens/s is modelled, not measured" + (f"; {more} more were priced" if more > 0 else "")
    return _page(head, table if plan.candidates else "", note if plan.candidates else "", *plan.advice)


def _run_text(run: RunSpec, model: str) -> str:
    accumulation = f" x {run.accumulation} accumulated" if run.accumulation > 1 else ""
    gpus = f" on each of {run.gpus} GPUs ({run.parallel})" if run.gpus > 1 else ""
    return (
        f"{model}, {run.micro_batch_size} x {run.seq_len} tokens{accumulation}{gpus}, r={run.lora.r} on "
        f"{','.join(run.lora.targets)}, recipe {run.recipe}"
    )


def _ledger_row(row: Row, scale: Scale, longest: float) -> list[str]:
    mark = "~" if row.basis == "modelled" else ""
    colour = COLOURS.get(row.group, "currentColor")
    bar = ""
    if row.basis:
        width = BAR_EM * min(row.share / longest, 1.0)
        bar = f'<div style="width:{width:.2f}em;height:0.8em;background:{colour}"></div>'
    indent = "&nbsp;&nbsp;" if row.kind == LINE else ""
    cells = [indent + escape(row.label), mark + scale.text(row.steps), f"{row.share:.0%}", bar, escape(row.formula)]
    return cells if row.kind == LINE else [f"<b>{cell}</b>" if cell and cell != bar else cell for cell in cells]


def _candidate_row(candidate: Candidate, plan: Plan) -> list[str]:
    run = plan.run
    chosen = (candidate.levers, candidate.micro_batch_size) == (run.levers, run.micro_batch_size)
    speed = "-" if candidate.tokens_per_s is None else f"~{candidate.tokens_per_s:,}"
    word, colour = VERDICTS.get(candidate.verdict, (candidate.verdict, "inherit"))
    cells = [
        f"{candidate.micro_batch_size} x {candidate.accumulation}",
        escape(checkpointing_text(candidate.levers)),
        f"{candidate.device_bytes / GIB:.2f}",
        f'<span style="color:{colour}">{escape(word.removesuffix(" on").lower())}</span>',
        speed,
    ]
    return [f"<b>{cell}</b>" for cell in cells] if chosen and plan.verdict != "does_not_fit" else cells


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    def cells(row: Sequence[str], tag: str, rule: str = "") -> str:
        out = ""
        for index, cell in enumerate(row):
            side = "right" if index in numbers else "left"
            out += f'<{tag} style="text-align:{side};{CELL}{rule}">{cell}</{tag}>'
        return f'<tr style="background:transparent">{out}</tr>'

    body = "".join(cells(row, "td", f";{RULE}" if number == 0 else "") for number, row in enumerate(rows))
    return (
        '<table style="border-collapse:collapse;border:0;margin:0.5em 0"><thead>'
        f"{cells([escape(title) for title in head], 'th')}</thead><tbody>{body}</tbody></table>"
    )


def _page(head: str, table: str, *notes: str) -> str:
    """`head` and `table` are HTML already; notes are texts."""
    small = "".join(f'<div style="opacity:0.75">{escape(note)}</div>' for note in notes if note)
    return f'<div style="color:inherit;background:transparent">{head}{table}{small}</div>'
