"""Streams from strangers: compressed or not, from a file or from stdin, never more of them than was asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from vramplan.errors import InputError

GZIP = b"\x1f\x8b"
CHUNK_BYTES = 2**18
MAX_LOG_BYTES = 16 * 2**30  # of an unpacked log, which is read in pieces
FREE_BYTES, MAX_RATIO = 256 * 2**20, 100  # of what is unpacked in memory: so much, and so many times its size


def gunzipped(chunks: Iterator[bytes], limit: int = MAX_LOG_BYTES) -> Iterator[bytes]:
    """The pieces of a gzip stream, one after another, also of several that were put together. A stream that is cut
    off or broken gives what could be read: its end is where a run died. InputError beyond `limit`."""
    import zlib

    unpacker = zlib.decompressobj(31)
    total = 0
    for chunk in chunks:
        while chunk:
            try:
                piece = unpacker.decompress(chunk, CHUNK_BYTES)
            except zlib.error as error:
                if not total:
                    raise InputError("it begins as gzip, but cannot be unpacked") from error
                return
            total += len(piece)
            if total > limit:
                raise InputError(f"it unpacks to more than {limit // 2**20:,} MiB", "unpack it, and give its end")
            if piece:
                yield piece
            chunk = unpacker.unconsumed_tail
            if unpacker.eof:
                chunk = unpacker.unused_data.lstrip(b"\0")
                unpacker = zlib.decompressobj(31)


def unpacked(data: bytes, limit: int) -> bytes:
    """The same of a whole file in memory. What holds a hundred times its size is no snapshot."""
    if not data.startswith(GZIP):
        return data
    pieces = (data[at : at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES))
    return b"".join(gunzipped(pieces, min(limit, FREE_BYTES + MAX_RATIO * len(data))))


def head_of(data: bytes) -> bytes:
    """The beginning of what `data` begins; nothing for what cannot be unpacked."""
    if not data.startswith(GZIP):
        return data
    try:
        return next(gunzipped(iter([data])), b"")
    except InputError:
        return b""


class Ahead:
    """A stream that can be looked into before it is read."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self.stream, self.head = stream, stream.read(size) or b""

    def read(self, size: int) -> bytes:
        head, self.head = self.head[:size], self.head[size:]
        return head + (self.stream.read(size - len(head)) or b"") if len(head) < size else head


def read_up_to(stream: Any, limit: int) -> bytes:
    """All of a stream, or one byte more than `limit`; never room for more than has come."""
    pieces: list[bytes] = []
    left = limit + 1
    while left and (piece := stream.read(min(left, CHUNK_BYTES))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)
