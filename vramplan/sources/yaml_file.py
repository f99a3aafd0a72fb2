"""YAML and JSON files as mappings, read as what a stranger has written: no tags, no bombs, and the line of each key."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from vramplan.errors import InputError, VramplanError
from vramplan.sources.records import parse_json, read_text

if TYPE_CHECKING:
    from pathlib import Path

MAX_CONFIG_BYTES = 2**20
MOST_ALIASES, DEEPEST, MOST_VALUES = 10, 32, 20_000
LONGEST_BITS = 63


class Mapping(NamedTuple):
    """The top level of a file. `lines` has the line of a key, where the format tells it."""

    values: dict[str, Any]
    lines: dict[str, int]
    where: str


def read_mapping(path: Path | str) -> Mapping:
    """A `.json` file as JSON, any other as YAML. InputError for what is neither, or no mapping of names."""
    where = str(path)
    text = read_text(path, MAX_CONFIG_BYTES)
    if where.lower().endswith(".json"):
        values, lines = _parse_json(text, where)
    else:
        values, lines = parse(text, where)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{where} holds no settings", "a trainer's configuration is a mapping of names to values")
    _count(values, where)
    return Mapping(values, lines, where)


def _parse_json(text: str, where: str) -> tuple[Any, dict[str, int]]:
    return parse_json(text, where), {}


def parse(text: str, where: str) -> tuple[Any, dict[str, int]]:
    """YAML text to plain values, and the line of each key of its top level."""
    try:
        import yaml
    except ImportError:
        raise VramplanError("PyYAML is not installed", "pip install pyyaml") from None
    try:
        _refuse_bombs(yaml, text, where)
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, {}
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            lines = {key.value: key.start_mark.line + 1 for key, _ in pairs if isinstance(key.value, str)}
            return loader.construct_document(node), lines
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise InputError(f"{where}{line} is no plain YAML: {' '.join(str(problem).split())[:120]}") from None
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        # dates that do not exist, numbers of a thousand digits, keys that are lists: PyYAML lets them through
        raise InputError(f"{where} is no plain YAML: it holds a value that cannot be read") from None


def _refuse_bombs(yaml: Any, text: str, where: str) -> None:
    """Aliases can stand for exponentially much, and nesting for a stack as deep as the file is long."""
    aliases = depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent))
        depth -= isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent))
        for number, most, what in ((aliases, MOST_ALIASES, "aliases"), (depth, DEEPEST, "levels"),
                                   (count, MOST_VALUES, "values")):  # fmt: skip
            if number > most:
                raise InputError(f"{where}, line {event.start_mark.line + 1}: more than {most:,} {what} are not read")


def _count(values: dict[str, Any], where: str) -> None:
    """Refuse what aliases have made endless or huge, and numbers that no file of settings holds."""
    rest: list[tuple[Any, int]] = [(values, 0)]
    count = 0
    while rest:
        value, depth = rest.pop()
        count += 1
        if depth > DEEPEST or count > MOST_VALUES:
            raise InputError(f"{where} holds more than a configuration does")
        if isinstance(value, float) and not isfinite(value):
            raise InputError(f"{where} holds a number that is not finite")
        if isinstance(value, int) and value.bit_length() > LONGEST_BITS:
            raise InputError(f"{where} holds a number that is too long")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise InputError(f"{where} holds a text that is no Unicode")  # half a character, by an escape
        inner = [*value, *value.values()] if isinstance(value, dict) else list(value) if isinstance(value, list) else []
        rest += [(item, depth + 1) for item in inner]
