"""The allocator's replay: small cases worked by hand, and laws."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.core.allocator import Block, Native, OutOfMemory
from vramplan.core.expandable import Expandable, allocator
from vramplan.core.units import MIB

KINDS = ["native", "expandable"]


def test_requests_round_up_to_512_bytes():
    memory = Native()
    memory.malloc(1)
    memory.malloc(513)
    assert memory.allocated == 512 + 1024
    assert memory.reserved == 2 * MIB


@pytest.mark.parametrize(("size", "segment"), [(2 * MIB, 20), (9 * MIB, 20), (10 * MIB, 10), (21 * MIB + 1, 22)])
def test_native_segments(size, segment):
    memory = Native()
    memory.malloc(size)
    assert memory.reserved == segment * MIB


def test_a_rest_of_up_to_1_mib_stays_with_the_block():
    memory = Native()
    memory.malloc(19 * MIB)  # a segment of its own, rounded to 20
    assert memory.allocated == 20 * MIB
    split = Native()
    split.malloc(9 * MIB)
    assert split.allocated == 9 * MIB


def test_expandable_segments_leave_no_rest():
    memory = Expandable()
    memory.malloc(19 * MIB)
    assert memory.allocated == 19 * MIB
    assert memory.reserved == 20 * MIB


def test_cached_blocks_are_reused_best_fit():
    memory = Native()
    large, small = memory.malloc(40 * MIB), memory.malloc(24 * MIB)
    memory.free(large)
    memory.free(small)
    taken = memory.malloc(22 * MIB)
    assert isinstance(taken, Block)
    assert taken is small
    assert memory.reserved == 64 * MIB


def test_a_full_card_returns_cached_segments_and_tries_again():
    memory = Native(cap_bytes=64 * MIB)
    memory.free(memory.malloc(40 * MIB))
    memory.malloc(60 * MIB)
    assert (memory.retries, memory.reserved) == (1, 60 * MIB)
    with pytest.raises(OutOfMemory, match="reserved"):
        memory.malloc(5 * MIB)


def test_fragmentation_natively_and_not_with_expandable_segments():
    """Two freed 30 MiB neighbours hold 60 MiB only where they share an address range."""
    for kind, fits in (("native", False), ("expandable", True)):
        memory = allocator(kind, cap_bytes=100 * MIB)
        first, second, _ = memory.malloc(30 * MIB), memory.malloc(30 * MIB), memory.malloc(20 * MIB)
        memory.free(first)
        memory.free(second)
        held = memory.malloc(10 * MIB)  # pins one of the segments
        assert held
        if fits:
            memory.malloc(48 * MIB)
        else:
            with pytest.raises(OutOfMemory):
                memory.malloc(58 * MIB)


requests = st.lists(
    st.tuples(st.sampled_from(["malloc", "malloc", "free", "empty"]), st.integers(1, 60 * MIB), st.integers(0, 10**6)),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), requests)
def test_laws(kind, script):
    memory = allocator(kind)
    held: list = []
    sizes: list[int] = []
    for what, size, pick in script:
        if what == "malloc":
            held.append(memory.malloc(size))
            sizes.append(size)
        elif what == "free" and held:
            i = pick % len(held)
            memory.free(held.pop(i))
            sizes.pop(i)
        else:
            memory.empty_cache()
        spans = sorted((b.address, b.address + b.size) for b in held if isinstance(b, Block))
        assert all(a[1] <= b[0] for a, b in pairwise(spans)), "blocks overlap"
        assert sum(sizes) <= memory.allocated <= memory.reserved
        assert memory.allocated == sum(b if isinstance(b, int) else b.size for b in held)
    for block in held:
        memory.free(block)
    memory.empty_cache()
    assert (memory.allocated, memory.small) == (0, 0)
    assert memory.reserved == 0


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), requests)
def test_a_clone_goes_its_own_way_the_same(kind, script):
    memory = allocator(kind)
    for what, size, _ in script:
        if what == "malloc":
            memory.malloc(size)
    twin = memory.clone()
    before = (memory.allocated, memory.reserved)
    for size in (3 * MIB, 700, 44 * MIB):
        twin.malloc(size)
    assert (memory.allocated, memory.reserved) == before
    for size in (3 * MIB, 700, 44 * MIB):
        memory.malloc(size)
    assert (memory.allocated, memory.reserved) == (twin.allocated, twin.reserved)
