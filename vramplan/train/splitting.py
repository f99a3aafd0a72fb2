"""A micro-batch in pieces: some of its rows at a time, each piece a micro-batch of its own."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vramplan.train.collate import padded
from vramplan.train.store import IGNORED

Inputs = dict[str, Any]

# Borders of packed documents in the flattened batch, as transformers names them: int32 [documents + 1].
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k")


def rows_of(inputs: Inputs) -> int:
    """Rows of the batch; a row is never split, packed or not."""
    return int(inputs["input_ids"].shape[0])


def width_of(inputs: Inputs) -> int:
    """Tokens of a row, padding included."""
    return int(inputs["input_ids"].shape[1])


def labelled_in(inputs: Inputs) -> int:
    """Tokens that the loss is over. Waits for the device."""
    return int((inputs["labels"][:, 1:] != IGNORED).sum())


def pieces_of(inputs: Inputs, rows: int) -> list[Inputs]:
    """The batch in as few pieces as `rows` rows at a time need, evenly: 4 rows, 3 at a time, are 2 and 2.

    Every tensor with one entry per row is cut; what is no such tensor goes into every piece. A piece of padded rows
    loses the columns in which all of them are padding, which changes nothing that is computed.
    """
    total = rows_of(inputs)
    count = -(-total // max(rows, 1))
    if count <= 1:
        return [inputs]
    ends = [total * i // count for i in range(count + 1)]
    return [_piece(inputs, first, last) for first, last in pairwise(ends)]


def _piece(inputs: Inputs, first: int, last: int) -> Inputs:
    total, width = rows_of(inputs), width_of(inputs)
    piece: Inputs = {}
    for name, value in inputs.items():
        if name in _BORDERS:
            inside = value[(value >= first * width) & (value <= last * width)]
            piece[name] = inside - first * width
        elif isinstance(value, Tensor) and value.dim() and value.shape[0] == total:
            piece[name] = value[first:last]
        else:
            piece[name] = value
    return piece if any(name in inputs for name in _BORDERS) else _trimmed(piece)


def _trimmed(piece: Inputs) -> Inputs:
    """Without the last columns where they are padding in every row."""
    mask = piece.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return piece
    width = width_of(piece)
    used = torch.nonzero(mask.any(dim=0))
    needed = padded(int(used.max()) + 1 if used.numel() else 1, width)
    return {
        name: value[:, :needed] if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == width else value
        for name, value in piece.items()
    }
