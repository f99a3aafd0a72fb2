"""How much a card holds: what is named fits, and one more does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measured import model

from vramplan.core.capacity import SEQ_LEN_STEP, capacity
from vramplan.core.ledger import estimate
from vramplan.core.recipes import RECIPES
from vramplan.core.room import MAX_BATCH, judge
from vramplan.core.sizes import Sizes
from vramplan.core.types import GpuProfile, GpuVerdict, ModelSpec, RunSpec
from vramplan.core.units import GIB
from vramplan.sources.profiles import load_gpu

SMALL = replace(model("smollm2-135m"), num_layers=6)


def card(gib: float, key: str = "rtx-4090") -> GpuProfile:
    return replace(load_gpu(key), key=f"{key}-{gib}", total_bytes=int(gib * GIB), usable_bytes=int(gib * GIB))


def asked(name: str, recipe: str, **changes: object) -> RunSpec:
    return replace(RunSpec(model=name, recipe=recipe, levers=RECIPES[recipe]), **changes)


def check(spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> GpuVerdict:
    """What `capacity` says, held against full estimates."""
    found = capacity(Sizes(spec), run, gpu)

    def fits(**changes: int) -> bool:
        return judge(estimate(spec, replace(run, **changes), gpu), gpu) != "does_not_fit"

    assert found.verdict == judge(estimate(spec, run, gpu), gpu)
    batch, longest, most = found.max_batch_size, found.max_seq_len, spec.max_position_embeddings
    assert not batch or fits(micro_batch_size=batch)
    assert batch == MAX_BATCH or not fits(micro_batch_size=batch + 1)
    assert not longest or fits(seq_len=longest)
    assert longest in (0, most) or longest % SEQ_LEN_STEP == 0
    assert longest == most or not fits(seq_len=min(longest + SEQ_LEN_STEP, most))
    return found


@pytest.mark.parametrize("key", ["rtx-3060-12gb", "t4", "rtx-4090", "h200"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-2-9b", "qwen2.5-0.5b", "mixtral-8x7b", "llama-3.1-8b peft"])
def test_what_is_named_fits_and_one_more_does_not(name, key):
    name, _, recipe = name.partition(" ")
    check(model(name), asked(name, recipe or "lean"), load_gpu(key))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.floats(0.3, 6.0), st.integers(1, 4), st.integers(1, 2000), st.integers(100, 60_000),
       st.sampled_from(["lean", "peft"]), st.sampled_from(["rtx-3090", "t4", "h200"]))  # fmt: skip
def test_it_is_so_for_any_size_of_card_and_any_limit_of_the_model(gib, micro, seq_len, most, recipe, key):
    spec = replace(SMALL, max_position_embeddings=most)
    run = asked("s", recipe, micro_batch_size=micro, seq_len=min(seq_len, most))
    check(spec, run, card(gib, key))


def test_a_model_may_end_between_two_steps():
    spec = replace(SMALL, max_position_embeddings=1000)
    assert check(spec, asked("s", "lean", seq_len=64), card(8)).max_seq_len == 1000
    spec = replace(SMALL, max_position_embeddings=100)
    assert check(spec, asked("s", "lean", seq_len=64), card(8)).max_seq_len == 100


def test_nothing_fits_where_the_weights_do_not():
    found = check(model("llama-3.1-8b"), asked("llama-3.1-8b", "lean"), card(4))
    assert (found.verdict, found.max_batch_size, found.max_seq_len) == ("does_not_fit", 0, 0)


def test_cards_that_are_asked_together_are_told_what_each_is_told_alone():
    spec, run = SMALL, asked("s", "lean", seq_len=1024)
    cards = [card(gib, key) for gib in (0.5, 1, 3) for key in ("rtx-3060-12gb", "t4", "h200")]
    shared = Sizes(spec)
    assert [capacity(shared, run, gpu) for gpu in cards] == [capacity(Sizes(spec), run, gpu) for gpu in cards]


def test_more_card_never_means_a_smaller_plan():
    shared, run = Sizes(model("llama-3.1-8b")), RunSpec(model="llama-3.1-8b", seq_len=2048)
    sizes = [capacity(shared, run, card(g)).max_batch_size for g in (8, 12, 24, 48)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
