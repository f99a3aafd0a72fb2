"""The tokens of a run, kept in its folder: a resumed run sees the same rows in the same order, and at once."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from vramplan.core.types import RunSpec
from vramplan.sources import records
from vramplan.train import chat
from vramplan.train.ingest import Report, Source
from vramplan.train.store import TokenStore

VERSION = 1
_MAGIC = b"vramplan tokens\n"
_MAX_HEADER_BYTES = 2**20


def fingerprint(run: RunSpec, tokenizer: Any) -> str:
    """What the tokens of a run depend on: the files, how they are read, the tokenizer and its template."""
    assert run.data is not None
    data = {name: value for name, value in records.encode(run.data).items() if name != "show_samples"}
    files = [_state(path) for path in (run.data.path, run.data.eval_path) if path]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    told = [VERSION, data, files, run.seq_len, tokenizer.chat_template, tokenizer.special_tokens_map, words]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _state(path: str) -> list[Any]:
    """A file by its size and time; a data set by its name alone."""
    try:
        status = Path(path).expanduser().stat()
    except OSError:
        return [path]
    return [path, status.st_size, status.st_mtime_ns]


def save(path: Path, mark: str, sources: list[Source], made_template: bool, report: Report) -> None:
    """Write all, or nothing: a run can do without, so trouble is a warning."""
    header = {
        "mark": mark,
        "made_template": made_template,
        "byteorder": sys.byteorder,
        "sources": [_header(source) for source in sources],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_MAGIC + json.dumps(header).encode() + b"\n")
            for source in sources:
                for part in _parts(source.store):
                    file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        report({"event": "warning", "message": f"the tokens are not kept for --resume: {error.strerror or error}"})
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, mark: str, tokenizer: Any, report: Report) -> list[Source] | None:
    """What `save` wrote, if it is whole and still what this run would make; else None, with a warning where the order
    of the rows may now be another."""
    try:
        with path.open("rb") as file:
            header = _read_header(file)
            if header["mark"] == mark and header["byteorder"] == sys.byteorder:
                sources = [_read(file, each) for each in header["sources"]]
                if header["made_template"]:
                    chat.give_template(tokenizer)
                return sources
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        report({"event": "warning", "message": f"{path.name} cannot be read ({error}): the data is read again"})
        return None
    report(
        {
            "event": "warning",
            "message": "the data or the tokenizer has changed since this run began: it goes on with what is there now",
        }
    )
    return None


def _header(source: Source) -> dict[str, Any]:
    names = ("path", "kind", "unit")
    sizes = [len(part) for part in _parts(source.store)]
    return {**{name: getattr(source, name) for name in names}, "counts": dict(source.counts), "sizes": sizes}


def _parts(store: TokenStore) -> list[Any]:
    """Everything in a store, as bytes."""
    return [memoryview(part).cast("B") for part in (store.ids, store.learned, store.ends, store.sources, store.cut)]


def _read_header(file: BinaryIO) -> dict[str, Any]:
    if file.read(len(_MAGIC)) != _MAGIC:
        raise ValueError("not a file of tokens")
    header = json.loads(file.readline(_MAX_HEADER_BYTES))
    if not isinstance(header, dict):
        raise ValueError("a broken header")
    return header


def _read(file: BinaryIO, header: dict[str, Any]) -> Source:
    """ValueError unless it is all there and fits together."""
    store = TokenStore()
    arrays: list[array[int]] = [store.ids, array("B"), store.ends, store.sources, store.cut]
    store.ends.pop()
    for target, size in zip(arrays, header["sizes"], strict=True):
        part = file.read(size)
        if len(part) != size:
            raise ValueError("it ends too early")
        target.frombytes(part)
    store.learned = bytearray(arrays[1].tobytes())
    if not (len(store.ids) == len(store.learned) == store.ends[-1] and len(store) == len(store.sources)):
        raise ValueError("its parts do not fit together")
    counts: Counter[str] = Counter({str(name): int(count) for name, count in header["counts"].items()})
    source = Source(str(header["path"]), store, str(header["kind"]), str(header["unit"]), counts)
    return source
