"""Whole numbers that remember what they were computed from, so that what is played at one size answers for others.

A `Number` has the value that it has now, and stands wherever the player's code has an int. Arithmetic makes further
numbers, and notes how in the `Book` that all of them belong to. A comparison is answered by the values, and its answer
is noted too: for other values of the variables everything played stays as it was while all answers stay the same.
What is not described here, such as counting to a Number, raises TypeError, so that nothing is taken for a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import cast

Operation = Callable[[int, int], int]


class Number:
    """One value of the book, by its place there."""

    __slots__ = ("book", "place", "value")
    __hash__ = object.__hash__

    def __init__(self, book: Book, place: int, value: int) -> None:
        self.book, self.place, self.value = book, place, value

    def __mul__(self, other: object) -> Number:
        return self.book.made(operator.mul, self, other)

    def __add__(self, other: object) -> Number:
        return self.book.made(operator.add, self, other)

    def __sub__(self, other: object) -> Number:
        return self.book.made(operator.sub, self, other)

    def __floordiv__(self, other: object) -> Number:
        return self.book.made(operator.floordiv, self, other)

    def __mod__(self, other: object) -> Number:
        return self.book.made(operator.mod, self, other)

    def __rsub__(self, other: object) -> Number:
        return self.book.made(_from, self, other)

    def __neg__(self) -> Number:
        return self * -1

    __rmul__, __radd__ = __mul__, __add__

    def __lt__(self, other: object) -> bool:
        return self.book.answer(operator.lt, self, other)

    def __le__(self, other: object) -> bool:
        return self.book.answer(operator.le, self, other)

    def __gt__(self, other: object) -> bool:
        return self.book.answer(operator.gt, self, other)

    def __ge__(self, other: object) -> bool:
        return self.book.answer(operator.ge, self, other)

    def __eq__(self, other: object) -> bool:
        return other is self or self.book.answer(operator.eq, self, other)

    def __ne__(self, other: object) -> bool:
        return other is not self and self.book.answer(operator.ne, self, other)

    def __bool__(self) -> bool:
        return self.book.answer(operator.ne, self, 0)


class Book:
    """How numbers are made of the `variables` and of one another, and how comparisons of them came out."""

    def __init__(self, *variables: int) -> None:
        self._places = 0
        self._known: dict[tuple[Operation, object, object], Number] = {}
        self._answers: dict[tuple[Operation, object, object], bool] = {}
        # in the order of time: how the next number is made of those in two places, or how their comparison came out
        self._notes: list[tuple[Operation, int, int, bool | None]] = []
        self.variables = [cast(int, self._number(value)) for value in variables]  # they pass for ints

    def place(self, number: int) -> int:
        """Where in what `at` returns this number's value is, a constant's too."""
        return self._of(number).place

    def made(self, operation: Operation, left: Number, right: object) -> Number:
        found = self._known.get((operation, left, right))
        if found is None:
            other = self._of(right)
            self._notes.append((operation, left.place, other.place, None))
            found = self._known[operation, left, right] = self._number(operation(left.value, other.value))
        return found

    def answer(self, comparison: Operation, left: Number, right: object) -> bool:
        found = self._answers.get((comparison, left, right))
        if found is None:
            other = self._of(right)
            found = self._answers[comparison, left, right] = bool(comparison(left.value, other.value))
            self._notes.append((comparison, left.place, other.place, found))
        return found

    def at(self, *variables: int) -> list[int] | None:
        """Every number's value with these variables; None where a comparison would have come out otherwise."""
        values = list(variables)
        for operation, left, right, answer in self._notes:
            if operation is _constant:
                values.append(right)
            elif answer is None:
                values.append(operation(values[left], values[right]))
            elif operation(values[left], values[right]) is not answer:
                return None
        return values

    def _of(self, value: object) -> Number:
        if isinstance(value, Number):
            return value
        if not isinstance(value, int):
            raise TypeError(f"{value!r} is no whole number")
        found = self._known.get((_constant, value, None))
        if found is None:
            self._notes.append((_constant, 0, value, None))
            found = self._known[_constant, value, None] = self._number(value)
        return found

    def _number(self, value: int) -> Number:
        self._places += 1
        return Number(self, self._places - 1, value)


def applied(function: Callable[[int], int], number: int | Number) -> int:
    """`function(number)`, noted as one operation, so that it may branch as it likes."""
    if not isinstance(number, Number):
        return function(number)
    return cast(int, number.book.made(lambda value, _: function(value), number, 0))


def _constant(_: int, value: int) -> int:
    return value


def _from(right: int, left: int) -> int:
    return left - right
