"""The caching allocator once more, as plainly as it can be written: lists of blocks, searched from end to end.

Slow, and with nothing in common with `core.allocator` but the rules of c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from vramplan.core.units import MIB

FREE, LIVE, UNMAPPED = "free", "live", "unmapped"


class Reference:
    """`pools[small]` is a list of segments, a segment a list of [address, size, state]; addresses never repeat."""

    def __init__(self, kind: str, cap_bytes: int | None = None) -> None:
        self.expandable = kind == "expandable"
        self.cap_bytes = cap_bytes
        self.pools: dict[bool, list[list[list]]] = {True: [], False: []}
        self.next_address = 0
        if self.expandable:
            self.pools = {small: [[[0, 1 << 44, UNMAPPED]]] for small in (True, False)}

    @property
    def reserved(self) -> int:
        return self._sum(FREE, LIVE)

    @property
    def allocated(self) -> int:
        return self._sum(LIVE)

    def _sum(self, *states: str) -> int:
        return sum(b[1] for pool in self.pools.values() for segment in pool for b in segment if b[2] in states)

    def malloc(self, size: int) -> list | None:
        """The block, None if out of memory."""
        size = max(-(-size // 512) * 512, 512)
        small = size <= MIB
        found = self._best_fit(small, size)
        if found is None:
            request = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
            if self.cap_bytes is not None and self.reserved + request > self.cap_bytes:
                self.empty_cache()
                if self.reserved + request > self.cap_bytes:
                    return None
            found = self._expand(small, size) if self.expandable else self._new_segment(small, request)
        segment, block = found
        rest = block[1] - size
        if rest >= 512 if small or self.expandable else rest > MIB:
            segment.insert(segment.index(block) + 1, [block[0] + size, rest, FREE])
            block[1] = size
        block[2] = LIVE
        return block

    def _best_fit(self, small: bool, size: int):
        fits = [(b[1], b[0], s, b) for s in self.pools[small] for b in s if b[2] == FREE and b[1] >= size]
        fits.sort(key=lambda fit: fit[:2])
        if not fits:
            return None
        best = 0
        while best + 1 < len(fits) and self._reach(fits[best + 1]) < self._reach(fits[best]):
            best += 1
        return fits[best][2], fits[best][3]

    @staticmethod
    def _reach(fit) -> int:
        size, _, segment, block = fit
        after = segment.index(block) + 1
        return size + (segment[after][1] if after < len(segment) and segment[after][2] == UNMAPPED else 0)

    def _new_segment(self, small: bool, request: int):
        self.next_address -= request + 512
        block = [self.next_address, request, FREE]
        self.pools[small].append([block])
        return self.pools[small][-1], block

    def _expand(self, small: bool, size: int):
        page = (2 if small else 20) * MIB
        segment = self.pools[small][0]
        for i, block in enumerate(segment):
            if block[2] != UNMAPPED:
                continue
            first = i - 1 if i and segment[i - 1][2] == FREE else i
            last, room = first, 0
            while last < len(segment) and segment[last][2] != LIVE and room < size:
                room += segment[last][1]
                last += 1
            if room >= size:
                break
        have, at = 0, first
        while have < size:
            block = segment[at]
            if block[2] == UNMAPPED:
                taken = min(block[1], -(-(size - have) // page) * page)
                if taken < block[1]:
                    segment.insert(at + 1, [block[0] + taken, block[1] - taken, UNMAPPED])
                block[1:] = [taken, FREE]
            have += block[1]
            at += 1
        start = segment[first]
        self._merge(segment)
        return segment, next(b for b in segment if b[0] == start[0])

    def free(self, block: list) -> None:
        block[2] = FREE
        for pool in self.pools.values():
            for segment in pool:
                self._merge(segment)

    @staticmethod
    def _merge(segment: list) -> None:
        i = 0
        while i + 1 < len(segment):
            if segment[i][2] == segment[i + 1][2] != LIVE:
                segment[i][1] += segment.pop(i + 1)[1]
            else:
                i += 1

    def empty_cache(self) -> None:
        for small, pool in self.pools.items():
            if not self.expandable:
                pool[:] = [s for s in pool if not (len(s) == 1 and s[0][2] == FREE)]
                continue
            page = (2 if small else 20) * MIB
            (segment,) = pool
            for block in [b for b in segment if b[2] == FREE]:
                low, high = -(-block[0] // page) * page, (block[0] + block[1]) // page * page
                if high > low:
                    parts = [(block[0], low, FREE), (low, high, UNMAPPED), (high, block[0] + block[1], FREE)]
                    at = segment.index(block)
                    segment[at : at + 1] = [[a, b - a, state] for a, b, state in parts if b > a]
            self._merge(segment)
