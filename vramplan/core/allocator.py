"""Replays births and deaths through PyTorch's caching allocator (c10/cuda/CUDACachingAllocator.cpp, torch 2.11-2.13).

Rules, one stream and one device:

* Requests are rounded up to 512 bytes. Up to 1 MiB they are served by the small pool, else by the large one.
* The smallest free block that is large enough is taken, at the lowest address among equals.
* A new segment is 2 MiB (small pool), 20 MiB (requests below 10 MiB) or the request rounded up to 2 MiB.
* A large block is split when more than 1 MiB is left. Otherwise the rest stays with the block, and counts as allocated.
* Neighbours that are free merge.
* When a new segment does not fit under the cap, wholly free segments are returned and the request is tried once more.
The small pool is counted, not replayed: its blocks split at 512 bytes, so nothing is lost but the last 2 MiB segment.
"""

from __future__ import annotations

import copy
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import TypeAlias

from .units import MIB

GRANULE = 512
SMALL_REQUEST, SMALL_SEGMENT = MIB, 2 * MIB
LARGE_SEGMENT, LARGE_REQUEST, ROUND_LARGE = 20 * MIB, 10 * MIB, 2 * MIB


class OutOfMemory(Exception):
    """The cap does not hold the request, even after cached segments were returned."""


class Block:
    """A piece of a segment of the large pool."""

    __slots__ = ("address", "following", "free", "mapped", "previous", "size")

    def __init__(self, address: int, size: int, mapped: bool = True) -> None:
        self.address = address
        self.size = size
        self.mapped = mapped
        self.free = True
        self.previous: Block | None = None
        self.following: Block | None = None


Handle: TypeAlias = "Block | int"  # an int is a request of that size in the small pool


def segment_bytes(size: int) -> int:
    """What is asked of the driver for a rounded large request that no free block holds."""
    return LARGE_SEGMENT if size < LARGE_REQUEST else -(-size // ROUND_LARGE) * ROUND_LARGE


class Native:
    """The default allocator. `cap_bytes` is `set_per_process_memory_fraction`, or the card.

    `malloc` and `free` are written out rather than composed: a step calls them 15,000 times, and that is most of the
    time of an estimate.
    """

    least_rest = SMALL_REQUEST + 1

    def __init__(self, cap_bytes: int | None = None) -> None:
        self.cap_bytes = cap_bytes
        self.allocated = self.peak_allocated = 0
        self.large_reserved = self.small_reserved = self.peak_reserved = 0
        self.small = 0
        self.retries = 0
        self.watch_bytes: int | None = None  # from here on, every new peak notes what it pins
        self.pinned_bytes = 0
        self._free: list[tuple[int, int, Block]] = []  # (size, address, block) of mapped free blocks, sorted
        self._heads: dict[int, Block] = {}  # first block of every segment, by address
        self._next_address = 1 << 40

    @property
    def reserved(self) -> int:
        return self.large_reserved + self.small_reserved

    # ---------------------------------------------------------------------------------------------- interface
    def malloc(self, size: int) -> Handle:
        size = -(-size // GRANULE) * GRANULE or GRANULE
        if size <= SMALL_REQUEST:
            return self._malloc_small(size)
        free = self._free
        at = bisect_left(free, (size,))
        if at < len(free):
            block = free[at][2]
            after = block.following
            if after is not None and not after.mapped:  # it can grow: one that cannot may be preferred
                at = self._least_reach(at)
                block = free[at][2]
            del free[at]
        else:
            block = self._grow_or_retry(size)
        rest = block.size - size
        if rest >= self.least_rest:
            tail = Block(block.address + size, rest)
            tail.previous = block
            tail.following = after = block.following
            if after is not None:
                after.previous = tail
            block.following = tail
            block.size = size
            insort(free, (rest, tail.address, tail))
        block.free = False
        self.allocated += block.size
        if self.allocated > self.peak_allocated:
            self._note_peak()
        return block

    def free(self, block: Handle) -> None:
        if isinstance(block, int):
            self.allocated -= block
            self.small -= block
            return
        free = self._free
        self.allocated -= block.size
        block.free = True
        before, after = block.previous, block.following
        if after is not None and after.free and after.mapped:
            del free[bisect_left(free, (after.size, after.address))]
            block.size += after.size
            block.following = after = after.following
            if after is not None:
                after.previous = block
        if before is not None and before.free and before.mapped:
            del free[bisect_left(free, (before.size, before.address))]
            before.size += block.size
            before.following = after = block.following
            if after is not None:
                after.previous = before
            block = before
        insort(free, (block.size, block.address, block))

    def change_small(self, high: int, net: int) -> None:
        """Many births and deaths in the small pool at once: `high` above now at the most, `net` in the end."""
        if high > 0:
            self._malloc_small(high)
            net -= high
        self.small += net
        self.allocated += net

    def clone(self) -> Native:
        """An independent copy in the same state; handles of large blocks stay with the original."""
        twin = copy.copy(self)
        twin._free, twin._heads = [], {}
        for address, head in self._heads.items():
            previous: Block | None = None
            for block in segment(head):
                own = copy.copy(block)
                own.previous = previous
                if previous is None:
                    twin._heads[address] = own
                else:
                    previous.following = own
                previous = own
                if own.free and own.mapped:
                    twin._free.append((own.size, own.address, own))
        twin._free.sort()
        return twin

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def empty_cache(self) -> None:
        """Return every segment that is one free block."""
        self._trim_small()
        for _, address, block in list(self._free):
            if block.previous is None and block.following is None:
                self._drop(block)
                del self._heads[address]
                self.large_reserved -= block.size

    # -------------------------------------------------------------------------------------------- small pool
    def _malloc_small(self, size: int) -> int:
        self.small += size
        self.allocated += size
        if self.small > self.small_reserved:
            self._reserve_small(size)
        if self.allocated > self.peak_allocated:
            self._note_peak()
        return size

    def _reserve_small(self, size: int) -> None:
        more = -(-(self.small - self.small_reserved) // SMALL_SEGMENT) * SMALL_SEGMENT
        if not self._fits(more):
            self.retries += 1
            self.empty_cache()  # it counts the new request as there, and so reserves for it
            if not self._fits(0):
                raise self._out_of_memory(size)
            more = 0
        self.small_reserved += more
        self._note_reserved()

    def _trim_small(self) -> None:
        self.small_reserved = -(-self.small // SMALL_SEGMENT) * SMALL_SEGMENT

    # ------------------------------------------------------------------------------------------------- blocks
    def _note_peak(self) -> None:
        self.peak_allocated = self.allocated
        if self.watch_bytes is not None and self.allocated >= self.watch_bytes:
            self.pinned_bytes = self._pinned()

    def _put(self, block: Block) -> None:
        insort(self._free, (block.size, block.address, block))

    def _drop(self, block: Block) -> None:
        del self._free[bisect_left(self._free, (block.size, block.address))]

    def _least_reach(self, at: int) -> int:
        raise AssertionError("only expandable segments hold unmapped blocks")

    def _pinned(self) -> int:
        """Bytes of segments that hold something: what would stay reserved if the cache were emptied now."""
        total = self.small_reserved
        for head in self._heads.values():
            blocks = list(segment(head))
            if any(not block.free for block in blocks):
                total += sum(block.size for block in blocks)
        return total

    # ------------------------------------------------------------------------------------------------- growth
    def _grow_or_retry(self, size: int) -> Block:
        block = self._grow(size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._grow(size)
            if block is None:
                raise self._out_of_memory(size)
        return block

    def _out_of_memory(self, size: int) -> OutOfMemory:
        return OutOfMemory(f"{size} bytes asked, {self.reserved} reserved, {self.allocated} allocated")

    def _fits(self, more: int) -> bool:
        return self.cap_bytes is None or self.reserved + more <= self.cap_bytes

    def _note_reserved(self) -> None:
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved

    def _grow(self, size: int) -> Block | None:
        fresh = segment_bytes(size)
        if not self._fits(fresh):
            return None
        block = Block(self._next_address, fresh)
        self._next_address += fresh + (1 << 32)
        self._heads[block.address] = block
        self.large_reserved += fresh
        self._note_reserved()
        return block


def segment(head: Block) -> Iterator[Block]:
    """The blocks of a segment by address; the one at hand may be split or merged on the way."""
    at: Block | None = head
    while at is not None:
        following = at.following
        yield at
        at = following
