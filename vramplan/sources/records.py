"""The one JSON codec: every dataclass of `core.types` to and from plain JSON, strictly.

A record is an object with "schema_version", "type" (the class name) and the fields. Reading trusts nothing: unknown or
missing keys, wrong types, NaN, infinities, numbers over 63 bits and files over 64 MiB are refused with the path of the
key. A field added later with a default reads from older files; a newer schema is refused rather than half understood.
"""

from __future__ import annotations

import errno
import json
import os
import types
import typing
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from vramplan.core.types import (
    ALLOCATORS,
    ATTENTIONS,
    BASES,
    CONFIG_TOOLS,
    INTERVALS,
    KERNELS,
    LOSSES,
    LR_SCHEDULERS,
    MERGE_BASES,
    ON_NAN,
    OPTIMIZERS,
    PARALLELS,
    SAMPLINGS,
    SAVE_STRATEGIES,
    SCHEMA_VERSION,
    TRUNCATIONS,
    UPCASTS,
    VERDICTS,
)
from vramplan.errors import InputError, VramplanError

if TYPE_CHECKING:
    from pathlib import Path

MAX_BYTES = 64 * 2**20
_MAX_INT = 2**63 - 1

# Text fields that hold one of a few words, by field name (each name means the same in every class).
CHOICES: dict[str, tuple[str, ...]] = {
    "upcast": UPCASTS,
    "loss": LOSSES,
    "attention": ATTENTIONS,
    "allocator": ALLOCATORS,
    "kernels": KERNELS,
    "optimizer": OPTIMIZERS,
    "lr_scheduler_type": LR_SCHEDULERS,
    "save_strategy": SAVE_STRATEGIES,
    "eval_strategy": INTERVALS,
    "onto": MERGE_BASES,
    "on_nan": ON_NAN,
    "truncation": TRUNCATIONS,
    "train_sampling_strategy": SAMPLINGS,
    "parallel": PARALLELS,
    "tool": CONFIG_TOOLS,
    "verdict": VERDICTS,
    "basis": BASES,
    "usable_basis": BASES,
    "context_basis": BASES,
    "ended": ("finished", "interrupted", "oom", "error"),
}

T = TypeVar("T")


# ------------------------------------------------------------------------------------------------------ to JSON
def encode(value: Any) -> dict[str, Any]:
    """A dataclass of `core.types` as plain JSON types. InputError if a number in it is NaN or infinite."""
    if not is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"{type(value).__name__} is not a record")
    name = type(value).__name__
    return {"schema_version": SCHEMA_VERSION, "type": name, **_plain(value, name)}


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not isfinite(value):
            raise InputError(f"{path} is {value}, which a record cannot hold")
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), f"{path}.{f.name}") for f in fields(value)}
    raise TypeError(f"{path} is a {type(value).__name__}, which a record cannot hold")


# ---------------------------------------------------------------------------------------------------- from JSON
def decode(data: Any, cls: type[T], *, where: str = "") -> T:
    """The `cls` that `encode` wrote. InputError, naming `where` (a file) and the key, if `data` is not one."""
    where = where or cls.__name__
    if not isinstance(data, dict):
        raise InputError(f"{where} is not a {cls.__name__} record: it holds {_kind(data)}, not an object")
    version = data.get("schema_version")
    if type(version) is not int or version < 1:
        raise InputError(f"{where} is not a vramplan record: schema_version is {_show(version)}")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{where} has schema_version {version}, this vramplan reads up to {SCHEMA_VERSION}", "upgrade vramplan"
        )
    if data.get("type") != cls.__name__:
        raise InputError(f"{where} holds a record of type {_show(data.get('type'))}, not {cls.__name__!r}")
    body = {key: item for key, item in data.items() if key not in ("schema_version", "type")}
    value: T = _object(body, cls, "", where)
    return value


@cache
def _schema(cls: type) -> dict[str, tuple[Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return {f.name: (f, hints[f.name]) for f in fields(cls)}


def _object(data: Any, cls: Any, path: str, where: str) -> Any:
    if not isinstance(data, dict):
        _wrong(where, path, "an object", data)
    schema = _schema(cls)
    prefix = f"{path}." if path else ""
    for key in data:
        if key not in schema:
            raise InputError(f"{where}: {_show(prefix + key)} is not a field of {cls.__name__}")
    values = {}
    for name, (field, hint) in schema.items():
        if name in data:
            values[name] = _value(data[name], hint, prefix + name, where)
            if name in CHOICES and values[name] not in CHOICES[name]:
                _wrong(where, prefix + name, "one of " + ", ".join(CHOICES[name]), data[name])
        elif field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"{where}: {prefix + name} is missing")
    return cls(**values)


def _value(data: Any, hint: Any, path: str, where: str) -> Any:
    if is_dataclass(hint):
        return _object(data, hint, path, where)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):  # only "something or None" is used
        if data is None:
            return None
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
        return _value(data, inner, path, where)
    if origin is tuple:
        return _tuple(data, typing.get_args(hint), path, where)
    return _scalar(data, hint, path, where)


def _tuple(data: Any, args: tuple[Any, ...], path: str, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list):
        _wrong(where, path, "a list", data)
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(data)
    elif len(data) != len(args):
        raise InputError(f"{where}: {path} must have {len(args)} entries, not {len(data)}")
    return tuple(
        _value(item, arg, f"{path}[{index}]", where) for index, (item, arg) in enumerate(zip(data, args, strict=True))
    )


def _scalar(data: Any, hint: Any, path: str, where: str) -> Any:
    if hint is float:
        if type(data) not in (int, float):
            _wrong(where, path, "a number", data)
        if abs(data) > 1e300:  # infinity too
            raise InputError(f"{where}: {path} is too large")
        if data != data:
            raise InputError(f"{where}: {path} is NaN")
        return float(data)
    if type(data) is not hint:  # exact: a bool is not an int here
        _wrong(where, path, {int: "a whole number", str: "text", bool: "true or false"}.get(hint, str(hint)), data)
    if hint is int and abs(data) > _MAX_INT:
        raise InputError(f"{where}: {path} is too large")
    return data


def _wrong(where: str, path: str, wanted: str, data: Any) -> NoReturn:
    raise InputError(f"{where}: {path} must be {wanted}, not {_show(data)}")


def _kind(data: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}.get(
        type(data), "a number"
    )


def _show(data: Any) -> str:
    """A short, one-line form of an untrusted value for an error message."""
    if isinstance(data, (dict, list)):
        return _kind(data)
    if isinstance(data, int) and abs(data) > _MAX_INT:
        return "a huge number"
    text = json.dumps(data)
    return text if len(text) <= 60 else text[:57] + "..."


# --------------------------------------------------------------------------------------------------------- files
def parse_json(text: str, where: str) -> Any:
    """JSON text to plain values. InputError naming `where` if it is not JSON or nested too deep."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not valid JSON: {error.msg} (line {error.lineno})") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deep") from None
    except ValueError:  # an integer of thousands of digits
        raise InputError(f"{where} is not valid JSON: a number is too long") from None


def read_text(path: Path | str, max_bytes: int = MAX_BYTES) -> str:
    """A UTF-8 file of at most `max_bytes`. InputError if it cannot be read, is larger, or is not UTF-8."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > max_bytes:
        raise InputError(f"{path} is larger than {max_bytes // 2**20} MiB")
    try:
        return data.decode("utf-8-sig")  # Windows editors put a byte order mark in front
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text") from None


def read_json(path: Path | str, cls: type[T]) -> T:
    """The record of class `cls` in a file. InputError if it is missing or not one."""
    return decode(parse_json(read_text(path), str(path)), cls, where=str(path))


def write_json(path: Path | str, value: Any) -> None:
    """Write a record to a file, whole or not at all."""
    write_text(path, json.dumps(encode(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path | str, text: str) -> None:
    """Write a file whole or not at all: a temporary file beside it, synced, then renamed over it.

    InputError if it cannot be created there, VramplanError if writing fails (disk full).
    """
    from pathlib import Path

    path = Path(path)
    if path.exists() and not path.is_file():  # a folder; or /dev/null, which a rename would replace
        raise InputError(f"cannot write {path}: not a regular file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _write_error(path, error) from None
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    with suppress(OSError):  # the folder itself is missing or not a folder: reported already
        path.unlink(missing_ok=True)


def _write_error(path: Path, error: OSError) -> VramplanError:
    message = f"cannot write {path}: {error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
        return VramplanError(message)
    return InputError(message)


def append_jsonl(path: Path | str, value: Any) -> None:
    """Add a record to a file as one line, all of it or nothing."""
    from pathlib import Path

    path = Path(path)
    line = (json.dumps(encode(value), allow_nan=False) + "\n").encode()
    try:
        with path.open("ab", buffering=0) as file:
            before = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) != len(line):  # a short write: the disk filled up half-way
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise
    except OSError as error:
        raise _write_error(path, error) from None


def read_jsonl(path: Path | str, cls: type[T]) -> list[T]:
    """All records of a file of lines. A last line without its newline that is no JSON was never finished: left out."""
    lines = read_text(path).split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            data = parse_json(line, where)
        except InputError:
            if number == len(lines):
                break
            raise
        records.append(decode(data, cls, where=where))
    return records
