"""The curve of a step: it is the ledger's own step, event by event, and what is left out of a picture hides nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.core import curve
from vramplan.core.groups import group_of
from vramplan.core.ledger import estimate
from vramplan.core.recipes import RECIPES
from vramplan.core.types import Ledger, Levers, Lora, RunSpec, Timeline
from vramplan.sources.hf_config import load_model

LEAN, PEFT = RECIPES["lean"], RECIPES["peft"]
RUNS: dict[str, RunSpec] = {
    "lean": RunSpec(model="llama-3.1-8b"),
    "offload": RunSpec(model="tinyllama-1.1b", levers=replace(LEAN, checkpoint_offload=True)),
    "no checkpoints": RunSpec(model="tinyllama-1.1b", levers=replace(LEAN, checkpointing="none"), accumulation=4),
    "stock": RunSpec(model="tinyllama-1.1b", levers=PEFT, recipe="peft"),
    "dropout": RunSpec(model="qwen2.5-0.5b", levers=PEFT, lora=Lora(dropout=0.05), driver="loop"),
    "adafactor": RunSpec(model="tinyllama-1.1b", levers=Levers(optimizer="adafactor"), seq_len=512),
    "fsdp": RunSpec(model="tinyllama-1.1b", gpus=2, parallel="fsdp"),
    "gemma": RunSpec(model="gemma-2-2b", levers=replace(PEFT, allocator="expandable"), seq_len=512),
}


def played(name: str) -> tuple[Ledger, Timeline]:
    run = RUNS[name]
    ledger = estimate(load_model(run.model), run)
    return ledger, curve.timeline(ledger)


@pytest.mark.parametrize("name", RUNS)
def test_the_stack_at_the_peak_is_the_ledger(name: str) -> None:
    ledger, step = played(name)
    found = curve.levels(step)
    assert found.totals[found.peak] == max(found.totals) == ledger.peak.device_bytes
    assert found.allocated[found.peak] == max(found.allocated) == ledger.peak.allocated_bytes
    lines: Counter[str] = Counter()
    for line in ledger.lines:
        lines[group_of(line)] += line.bytes
    assert {group: sizes[found.peak] for group, sizes in found.groups.items()} == dict(lines)
    phase = curve.place(step, found.peak).phase
    assert {"loss": "forward"}.get(phase, phase) == ledger.peak.phase


@pytest.mark.parametrize("name", RUNS)
def test_every_phase_has_the_peak_of_the_ledger(name: str) -> None:
    """A phase begins with what the one before has left."""
    ledger, step = played(name)
    allocated = curve.levels(step).allocated
    highest: dict[str, int] = {}
    for part in curve.stretches(step):
        phase = {"loss": "forward"}.get(part.phase, part.phase)
        highest[phase] = max(highest.get(phase, 0), *allocated[max(part.first - 1, 0) : part.end])
    wanted = {phase.name: phase.peak_bytes for phase in ledger.phases if phase.name not in ("load", "end")}
    assert highest == wanted


@pytest.mark.parametrize("name", ["lean", "stock"])
def test_what_is_live_at_a_point_is_what_the_curve_counts(name: str) -> None:
    _, step = played(name)
    found = curve.levels(step)
    for point in {*range(0, len(found.totals), 997), found.peak, len(found.totals) - 1}:
        live = curve.live_at(step, point)
        assert all(count > 0 for _, count in live)
        sizes = [kind.bytes * count for kind, count in live]
        assert sizes == sorted(sizes, reverse=True)
        assert sum(sizes) + (step.tails[point] if step.tails else 0) == found.totals[point]


@pytest.mark.parametrize("name", RUNS)
def test_a_steady_step_ends_as_it_began(name: str) -> None:
    _, step = played(name)
    assert curve.live_at(step, 0) == curve.live_at(step, len(curve.levels(step).totals) - 1)


def test_the_phases_follow_each_other_without_a_gap() -> None:
    _, step = played("no checkpoints")
    parts = curve.stretches(step)
    once = ["forward", "loss", "backward"]
    assert [part.phase for part in parts] == [*once, *once, "optimizer"]
    points = [point for part in parts for point in range(part.first, part.end)]
    assert points == list(range(len(curve.levels(step).totals)))
    for part in parts:
        assert curve.place(step, part.end - 1).phase == part.phase
    with pytest.raises(IndexError):
        curve.place(step, len(points))


def test_a_step_of_half_the_rows_is_another_curve() -> None:
    """The chip and the run decide: nothing is kept from the step before."""
    ledger, step = played("stock")
    half = estimate(ledger.model, replace(ledger.run, seq_len=1024))
    assert max(curve.levels(curve.timeline(half)).totals) == half.peak.device_bytes < ledger.peak.device_bytes
    assert max(curve.levels(step).totals) == ledger.peak.device_bytes


# ------------------------------------------------------------------------------------------------------ thinning
TOTALS = st.lists(st.integers(0, 50), min_size=1, max_size=300)


@given(TOTALS, st.integers(1, 40))
def test_no_point_that_is_left_out_lies_outside_what_is_drawn_of_its_piece(totals: list[int], count: int) -> None:
    pieces = curve.buckets(curve.Stretch("forward", 0, len(totals)), count)
    assert [point for piece in pieces for point in piece] == list(range(len(totals)))
    kept = curve.thinned(totals, pieces)
    assert kept == sorted(set(kept)) and len(kept) <= 3 * len(pieces)
    for piece in pieces:
        drawn = [totals[point] for point in kept if point in piece]
        assert min(drawn) == min(totals[point] for point in piece)
        assert max(drawn) == max(totals[point] for point in piece)
        assert piece.start in kept
    assert totals.index(max(totals)) in kept


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=9), st.integers(0, 9), st.integers(90, 200))
def test_widths_add_up_and_no_phase_vanishes(lengths: list[int], least: int, whole: int) -> None:
    parts, at = [], 0
    for length in lengths:
        parts.append(curve.Stretch("forward", at, at + length))
        at += length
    found = curve.widths(parts, whole, least)
    assert sum(found) == whole
    assert min(found) >= min(least, whole // len(lengths))
