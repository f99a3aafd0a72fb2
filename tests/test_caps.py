"""What a run needs at least: the caps that are tried, and when no more of them have to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measured import model

from vramplan.core import caps
from vramplan.core.allocator import OutOfMemory
from vramplan.core.caps import LADDER, MARGIN, Caps
from vramplan.core.ledger import Simulation, estimate, lay, simulate
from vramplan.core.recipes import RECIPES
from vramplan.core.replay import play_run, workspaces
from vramplan.core.types import Levers, RunSpec

SMALL = replace(model("smollm2-135m"), num_layers=5)
few = settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def sims(draw: st.DrawFn) -> Simulation:
    levers = Levers(
        allocator="native",
        kernels=draw(st.sampled_from(["stock", "fused"])),
        loss=draw(st.sampled_from(["full", "fused"])),
        checkpointing=draw(st.sampled_from(["all", "none"])),
    )
    run = RunSpec(model="x", micro_batch_size=draw(st.integers(1, 6)), seq_len=draw(st.integers(2, 700)), levers=levers)
    return simulate(SMALL, run)


def all_caps(sim: Simulation) -> int:
    """The ladder to its end, a fresh process first and one with its workspaces then."""
    most, cap = sim.played.reserved_bytes, max(sim.allocated_bytes, sim.pinned_bytes)
    warm = sim.before_step.clone()
    for size in workspaces(sim.unrolled):
        warm.malloc(size)
    for start, is_warm in ((sim.before_step, False), (warm, True)):
        while cap < most:
            memory = start.clone()
            memory.cap_bytes = cap
            try:
                play_run(sim.unrolled, memory, sim.states, warm=is_warm)
            except OutOfMemory as error:
                cap = max(error.needed_bytes, int(cap * LADDER))
            else:
                break
    return min(int(cap * (1 + MARGIN["native"])), most)


@few
@given(sims())
def test_the_minimum_is_that_of_the_whole_ladder(sim):
    assert Caps(sim, "native").minimum_bytes() == all_caps(sim)


@few
@given(sims(), st.data())
def test_a_question_is_answered_as_by_the_minimum(sim, data):
    minimum = Caps(sim, "native").minimum_bytes()
    asked = Caps(sim, "native")
    for room in data.draw(st.lists(st.integers(minimum * 8 // 10, minimum * 12 // 10) | st.just(minimum))):
        assert asked.within(room) is (minimum <= room)
        assert asked.least_bytes <= minimum <= asked.most_bytes


def test_no_more_caps_are_tried_than_asked(monkeypatch):
    """A room below the least or above the most is answered without a replay."""
    sim = simulate(SMALL, RunSpec(model="x", seq_len=600, levers=RECIPES["peft"]))
    tried = []
    monkeypatch.setattr(caps, "play_run", lambda *args, **kwargs: tried.append(1) or play_run(*args, **kwargs))
    asked = Caps(sim, "native")
    assert asked.least_bytes < asked.most_bytes
    assert not asked.within(asked.least_bytes - 1) and asked.within(asked.most_bytes) and not tried
    assert asked.minimum_bytes() and tried


@pytest.mark.parametrize("levers", [Levers(), RECIPES["peft"], replace(RECIPES["peft"], upcast="none", loss="fused")])
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma-3-1b"])
def test_what_is_laid_out_is_what_an_estimate_says(name, levers):
    spec, run = model(name), RunSpec(model=name, seq_len=300, levers=levers)
    least = estimate(spec, run).peak.minimum_bytes
    laid = lay(spec, run, None)
    assert laid.bounds[0] <= least <= laid.bounds[1]
    assert laid.within(least) and not laid.within(least - 1)
    assert estimate(spec, run, laid=laid) == estimate(spec, run)
    laid.caps.minimum_bytes()
    assert laid.bounds == (least, least)
