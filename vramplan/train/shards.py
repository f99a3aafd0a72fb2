"""Checkpoints in safetensors, tensor by tensor: never more than one tensor of them in memory.

Reading is safetensors' own memory mapping. Writing is done here, because `safetensors.torch.save_file` takes a whole
shard at once: the format (https://github.com/huggingface/safetensors#format) is the length of a JSON header as 8 bytes,
the header, and the tensors' bytes one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vramplan.core.units import round_up
from vramplan.errors import InputError
from vramplan.sources import records

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a checkpoint that is not read yet."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * int(self.dtype.itemsize)


class Checkpoint:
    """The tensors of a folder's safetensors files by name. One file is open at a time; a context manager."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        self._stack = ExitStack()
        for path in files:
            for entry in _entries(path):
                if entry.name in self.entries:
                    raise InputError(f"{path} holds {entry.name}, as another file does")
                self.entries[entry.name], self._file_of[entry.name] = entry, path

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self, name: str) -> Tensor:
        path = self._file_of[name]
        if self._open is None or self._open[0] != path:
            self._stack.close()
            self._open = path, self._stack.enter_context(safe_open(path, "pt"))
        tensor: Tensor = self._open[1].get_tensor(name)
        return tensor


def checkpoint_files(folder: Path) -> list[Path]:
    """The weight files of a model's folder. InputError if there are none, or one that the index names is missing."""
    if (folder / INDEX).is_file():
        index = records.parse_json(records.read_text(folder / INDEX), str(folder / INDEX))
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(n, str) and Path(n).name == n for n in places.values()):
            raise InputError(f"{folder / INDEX} is not an index of safetensors files")
        files = [folder / name for name in sorted(set(places.values()))]
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            other = next(folder.glob("*.bin"), None)
            hint = "load and save it with transformers once: it writes safetensors" if other else ""
            raise InputError(f"{folder} holds no {file.name}", hint)
    return files


def _entries(path: Path) -> Iterator[Entry]:
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 -- no dict
                part = file.get_slice(name)
                kind = part.get_dtype()
                if kind not in DTYPES:
                    raise InputError(f"{path.name} holds {name} as {kind}, which cannot be merged into")
                yield Entry(name, DTYPES[kind], tuple(part.get_shape()))
    except SafetensorError as error:
        raise InputError(f"{path} is no whole safetensors file: {error}") from None


# ------------------------------------------------------------------------------------------------------- writing
def in_shards(entries: Sequence[Entry], max_bytes: int) -> list[list[Entry]]:
    """Entries in their order, cut into files of at most `max_bytes`; a larger tensor has a file of its own."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def write_checkpoint(folder: Path, entries: Sequence[Entry], max_bytes: int, make: Callable[[Entry], Tensor]) -> int:
    """Write every entry as `make` gives it, in files of at most `max_bytes`, with their index; how many files.

    `make` is called once for each entry, in the order in which they are written.
    """
    shards = in_shards(entries, max_bytes)
    names = [SINGLE] if len(shards) == 1 else [shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, make)
    if len(shards) > 1:
        places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        total = sum(entry.bytes for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        records.write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return len(shards)


def shard_name(number: int, count: int) -> str:
    return f"model-{number:05}-of-{count:05}.safetensors"


def _write_shard(path: Path, shard: Sequence[Entry], make: Callable[[Entry], Tensor]) -> None:
    ordered = sorted(shard, key=lambda entry: -entry.dtype.itemsize)  # so that each begins where its dtype may
    with path.open("wb") as file:
        file.write(_header(ordered))
        for entry in ordered:
            tensor = make(entry)
            if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
                raise ValueError(f"{entry.name} is {tensor.dtype} {tuple(tensor.shape)}, not as announced: {entry}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


def _header(entries: Sequence[Entry]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in entries:
        end = begin + entry.bytes
        table[entry.name] = {"dtype": NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (round_up(len(text), 8) - len(text))
    return len(text).to_bytes(8, "little") + text
