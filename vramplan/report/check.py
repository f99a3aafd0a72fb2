"""The picture of `check`: the live card as a bar, a run held against it, what to close or change."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.text import Text

from vramplan.core.occupancy import link, power
from vramplan.core.types import CardCheck, GpuProfile, GpuState
from vramplan.core.units import human
from vramplan.report import card_bar, tables
from vramplan.report.diagnose import listing
from vramplan.report.estimate import one_card, run_line
from vramplan.report.gpus import card_line


def show_check(stream: TextIO, found: CardCheck, *, width: int | None = None) -> None:
    """Verdict first where a model was named; then the card, its bar and legend, what would make room, notes."""
    screen = tables.console(stream, width)
    if found.ledger is not None and found.judged is not None:
        need = found.ledger.peak.device_bytes
        tables.sentence(screen, one_card(need, found.judged), found.judged.verdict)
        screen.print(Text(run_line(found.ledger), style="dim"))
    tables.sentence(screen, card_line(found.card))
    screen.print(Text(state_line(found.card), style="dim"))
    screen.print()
    screen.print(card_bar.bar(screen, found))
    screen.print()
    tables.put(screen, *card_bar.legend(screen, found))
    if any(segment.basis == "modelled" for segment in found.segments):
        screen.print(Text("~ modelled; everything else was read or is counted exactly", style="dim"))
    _show_remedies(screen, found)
    if found.notes:
        screen.print()
        screen.print(listing(["-"] * len(found.notes), found.notes))
    if found.ledger is None:
        tables.command(screen, "What fits what is free:", "vramplan check MODEL")
    else:
        screen.print()
        screen.print(Text("Every line of it: vramplan estimate with the same flags and --gpu live", style="dim"))


def state_line(card: GpuProfile) -> str:
    """What the card says of itself; what it does not say is left out."""
    state = card.state
    parts = [f"driver {card.driver}" if card.driver else ""]
    if state is not None:
        most = link(state.pcie_max_generation, state.pcie_max_width)
        now = link(state.pcie_generation, state.pcie_width)
        parts += [
            f"CUDA {state.cuda}" if state.cuda else "",
            "compute {}.{}".format(*card.compute_capability),
            _instance(state),
            f"PCIe {most or now}{f' (now {now})' if now and most and now != most else ''}" if most or now else "",
            {True: "ECC on", False: "ECC off", None: ""}[state.ecc],
            power(state),
            "" if state.busy_percent is None else f"{state.busy_percent}% busy",
        ]
    return ", ".join(part for part in parts if part) or "the driver says nothing else of it"


def _instance(state: GpuState) -> str:
    """ "MIG 1g.10gb, instance 3", or "" for a whole card."""
    if state.mig_uuid is None:
        return ""
    which = "" if state.mig_instance is None else f"instance {state.mig_instance}"
    return "MIG " + ", ".join(part for part in (state.mig_profile, which) if part)


def _show_remedies(screen: Console, found: CardCheck) -> None:
    if not found.remedies:
        return
    screen.print()
    table = tables.plain_table(screen)
    table.add_column("what would make room", overflow="fold")
    tables.add_number(table, "frees")
    tables.add_text(table, "then it", screen)
    for remedy in found.remedies:
        title = remedy.title + (" *" if remedy.changes_training else "")
        table.add_row(title, human(remedy.frees_bytes), tables.verdict_text(remedy.verdict))
    tables.put(screen, table)
    if any(remedy.changes_training for remedy in found.remedies):
        screen.print(Text("* changes what is trained", style="dim"))
    fitting = [remedy for remedy in found.remedies if remedy.verdict != "does_not_fit"]
    if not fitting:
        screen.print()
        tables.sentence(screen, "None of these is enough, alone or together.")
    changed = next((remedy for remedy in fitting if remedy.command), None)
    if changed is not None:
        how = f"with {changed.title}" if changed.kind == "change" else "then"
        tables.command(screen, f"To run it {how}:", changed.command)
