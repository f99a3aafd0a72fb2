"""Whole micro-steps as CUDA graphs, where starting kernels takes longer than running them.

With few tokens or a small model the card waits for Python: a Llama layer's forward and backward are some eighty kernels
of a few microseconds each. A graph starts all of them at once. It needs shapes that come back (packed rows, one length)
and memory that stays where it is: gradients are kept and zeroed, and what lives within a micro-step lies in a pool of
the graphs' own, as large as the cached memory that an ordinary step leaves behind.

Whether it pays is seen, not modelled: if the card has finished by the time Python has started the last kernel, Python
is what is slow.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WATCHED = 2  # ordinary micro-steps of a shape before it is captured
MOST = 8  # shapes that are captured; others run as ever
SHARE = 0.03  # of the time that starting took: the card is no further behind where starting is the slow part
SPARE_BYTES = 256 * 2**20

# (input_ids, labels, items in the batch) -> loss, with the gradients added to the parameters'
MicroStep = Callable[[Tensor, Tensor, Tensor], Tensor]


class Graphs:
    """Runs a micro-step, as a graph once its shape has come back and starting it is what takes the time."""

    def __init__(self, step: MicroStep, parameters: Sequence[nn.Parameter], forget: Callable[[], None]) -> None:
        self.step, self.parameters, self.forget = step, parameters, forget
        self.made: dict[tuple[int, ...], _Graph] = {}
        self.seen: dict[tuple[int, ...], int] = {}
        self.pool: Any = None
        self.off = ""  # why there will be no more of them
        self.gradients: list[Tensor] = []

    def run(self, ids: Tensor, labels: Tensor, items: Tensor) -> tuple[Tensor, bool]:
        """(loss, whether it was a graph)."""
        shape = tuple(ids.shape)
        graph = self.made.get(shape)
        if graph is not None:
            self._hold_gradients()
            return graph.replay(ids, labels, items), True
        begun = time.perf_counter()
        loss = self.step(ids, labels, items)
        if not self.off and len(self.made) < MOST:
            started = time.perf_counter() - begun
            self.seen[shape] = self.seen.get(shape, 0) + 1 if _caught_up(SHARE * started) else -MOST * WATCHED
        return loss, False

    def wants(self, shape: tuple[int, ...]) -> bool:
        return not self.off and shape not in self.made and self.seen.get(shape, 0) >= WATCHED

    def capture(self, ids: Tensor, labels: Tensor, items: Tensor, needed_bytes: int) -> None:
        """Make the graph of this shape, between two optimizer steps: the gradients are zero again after it.

        `needed_bytes` is what an ordinary micro-step takes beyond what is resident.
        """
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < needed_bytes + SPARE_BYTES:
            self.off = "the card has no room for a pool of their own"
            return
        self._hold_gradients()
        try:
            self.made[tuple(ids.shape)] = _Graph(self.step, ids, labels, items, self)
        except Exception as error:  # whatever cannot be captured: a library that waits for the card, for one
            self.off = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            self.forget()
            torch.cuda.synchronize()
        for gradient in self.gradients:
            gradient.zero_()

    def _hold_gradients(self) -> None:
        """The graphs add into these very tensors; whoever has replaced one meanwhile gets it back."""
        if not self.gradients:
            self.gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        for parameter, kept in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is kept:
                continue
            if parameter.grad is None:
                kept.zero_()
            else:
                kept.copy_(parameter.grad)
            parameter.grad = kept

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients must be zeroed where they are rather than dropped."""
        return bool(self.made)


class _Graph:
    """One captured micro-step and the tensors that it reads."""

    def __init__(self, step: MicroStep, ids: Tensor, labels: Tensor, items: Tensor, owner: Graphs) -> None:
        self.inputs = ids.clone(), labels.clone(), items.clone()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=owner.pool):
            self.loss = step(*self.inputs).detach()
        owner.pool = owner.pool or self.graph.pool()

    def replay(self, *values: Tensor) -> Tensor:
        for place, value in zip(self.inputs, values, strict=True):
            place.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()


def _caught_up(patience_s: float) -> bool:
    """Whether the card finishes what it was given within this time."""
    done = torch.cuda.Event()
    done.record()
    until = time.perf_counter() + patience_s
    while not done.query():
        if time.perf_counter() > until:
            return False
    return True
