"""A log as blocks of UTF-8, however it is packed and encoded; what is no log is refused by its first bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from pathlib import Path
from typing import IO, Any

from vramplan.errors import InputError
from vramplan.sources.unpacked import GZIP, gunzipped

BLOCK_BYTES = 2**20

Source = Path | str | IO[bytes] | IO[str]


def opened(source: Source) -> AbstractContextManager[Any]:
    """The file, or the stream that is open already."""
    if not isinstance(source, (str, Path)):
        return nullcontext(source)
    path = Path(source)
    if path.exists() and not (path.is_file() or path.is_fifo()):
        raise InputError(f"{path} is not a file")
    return path.open("rb")


def blocks_of(stream: IO[bytes] | IO[str]) -> Iterator[bytes]:
    """The stream, unpacked, as UTF-8 in blocks of up to a MiB; PowerShell's `>` writes UTF-16."""
    raw = _raw(stream)
    first = next(raw, b"")
    if first.startswith(GZIP):
        raw = gunzipped(chain((first,), raw))
        first = next(raw, b"")
    blocks = chain((first,), raw)
    refuse_snapshot(first)
    wide = _utf16(first)
    if wide is None:
        yield from filter(None, blocks)
        return
    import codecs

    decoder = codecs.getincrementaldecoder(wide)(errors="replace")
    for block in blocks:
        if text := decoder.decode(block):
            yield text.encode("utf-8", errors="replace")


def _raw(stream: IO[bytes] | IO[str]) -> Iterator[bytes]:
    while raw := stream.read(BLOCK_BYTES):
        yield raw.encode("utf-8", errors="replace") if isinstance(raw, str) else bytes(raw)


def _utf16(head: bytes) -> str | None:
    """Which UTF-16 it is: by its mark, or, appended to or cut, by the empty halves of what is mostly ASCII."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    head = head[:4096]
    half = len(head) // 2
    if half < 16:
        return None
    if 2 * head[1::2].count(0) > half and not head[::2].count(0):
        return "utf-16-le"
    return "utf-16-be" if 2 * head[::2].count(0) > half and not head[1::2].count(0) else None


def refuse_snapshot(head: bytes) -> None:
    """InputError for a pickle or a compressed file by its first bytes."""
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise InputError(
            "this is a memory snapshot or another pickle, not a log", "vramplan diagnose takes it as it is"
        )
    if head[:4] in (b"PK\x03\x04", b"\x28\xb5\x2f\xfd") or head[:6] == b"\xfd7zXZ\0" or head[:3] == b"BZh":
        raise InputError("of compressed files only gzip can be read", "unpack it and give the log")
