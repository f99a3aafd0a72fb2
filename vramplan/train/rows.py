"""Reads rows of training data from a file or a `datasets` data set, one at a time. Never holds a whole file's rows.

A row that cannot be read is a `Row` with a `problem`, so that the caller decides between stopping and skipping; what
makes the whole file unusable is an InputError.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from vramplan.core.types import DataSpec
from vramplan.core.units import human
from vramplan.errors import InputError, MissingExtra

MAX_LINE_BYTES = 64 * 2**20
MAX_ARRAY_BYTES = 2**30  # a JSON array has to be read in one piece
_BATCH_ROWS = 256  # Parquet rows turned into Python objects at a time
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One row. `where` is "line 3" or "row 3", counted from 1; `problem` is why it cannot be used, or "". `size` is in
    bytes of the file, where that is known."""

    where: str
    value: dict[str, Any]
    problem: str = ""
    size: int = 0


class Rows:
    """The rows of `data.path`, once: a file by its extension, otherwise the name of a data set.

    InputError for a missing or empty file, a folder, an extension nobody knows, a file that is not what it says.
    """

    def __init__(self, data: DataSpec) -> None:
        self._data = data
        self._file: BinaryIO | None = None
        self._size = self._done = 0  # bytes of the file; or rows of the data set

    def __iter__(self) -> Iterator[Row]:
        data = self._data
        path = Path(data.path).expanduser()
        if path.is_dir():
            raise InputError(
                f"{data.path} is a folder, not a data file", "name a file in it: JSONL, Parquet, CSV or text"
            )
        if path.exists():
            return self._file_rows(path)
        if _looks_like_file(data.path):
            raise InputError(f"there is no data file {data.path}", f"looked in {path.absolute().parent}")
        return self._dataset_rows()

    def share(self) -> float | None:
        """How much of the whole has been read; None where nobody knows."""
        try:
            done = self._done if self._file is None else self._file.tell()
        except (OSError, ValueError):  # closed
            return None
        return min(done / self._size, 1.0) if self._size else None

    def _file_rows(self, path: Path) -> Iterator[Row]:
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            known = ", ".join(sorted(_READERS))
            raise InputError(f"{path}: data files end in one of {known}", "rename the file after what is in it")
        try:
            size = path.stat().st_size
            if size == 0:
                raise InputError(f"{path} is empty", "one JSON object a line is what most people use")
            with path.open("rb") as file:
                if path.suffix.lower() != ".parquet":  # read in an order of its own
                    self._file, self._size = file, size
                yield from reader(path, file, self._data)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from error

    def _dataset_rows(self) -> Iterator[Row]:
        values = _dataset(self._data)
        self._size = len(values)
        for self._done, value in enumerate(values, start=1):
            yield Row(f"row {self._done}", value)


def _looks_like_file(name: str) -> bool:
    """Data set names have at most one slash and no extension of a data file."""
    return Path(name).suffix.lower() in _READERS or name.startswith((".", "/", "~")) or name.count("/") > 1


# ------------------------------------------------------------------------------------------------------- lines
def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number, line without its end), numbered from 1. None: longer than MAX_LINE_BYTES, read over and dropped."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, None
            continue
        if number == 1:
            line = line.removeprefix(_BOM)
        yield number, line.rstrip(b"\r\n")


def _not_utf8(line: bytes) -> str:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16, not UTF-8 (save the file as UTF-8)"
    if line.startswith(b"\x1f\x8b"):
        return "is gzip, not text (unpack the file first)"
    return "is not UTF-8 (convert the file, for example with iconv)"


_TOO_LONG = f"is longer than {human(MAX_LINE_BYTES)}"


def _jsonl(path: Path, file: BinaryIO, data: DataSpec) -> Iterator[Row]:
    """One object a line, or, whatever the extension says, one array of objects."""
    start = file.read(4096).removeprefix(_BOM).lstrip()
    file.seek(0)
    if start.startswith(b"["):
        yield from _json_array(path, file)
        return
    for number, line in _lines(file):
        if line is None:
            yield Row(f"line {number}", {}, _TOO_LONG)
        elif line.strip():
            yield replace(_json_row(number, line), size=len(line))


def _json_row(number: int, line: bytes) -> Row:
    where = f"line {number}"
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return Row(where, {}, _not_utf8(line))
    except json.JSONDecodeError as error:
        return Row(where, {}, f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, ten thousand brackets
        return Row(where, {}, f"is not JSON that can be read: {error}")
    return _object_row(where, value)


def _object_row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(where, {}, f"is a JSON {_kind(value)}, not an object")
    return Row(where, value)


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "number"


def _json_array(path: Path, file: BinaryIO) -> Iterator[Row]:
    size = path.stat().st_size
    if size > MAX_ARRAY_BYTES:
        raise InputError(
            f"{path} is a JSON array of {human(size)}; arrays are read up to {human(MAX_ARRAY_BYTES)}",
            f"one object a line is read without a limit: jq -c '.[]' {path.name} > {path.stem}.jsonl",
        )
    try:
        values = json.loads(file.read().removeprefix(_BOM).decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start})", "convert it, for example with iconv") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}, is not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON that can be read: {error}") from error
    if not isinstance(values, list):  # an array and then something else would have failed above
        raise InputError(f"{path} is not a JSON array")
    for number, value in enumerate(values, start=1):
        yield _object_row(f"row {number}", value)


def _text(path: Path, file: BinaryIO, data: DataSpec) -> Iterator[Row]:
    """Paragraphs, separated by blank lines; each becomes a row with the one column `data.text_column`."""
    first, problem = 0, ""
    paragraph: list[str] = []
    for number, line in _lines(file):
        if line is not None and not line.strip():
            if paragraph or problem:
                yield Row(f"line {first}", {data.text_column: "\n".join(paragraph)}, problem)
            paragraph, problem = [], ""
            continue
        if not paragraph and not problem:
            first = number
        try:
            paragraph.append("" if line is None else line.decode())
        except UnicodeDecodeError:
            problem = _not_utf8(line or b"")
        problem = _TOO_LONG if line is None else problem
    if paragraph or problem:
        yield Row(f"line {first}", {data.text_column: "\n".join(paragraph)}, problem)


# ---------------------------------------------------------------------------------------------------- tables
def _csv(path: Path, file: BinaryIO, data: DataSpec, delimiter: str = ",") -> Iterator[Row]:
    """Every value is text. A quoted value may span lines; `where` is the line on which its row ends."""
    old_limit = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        # A wrong byte becomes a lone surrogate, so that it spoils its own row and not the whole file.
        texts = ("\0" if line is None else line.decode(errors="surrogateescape") + "\n" for _, line in _lines(file))
        reader = csv.reader(texts, delimiter=delimiter)
        header = next(reader, [])
        if not any(header) or len(set(header)) < len(header):
            raise InputError(f"{path}: the first line must name the columns, each once, but is {header[:8]}")
        while True:
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield Row(f"line {reader.line_num}", {}, f"is not CSV: {error}")
                continue
            if values is None:
                return
            if values:  # a blank line is no row
                yield _table_row(f"line {reader.line_num}", header, values)
    finally:
        csv.field_size_limit(old_limit)


def _tsv(path: Path, file: BinaryIO, data: DataSpec) -> Iterator[Row]:
    return _csv(path, file, data, delimiter="\t")


def _table_row(where: str, header: list[str], values: list[str]) -> Row:
    if any("\0" in value for value in values):
        return Row(where, {}, _TOO_LONG)
    if len(values) != len(header):
        return Row(where, {}, f"has {len(values)} values, but there are {len(header)} columns")
    if any(re.search("[\udc80-\udcff]", value) for value in values):
        return Row(where, {}, _not_utf8(b""))
    return Row(where, dict(zip(header, values, strict=True)))


def _parquet(path: Path, file: BinaryIO, data: DataSpec) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("reading Parquet") from error
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=_BATCH_ROWS):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", value)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as Parquet after row {number}: {_first_line(error)}") from error


_READERS: dict[str, Callable[[Path, BinaryIO, DataSpec], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _jsonl,
    ".txt": _text,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}


# -------------------------------------------------------------------------------------------------- data sets
def _dataset(data: DataSpec) -> Any:
    """A `datasets` data set by name; `split` may have a slice, "train[:10%]"."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("reading a data set by name") from error
    try:
        return datasets.load_dataset(data.path, data.config, split=data.split, revision=data.revision)
    except Exception as error:  # the library raises many kinds: offline, unknown, gated, needs a configuration
        raise InputError(
            f"{data.path!r} is neither a file here nor a data set that can be loaded: {_first_line(error)}",
            "give a JSONL, Parquet, CSV or text file, or check --data-config, --split and the network",
        ) from error


def _first_line(error: BaseException, limit: int = 300) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:limit]
