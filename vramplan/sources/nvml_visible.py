"""Which cards a CUDA program started here would see, and in which order: CUDA_VISIBLE_DEVICES, and MIG.

CUDA's rules: the list counts up to its first entry that names no card, an entry that comes twice hides everything, all
entries are of one kind (indices, "GPU-" UUIDs which may be cut short, "MIG-" UUIDs), and of a card that is split into
MIG instances a process sees one instance.

NVML counts cards by PCI slot. CUDA counts the fastest first unless CUDA_DEVICE_ORDER=PCI_BUS_ID, by a rule that is not
written down: where the cards differ, an index is only likely to mean the same card, and `certain` is False.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vramplan.errors import VramplanError
from vramplan.sources.nvml_calls import ELSEWHERE, Calls, text

_LEADING_INDEX = re.compile(r"\+?(\d{1,6})")  # CUDA reads "1abc" as 1, as strtol does
_OLD_MIG = re.compile(r"MIG-(GPU-[0-9a-f-]+)/(\d+)/(\d+)\Z")  # drivers before R470: card, GPU and compute instance


class Visible(NamedTuple):
    """A card or a MIG instance; `error` says why it cannot be asked (it is lost)."""

    handle: Any
    certain: bool
    error: VramplanError | None = None


def visible(calls: Calls, environment: Mapping[str, str]) -> list[Visible]:
    """The cards in the order in which this process sees them, at least one. VramplanError if there is none."""
    cards = _permitted(calls)
    if not cards:
        raise VramplanError("this machine has no NVIDIA GPU", ELSEWHERE)
    same_order = environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len(_names(calls, cards)) <= 1
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    parts = [] if wanted is None else [part.strip() for part in wanted.split(",")]
    kind = next((kind for kind in ("GPU-", "MIG-") if parts and parts[0].startswith(kind)), "")
    chosen = cards if wanted is None else _chosen(calls, cards, parts, kind)
    if not chosen:
        raise VramplanError(f"CUDA_VISIBLE_DEVICES={wanted!r} hides every GPU", "unset it")
    if kind == "MIG-":
        return chosen
    certain = same_order or kind == "GPU-"
    found = [part for card in chosen for part in _instances(calls, card._replace(certain=certain))]
    if not found:
        raise VramplanError("the GPU is in MIG mode and has no instance", "`nvidia-smi mig -cgi PROFILE -C` makes one")
    return found


def _permitted(calls: Calls) -> list[Visible]:
    """All cards but those that this process may not open, which CUDA does not count either (containers, Slurm)."""
    cards, refused = [], None
    for index in range(calls.must("nvmlDeviceGetCount")):
        try:
            cards.append(Visible(calls.nvml.nvmlDeviceGetHandleByIndex(index), True))
        except calls.errors as error:
            if calls.code(error) == "NO_PERMISSION":
                refused = calls.failure(error)
            else:
                cards.append(Visible(None, True, calls.failure(error)))
    if refused is not None and not cards:
        raise refused
    return cards


def _names(calls: Calls, cards: list[Visible]) -> set[str]:
    return {text(_quietly(calls, "nvmlDeviceGetName", card)) for card in cards if card.error is None}


def _quietly(calls: Calls, name: str, card: Visible) -> Any:
    """What a card that may be lost says while another one is asked for."""
    try:
        return calls.may(name, card.handle)
    except VramplanError:
        return None


def _chosen(calls: Calls, cards: list[Visible], parts: list[str], kind: str) -> list[Visible]:
    found: list[Visible] = []
    seen: set[str | int] = set()
    for part in parts:
        card = _card(calls, cards, part, kind) if part.startswith(kind) else None
        if card is None:
            break
        key = part if kind == "MIG-" else id(card)
        if key in seen:
            return []
        seen.add(key)
        found.append(card)
    return found


def _card(calls: Calls, cards: list[Visible], part: str, kind: str) -> Visible | None:
    if kind == "MIG-":
        handle = calls.may("nvmlDeviceGetHandleByUUID", part) or _old_mig(calls, cards, part)
        return Visible(handle, True) if handle else None
    if kind == "GPU-":
        return _by_uuid(calls, cards, part)
    index = _LEADING_INDEX.match(part)
    return cards[int(index[1])] if index and int(index[1]) < len(cards) else None


def _by_uuid(calls: Calls, cards: list[Visible], start: str) -> Visible | None:
    """The one card whose UUID begins so, or None."""
    found = [c for c in cards if c.error is None and text(_quietly(calls, "nvmlDeviceGetUUID", c)).startswith(start)]
    return found[0] if len(found) == 1 else None


def _old_mig(calls: Calls, cards: list[Visible], name: str) -> Any:
    match = _OLD_MIG.match(name)
    card = _by_uuid(calls, cards, match[1]) if match else None
    if match is None or card is None:
        return None
    ids = ("nvmlDeviceGetGpuInstanceId", "nvmlDeviceGetComputeInstanceId")
    wanted = [int(match[2]), int(match[3])]
    parts = _split(calls, card.handle)
    return next((part for part in parts if [calls.may(ask, part) for ask in ids] == wanted), None)


def _instances(calls: Calls, card: Visible) -> list[Visible]:
    """The MIG instances of a card that is split, else the card: a split card's own memory is nobody's.

    Without being told which, CUDA takes the first.
    """
    mode = None if card.error is not None else calls.may("nvmlDeviceGetMigMode", card.handle)
    if not mode or mode[0] != 1:
        return [card]
    return [Visible(part, card.certain and place == 0) for place, part in enumerate(_split(calls, card.handle))]


def _split(calls: Calls, handle: Any) -> Iterator[Any]:
    for slot in range(calls.may("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
        part = calls.may("nvmlDeviceGetMigDeviceHandleByIndex", handle, slot)
        if part is not None:
            yield part
