"""Run files: TOML whose keys are the flags of a command, without dashes in front."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

from vramplan.errors import InputError
from vramplan.sources.profiles import parse_toml

if TYPE_CHECKING:
    from pathlib import Path

Setting: TypeAlias = "str | bool | list[str]"


def read_run_file(path: Path | str) -> dict[str, Setting]:
    """Flag (with dashes, "learning-rate") -> what follows it on a command line; in the file's order.

    A list is one text with commas, unless the flag may be repeated, which only the caller knows: it stays a list. A
    table is a JSON object. InputError for what is no TOML, or holds a value that no flag takes.
    """
    data = parse_toml(path)
    return {key.replace("_", "-"): _setting(path, key, value) for key, value in data.items()}


def _setting(path: Path | str, key: str, value: Any) -> Setting:
    if isinstance(value, bool):
        return value
    if isinstance(value, (str, int, float)):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return [str(item) for item in value]
    if isinstance(value, dict):
        try:
            return json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            pass
    raise InputError(f"{path}: {key} has a value that no flag takes", "texts, numbers, true, false, lists")
