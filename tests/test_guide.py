"""The buying guide: what is printed of a card is what a full estimate says of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from measured import model
from test_laws import runs, specs

from vramplan.core.caps import Caps
from vramplan.core.guide import choose, guide, lengths, memory_gb, offers, with_cheapest
from vramplan.core.ledger import Laid, estimate
from vramplan.core.recipes import RECIPES
from vramplan.core.room import MAX_BATCH, Quick, judge
from vramplan.core.savings import changed, savings
from vramplan.core.sizes import BEYOND_BYTES, Family, Sizes
from vramplan.core.timeline import play
from vramplan.core.types import GpuProfile, Levers, Lora, ModelSpec, Offer, RunSpec, Unplannable
from vramplan.core.units import GIB
from vramplan.sources.profiles import gpu_names, load_gpu

STORED = tuple(load_gpu(name) for name in gpu_names())
SMALL = replace(model("smollm2-135m"), num_layers=6)
NONE = "does_not_fit"


def card(gib: float, key: str = "rtx-4090") -> GpuProfile:
    return replace(load_gpu(key), key=f"{key}-{gib}", total_bytes=int(gib * GIB), usable_bytes=int(gib * GIB))


def one(spec: ModelSpec, run: RunSpec, gpu: GpuProfile, price: float | None = None) -> Offer:
    (found,) = offers(spec, run, (gpu,), {} if price is None else {gpu.key: price})
    return found


def with_levers(run: RunSpec, **changes: object) -> RunSpec:
    return replace(run, levers=replace(run.levers, **changes))


# ------------------------------------------------------------------------------------------- the exact verdict's laws
def check(spec: ModelSpec, run: RunSpec, gpu: GpuProfile, found: Offer) -> None:
    """Everything in an offer, held against full estimates."""

    def fits(variant: RunSpec) -> bool:
        return judge(estimate(spec, variant, gpu), gpu) != NONE

    chosen = replace(run, levers=found.levers)
    ledger = estimate(spec, chosen, gpu)
    assert (found.device_bytes, found.verdict) == (ledger.peak.device_bytes, judge(ledger, gpu))
    assert found.missing_bytes == max(0, found.device_bytes - gpu.usable_bytes)
    assert found.as_asked is fits(run)
    if found.as_asked:
        assert found.levers == run.levers
    elif found.verdict != NONE:
        for name in Levers.__dataclass_fields__:  # the least change: not one of them can be left as it was
            asked = getattr(run.levers, name)
            if getattr(found.levers, name) != asked and not (name == "checkpointing" and chosen_offloads(found)):
                assert not fits(with_levers(chosen, **{name: asked})), name
    batch, longest = found.max_batch_size, found.max_seq_len
    assert not batch or fits(replace(chosen, micro_batch_size=batch))
    assert batch == MAX_BATCH or not fits(replace(chosen, micro_batch_size=batch + 1))
    context = replace(run, levers=found.context_levers, micro_batch_size=1)
    assert not longest or fits(replace(context, seq_len=longest))
    longer = next((n for n in lengths(spec.max_position_embeddings) if n > longest), None)
    assert longer is None or not fits(replace(context, seq_len=longer))
    if found.fastest is not None:
        best = replace(run, levers=found.fastest.levers, micro_batch_size=found.fastest.micro_batch_size)
        assert fits(best)
        assert found.tokens_per_s == found.fastest.tokens_per_s == Quick(spec).speed(best, gpu)


def chosen_offloads(found: Offer) -> bool:
    """Offloading needs checkpoints: `checkpointing` alone cannot be taken back."""
    return found.levers.checkpoint_offload


@pytest.mark.parametrize("key", ["rtx-4060", "rtx-4090", "t4", "h100-80gb", "b200"])
@pytest.mark.parametrize(("name", "seq_len"), [("llama-3.1-8b", 2048), ("qwen2.5-0.5b", 8192), ("mixtral-8x7b", 1024)])
def test_an_offer_is_what_full_estimates_say(name, seq_len, key):
    spec, run, gpu = model(name), RunSpec(model=name, seq_len=seq_len), load_gpu(key)
    check(spec, run, gpu, one(spec, run, gpu))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.floats(0.7, 5.0),
    st.integers(1, 8),
    st.sampled_from(["none", "every-2", "all"]),
    st.sampled_from(["lean", "peft"]),
    st.sampled_from(["rtx-3090", "t4", "h200"]),
)
def test_laws_of_an_offer(gib, batch, checkpointing, recipe, key):
    run = RunSpec(model="s", seq_len=512, micro_batch_size=batch, recipe=recipe, levers=RECIPES[recipe])
    run = with_levers(run, checkpointing=checkpointing)
    gpu = card(gib, key)
    check(SMALL, run, gpu, one(SMALL, run, gpu))


def test_cards_that_are_looked_at_together_are_told_what_each_is_told_alone():
    run = with_levers(RunSpec(model="s", seq_len=1024), checkpointing="none")
    cards = [card(gib, key) for gib in (0.9, 1.5, 3, 6) for key in ("rtx-3060-12gb", "t4", "h200", "rtx-5090")]
    assert list(offers(SMALL, run, cards)) == [one(SMALL, run, gpu) for gpu in cards]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(specs(), runs(), st.integers(0, len(STORED) - 1), st.integers(0, len(STORED) - 1), st.booleans())
def test_cards_of_one_key_play_the_same(spec, run, i, j, short):
    """What `Quick` and the guide share between cards is the same for all that share it."""
    run = replace(run, seq_len=1 + run.seq_len % 64) if short else run
    quick, first, second = Quick(spec), STORED[i], STORED[j]
    assume(quick.key(run, first) == quick.key(run, second))
    one, other = play(spec, run, first), play(spec, run, second)
    assert one.info == other.info
    assert [(s.name, s.layer, s.events) for s in one.sections] == [(s.name, s.layer, s.events) for s in other.sections]


def test_experts_tell_chips_apart_that_attention_does_not():
    """Heads this wide have one kernel on old and newer cards; `_grouped_mm` has two."""
    spec = replace(model("mixtral-8x7b"), num_layers=2, head_dim=320, num_kv_heads=32)
    run, old, newer = RunSpec(model="x"), load_gpu("t4"), load_gpu("rtx-3090")
    assert play(spec, run, old).info != play(spec, run, newer).info
    assert Quick(spec).key(run, old) != Quick(spec).key(run, newer)


def test_only_few_kinds_of_chips_are_played():
    quick, run = Quick(model("llama-3.1-8b")), RunSpec(model="x")
    assert len({quick.key(run, gpu) for gpu in STORED}) == 4
    assert quick.key(run, load_gpu("rtx-5090")) == quick.key(run, load_gpu("a100-40gb"))
    stock = with_levers(replace(run, seq_len=64), kernels="stock")
    assert len({quick.key(stock, gpu) for gpu in STORED}) > 4  # bitsandbytes chooses by the chip


def test_births_are_those_of_the_steps():
    for levers in (*RECIPES.values(), Levers(checkpoint_offload=True), Levers(checkpointing="every-4")):
        unrolled = play(model("gemma-3-1b"), RunSpec(model="x", accumulation=2, levers=levers), load_gpu("h200"))
        events = [event for _, _, changes in unrolled.steps() for event, _, _ in changes if event > 0]
        assert unrolled.births() == (sum(unrolled.info[event][5] for event in events), len(events))


# ----------------------------------------------------------------------------------------------------------- changes
def test_a_single_lever_comes_before_several():
    """From roomy to tight: nothing is changed, then one lever, then more, until nothing helps."""
    run = RunSpec(model="s", seq_len=2048, recipe="peft", levers=RECIPES["peft"])
    counts = []
    for need in (8.0, 2.2, 1.6, 1.0, 0.6, 0.5):
        found = one(SMALL, run, card(need))
        changes = [name for name in Levers.__dataclass_fields__
                   if getattr(found.levers, name) != getattr(run.levers, name)]  # fmt: skip
        counts.append(len(changes) if found.verdict != NONE else 99)
    assert counts == sorted(counts)
    assert counts[0] == 0 and 1 in counts and any(1 < n < 99 for n in counts) and counts[-1] == 99


def test_what_only_offloading_made_necessary_goes_with_it():
    """A few tokens take more with their checkpoints in host memory."""
    spec = replace(model("llama-3.2-1b"), num_layers=4)
    levers = Levers(upcast="all", loss="full", optimizer="adamw_torch", attention="eager")
    run, gpu = RunSpec(model="x", seq_len=512, accumulation=2, padding=True, levers=levers), card(1.576, "h200")
    found = one(spec, run, gpu)
    assert found.verdict != NONE and found.levers.optimizer == "adamw_torch"
    check(spec, run, gpu, found)


def test_savings_leave_soft_capping_eager_and_what_is_lean_alone():
    assert savings(SMALL, Levers(checkpoint_offload=True)) == ()
    eager = Levers(attention="eager")
    assert {"attention": "sdpa"} in savings(SMALL, eager)
    assert changed(RunSpec(model="x", levers=eager), savings(model("gemma-2-2b"), eager)).levers.attention == "eager"


# ------------------------------------------------------------------------------------------------------------- sizes
@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40, unique=True), st.integers(0, 10**6), st.booleans(),
       st.integers(0, 400))  # fmt: skip
def test_the_largest_size_is_found_whatever_the_bytes_grow_like(found, budget, squared, slack):
    """Against a plain scan, with a replay that takes up to `slack` more than the tensors."""
    sizes = tuple(sorted(found))
    need = [size * size // 30 if squared else 190 * size for size in sizes]
    exact = [least + (7 * n) % (slack + 1) for n, least in enumerate(need)]
    fake = Fake(sizes, need, exact)
    gpu = replace(card(1), usable_bytes=budget, context_bytes=0)
    n = fake.largest(Family(RunSpec(model="x"), "seq_len", sizes), gpu)
    assert n == 0 or exact[n - 1] <= budget
    assert n == len(sizes) or exact[n] > budget


class Fake(Sizes):
    """Bytes by size from a table."""

    def __init__(self, sizes: tuple[int, ...], need: list[int], exact: list[int]) -> None:
        super().__init__(replace(SMALL, max_position_embeddings=10_000))
        self.need, self.exact = dict(zip(sizes, need, strict=True)), dict(zip(sizes, exact, strict=True))

    def _least(self, run: RunSpec, gpu: GpuProfile) -> int:
        return self.need[run.seq_len]

    def _fits_at(self, family: Family, n: int, gpu: GpuProfile) -> bool:
        size = family.size(n)
        self._replayed[self._key(family, gpu)] = self.need[size], Known(self.exact[size])
        return self.exact[size] <= gpu.usable_bytes


class Known(NamedTuple):
    """What a run needs, where nothing is left to be tried."""

    need: int

    @property
    def bounds(self) -> tuple[int, int]:
        return self.need, self.need


@pytest.mark.parametrize("levers", [RECIPES["peft"], Levers(allocator="native", loss="full")])
def test_caps_that_need_not_be_tried_change_no_answer(levers, monkeypatch):
    """A search goes the same way whether it knows a run's need or only between which two it is."""
    run = RunSpec(model="s", seq_len=200, levers=levers)
    cards = [card(gib, key) for gib in (0.9, 1.3, 2.2, 4, 7, 11) for key in ("rtx-3060-12gb", "t4")]
    tried: list[int] = []
    climb = Caps.climb
    monkeypatch.setattr(Caps, "climb", lambda caps: tried.append(1) or climb(caps))
    found = list(offers(SMALL, run, cards))
    some = len(tried)
    bounds = Laid.bounds.fget
    monkeypatch.setattr(Laid, "bounds", property(lambda laid: (laid.caps.minimum_bytes(), bounds(laid))[1]))
    tried.clear()
    assert list(offers(SMALL, run, cards)) == found
    assert some < len(tried)


def test_a_ledger_that_was_made_before_changes_no_offer():
    """`estimate --gpu all` makes one for its table, and the guide goes on from it."""
    for levers in (Levers(), RECIPES["peft"]):
        run = RunSpec(model="s", seq_len=1024, levers=levers)
        cards = [card(gib, key) for gib in (0.7, 1.5, 6) for key in ("rtx-4090", "t4")]
        for chip in (None, cards[1], cards[2]):
            sizes = Sizes(SMALL)
            assert sizes.estimate(run, chip) == estimate(SMALL, run, chip)
            found = list(offers(SMALL, run, cards, None, sizes))
            assert found == list(offers(SMALL, run, cards))
            ledger, again = guide(SMALL, run, cards, None, chip)
            assert (ledger, list(again)) == (estimate(SMALL, run, chip), found)
    with pytest.raises(Unplannable):
        Sizes(SMALL).estimate(RunSpec(model="s", seq_len=10**6))


def test_a_calibrated_card_is_judged_by_what_it_reserves():
    """Though it shares what was played with others of its chip."""
    run = RunSpec(model="s", seq_len=1024, levers=Levers(allocator="native"))
    plain = card(4)
    calibrated = replace(plain, key="calibrated", reserved_factor=1.3)
    sizes = Sizes(SMALL)
    reserved = [sizes._ledger(run, gpu).peak.reserved_bytes for gpu in (plain, calibrated)]
    assert reserved == [estimate(SMALL, run, gpu).peak.reserved_bytes for gpu in (plain, calibrated)]
    assert reserved[0] < reserved[1]


@pytest.mark.parametrize("limit", [100, 128, 2048, 32_768, 131_072, 1_000_000])
def test_lengths_grow_to_the_limit_in_small_steps(limit):
    found = lengths(limit)
    assert found[-1] == limit and found[0] == min(128, limit)
    for shorter, longer in pairwise((0, *found)):
        assert 0 < longer - shorter <= max(128, longer / 128)
        assert longer % 128 == 0 or longer == limit


def test_what_no_card_holds_is_not_replayed():
    sizes, run = Sizes(model("llama-2-70b")), RunSpec(model="x", seq_len=4096, micro_batch_size=512)
    assert sizes.device_bytes(run, load_gpu("t4")) > BEYOND_BYTES
    assert not sizes.fits(run, load_gpu("b200"))


# ---------------------------------------------------------------------------------------------------- speed and cost
def test_hours_and_cost_follow_from_the_speed():
    run, gpu = RunSpec(model="s", seq_len=512), card(8)
    found = one(SMALL, run, gpu, 0.5)
    assert found.tokens_per_s and found.hours_per_million_tokens
    assert found.hours_per_million_tokens * 3600 * found.tokens_per_s == pytest.approx(1e6)
    assert found.cost_per_million_tokens == pytest.approx(0.5 * found.hours_per_million_tokens)
    two = one(SMALL, replace(run, gpus=2, parallel="ddp"), gpu, 0.5)
    assert two.cost_per_million_tokens == pytest.approx(2 * 0.5 * two.hours_per_million_tokens)
    assert one(SMALL, run, gpu).cost_per_million_tokens is None


def test_unknown_rates_give_no_speed_but_everything_else():
    gpu = replace(card(8), bf16_flops_per_s=None, fp16_flops_per_s=None)
    found = one(SMALL, RunSpec(model="s", seq_len=512), gpu, 0.5)
    assert (found.fastest, found.tokens_per_s, found.hours_per_million_tokens) == (None, None, None)
    assert found.cost_per_million_tokens is None and not with_cheapest([found])[0].cheapest
    assert found.verdict == "fits" and found.max_batch_size > 1 and found.max_seq_len > 512


def test_the_fastest_is_at_least_as_fast_as_every_power_of_two_that_fits():
    spec, run = SMALL, RunSpec(model="s", seq_len=1024)
    for gib in (0.8, 1.2, 2, 12):
        gpu = card(gib)
        best = one(spec, run, gpu).tokens_per_s or 0
        for checkpointing, offload in (("none", False), ("every-4", False), ("all", False), ("all", True)):
            for micro in (1, 2, 4, 8, 16):
                levers = replace(run.levers, checkpointing=checkpointing, checkpoint_offload=offload)
                other = replace(run, micro_batch_size=micro, levers=levers)
                if judge(estimate(spec, other, gpu), gpu) != NONE:
                    assert (Quick(spec).speed(other, gpu) or 0) <= 1.03 * best


def test_the_cheapest_holds_the_run():
    fast, slow = (
        replace(one(SMALL, RunSpec(model="s"), card(4), price), gpu=f"{price}") for price in (1.0, 2.0)
    )  # fmt: skip
    assert [each.cheapest for each in with_cheapest([slow, fast])] == [False, True]
    assert [each.cheapest for each in with_cheapest([slow, replace(fast, verdict=NONE)])] == [True, False]
    assert not any(each.cheapest for each in with_cheapest([replace(fast, cost_per_million_tokens=None)]))


def test_a_run_that_cannot_be_is_refused():
    with pytest.raises(Unplannable):
        list(offers(SMALL, RunSpec(model="s", lora=Lora(targets=("nothing",))), STORED))


# ------------------------------------------------------------------------------------------------ the other way round
@pytest.mark.parametrize(
    ("key", "size"),
    [("rtx-5060", 8), ("rtx-3060-12gb", 12), ("t4", 16), ("rtx-4080", 16), ("a10", 24), ("rtx-4090", 24),
     ("rtx-5090", 32), ("a100-40gb", 40), ("a40", 48), ("rtx-6000-ada", 48), ("h100-80gb", 80), ("h100-nvl", 96),
     ("rtx-pro-6000-blackwell", 96), ("h200", 141), ("b200", 180)],
)  # fmt: skip
def test_the_class_of_a_card_is_the_memory_on_its_box(key, size):
    assert memory_gb(load_gpu(key)) == size


def test_a_card_larger_than_all_is_a_class_of_its_own():
    assert memory_gb(card(500.5)) == 501


def test_the_choice_is_the_smallest_class_that_holds_the_run():
    spec = model("llama-3.1-8b")
    run = RunSpec(model="x", seq_len=16384)
    found = choose(spec, run, STORED, {"rtx-4090": 0.35, "h100-80gb": 2.0, "rtx-4060": 0.01})
    assert found.memory_gb is not None and found.as_asked_gb is not None
    by_key = {offer.gpu: offer for offer in offers(spec, run, STORED, {"rtx-4090": 0.35, "h100-80gb": 2.0})}
    holding = [offer for offer in by_key.values() if offer.verdict != NONE]
    assert found.memory_gb == min(offer.memory_gb for offer in holding)
    assert found.as_asked_gb == min(offer.memory_gb for offer in holding if offer.as_asked) > found.memory_gb
    assert found.offers == tuple(offer for offer in by_key.values() if offer.memory_gb == found.memory_gb)
    below = [offer for offer in by_key.values() if offer.memory_gb == 8]
    assert found.smaller is not None and found.smaller.gpu in {offer.gpu for offer in below}
    assert found.smaller.missing_bytes == min(offer.missing_bytes for offer in below) > 0
    assert [offer.gpu for offer in found.priced] == ["h100-80gb", "rtx-4090"]  # the RTX 4060 does not hold it
    assert [offer.cheapest for offer in found.priced] == [True, False]


def test_nothing_smaller_and_nothing_large_enough():
    cards = (card(2), card(4))
    assert choose(SMALL, RunSpec(model="s"), cards).smaller is None
    none = choose(model("llama-3.1-70b"), RunSpec(model="x"), cards)
    assert (none.memory_gb, none.as_asked_gb, none.offers) == (None, None, ())
    assert none.smaller is not None and none.smaller.gpu == cards[1].key
    need = estimate(model("llama-3.1-70b"), replace(RunSpec(model="x"), levers=none.smaller.levers), cards[1])
    assert none.smaller.missing_bytes == need.peak.device_bytes - cards[1].usable_bytes


def test_more_memory_never_does_less():
    found = list(offers(SMALL, RunSpec(model="s", seq_len=1024), [card(gib) for gib in (1, 1.5, 2, 4, 8)]))
    for less, more in combinations(found, 2):
        assert less.max_batch_size <= more.max_batch_size
        assert less.max_seq_len <= more.max_seq_len
        assert (less.tokens_per_s or 0) <= (more.tokens_per_s or 0)
