"""From the size that was asked for back to a shape, where nobody says what ran: logits, and eager attention's scores.

Asked only where the traceback says which of the two it was: a size alone fits too many shapes. Those that people use
are few: tokens come in multiples of a power of two, vocabularies and heads are those of known models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .units import GIB, MIB, human

DTYPES = ((4, "float32"), (2, "bf16"))
ROUND = 8  # tokens are multiples of at least 2 to this
SHIFTED = 8  # sequences whose last token has no label and may have been left out
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
SEQUENCES = tuple(range(512, 8192, 512)) + tuple(range(8192, 65537, 2048))
CLEAR = 2.0  # times less likely by chance: then it is worth saying
SHOWN = 2


class Known(NamedTuple):
    """What known models have: (vocabulary, whose), and numbers of heads."""

    vocabularies: tuple[tuple[int, tuple[str, ...]], ...] = ()
    heads: tuple[int, ...] = ()


NOTHING = Known()


class Shape(NamedTuple):
    """A tensor that could have been asked for. `clear`: how many times less often chance would match it."""

    cause: str  # logits | eager_attention
    clear: float
    text: str
    models: int = 1  # known ones that have it


def shapes(asked: int, known: Known, phase: str | None) -> list[Shape]:
    """The clearest shapes of `asked` bytes, the most usual first; none where `phase` (of `causes.phase_of`) is another.

    The loss is taken of float32: of bf16 only what could not be that.
    """
    found: list[Shape] = []
    if phase == "loss":
        for width, dtype in DTYPES:
            found = found or [s for s in _logits(asked, known.vocabularies, width, dtype) if s.clear >= CLEAR]
    elif phase == "eager":
        found = [shape for shape in _scores(asked, known.heads) if shape.clear >= CLEAR]
    return sorted(found, key=lambda shape: -shape.clear * shape.models)[:SHOWN]


def sizes(asked: int) -> tuple[int, int]:
    """(least, most) bytes of what was asked for: a report's number has two digits after the point, of its unit, and is
    that of the segment, rounded up to 2 MiB."""
    unit = GIB if asked >= GIB else MIB if asked >= MIB else 1024
    off = int(0.00501 * unit)
    return max(asked - off - (2 * MIB if asked > 10 * MIB else 0), 1), asked + off


def _logits(asked: int, vocabularies: Sequence[tuple[int, tuple[str, ...]]], width: int, dtype: str) -> Iterator[Shape]:
    least, most = sizes(asked)
    for vocab, names in vocabularies:
        low, high = -(-least // (vocab * width)), most // (vocab * width)
        tokens, shift = _roundest(max(low, 1), high)
        if tokens:
            chances = len(vocabularies) * (1 + SHIFTED * bool(shift))
            clear = 8 * _two(tokens) / (high - low + 1) / chances
            whose = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            text = f"{dtype} logits of {tokens:,} tokens with a vocabulary of {vocab:,} ({whose})"
            yield Shape("logits", clear, text, len(names))


def _roundest(low: int, high: int) -> tuple[int, int]:
    """(the number with the most twos in it, and what was added to get it), from low to high or a few above: of each
    sequence one token may be missing. (0, 0) if none is round."""
    best, added = 0, 0
    for shift in range(SHIFTED + 1):
        power = 1 << max((high + shift).bit_length() - 1, 0)
        while power >= 1 << ROUND:
            tokens = (high + shift) // power * power
            if tokens >= low + shift and (not shift or tokens % shift == 0):
                if _two(tokens) > _two(best) * (SHIFTED if shift and best else 1):
                    best, added = tokens, shift
                break
            power //= 2
    return best, added


def _two(number: int) -> int:
    """The largest power of two in it; 0 of 0."""
    return number & -number


def _scores(asked: int, heads: Sequence[int]) -> Iterator[Shape]:
    least, most = sizes(asked)
    tried = len(heads) * len(BATCHES) * len(DTYPES) * len(SEQUENCES)
    for tokens in SEQUENCES:
        for width, dtype in DTYPES:
            for batch in BATCHES:
                for count in heads:
                    size = batch * count * tokens * tokens * width
                    if least <= size <= most:
                        # sizes spread over some twelve powers of two: how many of them would fall this near by chance
                        by_chance = tried * (most - least) / asked / 12
                        clear = min(asked / (most - least), 1 / by_chance * _two(tokens) / 64)
                        text = f"{dtype} scores of eager attention: {batch} x {count} heads x {tokens:,} x {tokens:,}"
                        yield Shape("eager_attention", clear, text)


def said(asked: int, found: Sequence[Shape]) -> str:
    """One sentence of one or two shapes."""
    return f"{human(asked)} would be {'; or '.join(shape.text for shape in found)}."
