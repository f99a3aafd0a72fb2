"""One flat tensor for the LoRA parameters of a decoder layer.

The optimizer steps one tensor a layer instead of fourteen, a layer's bf16 copies are made by one kernel for each group
of Linears, and the backward adds every gradient into one flat tensor, in float32, without temporaries. PEFT's own
parameters become views of it: what `save_pretrained` writes is what it always was.

Within a group of Linears that share an input, all A lie together, [n * r, in], so that x A^T is one product; then
each B, [out, r].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Slot(NamedTuple):
    """Where the adapters of one group lie in the flat tensor. `outs` are the rows of each B, in the group's order."""

    start: int
    rank: int
    inputs: int
    outs: tuple[int, ...]
    scalings: tuple[float, ...]

    @property
    def stop(self) -> int:
        return self.start + self.rank * (self.inputs * len(self.outs) + sum(self.outs))

    def views(self, flat: Tensor, start: int = 0) -> tuple[Tensor, list[Tensor]]:
        """(all A [n * r, in], each B [out, r]) in a flat tensor, in which this slot begins at `start`."""
        rank, rows, start = self.rank, self.rank * len(self.outs), start + flat.storage_offset()
        down, ups = flat.as_strided((rows, self.inputs), (self.inputs, 1), start), []
        start += rows * self.inputs
        for out in self.outs:
            ups.append(flat.as_strided((out, rank), (rank, 1), start))
            start += out * rank
        return down, ups


class FlatLora:
    """All LoRA parameters of a layer. `parameter` is what the optimizer steps; its `.grad` is written by `linear`."""

    def __init__(self) -> None:
        self.size = 0
        self.parameter: nn.Parameter | None = None
        self.regions: dict[Slot, Tensor] = {}  # the numbers of each slot, outside of autograd

    def reserve(self, rank: int, inputs: int, outs: Sequence[int], scalings: Sequence[float]) -> Slot:
        """Room for a group of adapters."""
        slot = Slot(self.size, rank, inputs, tuple(outs), tuple(scalings))
        self.size = slot.stop
        return slot

    def fill(self, slots: Sequence[tuple[Slot, Sequence[Any]]]) -> None:
        """Make the flat tensor and move PEFT's modules' parameters (`lora_A`, `lora_B` pairs) into it."""
        first = slots[0][1][0][0].weight
        flat = torch.empty(self.size, dtype=first.dtype, device=first.device)
        for slot, pairs in slots:
            self.regions[slot] = flat[slot.start : slot.stop]
            down, ups = slot.views(flat, slot.start)
            for i, (a, b) in enumerate(pairs):
                for module, view in ((a, down[i * slot.rank : (i + 1) * slot.rank]), (b, ups[i])):
                    view.copy_(module.weight.data)
                    module.weight.data = view
        self.parameter = nn.Parameter(flat)

    def weights(self, slot: Slot, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """(A, each B) in the dtype of the products: one copy for the group."""
        return slot.views(self.regions[slot].to(dtype))

    def gradients(self, slot: Slot) -> tuple[Tensor, list[Tensor]]:
        """Views of the flat gradient to add into; it begins as zeros."""
        assert self.parameter is not None
        if self.parameter.grad is None:
            self.parameter.grad = torch.zeros_like(self.parameter)
        return slot.views(self.parameter.grad, slot.start)
