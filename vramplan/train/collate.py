"""Examples -> a batch, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from vramplan.core.lengths import MULTIPLE
from vramplan.core.units import round_up
from vramplan.core.varlen import documents
from vramplan.train.store import IGNORED, Example

if TYPE_CHECKING:
    import torch


class Collator:
    """Examples -> a batch of LongTensors [examples, tokens]: `input_ids`, `labels` and `attention_mask`.

    Pads on the right to the longest example, and from 8 tokens on to a multiple of 8, but not beyond `max_length`.
    Padding has attention 0 and label -100.

    `packed`: every row is padded to `max_length` (None: as above), so that all batches have one shape. In the place of
    the mask come `position_ids`, which start again in each document, and what transformers calls the borders for
    variable-length attention: see `borders`. An example without `lengths` is one document.
    """

    def __init__(self, pad_token_id: int, max_length: int | None = None, packed: bool = False) -> None:
        self.pad_token_id = pad_token_id
        self.max_length = max_length
        self.packed = packed

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        import torch

        width = self._width(max(len(example["input_ids"]) for example in examples))
        padding = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        if self.packed:
            del padding["attention_mask"]
        batch: dict[str, Any] = {
            name: torch.tensor([e[name] + [value] * (width - len(e[name])) for e in examples], dtype=torch.long)
            for name, value in padding.items()
        }
        if self.packed:
            rows = [example.get("lengths") or [len(example["input_ids"])] for example in examples]
            batch |= borders(rows, width)
        return batch

    def _width(self, longest: int) -> int:
        if self.packed and self.max_length is not None:
            return max(longest, self.max_length)
        return padded(longest, self.max_length)


def padded(longest: int, most: int | None = None) -> int:
    """Tokens that rows are padded to, the longest of which has `longest`."""
    if longest <= MULTIPLE:
        return longest
    width = round_up(longest, MULTIPLE)
    return width if most is None else max(longest, min(width, most))


def borders(rows: Sequence[Sequence[int]], width: int) -> dict[str, Any]:
    """Where the documents of a batch begin: `rows` are their lengths, row by row, each padded to `width` tokens.

    `position_ids` LongTensor [rows, width], 0 where there is padding; `cu_seq_lens_q`, `cu_seq_lens_k` int32
    [documents + 1], over the rows end to end, what pads a row being a document of its own; `max_length_q`,
    `max_length_k` the longest, an int.
    """
    import torch

    positions: list[list[int]] = []
    edges = [0]
    for lengths in rows:
        padding = width - sum(lengths)
        positions.append([position for length in lengths for position in range(length)] + [0] * padding)
        for length in [*lengths, padding] if padding else lengths:
            edges.append(edges[-1] + length)
    longest = max(after - before for before, after in pairwise(edges))
    cumulative = {f"cu_seq_lens_{side}": torch.tensor(edges, dtype=torch.int32) for side in "qk"}
    both = {f"max_length_{side}": longest for side in "qk"}
    return {"position_ids": torch.tensor(positions, dtype=torch.long), **cumulative, **both}


def of_one_shape(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch whose borders have one shape whatever documents it holds, for what is captured once.

    As many documents as there can be (`core/varlen.py`), some of them empty, and a row's width for the longest.
    """
    import torch

    rows, width = batch["input_ids"].shape
    fixed = dict(batch)
    for side in "qk":
        edges = batch.get(f"cu_seq_lens_{side}")
        if edges is not None:
            empty = edges[-1:].expand(max(documents(rows, width) + 1 - len(edges), 0))
            fixed[f"cu_seq_lens_{side}"] = torch.cat((edges, empty))
            fixed[f"max_length_{side}"] = width
    return fixed


def input_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Tokens of a batch that are no padding, as a scalar on its device: nothing waits here."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum()
    positions = batch["position_ids"]  # a document has one token at position 1, beside the one at 0
    return (positions > 0).sum() + (positions == 1).sum()
