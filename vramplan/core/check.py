"""A live card: who holds what of it, what a run would add, and what to close or change where that is too much."""

from __future__ import annotations

from dataclasses import replace

from .capacity import capacity
from .fixes import Pricer
from .ledger import estimate
from .occupancy import NOTABLE_BYTES, notes, segments, shares
from .room import judge
from .sizes import Sizes
from .types import CardCheck, Fix, GpuProcess, GpuProfile, Ledger, ModelSpec, Remedy, RunSpec

SHOWN_CHANGES, SHOWN_NAMES = 4, 4


def check(card: GpuProfile, model: ModelSpec | None = None, run: RunSpec | None = None) -> CardCheck:
    """The card alone, or with this run of this model on it. Raises Unplannable."""
    if model is None or run is None:
        return CardCheck(card=card, segments=segments(card), notes=notes(card))
    ledger = estimate(model, run, card)
    return CardCheck(
        card=card,
        segments=segments(card, ledger),
        missing_bytes=max(ledger.peak.device_bytes - card.usable_bytes, 0),
        notes=notes(card),
        ledger=ledger,
        judged=capacity(Sizes(model), run, card),
        remedies=remedies(card, ledger),
    )


def remedies(card: GpuProfile, ledger: Ledger) -> tuple[Remedy, ...]:
    """What would make this run fit, closings first; none where it fits with room.

    Where the run is tight, only what to close: it runs as it is. Where neither is enough, both together.
    """
    now = judge(ledger, card)
    if now == "fits":
        return ()
    closed = _closings(card, ledger, _missing(card, ledger, now))
    if now == "tight":
        return tuple(remedy for remedy in closed if remedy.verdict == "fits")
    fixes = _fixes(card, ledger)
    changes = [_change(fix, card) for fix in fixes if fix.fits][:SHOWN_CHANGES]
    fitting = [remedy for remedy in (*closed, *changes) if remedy.verdict != "does_not_fit"]
    if fitting:
        return tuple(fitting)
    largest = [_change(fix, card) for fix in sorted(fixes, key=lambda fix: -fix.saves_bytes)[:1]]
    both = [_both(closing, fixes, card) for closing in closed if fixes]
    return (*closed, *largest, *(remedy for remedy in both if remedy.verdict != "does_not_fit"))


def _missing(card: GpuProfile, ledger: Ledger, verdict: str) -> int:
    """Bytes to the next better verdict."""
    cached = ledger.peak.reserved_bytes - ledger.peak.minimum_bytes if verdict == "tight" else 0
    return ledger.peak.device_bytes + max(cached, 0) - card.usable_bytes


# ------------------------------------------------------------------------------------------------------ to close
def _closings(card: GpuProfile, ledger: Ledger, missing: int) -> list[Remedy]:
    """The smallest process that is enough, else a few, else all of them; desktops last. One remedy or none."""
    sized = [(process, size) for process, size in shares(card) if process is not None and size]
    able = sorted(sized, key=lambda pair: (pair[0].graphics, -pair[1]))
    enough = [pair for pair in able if pair[1] >= missing and not pair[0].graphics]
    chosen = [min(enough, key=lambda pair: pair[1])] if enough else _few(able, missing)
    freed = sum(size for _, size in chosen)
    names = [_who(process) for process, _ in chosen]
    unnamed = sum(size or 0 for process, size in shares(card) if process is None)
    if freed < missing and unnamed >= NOTABLE_BYTES:  # they cannot be told apart, only closed together
        freed += unnamed
        names.append("other programs on the card")
    return [_closing(card, ledger, names, freed)] if names else []


def _few(able: list[tuple[GpuProcess, int]], missing: int) -> list[tuple[GpuProcess, int]]:
    """From the front until it is enough, without those that then were not needed."""
    chosen: list[tuple[GpuProcess, int]] = []
    for pair in able:
        if sum(size for _, size in chosen) < missing:
            chosen.append(pair)
    for pair in tuple(chosen):
        if sum(size for _, size in chosen) - pair[1] >= missing:
            chosen.remove(pair)
    return chosen


def _closing(card: GpuProfile, ledger: Ledger, names: list[str], freed: int) -> Remedy:
    verdict = judge(ledger, replace(card, usable_bytes=card.usable_bytes + freed))
    shown = names if len(names) <= SHOWN_NAMES else [*names[: SHOWN_NAMES - 1], f"{len(names) - SHOWN_NAMES + 1} more"]
    who = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
    return Remedy(kind="close", title=f"close {who}", frees_bytes=freed, verdict=verdict)


def _who(process: GpuProcess) -> str:
    if process.pid is None:
        return process.name or "a process that is not seen from here"
    return f"{process.name or 'a process'} (pid {process.pid})"


# ----------------------------------------------------------------------------------------------------- to change
def _fixes(card: GpuProfile, ledger: Ledger) -> tuple[Fix, ...]:
    """Changes of the run, priced: those that fit first, of them those that leave training as it is."""
    pricer = Pricer(ledger.model, ledger, card, card.usable_bytes)
    return pricer.ranked(pricer.fixes(), "")


def _change(fix: Fix, card: GpuProfile) -> Remedy:
    return Remedy(
        kind="change",
        title=fix.title,
        frees_bytes=fix.saves_bytes,
        verdict="fits" if fix.device_bytes <= card.usable_bytes else "does_not_fit",
        changes_training=fix.changes_training,
        command=fix.command,
    )


def _both(closing: Remedy, fixes: tuple[Fix, ...], card: GpuProfile) -> Remedy:
    """Everything closed that can be, and the first change that then fits; the largest saving if none does."""
    room = card.usable_bytes + closing.frees_bytes
    gentle = sorted(fixes, key=lambda fix: fix.changes_training)  # there is more room than they were ranked for
    fix = next((fix for fix in gentle if fix.device_bytes <= room), max(fixes, key=lambda fix: fix.saves_bytes))
    change = _change(fix, replace(card, usable_bytes=room))
    title = f"{closing.title}, and {change.title}"
    return replace(change, kind="both", title=title, frees_bytes=closing.frees_bytes + change.frees_bytes)
