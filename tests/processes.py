"""The processes that were measured, played from their beginning: what a run leaves behind is there for the next one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from measured import case_id, h200, model, rows, step_run

from vramplan.core import architecture as arch
from vramplan.core.allocator import Native
from vramplan.core.ledger import Simulation, simulate
from vramplan.core.loading import Loader


class ScriptLoader(Loader):
    """The measuring script's own order: all Linears first, then what is left, module by module."""

    def load(self) -> None:
        linears = arch.layer_linears(self.spec)
        self._layers(tuple(x for x in linears if x.quantised), ())
        self._embedding()
        self._layers(tuple(x for x in linears if not x.quantised), arch.layer_vectors(self.spec))
        self._outer()
        self._head()
        self.memory.empty_cache()


def step_memory() -> Iterator[tuple[dict[str, Any], Simulation]]:
    """Every row of h200-step-memory.jsonl with its replay.

    One process measured all rows of a model, one after the other: only its first row found no workspaces.
    """
    process: tuple[str, Native] | None = None
    for row in rows("h200-step-memory.jsonl"):
        warm = process is not None and process[0] == row["model"]
        if not warm:
            process = row["model"], Native()
        assert process is not None
        memory = process[1]
        memory.empty_cache()
        run = step_run(row)
        loader = ScriptLoader(memory, model(row["model"]), run.double_quant, drawn=True)
        sim = simulate(model(row["model"]), run, h200(), loader, warm)
        yield row, sim
        loader.unload()
        for block in sim.played.states:
            memory.free(block)


@cache
def replays() -> dict[str, Simulation]:
    """`step_memory` by `case_id`."""
    return {case_id(row): sim for row, sim in step_memory()}
