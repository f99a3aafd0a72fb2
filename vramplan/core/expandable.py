"""Replays births and deaths through `expandable_segments:True` of PyTorch's caching allocator.

As `allocator`, but: a pool is one growing address range, mapped in pages of 2 MiB (small pool) or 20 MiB; a block is
split when at least 512 bytes are left; among fitting free blocks the one that can grow to the smallest size is taken;
new pages go to the lowest address that has room (`find_expandable_block`, `map_block`); returning unmaps whole free
pages. The cap is compared with the native segment's size, as `alloc_block` does, though less may be mapped.
"""

from __future__ import annotations

from bisect import bisect_right

from .allocator import BITS, GRANULE, MASK, Native, Pool, end_of
from .types import Unplannable

_RANGE = 1 << (BITS - 1)  # address space of a pool, in units: 4 TiB


class ExpandablePool(Pool):
    """One segment, mapped page by page."""

    def __init__(self, memory: Native, small: bool) -> None:
        super().__init__(memory, small)
        self.least_rest = 1
        self.unmapped = {0: _RANGE}

    def least_reach(self, at: int) -> int:
        """A block that unmapped space follows counts as large as it can grow; another may be preferred."""
        blocks = self.blocks
        reach = self._reach(blocks[at])
        while at + 1 < len(blocks):
            following = self._reach(blocks[at + 1])
            if following >= reach:
                break
            at, reach = at + 1, following
        return at

    def _reach(self, block: int) -> int:
        return (block >> BITS) + self.unmapped.get(end_of(block), 0)

    def grow(self, size: int, request: int) -> tuple[int, int]:
        address = at = self._candidate(size)
        while at - address < size:
            free = self.starts.get(at)
            if free:
                self.take(free)
                at += free >> BITS
            else:
                at += self._map(at, size - (at - address))
        after = self.starts.get(at, 0)
        if after:
            self.take(after)
        return address, at + (after >> BITS) - address

    def _candidate(self, size: int) -> int:
        """The first free stretch, by address, that mapping can make large enough."""
        for hole in sorted(self.unmapped):
            begin = at = self.ends.get(hole, hole) & MASK
            while at - begin < size:
                length = self.starts.get(at, 0) >> BITS or self.unmapped.get(at)
                if not length:
                    break
                at += length
            else:
                return begin
        raise Unplannable(
            f"the run takes more than the {_RANGE * GRANULE >> 40} TiB of addresses that are played",
            "no card is near that: is a shape wrong?",
        )

    def _map(self, address: int, size: int) -> int:
        """Map pages for up to `size` units at the beginning of an unmapped stretch; returns how much."""
        length = self.unmapped.pop(address)
        taken = min(length, -(-size // self.page) * self.page)
        if taken < length:
            self.unmapped[address + taken] = length - taken
        self.memory.reserved += taken * GRANULE
        return taken

    def release(self) -> None:
        """Unmap every page that is wholly free."""
        for block in list(self.blocks):
            address, size = block & MASK, block >> BITS
            low, high = self._whole_pages(address, size)
            if high <= low:
                continue
            self.take(block)
            if low > address:
                self.put(low - address << BITS | address)
            if high < address + size:
                self.put(address + size - high << BITS | high)
            self.memory.reserved -= (high - low) * GRANULE
            self._unmap(low, high)

    def _whole_pages(self, address: int, size: int) -> tuple[int, int]:
        page = self.page
        return -(-address // page) * page, (address + size) // page * page

    def _unmap(self, low: int, high: int) -> None:
        high += self.unmapped.pop(high, 0)
        holes = sorted(self.unmapped)
        at = bisect_right(holes, low) - 1
        if at >= 0 and holes[at] + self.unmapped[holes[at]] == low:
            low = holes[at]
        self.unmapped[low] = high - low

    def mapped_units(self) -> int:
        return _RANGE - sum(self.unmapped.values())

    def live_units(self) -> int:
        return self.mapped_units() - sum(block >> BITS for block in self.blocks)

    def pinned_bytes(self) -> int:
        """Bytes of pages that hold something."""
        mapped = self.mapped_units()
        for block in self.blocks:
            low, high = self._whole_pages(block & MASK, block >> BITS)
            mapped -= max(high - low, 0)
        return mapped * GRANULE


class Expandable(Native):
    """`expandable_segments:True`: one segment for each pool."""

    pool = ExpandablePool
    small: ExpandablePool
    large: ExpandablePool


def allocator(kind: str, cap_bytes: int | None = None) -> Native:
    """`kind` is the allocator lever: "native" or "expandable"."""
    return Expandable(cap_bytes) if kind == "expandable" else Native(cap_bytes)
