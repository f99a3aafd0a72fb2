"""Several cards in the arithmetic: what one of them holds, over random architectures and levers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured import h200, model
from test_laws import cards, held, law, runs, specs, with_lever

from vramplan.core import resident
from vramplan.core.capacity import capacity
from vramplan.core.fixes import command
from vramplan.core.gathering import KEY
from vramplan.core.ledger import NO_CARD, estimate, simulate
from vramplan.core.parallel import BUCKET_BYTES, largest_bucket, layer_matrices, nccl_bytes, shard_rows
from vramplan.core.room import Quick, judge
from vramplan.core.sizes import Sizes
from vramplan.core.speed import link_seconds, tokens_per_s
from vramplan.core.timeline import play
from vramplan.core.types import Ledger, RunSpec, Unplannable
from vramplan.core.units import MIB
from vramplan.sources.profiles import load_gpu

several = st.integers(2, 9)


def spread(run: RunSpec, gpus: int, parallel: str) -> RunSpec:
    return replace(run, gpus=gpus, parallel=parallel)


def sizes(ledger: Ledger) -> dict[str, int]:
    return {line.key: line.bytes for line in ledger.lines}


# -------------------------------------------------------------------------------------------------------- one card
@law
@given(specs(), runs(), cards, st.sampled_from(["ddp", "fsdp"]))
def test_one_card_of_one_is_one_card(spec, run, gpu, parallel):
    one = estimate(spec, spread(run, 1, parallel), gpu)
    assert replace(one, run=run) == estimate(spec, run, gpu)


# ---------------------------------------------------------------------------------------------------- the ledger
@law
@given(specs(), runs(), cards, several, st.sampled_from(["ddp", "fsdp"]))
def test_rows_of_one_card_add_up(spec, run, gpu, gpus, parallel):
    run = spread(run, gpus, parallel)
    ledger = estimate(spec, run, gpu)
    top = ledger.peak
    outside = gpu.context_bytes + nccl_bytes(run, gpu)
    assert sum(line.bytes for line in ledger.lines) == top.device_bytes == top.minimum_bytes + outside
    assert sum(line.bytes for line in ledger.lines if line.basis == "exact") == top.allocated_bytes
    assert held(ledger) <= top.allocated_bytes <= top.minimum_bytes <= top.reserved_bytes
    assert len({line.key for line in ledger.lines}) == len(ledger.lines)


@law
@given(specs(), runs(), cards, several, st.sampled_from(["ddp", "fsdp"]))
def test_the_peak_is_the_sum_of_what_lives_at_its_moment(spec, run, gpu, gpus, parallel):
    run = spread(with_lever(run, allocator="expandable"), gpus, parallel)
    sim = simulate(spec, run, gpu)
    still = sim.resident.with_lora_bytes + sim.optimizer_bytes + sim.workspace_bytes
    assert sim.allocated_bytes == still + sim.unrolled.peak_bytes()
    weights = resident.weights(spec, run.double_quant, run.levers.upcast, gpus if parallel == "fsdp" else 1)
    assert sim.resident.with_lora_bytes == weights.total_bytes + resident.lora_bytes(spec, run)


@law
@given(specs(), runs(), cards, several)
def test_ddp_adds_its_bucket_and_nothing_else(spec, run, gpu, gpus):
    """Every tensor of the step is that of one card; the bucket of gradients lives when the graph is gone."""
    one, ddp = estimate(spec, run, gpu), estimate(spec, spread(run, gpus, "ddp"), gpu)
    if ddp.peak.phase != "optimizer":
        assert held(ddp) == held(one)
    assert held(one) <= held(ddp) <= held(one) + BUCKET_BYTES
    assert ddp.resident == one.resident


@law
@given(specs(layers=2), runs(), cards, several)
def test_sharding_takes_from_the_weights_and_adds_what_is_gathered(spec, run, gpu, gpus):
    """With everything that is gathered at the peak taken off, one card of several never holds more than one alone."""
    run = with_lever(run, allocator="expandable", kernels="stock")  # sharded layers are not fused
    one, part = estimate(spec, run, gpu), estimate(spec, spread(run, gpus, "fsdp"), gpu)
    gathered = sizes(part).get(KEY, 0)
    padding = 512 * spec.num_layers * 12 + 2 * gpus * 512  # a part is rounded up too
    assert held(part) - gathered <= held(one) + BUCKET_BYTES + padding
    flat = gpus * sum(m.shard_bytes(gpus) for m in layer_matrices(spec, run.levers.upcast))
    vocabulary = 4 * gpus * shard_rows(spec.vocab_size, gpus) * spec.hidden_size
    assert gathered <= max(3 * flat, flat + vocabulary) + 512 * 20
    for key in ("weights.nf4", "weights.plain"):
        assert sizes(part).get(key, 0) <= sizes(one).get(key, 0) / gpus + padding + spec.hidden_size * 4 * 512
    if spec.num_experts:  # shared out whole
        share = shard_rows(spec.num_experts, gpus) / spec.num_experts
        assert sizes(part)["weights.experts"] <= share * sizes(one)["weights.experts"] + padding


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-70b", "qwen2.5-32b", "mixtral-8x7b"])
def test_where_weights_dominate_each_card_more_makes_the_rest_smaller(name):
    spec, run = model(name), RunSpec(model=name, seq_len=512)
    peaks = [estimate(spec, run).peak.device_bytes]
    peaks += [estimate(spec, spread(run, gpus, "fsdp")).peak.device_bytes for gpus in (2, 4, 8)]
    assert peaks == sorted(peaks, reverse=True)
    ddp = estimate(spec, spread(run, 2, "ddp")).peak.device_bytes
    assert peaks[1] < 0.75 * ddp
    assert ddp >= peaks[0]


def test_a_model_too_large_for_one_card_fits_on_two():
    spec, card = model("llama-3.1-70b"), load_gpu("a100-40gb")
    run = RunSpec(model=spec.name, micro_batch_size=1, seq_len=2048)
    assert judge(estimate(spec, run, card), card) == "does_not_fit"
    assert judge(estimate(spec, spread(run, 2, "ddp"), card), card) == "does_not_fit"
    verdict = capacity(Sizes(spec), spread(run, 2, "fsdp"), card)
    assert verdict.verdict != "does_not_fit" and verdict.max_batch_size >= 2


def test_what_is_gathered_when():
    """Llama-2-7B on two cards: a layer's packed weights are 96.5 MiB, the head 250 MiB."""
    spec = model("llama-2-7b")
    run = spread(RunSpec(model=spec.name), 2, "fsdp")
    unrolled = play(spec, run, NO_CARD)
    layer = 2 * sum(m.shard_bytes(2) for m in layer_matrices(spec, "none"))
    head = 2 * spec.vocab_size * spec.hidden_size
    assert layer == (4 * 4096 * 4096 + 3 * 4096 * 11008) // 2
    now, most = 0, {}
    for section, _, changes in unrolled.steps():
        for event, _, _ in changes:
            key, *_, size = unrolled.info[abs(event)]
            if key == KEY:
                now += size if event > 0 else -size
            most[section.phase, section.layer < 0] = max(most.get((section.phase, section.layer < 0), 0), now)
    assert now == 0
    assert most["forward", False] == 3 * layer  # one layer, the flat buffer it came in, and that of the one before
    assert most["backward", False] == 2 * layer
    assert most["forward", True] == head


# ------------------------------------------------------------------------------------------- buckets, speed, words
@given(st.lists(st.integers(512, 40 * MIB), max_size=60))
def test_the_largest_bucket(gradients):
    bucket = largest_bucket(gradients)
    assert bucket <= BUCKET_BYTES
    assert bucket >= max((size for size in gradients if size < BUCKET_BYTES), default=0)
    assert bucket <= sum(size for size in gradients if size < BUCKET_BYTES)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_cards_together_are_faster_but_not_more_than_as_many(parallel):
    spec, card = model("llama-3.1-8b"), load_gpu("rtx-4090")
    run = RunSpec(model=spec.name, micro_batch_size=4)
    variants = [run, *(spread(run, n, parallel) for n in (2, 4))]
    speeds = [tokens_per_s(spec, each, card, play(spec, each, card)) for each in variants]
    assert speeds[0] < speeds[1] < speeds[2]
    assert speeds[1] <= 2 * speeds[0] and speeds[2] <= 4 * speeds[0]
    gathering, summing = link_seconds(spec, spread(run, 2, parallel), card)
    assert (gathering > 0) == (parallel == "fsdp") and summing > 0


def test_the_quick_search_knows_cards_apart():
    spec, card = model("llama-3.1-8b"), load_gpu("rtx-4090")
    quick = Quick(spec)
    runs_of = [RunSpec(model=spec.name)] + [
        spread(RunSpec(model=spec.name), n, p) for n in (2, 4) for p in ("ddp", "fsdp")
    ]
    found = [quick.bytes(run, card) for run in runs_of]
    assert found == [Quick(spec).bytes(run, card) for run in runs_of]
    one, ddp2, fsdp2, ddp4, fsdp4 = found
    assert fsdp4 < fsdp2 < one <= ddp2 == ddp4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpus": 0}, "number of GPUs must be at least 1"),
        ({"gpus": 2}, "2 GPUs need a way to train together"),
        ({"gpus": 2, "parallel": "pipeline"}, "'pipeline'"),
    ],
)
def test_what_does_not_exist_is_refused(changes, said):
    with pytest.raises(Unplannable, match=said):
        estimate(model("llama-2-7b"), replace(RunSpec(model="x"), **changes), h200())


def test_a_fix_keeps_the_cards():
    assert "--gpus 2 --parallel fsdp" in command(spread(RunSpec(model="m"), 2, "fsdp"))
    assert "--gpus" not in command(RunSpec(model="m"))
