"""The table of `audit`: what a configuration costs without need, and what to write instead."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vramplan.core.types import ConfigAudit, ConfigFinding, TrainerConfig
from vramplan.core.units import human
from vramplan.report import tables
from vramplan.report.fields import one_line

TOOL_NAMES = {"transformers": "TrainingArguments", "trl": "TRL", "axolotl": "axolotl", "llama-factory": "LLaMA-Factory",
              "vramplan": "a run file", "model": "a model"}  # fmt: skip
SHOWN_KEYS = 6


def show_config_audit(stream: TextIO, found: ConfigAudit, *, width: int | None = None) -> None:
    """Verdict, what was read, the findings, what was assumed, and the keys that nobody read."""
    screen = tables.console(stream, width)
    verdict = found.judged.verdict if found.judged else ""
    tables.sentence(screen, one_line(headline(found)), verdict)
    tables.sentence(screen, one_line(_what(found.config)))
    if found.findings:
        screen.print()
        screen.print(_table(screen, found.findings))
        if not all(finding.certain for finding in found.findings):
            screen.print(Text("? the file leaves it to a script, the environment, a version or the data", style="dim"))
    _notes(screen, found.config)


def headline(found: ConfigAudit) -> str:
    """What was found and what the run needs, in one sentence."""
    certain = sum(finding.certain for finding in found.findings)
    open_ = len(found.findings) - certain
    count = f"{certain} {'thing costs' if certain == 1 else 'things cost'} memory without need" if certain else (
        "Nothing that costs memory without need")  # fmt: skip
    count += f", {open_} more may" if open_ else ""
    if found.device_bytes is None:
        return count + "."
    saved = ""
    if found.fixed_bytes is not None and found.fixed_bytes < found.device_bytes:
        saved = f", {human(found.fixed_bytes)} with what is certain changed"
    need = f"needs {human(found.device_bytes)}"
    if found.judged is None:
        return f"{count}: {need} as written{saved}."
    words = {"fits": "Fits", "tight": "Tight on", "does_not_fit": "Does not fit"}[found.judged.verdict]
    usable = human(found.judged.usable_bytes)
    return f"{words} {found.judged.gpu} ({usable} usable): {need} as written{saved}. {count}."


def _what(config: TrainerConfig) -> str:
    parts = [config.source if config.tool == "model" else f"{config.source} ({TOOL_NAMES[config.tool]})"]
    run = config.run
    if config.model and config.tool != "model":
        parts.append(config.model)
    if run is not None:
        parts.append(f"{run.micro_batch_size} x {run.seq_len} tokens")
        parts.append(f"r={run.lora.r} on {','.join(run.lora.targets)}")
    return ", ".join(parts)


def _table(screen: Console, findings: tuple[ConfigFinding, ...]) -> Table:
    """The bytes never wrap, the sentences do; at 80 columns the fix stands under what was found."""
    table = tables.plain_table(screen)
    tables.add_number(table, "costs")
    table.add_column("what costs memory", overflow="fold")
    wide = screen.width >= tables.WIDE
    if wide:
        table.add_column("write instead", overflow="fold", ratio=2)
        table.columns[1].ratio = 3
    table.add_column("cause", justify="right", no_wrap=True)
    for finding in findings:
        size = "-" if finding.bytes is None else human(finding.bytes)
        mark = "" if finding.certain else "? "
        cells = [one_line(finding.message), one_line(finding.fix)]
        told: list[str | Text] = list(cells) if wide else [Text(f"{cells[0]}\n").append(f"-> {cells[1]}", style="dim")]
        table.add_row(mark + size, *told, "" if finding.cause is None else str(finding.cause))
    return table


def _notes(screen: Console, config: TrainerConfig) -> None:
    lines = [*config.assumed]
    if config.unplanned:
        lines.insert(0, f"no bytes of the run: {config.unplanned}")
    keys = config.not_understood
    if keys:
        more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
        what = "key was" if len(keys) == 1 else "keys were"
        lines.append(f"{len(keys)} {what} not understood: {', '.join(keys[:SHOWN_KEYS])}{more}")
    if lines:
        screen.print()
    for line in lines:
        tables.sentence(screen, one_line(line))
