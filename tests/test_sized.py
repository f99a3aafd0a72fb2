"""A step that was played at one size, in others: what playing them gives, or nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from measured import model
from test_laws import runs, specs

from vramplan.core.recipes import RECIPES
from vramplan.core.room import Quick
from vramplan.core.sized import Sized, kind
from vramplan.core.timeline import play
from vramplan.core.types import Levers, RunSpec
from vramplan.core.unroll import Unrolled
from vramplan.sources.profiles import gpu_names, load_gpu

STORED = tuple(load_gpu(name) for name in gpu_names())
law = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def same(one: Unrolled, other: Unrolled) -> None:
    assert one.info == other.info and one.sizes == other.sizes
    assert [section[:] for section in one.sections] == [section[:] for section in other.sections]
    assert (one.highest(), one.births()) == (other.highest(), other.births())
    assert [totals[:] for totals in one.totals.values()] == [totals[:] for totals in other.totals.values()]
    assert [changes for _, _, changes in one.steps()] == [changes for _, _, changes in other.steps()]


@law
@given(specs(), runs(), st.integers(1, 5), st.integers(1, 2100), st.integers(0, len(STORED) - 1), st.data())
def test_another_size_is_what_playing_it_gives(spec, run, batch, seq, i, data):
    """Also on another chip, where the kind is the same."""
    gpu, other = STORED[i], replace(run, micro_batch_size=batch, seq_len=seq)
    alike = [card for card in STORED if kind(spec, other, card) == kind(spec, run, gpu)]
    assume(alike)
    chip = data.draw(st.sampled_from(alike))
    played = Sized(spec, run, gpu)
    same(played.played, play(spec, run, gpu))
    found = played.at(other, chip)
    if found is not None:
        same(found, play(spec, other, chip))
    same(played.played, play(spec, run, gpu))  # which was not touched


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-3-4b", "mixtral-8x7b"])
def test_few_plays_are_enough(name, recipe):
    """Micro-batches above 1, and lengths above a window, differ in nothing but their size."""
    spec, gpu = model(name), load_gpu("rtx-4090")
    run = RunSpec(model=name, micro_batch_size=2, levers=RECIPES[recipe])
    played = Sized(spec, run, gpu)
    assert all(played.at(replace(run, micro_batch_size=n), gpu) for n in (3, 8, 100))
    assert all(played.at(replace(run, seq_len=n), gpu) for n in (1664, 8192, 30_000))
    assert played.at(replace(run, micro_batch_size=2, seq_len=2), gpu) is None


def test_what_changes_no_tensor_is_no_other_kind():
    spec, gpu = model("llama-3.2-1b"), load_gpu("rtx-4090")
    run = RunSpec(model="x", levers=RECIPES["peft"])

    def kinds(**levers: object) -> tuple[object, ...]:
        return kind(spec, replace(run, levers=replace(run.levers, **levers)), gpu)

    assert kinds() == kinds(allocator="expandable") == kinds(optimizer="lion_8bit") == kinds(kernels="fused")
    others = [kinds(optimizer="adafactor"), kinds(upcast="none"), kinds(upcast="none", kernels="fused")]
    assert len({kinds(), *others}) == 4


def test_quick_plays_a_kind_once():
    quick, run = Quick(model("llama-3.1-8b")), RunSpec(model="x", micro_batch_size=2)
    for gpu in STORED:
        for batch in (2, 3, 8):
            quick.unrolled(replace(run, micro_batch_size=batch), gpu)
    played = [len(each) for each in quick.sized.values()]
    assert len(played) == 3 and set(played) == {1}  # of four kinds of chips two differ in the workspace alone
    lean = replace(run, levers=Levers(checkpoint_offload=True))
    assert quick.unrolled(lean, STORED[0]) is quick.unrolled(lean, STORED[0])
