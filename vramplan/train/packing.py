"""Which documents share a row: best fit, longest first, so that rows of one length hold as little padding as can be.

TRL's `packing_strategy="bfd"`. No document is split, and none sees another (`varlen.py`).
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_left, insort
from collections.abc import Sequence

from vramplan.core.varlen import documents_per_row


def pack(lengths: Sequence[int], seq_len: int, seed: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each of at most `seq_len` tokens and `documents_per_row` documents.

    Longest first, each into the fullest row that still takes it; among equals the seed decides, so that neighbours in
    the file do not end up in one row. ValueError for a length that no row takes.
    """
    if lengths and max(lengths) > seq_len:
        raise ValueError(f"a document of {max(lengths)} tokens does not fit a row of {seq_len}")
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda index: -lengths[index])
    most = documents_per_row(seq_len) - 1  # the padding at a row's end counts as one
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free tokens -> rows with so many
    spaces: list[int] = []  # the keys, ascending
    for index in order:
        length = lengths[index]
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        else:
            space, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        left = space - length
        if left and len(rows[row]) < most:
            if left not in open_rows:
                open_rows[left] = []
                insort(spaces, left)
            open_rows[left].append(row)
    return rows


class Packing:
    """The rows that `pack` made, compactly: which documents, in which order."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self._documents = array("q", (index for row in rows for index in row))
        self._ends = array("q", [0])
        for row in rows:
            self._ends.append(self._ends[-1] + len(row))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def row(self, index: int) -> Sequence[int]:
        return self._documents[self._ends[index] : self._ends[index + 1]]
