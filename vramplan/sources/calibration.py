"""What `vramplan calibrate` has measured on this machine's cards, in the user's cache directory, one file a card.

`$VRAMPLAN_CACHE`, else `$XDG_CACHE_HOME/vramplan`, else `~/.cache/vramplan`, on every system: where Hugging Face's
libraries keep theirs. A file that is damaged or speaks of another card is left aside with a warning.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from vramplan.core.calibrate import CONTEXT_BYTES, LIMITS, RESERVED_FACTOR
from vramplan.core.types import Calibration, GpuProfile
from vramplan.errors import InputError, VramplanError
from vramplan.sources.profiles import normalise
from vramplan.sources.records import read_json, write_json

CACHE_VARIABLE = "VRAMPLAN_CACHE"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
RENEW = "`vramplan calibrate` measures again"


def folder() -> Path:
    """Where calibrations are; it need not exist."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser() / "calibration"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "vramplan" / "calibration"


def path_of(card: GpuProfile) -> Path:
    """The file of one card: cards of one name differ in size."""
    return folder() / f"{normalise(card.name) or 'gpu'}-{card.total_bytes // 2**20}.json"


def rows_path(card: GpuProfile) -> Path:
    """What an unfinished calibration has measured so far."""
    return path_of(card).with_suffix(".rows.jsonl")


def installed_versions(card: GpuProfile) -> dict[str, str]:
    """Versions of what decides overheads and speed: the libraries here, and the driver's major one."""
    from importlib import metadata

    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # built from source, on the path only
            found[name] = "unknown"
    return {**found, "driver": (card.driver or "unknown").partition(".")[0]}


# ---------------------------------------------------------------------------------------------------------- using
def apply(card: GpuProfile) -> tuple[GpuProfile, str, str]:
    """(the card with its calibration, a note that it has one, a warning why one was left aside)."""
    path = path_of(card)
    if not path.is_file():
        return card, "", ""
    try:
        found = checked(read_json(path, Calibration), path)
    except InputError as error:
        return card, "", f"the calibration is left aside: {error.message} ({RENEW})"
    if (found.card, found.total_bytes) != (card.name, card.total_bytes):
        return card, "", f"the calibration is left aside: {path} is of another card, {found.card} ({RENEW})"
    changed = _changed(dict(found.versions), installed_versions(card))
    if changed:
        return card, "", f"the calibration is left aside: {changed} ({RENEW})"
    return applied(card, found), f"calibrated on {found.made}: context, reserve and speed as measured on this card", ""


def applied(card: GpuProfile, found: Calibration) -> GpuProfile:
    """The card with these overheads; everything else is as it was."""
    source = f"vramplan calibrate, {found.made}"
    return replace(
        card,
        context_bytes=found.context_bytes,
        context_basis="measured",
        reserved_factor=found.reserved_factor,
        speed=found.speed,
        sources=tuple({**dict(card.sources), "context_bytes": source, "speed": source}.items()),
    )


def checked(found: Calibration, path: Path) -> Calibration:
    """InputError for numbers that no measurement gives: a damaged file must not steer a plan."""
    numbers = {
        "context_bytes": (found.context_bytes, CONTEXT_BYTES),
        "reserved_factor": (found.reserved_factor, RESERVED_FACTOR),
        **{f"speed.{name}": (getattr(found.speed, name), limits) for name, limits in LIMITS.items()},
    }
    for name, (value, (low, high)) in numbers.items():
        if not low <= value <= high:
            raise InputError(f"{path}: {name} is {value}, which is not from {low} to {high}")
    return found


def _changed(then: dict[str, str], now: dict[str, str]) -> str:
    """ "torch was 2.11.0 and is 2.12.0", or ""."""
    names = [name for name in (*LIBRARIES, "driver") if then.get(name) != now[name]]
    return f"{names[0]} was {then.get(names[0], 'unknown')} and is {now[names[0]]}" if names else ""


# -------------------------------------------------------------------------------------------------------- keeping
def save(calibration: Calibration, card: GpuProfile) -> Path:
    """Write it whole or not at all; what was measured on the way is not needed any more."""
    path = path_of(card)
    make_folder()
    write_json(path, calibration)
    rows_path(card).unlink(missing_ok=True)
    return path


def make_folder() -> None:
    """InputError if there can be none."""
    try:
        folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = f"{CACHE_VARIABLE} names another folder"
        raise InputError(f"{folder()} cannot be made: {error.strerror or error}", hint) from error


def stored() -> tuple[list[tuple[Path, Calibration]], list[str]]:
    """(all calibrations with their files, what is wrong with those that cannot be read)."""
    found, wrong = [], []
    for path in sorted(folder().glob("*.json")):
        try:
            found.append((path, checked(read_json(path, Calibration), path)))
        except VramplanError as error:
            wrong.append(error.message)
    return found, wrong


def forget() -> int:
    """Delete all calibrations and what was measured for them; how many files there were."""
    paths = [*folder().glob("*.json"), *folder().glob("*.rows.jsonl")]
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)
