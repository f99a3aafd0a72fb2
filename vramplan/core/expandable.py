"""Replays births and deaths through `expandable_segments:True` of PyTorch's caching allocator.

As `allocator`, but: one growing address range, mapped in pages of 20 MiB; a block is split when at least 512 bytes are
left; among fitting free blocks the one that can grow to the smallest size is taken; returning unmaps whole free pages.
"""

from __future__ import annotations

from .allocator import GRANULE, LARGE_SEGMENT, Block, Native, segment

_RANGE = 1 << 44  # address space of the one segment


class Expandable(Native):
    """`expandable_segments:True`: one segment, mapped page by page."""

    least_rest = GRANULE

    def __init__(self, cap_bytes: int | None = None) -> None:
        super().__init__(cap_bytes)
        block = Block(1 << 45, _RANGE, mapped=False)
        self._start = block.address
        self._heads[block.address] = block

    def _least_reach(self, at: int) -> int:
        free = self._free
        while at + 1 < len(free) and _reach(free[at + 1][2]) < _reach(free[at][2]):
            at += 1
        return at

    def _pinned(self) -> int:
        """Bytes of pages that hold something."""
        pages: set[int] = set()
        for block in segment(self._heads[self._start]):
            if block.mapped and not block.free:
                first = (block.address - self._start) // LARGE_SEGMENT
                last = (block.address + block.size - 1 - self._start) // LARGE_SEGMENT
                pages.update(range(first, last + 1))
        return len(pages) * LARGE_SEGMENT + self.small_reserved

    # ------------------------------------------------------------------------------------------------- growth
    def _grow(self, size: int) -> Block | None:
        block = self._candidate(size)
        if block is None or not self._fits(_missing(block, size)):
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
            _merge(block, after)
        return block

    def _candidate(self, size: int) -> Block | None:
        """The first free stretch, by address, that mapping can make large enough."""
        for block in segment(self._heads[self._start]):
            if block.mapped:
                continue
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

    def _map(self, block: Block, size: int) -> None:
        take = min(block.size, -(-size // LARGE_SEGMENT) * LARGE_SEGMENT)
        if take < block.size:
            _split(block, take)
        block.mapped = True
        self.large_reserved += take
        self._note_reserved()

    def empty_cache(self) -> None:
        """Unmap every page that is wholly free."""
        self._trim_small()
        for _, _, block in list(self._free):
            self._unmap(block)

    def _unmap(self, block: Block) -> None:
        low = self._start + -(-(block.address - self._start) // LARGE_SEGMENT) * LARGE_SEGMENT
        high = self._start + (block.address + block.size - self._start) // LARGE_SEGMENT * LARGE_SEGMENT
        if high <= low:
            return
        self._drop(block)
        if high < block.address + block.size:
            self._put(_split(block, high - block.address))
        if low > block.address:
            rest = _split(block, low - block.address)
            self._put(block)
            block = rest
        block.mapped = False
        self.large_reserved -= block.size
        if block.previous is not None and not block.previous.mapped:
            block = _merge(block.previous, block)
        if block.following is not None and not block.following.mapped:
            _merge(block, block.following)


def _split(block: Block, size: int) -> Block:
    """Cut `block` to `size`; returns the rest, mapped or not as the block is."""
    rest = Block(block.address + size, block.size - size, block.mapped)
    rest.previous, rest.following = block, block.following
    if block.following is not None:
        block.following.previous = rest
    block.following = rest
    block.size = size
    return rest


def _merge(block: Block, after: Block) -> Block:
    """`after` becomes part of its neighbour."""
    block.size += after.size
    block.following = after.following
    if after.following is not None:
        after.following.previous = block
    return block


def _reach(block: Block) -> int:
    """How large a free block is with the unmapped stretch behind it."""
    after = block.following
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _missing(block: Block, size: int) -> int:
    """Bytes that must be mapped before the stretch that begins with `block` holds `size`."""
    have = missing = 0
    at: Block | None = block
    while have < size and at is not None:
        take = at.size if at.mapped else min(at.size, -(-(size - have) // LARGE_SEGMENT) * LARGE_SEGMENT)
        missing += 0 if at.mapped else take
        have += take
        at = at.following
    return missing


def allocator(kind: str, cap_bytes: int | None = None) -> Native:
    """`kind` is the allocator lever: "native" or "expandable"."""
    return Expandable(cap_bytes) if kind == "expandable" else Native(cap_bytes)
