"""Replays births and deaths through PyTorch's caching allocator (c10/cuda/CUDACachingAllocator.cpp, torch 2.11-2.13).

Rules, one stream and one device:

* Requests are rounded up to 512 bytes. Up to 1 MiB they are served by the small pool, else by the large one.
* The smallest free block that is large enough is taken, at the lowest address among equals (`get_free_block`).
* A new segment is 2 MiB (small pool), 20 MiB (requests below 10 MiB) or the request rounded up to 2 MiB.
* A block is split when 512 bytes are left (small pool) or more than 1 MiB (large pool, `should_split`). Otherwise the
  rest stays with the block, and counts as allocated.
* Neighbours that are free merge.
* When a new segment does not fit under the cap, wholly free segments are returned and the request is tried once more.

`cudaMalloc` gives addresses from high to low: a recorded snapshot of an H200 shows it, and it decides between equals.

A block is one int, `size << BITS | address`, both in units of 512 bytes, so that it mostly stays below 2**60, where
CPython's integers are quick. So the free list is a sorted list of ints, and what is free is a function of what is
alive: two states with equal free lists and segments answer every later request the same.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from itertools import groupby
from typing import TypeAlias

from .units import MIB

GRANULE = 512  # bytes; every request is rounded up to this, and it is the unit inside the pools
SMALL_REQUEST, SMALL_SEGMENT = MIB, 2 * MIB
LARGE_SEGMENT, LARGE_REQUEST, ROUND_LARGE = 20 * MIB, 10 * MIB, 2 * MIB
BITS = 34  # of an address
MASK = (1 << BITS) - 1
_SMALL = SMALL_REQUEST // GRANULE
LARGE_BLOCK = (_SMALL + 1) << BITS  # blocks of the large pool are at least this

# One operation: (key, units, key is relative). Negative units: the tensor of that key and size dies.
Op: TypeAlias = tuple[int, int, bool]
# The same for `run`, of a birth with what it saves computing: units << BITS, and what less a block is afterwards.
Written: TypeAlias = tuple[int, bool, int, int, int]
PoolOps: TypeAlias = tuple[bool, list[Written]]  # what follows one another in one pool: whether it is the large one


def units(size: int) -> int:
    """Bytes as units, rounded up; nothing takes one too."""
    return -(-size // GRANULE) or 1


def by_pool(ops: Iterable[Op]) -> list[PoolOps]:
    """Operations as `run` takes them; tensors without bytes are none of the allocator's."""
    sized = [op for op in ops if op[1]]
    groups = groupby(sized, lambda op: not -_SMALL <= op[1] <= _SMALL)
    return [(large, [_written(op) for op in group]) for large, group in groups]


def _written(op: Op) -> Written:
    key, size, relative = op
    want = size << BITS if size > 0 else 0
    return key, relative, size, want, want - size


def block_bytes(block: int) -> int:
    return (block >> BITS) * GRANULE


def end_of(block: int) -> int:
    return (block & MASK) + (block >> BITS)


class OutOfMemory(Exception):
    """The cap does not hold the request, even after cached segments were returned; `needed_bytes` would."""

    def __init__(self, reserved: int, request: int) -> None:
        super().__init__(f"{request} bytes on top of {reserved} reserved")
        self.needed_bytes = reserved + request


def segment_bytes(size: int) -> int:
    """What is asked of the driver for a rounded request that no free block holds (`get_allocation_size`)."""
    if size <= SMALL_REQUEST:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE_REQUEST else -(-size // ROUND_LARGE) * ROUND_LARGE


class Pool:
    """The small or the large blocks, in segments of `cudaMalloc`. Sizes and addresses are in units."""

    def __init__(self, memory: Native, small: bool) -> None:
        self.memory = memory
        self.page = (SMALL_SEGMENT if small else LARGE_SEGMENT) // GRANULE
        self.least_rest = 1 if small else _SMALL + 1
        self.blocks: list[int] = []  # free ones, sorted by size, then address
        self.starts: dict[int, int] = {}  # a free block by its address
        self.ends: dict[int, int] = {}  # and by its end
        self.segments: dict[int, int] = {}  # address -> size
        self.unmapped: dict[int, int] = {}  # address -> size; only expandable segments have such

    def clone(self, memory: Native) -> Pool:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.memory = memory
        twin.blocks = self.blocks.copy()
        twin.starts, twin.ends = self.starts.copy(), self.ends.copy()
        twin.segments, twin.unmapped = self.segments.copy(), self.unmapped.copy()
        return twin

    # ------------------------------------------------------------------------------------------------- growth
    def least_reach(self, at: int) -> int:
        raise AssertionError("only expandable segments hold unmapped blocks")

    def grow_or_retry(self, size: int) -> int:
        """A block of new memory. Raises OutOfMemory."""
        memory = self.memory
        request = segment_bytes(size * GRANULE)
        if memory.cap_bytes is not None and memory.reserved + request > memory.cap_bytes:
            memory.retries += 1
            memory.empty_cache()
            if memory.reserved + request > memory.cap_bytes:
                raise OutOfMemory(memory.reserved, request)
        address, have = self.grow(size, request // GRANULE)
        if memory.reserved > memory.peak_reserved:
            memory.peak_reserved = memory.reserved
        return have << BITS | address

    def grow(self, size: int, request: int) -> tuple[int, int]:
        """(address, size) of new memory, not yet among the free blocks."""
        lowest = min(self.segments, default=1 << (BITS - 1))
        address = lowest - request - 1  # the gap keeps segments from merging
        self.segments[address] = request
        self.memory.reserved += request * GRANULE
        return address, request

    def release(self) -> None:
        """Return every segment that is one free block."""
        for address, size in list(self.segments.items()):
            if self.starts.get(address) == size << BITS | address:
                self.take(size << BITS | address)
                del self.segments[address]
                self.memory.reserved -= size * GRANULE

    def pinned_bytes(self) -> int:
        """Bytes of segments that hold something."""
        return GRANULE * sum(
            size for address, size in self.segments.items() if self.starts.get(address) != size << BITS | address
        )

    # ------------------------------------------------------------------------------------------- free blocks
    def take(self, block: int) -> None:
        """Remove a free block."""
        del self.blocks[bisect_left(self.blocks, block)]
        del self.starts[block & MASK], self.ends[end_of(block)]

    def put(self, block: int) -> None:
        """Add a free block that has no free neighbour."""
        self.starts[block & MASK] = self.ends[end_of(block)] = block
        insort(self.blocks, block)


class Native:
    """The default allocator. `cap_bytes` is `set_per_process_memory_fraction`, or the card."""

    pool: type[Pool] = Pool

    def __init__(self, cap_bytes: int | None = None) -> None:
        self.cap_bytes = cap_bytes
        self.in_use = self.most_in_use = 0  # units
        self.reserved = self.peak_reserved = 0
        self.retries = 0
        self.watch = 1 << BITS  # units: from here on, every new peak notes what it pins
        self.pinned_bytes = 0
        self.small, self.large = self.pool(self, True), self.pool(self, False)

    @property
    def allocated(self) -> int:
        """`torch.cuda.memory_allocated()`."""
        return self.in_use * GRANULE

    @property
    def peak_allocated(self) -> int:
        return self.most_in_use * GRANULE

    # ---------------------------------------------------------------------------------------- births and deaths
    def malloc(self, size: int) -> int:
        """A block for `size` bytes. Raises OutOfMemory."""
        live: dict[int, int] = {}
        self.run(by_pool([(0, units(size), False)]), 0, live)
        return live[0]

    def free(self, block: int) -> None:
        self.run(by_pool([(0, -(block >> BITS), False)]), 0, {0: block})

    def run(self, todo: Iterable[PoolOps], shift: int, live: dict[int, int]) -> None:
        """Many births and deaths; `live` has the blocks by key, relative keys get `shift` added.

        One function for all, because a step has 20,000 of them and calls alone would double the time of an estimate.
        """
        now, most, watch = self.in_use, self.most_in_use, self.watch
        die, mask, bits = live.pop, MASK, BITS
        for large, ops in todo:
            pool = self.large if large else self.small
            blocks, starts, ends, unmapped = pool.blocks, pool.starts, pool.ends, pool.unmapped
            least = pool.least_rest << bits
            for key, relative, size, want, less in ops:
                if relative:
                    key += shift
                if want:
                    at = bisect_left(blocks, want)
                    try:
                        block = blocks[at]
                    except IndexError:
                        block = pool.grow_or_retry(size)
                        address = block & mask
                        end = address + (block >> bits)
                        at = len(blocks)
                        blocks.append(0)  # where it would be, were it free
                    else:
                        address = block & mask
                        end = address + (block >> bits)
                        if unmapped and end in unmapped and at + 1 < len(blocks):
                            # it can grow: one that cannot may be preferred
                            at = pool.least_reach(at)
                            block = blocks[at]
                            address = block & mask
                            end = address + (block >> bits)
                        del starts[address]
                    rest = block - less
                    if rest >= least:
                        starts[rest & mask] = ends[end] = rest
                        if at and rest < blocks[at - 1]:
                            del blocks[at]
                            insort(blocks, rest)
                        else:  # mostly it is still larger than the next smaller block
                            blocks[at] = rest
                        live[key] = want + address
                        now += size
                    else:
                        del blocks[at]
                        ends.pop(end, None)
                        live[key] = block
                        now += block >> bits
                    if now > most:
                        most = now
                        if now >= watch:
                            self.pinned_bytes = self.pinned_now()
                else:
                    block = die(key)
                    address, size = block & mask, block >> bits
                    now -= size
                    end = address + size
                    at = -1
                    if end in starts:
                        after = starts.pop(end)
                        at = bisect_left(blocks, after)
                        block += after - end
                        end += after >> bits
                    if address in ends:
                        before = ends.pop(address)
                        if at >= 0:
                            del blocks[at]
                        at = bisect_left(blocks, before)
                        block += before - address
                        address = before & mask
                    starts[address] = ends[end] = block
                    if at < 0:
                        insort(blocks, block)
                    elif at + 1 < len(blocks) and blocks[at + 1] < block:
                        del blocks[at]
                        insort(blocks, block)
                    else:
                        blocks[at] = block
        self.in_use, self.most_in_use = now, most

    def empty_cache(self) -> None:
        """`torch.cuda.empty_cache()`."""
        self.large.release()
        self.small.release()

    # --------------------------------------------------------------------------------------------------- states
    def clone(self) -> Native:
        """An independent copy in the same state; the same blocks are alive in both."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.small, twin.large = self.small.clone(twin), self.large.clone(twin)
        return twin

    def same_cache(self, other: Native) -> bool:
        """Whether both have the same free blocks and as much reserved, and so go on alike if they are asked alike."""
        return (
            self.reserved == other.reserved
            and self.small.blocks == other.small.blocks
            and self.large.blocks == other.large.blocks
        )

    def reset_peaks(self) -> None:
        """`torch.cuda.reset_peak_memory_stats()`."""
        self.most_in_use, self.peak_reserved = self.in_use, self.reserved

    def pinned_now(self) -> int:
        """What would stay reserved if the cache were emptied now."""
        return self.small.pinned_bytes() + self.large.pinned_bytes()
