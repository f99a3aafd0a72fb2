"""Another trainer's configuration with some keys set: everything else in the file stays as it is.

YAML is changed where a key's value stands, so that comments, order and quotes are kept. The result is read again and
must hold what was meant and nothing else; where it does not (anchors, a mapping in braces), the file is written anew
from its values, and its comments are lost.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from vramplan.errors import InputError
from vramplan.sources.records import read_text, write_text
from vramplan.sources.yaml_file import MAX_CONFIG_BYTES, parse, read_mapping

if TYPE_CHECKING:
    from pathlib import Path

WIDEST = 10_000  # a value stays on one line


def write_like(source: Path | str, target: Path | str, keys: dict[str, Any]) -> bool:
    """Write `source` with these keys set to `target`. True if comments were lost on the way."""
    file = read_mapping(source)
    text = read_text(source, MAX_CONFIG_BYTES)
    wanted = {**file.values, **keys}
    if str(source).lower().endswith(".json"):
        indent = re.search(r"^[ \t]+(?=\")", text, re.MULTILINE)
        written = json.dumps(wanted, indent=indent[0] if indent else 2, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(target, written)
        return False
    edited = _edited(text, keys)
    whole = _reads_as(edited, wanted)
    write_text(target, edited if whole else _dumped(wanted))
    return not whole and "#" in text


def _reads_as(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return bool(parse(text, "the edited file")[0] == wanted)
    except InputError:
        return False


def _edited(text: str, keys: dict[str, Any]) -> str:
    """Each value in its place; keys that the file does not have at its end."""
    import yaml

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = {key.value: (key, value) for key, value in node.value} if node is not None else {}
    places = []
    for name, value in keys.items():
        if name in pairs:
            start, end = _place(text, *pairs[name])
            places.append((start, end, f" {_flow(value)}"))
    for start, end, new in sorted(places, reverse=True):
        text = text[:start] + new + text[end:]
    more = "".join(f"{_flow(name)}: {_flow(value)}\n" for name, value in keys.items() if name not in pairs)
    return text + ("\n" if more and text and not text.endswith("\n") else "") + more


def _place(text: str, key: Any, value: Any) -> tuple[int, int]:
    """From behind the key's colon to the end of its value, without what follows a list: comments, the next key."""
    colon = text.index(":", key.end_mark.index)
    return colon + 1, max(_end(value), colon + 1)


def _end(node: Any) -> int:
    if isinstance(node.value, list) and node.value and not node.flow_style:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _flow(value: Any) -> str:
    """A value on one line."""
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=WIDEST, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...").removesuffix("\n")


def _dumped(values: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text
