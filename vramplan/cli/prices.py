"""What cards cost per hour, and which cards a guide is about."""

from __future__ import annotations

from collections.abc import Sequence

from vramplan.core.types import GpuProfile
from vramplan.errors import InputError

Priced = tuple[str, float]  # a card as it was named, and what an hour of it costs


def by_key(prices: Sequence[Priced], cards: Sequence[GpuProfile]) -> dict[str, float]:
    """Prices by the key of the card. `InputError` for a card that is not among `cards`, or has two prices."""
    found: dict[str, float] = {}
    for name, price in prices:
        key = _key(name, cards)
        if found.setdefault(key, price) != price:
            raise InputError(f"--price has two prices for {key}", "give one")
    return found


def _key(name: str, cards: Sequence[GpuProfile]) -> str:
    from vramplan.sources.profiles import load_gpu

    keys = [card.key for card in cards]
    if name in keys:
        return name
    try:
        key = load_gpu(name).key
    except InputError as error:
        raise InputError(error.message.replace("--gpu", "--price", 1), error.hint) from None
    if key not in keys:
        raise InputError(f"--price {name} is of a card that is not compared", f"add --gpu {key}, or --gpu all")
    return key
