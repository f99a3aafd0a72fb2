"""The step as one page that loads nothing: the picture with what is alive at any point of it, cards, measured, ledger.

The whole step is in the page, once for each kind of layer, so that it is exact at every event and yet small. What a
page holds is data: it is escaped, and a policy allows the three inlined texts alone, by their hashes.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from itertools import pairwise
from string import Template
from typing import Any

import vramplan
from vramplan.core import curve
from vramplan.core.groups import group_of
from vramplan.core.types import Ledger, Timeline
from vramplan.core.units import human
from vramplan.report import picture as shared
from vramplan.report.estimate import headline, run_line
from vramplan.report.fields import one_line
from vramplan.report.picture import Picture
from vramplan.report.tables import VERDICT_WORDS, percent

# NOTICE: static/uPlot.* are uPlot 1.6.32 from npm, unchanged, (c) 2022 Leon Sorokin, MIT (static/uPlot.LICENSE, which
# goes into every page with it). A newer one: `npm pack uplot`, dist/uPlot.iife.min.js and dist/uPlot.min.css.
LIBRARY, LIBRARY_STYLE, LIBRARY_LICENCE = "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"
POLICY = (
    "default-src 'none'; script-src {scripts}; style-src {style}; img-src data:; base-uri 'none'; form-action 'none'"
)
SHOWN_FIXES = 8
Cell = tuple[str, int | None, str]  # text, what it is sorted by, class


def page(picture: Picture) -> str:
    """The whole file."""
    ledger = picture.ledger
    said, verdict = _headline(picture)
    library = f"/*\nuPlot {_static(LIBRARY_LICENCE)}*/\n{_static(LIBRARY)}"
    script, style = _static("page.js"), _static(LIBRARY_STYLE) + "\n" + _static("page.css")
    data = page_data(picture)
    policy = POLICY.format(scripts=f"{_hash(library)} {_hash(script)}", style=_hash(style))
    return Template(_static("page.html")).substitute(
        policy=policy,
        version=vramplan.__version__,
        title=_safe(f"{ledger.model.name}: memory of one optimizer step"),
        verdict=verdict,
        headline=_safe(said),
        asked=_safe(run_line(ledger)),
        notes=_safe(" ".join(text for text in (_cut(data["bottom"]), shared.micro_steps(picture)) if text)),
        diagnosis=_diagnosis(picture),
        cards=_cards(picture),
        measured=_measured(picture),
        ledger=_ledger(ledger),
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        library=library,
        style=style,
        script=script,
    )


def _headline(picture: Picture) -> tuple[str, str]:
    """The sentence at the top, and the verdict that colours it."""
    if picture.diagnosis is None:
        return headline(picture.ledger, picture.verdicts)
    need, budget = human(picture.ledger.peak.device_bytes), picture.diagnosis.budget_bytes
    there = "" if budget is None else f", and {human(budget)} were there for it"
    return f"Out of memory: this run needs {need}{there}.", "does_not_fit"


def _static(name: str) -> str:
    return (files("vramplan.report") / "static" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _safe(text: str) -> str:
    return escape(one_line(text))


# ----------------------------------------------------------------------------------------------------------- data
def page_data(picture: Picture) -> dict[str, Any]:
    """What the page's script draws from, and whoever wants the numbers: `static/page.js` says what they mean."""
    found = curve.levels(picture.step)
    cards = shared.capacities(picture.verdicts)
    bottom, _, inside = shared.span(found, cards)
    groups = list(found.groups)
    return {
        "schema_version": 1,
        "vramplan": vramplan.__version__,
        "groups": [{"name": name, "colour": shared.COLOURS[name]} for name in groups],
        "bottom": bottom,
        **_step_data(picture.step, groups),
        "cards": [
            {"gpu": card.gpu, "usable_bytes": card.usable_bytes, "verdict": card.verdict, "drawn": card in inside}
            for card in shared.ascending(picture.verdicts)
        ],
        "measured": shared.measured_peaks(picture),
        "measured_as": shared.MEASURED_AS,
        "ledger": [
            {"key": line.key, "label": line.label, "group": group_of(line), "bytes": line.bytes, "basis": line.basis}
            for line in picture.ledger.lines
        ],
        "peak": {"point": found.peak, "device_bytes": found.totals[found.peak],
                 "allocated_bytes": found.allocated[found.peak]},
    }  # fmt: skip


def _step_data(step: Timeline, groups: Sequence[str]) -> dict[str, Any]:
    """Every event. The layers of one kind share a section; a kind without bytes may be of a group without any."""
    sections: dict[tuple[int, ...], int] = {}
    phases: dict[str, int] = {}
    passages = []
    for passage in step.passages:
        section = sections.setdefault(passage.events, len(sections))
        passages.append((phases.setdefault(passage.phase, len(phases)), passage.layer, section))
    changes = [(0, step.tails[0])] if step.tails else []
    changes += [(at, new) for at, (old, new) in enumerate(pairwise(step.tails), start=1) if old != new]
    where = {name: index for index, name in enumerate(groups)}
    return {
        "kinds": [
            (one_line(kind.name), where.get(kind.group, 0), kind.bytes, kind.rows, kind.columns, kind.dtype)
            for kind in step.kinds
        ],
        "resident": step.resident,
        "phases": list(phases),
        "sections": list(sections),
        "passages": passages,
        "tails": changes,
    }


def _cut(bottom: int) -> str:
    return f"The axis begins at {human(bottom)}: below is weights alone." if bottom else ""


# --------------------------------------------------------------------------------------------------------- tables
def _cards(picture: Picture) -> str:
    if not picture.verdicts:
        return ""
    need = picture.ledger.peak.device_bytes
    rows: list[Sequence[Cell]] = []
    for card in shared.ascending(picture.verdicts):
        spare = card.usable_bytes - need
        rows.append((
            (card.gpu, None, ""),
            (human(card.usable_bytes), card.usable_bytes, "n"),
            (VERDICT_WORDS[card.verdict], None, card.verdict),
            (human(spare), spare, "n"),
        ))  # fmt: skip
    heads = (("card", ""), ("usable", "n"), ("verdict", ""), ("to spare", "n"))
    return _section("Cards", _table(heads, rows, "usable", "ascending"))


def _diagnosis(picture: Picture) -> str:
    """Why the run ended out of memory, and what would change that."""
    found = picture.diagnosis
    if found is None:
        return ""
    causes = "".join(f"<li>{_safe(text)}</li>" for text in found.causes)
    rows: list[Sequence[Cell]] = []
    for fix in found.fixes[:SHOWN_FIXES]:
        verdict = "" if fix.fits is None else "fits" if fix.fits else "does_not_fit"
        rows.append((
            (fix.title + (" (changes what is trained)" if fix.changes_training else ""), None, ""),
            (human(fix.saves_bytes), None, "n"),
            (human(fix.device_bytes), None, "n"),
            (VERDICT_WORDS.get(verdict, ""), None, verdict),
        ))  # fmt: skip
    heads = (("what to change", ""), ("saves", "n"), ("then needs", "n"), ("verdict", ""))
    table = _plain_table(heads, rows) if rows else ""
    return _section("Diagnosis", f"<p>{_safe(found.evidence.message)}</p><ol>{causes}</ol>{table}")


def _measured(picture: Picture) -> str:
    peaks = shared.measured_peaks(picture)
    if picture.measurement is None:
        return ""
    if not peaks:
        return _section("Measured", "<p>The run has no peaks of its own: its device has no allocator to ask.</p>")
    rows: list[Sequence[Cell]] = [
        (
            (phase, None, ""),
            (human(predicted), predicted, "n"),
            (human(measured), measured, "n"),
            (_difference(measured - predicted), measured - predicted, "n"),
            (f"{(measured - predicted) / predicted:+.2%}", None, "n"),
        )
        for phase, measured, predicted in peaks
    ]
    heads = (("allocated at most", ""), ("predicted", "n"), ("measured", "n"), ("difference", "n"), ("%", "n"))
    device = picture.measurement.device_name
    where = _safe(f"Measured on {device}, dotted in the picture; overhead is no part of what is allocated.")
    return _section("Measured", f'{_plain_table(heads, rows)}<p class="dim small">{where}</p>')


def _difference(size: int) -> str:
    return human(size) if size < 0 else f"+{human(size)}"


def _ledger(ledger: Ledger) -> str:
    total = sum(line.bytes for line in ledger.lines)
    rows: list[Sequence[Cell]] = []
    for line in sorted(ledger.lines, key=lambda line: -line.bytes):
        mark = "~" if line.basis == "modelled" else ""
        rows.append((
            (line.label or line.key, None, ""),
            (group_of(line), None, ""),
            (mark + human(line.bytes), line.bytes, "n"),
            (percent(line.bytes / total), line.bytes, "n"),
            (line.formula, None, "formula"),
        ))  # fmt: skip
    heads = (("line", ""), ("group", ""), ("size", "n"), ("share", "n"), ("formula", ""))
    foot = [("device", None, ""), ("", None, ""), (human(total), total, "n"), ("100%", None, "n"), ("", None, "")]
    return _table(heads, rows, "size", "descending", foot, "sortable ledger")


def _section(title: str, body: str) -> str:
    name = title.lower()
    return f'<section aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{body}</section>'


def _table(
    heads: Sequence[tuple[str, str]],
    rows: Iterable[Sequence[Cell]],
    sorted_by: str,
    direction: str,
    foot: Sequence[Cell] = (),
    kind: str = "sortable",
) -> str:
    """A table whose heads sort it, as it is sorted already."""
    titles = "".join(
        f'<th scope="col"{_class(align)}{_sort(title == sorted_by, direction)}><button type="button">{_safe(title)}'
        "</button></th>"
        for title, align in heads
    )
    tail = f"<tfoot><tr>{_cells(foot)}</tr></tfoot>" if foot else ""
    body = "\n".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table, may scroll">'
        f'<table class="{kind}">'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody>{tail}</table></div>"
    )


def _plain_table(heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[Cell]]) -> str:
    """In the order in which things happen: nothing to sort."""
    titles = "".join(f'<th scope="col"{_class(kind)}>{_safe(title)}</th>' for title, kind in heads)
    body = "\n".join(f"<tr>{_cells(row)}</tr>" for row in rows)
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Table, may scroll"><table>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cells(row: Iterable[Cell]) -> str:
    return "".join(f"<td{_class(kind)}{_value(value)}>{_safe(text)}</td>" for text, value, kind in row)


def _value(value: int | None) -> str:
    return "" if value is None else f' data-value="{value}"'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _sort(is_sorted: bool, direction: str) -> str:
    return f' aria-sort="{direction}"' if is_sorted else ""
