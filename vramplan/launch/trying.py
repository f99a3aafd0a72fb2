"""Tries the fixes of a diagnosis on the real card, best first, until one runs."""

from __future__ import annotations

from dataclasses import replace

from vramplan.core.parallel import outside_bytes
from vramplan.core.types import Diagnosis, Fix
from vramplan.core.units import human
from vramplan.errors import InputError, VramplanError
from vramplan.launch.probing import Place, most, play, probe_run
from vramplan.launch.tenants import Say, wait_until_quiet

MOST_TRIES = 3


def try_fixes(diagnosis: Diagnosis, place: Place, say: Say) -> Diagnosis:
    """The diagnosis with what became of its fixes; the one that ran comes first, those that did not come last.

    The card is at rest when this is called. Each fix is played for a few steps with random weights in a child, which
    PyTorch holds to what there was for the run that failed. Raises VramplanError where nothing can be said: no fix that
    fits, a card too small, others at work.
    """
    able = [fix for fix in diagnosis.fixes if fix.fits]
    if not able:
        raise InputError(
            "no fix is predicted to fit, so none was tried", "say what ran and on which card: --run, --gpu"
        )
    failed: list[Fix] = []
    for number, fix in enumerate(able[:MOST_TRIES], 1):
        if failed:
            wait_until_quiet(place.nvml, place.index, say)
        found = _tried(fix, diagnosis, place, say)
        left = tuple(other for other in diagnosis.fixes if other not in able[:number])
        if found.tried == "finished":
            return replace(diagnosis, fixes=(found, *left, *failed))
        failed.append(found)
    return replace(diagnosis, fixes=(*left, *failed))


def cap_of(fix: Fix, diagnosis: Diagnosis, place: Place) -> int:
    """What PyTorch may have, so that the fix meets what the run that failed met."""
    evidence, budget = diagnosis.evidence, diagnosis.budget_bytes
    assert budget is not None  # or nothing would be said to fit
    cap = budget - outside_bytes(fix.run, place.card)
    return cap if evidence.allowed_bytes is None else min(cap, evidence.allowed_bytes)


def _tried(fix: Fix, diagnosis: Diagnosis, place: Place, say: Say) -> Fix:
    cap = cap_of(fix, diagnosis, place)
    free = place.card.usable_bytes - outside_bytes(fix.run, place.card)
    if free < cap and free < fix.device_bytes:
        raise InputError(
            f"{place.card.name} has {human(free)} free, too little to try a fix in", "free it, or leave out --verify"
        )
    say(f"trying: {fix.title}")
    played = play(probe_run(fix.run), place, cap_bytes=cap)
    if played.disturbances:
        raise VramplanError(f"{played.disturbances[0]} while a fix was tried: that proves nothing")
    ended = "finished" if played.finished else "oom"
    return replace(fix, tried=ended, tried_bytes=most(played.measurement, "peak_bytes") if played.finished else None)
