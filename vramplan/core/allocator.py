"""Replays births and deaths through PyTorch's caching allocator (c10/cuda/CUDACachingAllocator.cpp, torch 2.11-2.13).

Rules, one stream and one device:

* Requests are rounded up to 512 bytes. Up to 1 MiB they are served by the small pool, else by the large one.
* The smallest free block that is large enough is taken, at the lowest address among equals.
* A new segment is 2 MiB (small pool), 20 MiB (requests below 10 MiB) or the request rounded up to 2 MiB.
* A large block is split when more than 1 MiB is left (expandable segments: at least 512 bytes). Otherwise the rest
  stays with the block, and counts as allocated.
* Neighbours that are free merge.
* When a new segment does not fit under the cap, wholly free segments are returned and the request is tried once more.
* Expandable segments: one growing address range, mapped in pages of 20 MiB; among fitting free blocks the one that can
  grow to the smallest size is taken; returning unmaps whole free pages.

The small pool is counted, not replayed: its blocks split at 512 bytes, so nothing is lost but the last 2 MiB segment.
"""

from __future__ import annotations

import copy
from bisect import bisect_left, insort
from typing import TypeAlias

from .units import MIB

GRANULE = 512
SMALL_REQUEST, SMALL_SEGMENT = MIB, 2 * MIB
LARGE_SEGMENT, LARGE_REQUEST, ROUND_LARGE = 20 * MIB, 10 * MIB, 2 * MIB
_RANGE = 1 << 44  # address space of the expandable segment


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
    """The default allocator.

    `cap_bytes` is `set_per_process_memory_fraction`, or the card. `frugal` returns every free segment before a new one
    is asked for, as the real allocator does only under pressure: the most it then holds is what a run needs.
    """

    least_rest = SMALL_REQUEST + 1

    def __init__(self, cap_bytes: int | None = None, frugal: bool = False) -> None:
        self.cap_bytes = cap_bytes
        self.frugal = frugal
        self.allocated = self.peak_allocated = 0
        self.large_reserved = self.small_reserved = self.peak_reserved = 0
        self.small = 0
        self.retries = 0
        self.watch_bytes: int | None = None  # from here on, every new peak notes what it pins
        self.pinned_bytes = 0
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._blocks: dict[int, Block] = {}
        self._next_address = 1 << 40

    @property
    def reserved(self) -> int:
        return self.large_reserved + self.small_reserved

    # ---------------------------------------------------------------------------------------------- interface
    def malloc(self, size: int) -> Handle:
        size = -(-size // GRANULE) * GRANULE or GRANULE
        if size <= SMALL_REQUEST:
            return self._malloc_small(size)
        block = self._find(size)
        if block is None:
            if self.frugal:
                self.empty_cache()
            block = self._grow(size)
        if block is None:
            self.retries += 1
            self.empty_cache()
            block = self._grow(size)
            if block is None:
                raise OutOfMemory(f"{size} bytes asked, {self.reserved} reserved, {self.allocated} allocated")
        if block.size - size >= self.least_rest:
            self._put(self._split(block, size))
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
        self.allocated -= block.size
        block.free = True
        before, after = block.previous, block.following
        if before is not None and before.free and before.mapped:
            self._drop(before)
            block = self._merge(before, block)
        if after is not None and after.free and after.mapped:
            self._drop(after)
            self._merge(block, after)
        self._put(block)

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
        twin._free = list(self._free)
        twin._blocks = {address: copy.copy(block) for address, block in self._blocks.items()}
        for block in twin._blocks.values():
            block.previous = twin._blocks[block.previous.address] if block.previous else None
            block.following = twin._blocks[block.following.address] if block.following else None
        return twin

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def empty_cache(self) -> None:
        """Return every segment that is one free block."""
        self.small_reserved = -(-self.small // SMALL_SEGMENT) * SMALL_SEGMENT
        for _, address in list(self._free):
            block = self._blocks[address]
            if block.previous is None and block.following is None:
                self._drop(block)
                del self._blocks[address]
                self.large_reserved -= block.size

    # ------------------------------------------------------------------------------------------------- blocks
    def _malloc_small(self, size: int) -> int:
        self.small += size
        self.allocated += size
        self._reserve_small(size)
        if self.allocated > self.peak_allocated:
            self._note_peak()
        return size

    def _note_peak(self) -> None:
        self.peak_allocated = self.allocated
        if self.watch_bytes is not None and self.allocated >= self.watch_bytes:
            self.pinned_bytes = self._pinned()

    def _reserve_small(self, size: int) -> None:
        more = self.small - self.small_reserved
        if more > 0:
            more = -(-more // SMALL_SEGMENT) * SMALL_SEGMENT
            if not self._fits(more):
                self.retries += 1
                self.empty_cache()
                more = max(0, -(-self.small // SMALL_SEGMENT) * SMALL_SEGMENT - self.small_reserved)
                if not self._fits(more):
                    raise OutOfMemory(f"{size} bytes asked, {self.reserved} reserved, {self.allocated} allocated")
            self.small_reserved += more
            self._note_reserved()

    def _put(self, block: Block) -> None:
        insort(self._free, (block.size, block.address))

    def _drop(self, block: Block) -> None:
        del self._free[bisect_left(self._free, (block.size, block.address))]

    def _find(self, size: int) -> Block | None:
        at = bisect_left(self._free, (size, -1))
        return self._blocks[self._free.pop(at)[1]] if at < len(self._free) else None

    def _split(self, block: Block, size: int) -> Block:
        rest = Block(block.address + size, block.size - size, block.mapped)
        rest.previous, rest.following = block, block.following
        if block.following is not None:
            block.following.previous = rest
        block.following = rest
        block.size = size
        self._blocks[rest.address] = rest
        return rest

    def _merge(self, block: Block, after: Block) -> Block:
        block.size += after.size
        block.following = after.following
        if after.following is not None:
            after.following.previous = block
        del self._blocks[after.address]
        return block

    def _pinned(self) -> int:
        """Bytes of segments that hold something: what would stay reserved if the cache were emptied now."""
        total = self.small_reserved
        for head in self._blocks.values():
            if head.previous is None:
                size, used = 0, False
                at: Block | None = head
                while at is not None:
                    size += at.size
                    used = used or not at.free
                    at = at.following
                total += size if used else 0
        return total

    # ------------------------------------------------------------------------------------------------- growth
    def _fits(self, more: int) -> bool:
        return self.cap_bytes is None or self.reserved + more <= self.cap_bytes

    def _note_reserved(self) -> None:
        if self.reserved > self.peak_reserved:
            self.peak_reserved = self.reserved

    def _grow(self, size: int) -> Block | None:
        segment = segment_bytes(size)
        if not self._fits(segment):
            return None
        block = Block(self._next_address, segment)
        self._next_address += segment + (1 << 32)
        self._blocks[block.address] = block
        self.large_reserved += segment
        self._note_reserved()
        return block


class Expandable(Native):
    """`expandable_segments:True`."""

    least_rest = GRANULE

    def __init__(self, cap_bytes: int | None = None, frugal: bool = False) -> None:
        super().__init__(cap_bytes, frugal)
        block = Block(1 << 45, _RANGE, mapped=False)
        self._start = block.address
        self._blocks[block.address] = block
        self._unmapped = [block.address]  # sorted

    def clone(self) -> Native:
        twin = super().clone()
        assert isinstance(twin, Expandable)
        twin._unmapped = list(self._unmapped)
        return twin

    def _find(self, size: int) -> Block | None:
        free = self._free
        at = bisect_left(free, (size, -1))
        if at == len(free):
            return None
        block = self._blocks[free[at][1]]
        after = block.following
        if after is None or after.mapped:  # cannot grow: no later block, which is larger, reaches less
            del free[at]
            return block
        while at + 1 < len(free) and self._reach(free[at + 1][1]) < self._reach(free[at][1]):
            at += 1
        return self._blocks[free.pop(at)[1]]

    def _pinned(self) -> int:
        """Bytes of pages that hold something."""
        pages: set[int] = set()
        for block in self._blocks.values():
            if block.mapped and not block.free:
                first = (block.address - self._start) // LARGE_SEGMENT
                last = (block.address + block.size - 1 - self._start) // LARGE_SEGMENT
                pages.update(range(first, last + 1))
        return len(pages) * LARGE_SEGMENT + self.small_reserved

    def _reach(self, address: int) -> int:
        block = self._blocks[address]
        after = block.following
        return block.size + (after.size if after is not None and not after.mapped else 0)

    def _grow(self, size: int) -> Block | None:
        block = self._candidate(size)
        if block is None or not self._fits(self._missing(block, size)):
            return None
        if block.mapped:
            self._drop(block)
        else:
            self._map(block, size)
        while block.size < size:
            after = block.following
            assert after is not None
            if after.mapped:
                self._drop(after)
            else:
                self._map(after, size - block.size)
            self._merge(block, after)
        return block

    def _candidate(self, size: int) -> Block | None:
        for address in self._unmapped:
            block = self._blocks[address]
            if block.previous is not None and block.previous.free and block.previous.mapped:
                block = block.previous
            reach = 0
            at: Block | None = block
            while reach < size and at is not None and at.free:
                reach += at.size
                at = at.following
            if reach >= size:
                return block
        return None

    def _missing(self, block: Block, size: int) -> int:
        """Bytes that must be mapped before `block` holds `size`."""
        have = missing = 0
        at: Block | None = block
        while have < size and at is not None:
            take = at.size if at.mapped else min(at.size, -(-(size - have) // LARGE_SEGMENT) * LARGE_SEGMENT)
            missing += 0 if at.mapped else take
            have += take
            at = at.following
        return missing

    def _map(self, block: Block, size: int) -> None:
        take = min(block.size, -(-size // LARGE_SEGMENT) * LARGE_SEGMENT)
        if take < block.size:
            insort(self._unmapped, self._split(block, take).address)
        self._unmapped.remove(block.address)
        block.mapped = True
        self.large_reserved += take
        self._note_reserved()

    def empty_cache(self) -> None:
        """Unmap every page that is wholly free."""
        self.small_reserved = -(-self.small // SMALL_SEGMENT) * SMALL_SEGMENT
        for _, address in list(self._free):
            self._unmap(self._blocks[address])

    def _unmap(self, block: Block) -> None:
        low = self._start + -(-(block.address - self._start) // LARGE_SEGMENT) * LARGE_SEGMENT
        high = self._start + (block.address + block.size - self._start) // LARGE_SEGMENT * LARGE_SEGMENT
        if high <= low:
            return
        self._drop(block)
        if high < block.address + block.size:
            self._put(self._split(block, high - block.address))
        if low > block.address:
            rest = self._split(block, low - block.address)
            self._put(block)
            block = rest
        block.mapped = False
        self.large_reserved -= block.size
        before, after = block.previous, block.following
        if before is not None and not before.mapped:
            block = self._merge(before, block)
        else:
            insort(self._unmapped, block.address)
        if after is not None and not after.mapped:
            self._unmapped.remove(after.address)
            self._merge(block, after)


def allocator(kind: str, cap_bytes: int | None = None, frugal: bool = False) -> Native:
    """`kind` is the allocator lever: "native" or "expandable"."""
    return Expandable(cap_bytes, frugal) if kind == "expandable" else Native(cap_bytes, frugal)
