"""One play of a step for many sizes: micro-batch, length and workspace change the tensors' sizes, seldom what happens.

The step is played once on numbers that remember how they were computed (`formulas`). For other sizes they are computed
anew, which takes a hundredth of a play; where a comparison would come out otherwise (a mask that is needed, one chunk
of the loss more), the step is played again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .chip import traits
from .formulas import Book, Number
from .fused import is_fused
from .tape import workspace_bytes
from .timeline import ALLOCATING, begun, unrolled
from .types import GpuProfile, ModelSpec, RunSpec
from .unroll import Row, Unrolled


def kind(spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> tuple[object, ...]:
    """All that a step depends on but the variables."""
    _, *chip = traits(spec, run, gpu)  # without the workspace
    optimizer = run.levers.optimizer if run.levers.optimizer in ALLOCATING else ""
    levers = replace(run.levers, allocator="", kernels="", optimizer=optimizer)
    how = (run.lora, run.double_quant, run.padding, run.packing, run.driver, run.gpus, run.parallel)
    return (*chip, levers, is_fused(spec, run), min(run.accumulation, 2), *how)


class Sized:
    """A run's step on a chip, in every size for which it is played alike."""

    def __init__(self, spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> None:
        """Raises Unplannable."""
        self.book = Book(*_variables(run, gpu))
        batch, seq_len, workspace = self.book.variables
        step = begun(spec, replace(run, micro_batch_size=batch, seq_len=seq_len), gpu)
        step.tape.workspace_bytes = workspace
        step.play()
        self.rows = step.rec.info
        place = {size: self.book.place(size) for size in (0, *step.rec.sizes.values())}
        values = self.book.at(*_variables(run, gpu))
        assert values is not None
        self.played = unrolled(step, [place[row[5]] for row in self.rows], values)
        self.played.row = self._row(values)

    def at(self, run: RunSpec, gpu: GpuProfile) -> Unrolled | None:
        """The step in the sizes of this run, which differs from the one played in nothing else; None: play it anew."""
        values = self.book.at(*_variables(run, gpu))
        if values is None:
            return None
        return self.played.resized([values[place] for place in self.played.kind_places], self._row(values))

    def _row(self, values: list[int]) -> Callable[[int], Row]:
        """What says all of a tensor with these values."""

        def valued(number: object) -> Any:
            return values[number.place] if isinstance(number, Number) else number

        def row(ident: int) -> Row:
            key, name, rows, columns, dtype, size = self.rows[ident]
            return key, name, valued(rows), valued(columns), dtype, valued(size)

        return row


def _variables(run: RunSpec, gpu: GpuProfile) -> tuple[int, int, int]:
    return run.micro_batch_size, run.seq_len, workspace_bytes(gpu.compute_capability)
