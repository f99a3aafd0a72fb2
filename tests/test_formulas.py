"""Numbers that remember what they were computed from: the same at other values, or an honest no."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.core.formulas import Book, Number, applied
from vramplan.core.loss import chunk_tokens
from vramplan.core.units import round_up


def computed(batch: int, seq: int) -> list[int]:
    """All operations that a player uses, with branches that hang on the values."""
    tokens = batch * seq
    out = [tokens, 3 * tokens + 7, round_up(tokens, 512), tokens // 3 * 3, 1 - seq, seq - 1, -batch + 5]
    out.append(applied(lambda rows: chunk_tokens(max(rows, 1), 64, 1000), tokens - batch))
    out.append(tokens if tokens > 100 else 100)
    if seq % 16:
        out.append(round_up(seq, 16))
    out += [batch] if batch == 1 else [] if batch >= 3 else [batch, seq]
    out.append(max(tokens, 64) + min(seq, 8))
    return out + [seq * 0] * bool(batch - 2)


sizes = st.tuples(st.integers(1, 5), st.integers(1, 200))


@given(sizes, sizes)
def test_what_is_noted_at_one_size_is_computed_at_another(first, other):
    book = Book(*first)
    found = computed(*book.variables)
    places = [book.place(number) for number in found]
    values = book.at(*first)
    assert values is not None and [values[place] for place in places] == computed(*first)
    values = book.at(*other)
    if values is not None:
        assert [values[place] for place in places] == computed(*other)
    elif first == other:
        pytest.fail("the size that was played")


def test_most_sizes_are_alike():
    book = Book(2, 640)
    computed(*book.variables)
    assert all(book.at(2, 16 * n) for n in range(10, 100))
    assert book.at(2, 641) is None and book.at(3, 640) is None and book.at(2, 16) is None


def test_a_comparison_is_looked_at_before_what_hangs_on_it():
    """Not even a division by zero comes of values for which another way was taken."""
    book = Book(7)
    (number,) = book.variables
    if number:
        number // number
    assert book.at(0) is None and book.at(3) is not None


@pytest.mark.parametrize(
    "misuse",
    [range, lambda n: [0] * n, lambda n: n / 2, lambda n: n * 0.5, float, lambda n: n**2, lambda n: "abc"[n]],
)
def test_a_number_is_never_taken_for_a_constant(misuse: Callable[[int], object]):
    (number,) = Book(2).variables
    assert isinstance(number, Number)
    with pytest.raises(TypeError):
        misuse(number)
