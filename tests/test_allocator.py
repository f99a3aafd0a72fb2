"""The allocator's replay: small cases worked by hand, and laws."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_allocator import Reference

from vramplan.core.allocator import MASK, Native, OutOfMemory, block_bytes
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
    assert taken & MASK == small & MASK
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


def test_a_later_segment_lies_at_a_lower_address_and_is_taken_first():
    memory = Native()
    first, second = memory.malloc(40 * MIB), memory.malloc(40 * MIB)
    assert second & MASK < first & MASK
    memory.free(first)
    memory.free(second)
    assert memory.malloc(40 * MIB) == second


def test_the_small_pool_breaks_up_too():
    """One live block of 512 bytes in each of many segments keeps them all."""
    memory = Native()
    blocks = [memory.malloc(MIB // 2) for _ in range(40)]
    for i, block in enumerate(blocks):
        if i % 4:
            memory.free(block)
    memory.empty_cache()
    assert (memory.allocated, memory.reserved) == (5 * MIB, 20 * MIB)


def test_the_cap_is_compared_with_a_whole_segment_even_where_a_page_would_do():
    memory = Expandable(cap_bytes=47 * MIB)
    memory.malloc(20 * MIB)
    with pytest.raises(OutOfMemory) as error:
        memory.malloc(28 * MIB)
    assert error.value.needed_bytes == 48 * MIB


requests = st.lists(
    st.tuples(
        st.sampled_from(["malloc", "malloc", "free", "empty"]),
        st.one_of(st.integers(1, MIB), st.integers(1, 60 * MIB), st.sampled_from([11 * MIB, 16 * MIB, 20 * MIB])),
        st.integers(0, 10**6),
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from([None, 90 * MIB, 300 * MIB]), requests)
def test_as_the_plain_allocator_has_it(kind, cap_bytes, script):
    """Sizes, and so every choice that shows in bytes, are those of a search through plain lists of blocks."""
    memory, plain = allocator(kind, cap_bytes), Reference(kind, cap_bytes)
    held: list[tuple[int, list]] = []
    for what, size, pick in script:
        if what == "malloc":
            expected = plain.malloc(size)
            if expected is None:
                with pytest.raises(OutOfMemory):
                    memory.malloc(size)
            else:
                held.append((memory.malloc(size), expected))
                assert block_bytes(held[-1][0]) == expected[1]
        elif what == "free" and held:
            block, expected = held.pop(pick % len(held))
            memory.free(block)
            plain.free(expected)
        else:
            memory.empty_cache()
            plain.empty_cache()
        assert (memory.allocated, memory.reserved) == (plain.allocated, plain.reserved)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), requests)
def test_a_clone_goes_its_own_way_the_same(kind, script):
    memory = allocator(kind)
    for what, size, _ in script:
        if what == "malloc":
            memory.malloc(size)
    twin = memory.clone()
    assert twin.same_cache(memory)
    before = (memory.allocated, memory.reserved)
    for size in (3 * MIB, 700, 44 * MIB):
        twin.malloc(size)
    assert (memory.allocated, memory.reserved) == before
    for size in (3 * MIB, 700, 44 * MIB):
        memory.malloc(size)
    assert (memory.allocated, memory.reserved) == (twin.allocated, twin.reserved)
    assert twin.same_cache(memory)
