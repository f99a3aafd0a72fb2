"""Tells a memory snapshot from a log by its beginning, without loading what reads snapshots."""

from __future__ import annotations

from pathlib import Path

from vramplan.sources.unpacked import head_of

HEAD_BYTES = 4096


def is_snapshot(head: bytes) -> bool:
    """Whether a file that starts like this is a pickle, or JSON with the keys of a snapshot."""
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return True
    start = head[:HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n")
    return start[:1] in (b"{", b"[") and any(
        key in start for key in (b'"device_traces"', b'"segments"', b'"segment_type"'))  # fmt: skip


def is_snapshot_file(path: Path | str) -> bool:
    """Whether this is a regular file with a snapshot's beginning, also packed; False for what cannot be read."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            return is_snapshot(head_of(file.read(HEAD_BYTES)))
    except (OSError, ValueError):
        return False
