"""Tokenised rows, compactly, and the data sets that are cut from them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, overload

from vramplan.train.packing import Packing

IGNORED = -100  # the label that cross entropy leaves out

Example = dict[str, list[int]]


class TokenStore:
    """Token ids of all rows end to end, which of them are learned, and the line or row of the file each came from."""

    def __init__(self) -> None:
        self.ids = array("i")
        self.learned = bytearray()
        self.ends = array("q", [0])
        self.sources = array("q")  # line or row numbers in the file, from 1
        self.cut = array("i")  # tokens that were cut off at the end

    def append(self, ids: Sequence[int], learned: Sequence[int], source: int = 0, cut: int = 0) -> None:
        if len(ids) != len(learned):
            raise ValueError(f"{len(ids)} tokens with {len(learned)} flags")
        self.ids.extend(ids)
        self.learned.extend(learned)
        self.ends.append(len(self.ids))
        self.sources.append(source)
        self.cut.append(cut)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def length(self, index: int) -> int:
        """Tokens of one row."""
        return self.ends[index + 1] - self.ends[index]

    def learned_tokens(self, index: int) -> int:
        """Labels of one row that the loss counts: the first token is never predicted."""
        return sum(self.learned[self.ends[index] + 1 : self.ends[index + 1]])

    def example(self, index: int) -> Example:
        span = slice(self.ends[index], self.ends[index + 1])
        ids = self.ids[span].tolist()
        labels = [token if learned else IGNORED for token, learned in zip(ids, self.learned[span], strict=True)]
        return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


class Examples(Sequence[Example]):
    """Some rows of a TokenStore, as a data set: dicts of `input_ids`, `labels` and `attention_mask`, each [tokens]."""

    def __init__(self, store: TokenStore, rows: Sequence[int]) -> None:
        self.store = store
        self.rows = array("q", rows)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Examples: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(self.store, self.rows[index])
        return self.store.example(self.rows[index])

    def length(self, index: int) -> int:
        """Tokens of one example, without padding."""
        return self.store.length(self.rows[index])

    def lengths(self) -> array[int]:
        return array("q", map(self.length, range(len(self))))

    def documents(self, index: int) -> Sequence[int]:
        """Which rows of the store an example is made of."""
        return [self.rows[index]]


class PackedExamples(Examples):
    """Rows of several documents each. An example has `input_ids`, `labels` and `lengths`, of the documents in it.

    The first label of a document is ignored: nothing predicts across the border. `length` is what the row takes in a
    batch: `seq_len`, whatever is in it.
    """

    def __init__(self, store: TokenStore, rows: Sequence[int], packing: Packing, seq_len: int) -> None:
        """`packing` holds indices into `rows`."""
        super().__init__(store, rows)
        self.packing, self.seq_len = packing, seq_len

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            rows = [self.packing.row(i) for i in range(*index.indices(len(self)))]
            return PackedExamples(self.store, self.rows, Packing(rows), self.seq_len)
        example: Example = {"input_ids": [], "labels": [], "lengths": []}
        for row in self.documents(index):
            document = self.store.example(row)
            example["input_ids"] += document["input_ids"]
            example["labels"] += [IGNORED, *document["labels"][1:]]
            example["lengths"].append(len(document["input_ids"]))
        return example

    def length(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.seq_len

    def documents(self, index: int) -> Sequence[int]:
        return [self.rows[document] for document in self.packing.row(index)]
