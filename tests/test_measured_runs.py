"""`vramplan measure` on an H200, many architectures and every lever of `lean`, against the prediction."""

from __future__ import annotations

from dataclasses import replace

import pytest
from measured import MIB, h200, model, rows

from vramplan.core.ledger import simulate
from vramplan.core.types import RunSpec
from vramplan.sources.records import decode


def name(row):
    run, levers = row["run"], row["run"]["levers"]
    parts = [row["model"], f"{run['micro_batch_size']}x{run['seq_len']}", run["recipe"], levers["optimizer"]]
    return "-".join([*parts, levers["checkpointing"], levers["upcast"], levers["attention"]])


@pytest.mark.parametrize("row", rows("h200-measure.jsonl"), ids=name)
def test_every_phase_is_that_of_the_card(row):
    run = decode({"schema_version": 1, "type": "RunSpec", **row["run"]}, RunSpec)
    sim = simulate(replace(model(row["model"]), num_layers=row["layers"]), replace(run, random_weights=True), h200())
    measured = {phase["name"]: phase for phase in row["measurement"]["phases"]}
    assert sim.resident.loaded_bytes == pytest.approx(measured["loaded"]["allocated_bytes"], abs=0.01 * MIB)
    assert sim.resident.prepared_bytes == pytest.approx(measured["prepared"]["allocated_bytes"], abs=0.01 * MIB)
    assert sim.resident.with_lora_bytes == pytest.approx(measured["with_lora"]["allocated_bytes"], abs=0.01 * MIB)
    for phase in ("forward", "backward", "optimizer"):
        assert sim.played.allocated[phase] == pytest.approx(measured[phase]["peak_bytes"], rel=0.0002), phase
    assert sim.played.reserved_bytes == pytest.approx(measured["step"]["reserved_bytes"], rel=0.05)
