"""What a run survived, in words: its events `oom`, `rehearsal` and `health`, and the sum of them at the end."""

from __future__ import annotations

from typing import Any

from vramplan.core.types import Ledger, Measurement
from vramplan.core.units import human
from vramplan.report.fields import whole

Event = dict[str, Any]

# action of an `oom` event -> what was done about it
MEASURES = {
    "checkpoint": "redone with every layer checkpointed",
    "offload": "redone with checkpoints in host memory",
    "drop_graphs": "redone without CUDA graphs",
    "retry": "taken again",
    "one_by_one": "taken one parameter at a time",
}


def oom_text(event: Event) -> str:
    """ "out of memory: step 12, backward, 4 x 4,096 tokens (2.00 GiB asked for): redone 2 rows at a time"."""
    now, action, where = _count(event, "micro_batch_size"), event.get("action"), event.get("where")
    if action in ("shrink", "grow"):
        back = "back to " if action == "grow" else ""
        return (
            f"micro-batch: {back}{now} rows of {_count(event, 'tokens')} tokens at a time from step "
            f"{_count(event, 'step')} on, accumulation {_count(event, 'accumulation')}: the effective batch stays"
        )
    asked = whole(event.get("requested_bytes"))
    size = f" ({human(asked)} asked for)" if asked is not None else ""
    played = "" if where == "optimizer" else f", {_count(event, 'rows')} x {_count(event, 'tokens')} tokens"
    done = f"{now} rows at a time from now on" if where == "evaluation" else f"redone {now} rows at a time"
    done = MEASURES.get(str(action), done)
    return f"out of memory: step {_count(event, 'step')}, {where or 'somewhere'}{played}{size}: {done}"


def rehearsal_text(event: Event) -> str:
    """Whether the largest batch fits, and what was done if not."""
    rows, now = whole(event.get("rows")), whole(event.get("micro_batch_size"))
    tokens, peak = _count(event, "tokens"), whole(event.get("peak_bytes"))
    high = f", peak {human(peak)}" if peak is not None else ""
    relief = event.get("relief")
    names = [str(name) for name in relief] if isinstance(relief, list) else []
    taken = "".join(f", {MEASURES[name].removeprefix('redone ')}" for name in names if name in MEASURES)
    if rows is None or now is None or now >= rows:
        return f"rehearsal: the largest batch, {_count(event, 'rows')} x {tokens} tokens, fits{taken}{high}"
    return (
        f"rehearsal: rows of {tokens} tokens do not fit {rows} at a time: {now} x {tokens} from the start{taken}, "
        f"accumulation {_count(event, 'accumulation')}; the effective batch stays{high}"
    )


def health_text(event: Event) -> str:
    reason = f" ({event['reason']})" if event.get("reason") else ""
    return f"health: step {_count(event, 'step')}: {event.get('message', '')}{reason}"


def survived(ledger: Ledger, measurement: Measurement) -> list[str]:
    """Sentences for the end of a run; none if nothing happened."""
    out = []
    planned = ledger.run.micro_batch_size
    if measurement.oom_events:
        times = "once" if measurement.oom_events == 1 else f"{measurement.oom_events:,} times"
        now = measurement.micro_batch_size or planned
        rows = f"the micro-batch is {planned} as planned"
        if now < planned:
            pieces = ledger.run.accumulation * -(-planned // now)
            rows = f"the longest rows run {now} at a time instead of {planned}, accumulation {pieces}"
        effective = planned * ledger.run.accumulation
        out.append(f"Out of memory {times} and went on: {rows}; the effective batch stayed {effective}.")
    if measurement.skipped_steps:
        some = "1 step was" if measurement.skipped_steps == 1 else f"{measurement.skipped_steps:,} steps were"
        out.append(f"{some} left out: no finite gradient.")
    return out


def _count(event: Event, name: str) -> str:
    value = whole(event.get(name))
    return "?" if value is None else f"{value:,}"
