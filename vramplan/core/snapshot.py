"""A recorded memory snapshot of PyTorch as plain values: what the allocator holds, and what it did before.

Named tuples, not dataclasses: a trace has hundreds of thousands of events, and none of them crosses a door.
"""

from __future__ import annotations

from typing import NamedTuple

Frames = tuple[str, ...]  # "llama/modeling_llama.py:403 forward", innermost last, as in `OomEvidence`

ALLOC, FREE, SEGMENT_ALLOC, SEGMENT_FREE, OOM = "alloc", "free", "segment_alloc", "segment_free", "oom"


class Block(NamedTuple):
    """A piece of a segment. `active` until its memory can be used again; `requested_bytes` is what was asked for."""

    address: int
    size_bytes: int
    requested_bytes: int
    active: bool
    frames: Frames


class Segment(NamedTuple):
    """Memory asked of the driver. `private`: of a pool of its own, as of a CUDA graph. Addresses of blocks ascend."""

    address: int
    size_bytes: int
    private: bool
    blocks: tuple[Block, ...]


class TraceEvent(NamedTuple):
    """One step of the allocator. `free_bytes`: what the driver had left, of an `oom` alone."""

    action: str
    address: int
    size_bytes: int
    frames: Frames
    free_bytes: int | None = None


class Snapshot(NamedTuple):
    """One card's part of a snapshot; `events` in the order in which they happened, the oldest may be missing."""

    device: int
    segments: tuple[Segment, ...]
    events: tuple[TraceEvent, ...]
    settings: dict[str, bool | int | float | str]
