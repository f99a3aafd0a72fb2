"""Fields of an event, which another process wrote: of the right kind, or None; texts on one line."""

from __future__ import annotations

from math import isfinite
from typing import Any


def number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and isfinite(value) else None


def whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def objects(value: Any) -> list[dict[str, Any]]:
    """The objects of a list; what is none is left out."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def one_line(text: str) -> str:
    """Without line breaks and control characters, which a model or a file may well produce."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
