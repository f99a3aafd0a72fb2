"""What was loaded, beside the plan: a small table, and a line for everything that costs memory without need."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from vramplan.core.rows import Scale, apportion, scale_for
from vramplan.core.units import human
from vramplan.report import tables
from vramplan.report.fields import objects, one_line, whole

Event = dict[str, Any]


def show_audit(screen: Console, event: Event) -> None:
    """The table of an `audit` event, whose printed rows add up, and its findings."""
    rows = objects(event.get("rows"))
    if rows:
        tables.put(screen, _table(screen, event, rows))
    for finding in objects(event.get("findings")):
        tables.sentence(screen, one_line(finding_text(finding)))


def _table(screen: Console, event: Event, rows: list[Event]) -> Table:
    counted = [whole(row.get("bytes")) or 0 for row in rows]
    planned = [whole(row.get("planned_bytes")) for row in rows]
    labels = [one_line(str(row.get("label", row.get("key", "")))) for row in rows]
    dtypes = [one_line(" + ".join(map(str, d))) if isinstance(d := row.get("dtypes"), dict) else "" for row in rows]
    allocated = whole(event.get("allocated_bytes"))
    if allocated is not None and allocated > sum(counted):
        rest = allocated - sum(counted)
        labels, dtypes = [*labels, "in no module"], [*dtypes, ""]
        counted, planned = [*counted, rest], [*planned, 0 if None not in planned else None]
    scale = scale_for(0)  # MiB, in which a difference shows
    known = [size for size in planned if size is not None]
    table = tables.plain_table(screen)
    tables.add_text(table, "loaded", screen)
    tables.add_text(table, "dtype", screen)
    tables.add_number(table, scale.unit)
    columns = [labels, dtypes, _printed(counted, scale)]
    totals = ["together", "", scale.text(scale.steps(sum(counted)))]
    if len(known) == len(planned):
        tables.add_number(table, "planned")
        tables.add_number(table, "difference")
        columns += [_printed(known, scale), [_difference(*pair) for pair in zip(counted, known, strict=True)]]
        totals += [scale.text(scale.steps(sum(known))), _difference(sum(counted), sum(known))]
    for cells in zip(*columns, strict=True):
        table.add_row(*cells)
    table.add_section()
    table.add_row(*totals)
    return table


def _printed(sizes: list[int], scale: Scale) -> list[str]:
    return [scale.text(steps) for steps in apportion(sizes, scale.steps(sum(sizes)), scale)]


def _difference(counted: int, planned: int) -> str:
    if counted == planned:
        return "exact"
    sign = "+" if counted > planned else "-"
    return f"{sign}{human(abs(counted - planned))}"


def finding_text(finding: Event) -> str:
    """ "warning: embeddings and head were made float32, 2.00 GiB: --upcast none (cause 3)"."""
    size, cause = whole(finding.get("bytes")), whole(finding.get("cause"))
    cost = f", {human(size)}" if size else ""
    number = f" (cause {cause} in docs/oom-playbook.md)" if cause is not None else ""
    return f"warning: {finding.get('message', '')}{cost}: {finding.get('fix', '')}{number}"
