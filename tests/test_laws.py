"""Laws of a prediction, over random architectures of every family and random levers.

What is monotone is the sum of the tensors, `held`: the allocated peak without the tails of blocks that are too small to
split. Reserved bytes, and with them the smallest cap, are not: a caching allocator may reserve less for more
(`test_more_may_reserve_less`). They lie between the allocated peak and one another, so the tensors of a smaller run
bound all four numbers of a larger one from below.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measured import h200, model
from test_timeline import of_family

from vramplan.core import resident
from vramplan.core.allocator import LARGE_BLOCK, MASK, OutOfMemory, block_bytes
from vramplan.core.blocks import PLAYED
from vramplan.core.expandable import allocator
from vramplan.core.ledger import NO_CARD, estimate, simulate
from vramplan.core.loss import chunk_tokens
from vramplan.core.replay import play_run
from vramplan.core.timeline import play
from vramplan.core.types import (
    ALLOCATORS,
    KERNELS,
    LOSSES,
    OPTIMIZERS,
    UPCASTS,
    GpuProfile,
    Ledger,
    Levers,
    Lora,
    ModelSpec,
    RunSpec,
)
from vramplan.core.units import MIB

CHECKPOINTINGS = ("none", "all", "every-2", "every-3")
law = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
base_of = cache(of_family)


# --------------------------------------------------------------------------------------------------- random cases
@st.composite
def specs(draw: st.DrawFn, layers: int = 1) -> ModelSpec:
    """A small model of any family, with widths of its own."""
    base = base_of(draw(st.sampled_from(sorted(PLAYED))))
    heads = draw(st.sampled_from([2, 4, 8, 12]))
    key_heads = draw(st.sampled_from([k for k in (1, 2, 4, 8, 12) if heads % k == 0]))
    if base.model_type in ("gpt_neox", "phi"):  # no grouped queries
        key_heads = heads
    if base.model_type == "falcon":
        key_heads = draw(st.sampled_from([1, heads]))
    changes = {"num_experts": 8, "num_experts_per_token": 2, "moe_intermediate_size": 256} if base.num_experts else {}
    return replace(
        base,
        num_layers=draw(st.integers(layers, 6)),
        hidden_size=64 * draw(st.integers(1, 32)),
        num_heads=heads,
        num_kv_heads=key_heads,
        head_dim=draw(st.sampled_from([32, 64, 96, 128, 256])),
        intermediate_size=64 * draw(st.integers(1, 64)),
        vocab_size=draw(st.sampled_from([256, 1000, 32000, 128256])),
        max_position_embeddings=1 << 20,
        **changes,
    )


@st.composite
def runs(draw: st.DrawFn, shortest: int = 1) -> RunSpec:
    return RunSpec(
        model="x",
        micro_batch_size=draw(st.integers(1, 4)),
        seq_len=draw(st.integers(shortest, 1500)),
        accumulation=draw(st.integers(1, 2)),
        double_quant=draw(st.booleans()),
        driver=draw(st.sampled_from(["trainer", "loop"])),
        padding=draw(st.booleans()),
        lora=Lora(r=draw(st.sampled_from([1, 4, 8, 16, 64])), dropout=draw(st.sampled_from([0.0, 0.1]))),
        levers=Levers(
            upcast=draw(st.sampled_from(UPCASTS)),
            loss=draw(st.sampled_from(LOSSES)),
            checkpointing=draw(st.sampled_from(CHECKPOINTINGS)),
            checkpoint_offload=draw(st.booleans()),
            optimizer=draw(st.sampled_from(OPTIMIZERS)),
            attention=draw(st.sampled_from(["sdpa", "eager"])),
            allocator=draw(st.sampled_from(ALLOCATORS)),
            kernels=draw(st.sampled_from(KERNELS)),
        ),
    )


cards = st.sampled_from([NO_CARD, h200()])


def tails(ledger: Ledger) -> int:
    return sum(line.bytes for line in ledger.lines if line.key == "overhead.rounding")


def held(ledger: Ledger) -> int:
    """Bytes of the tensors at the highest point."""
    return ledger.peak.allocated_bytes - tails(ledger)


def grown(spec: ModelSpec, run: RunSpec, what: str, by: int) -> tuple[ModelSpec, RunSpec]:
    if what == "layers":
        return replace(spec, num_layers=spec.num_layers + by), run
    if what == "batch":
        return spec, replace(run, micro_batch_size=run.micro_batch_size + by)
    if what == "sequence":
        return spec, replace(run, seq_len=run.seq_len + by)
    return spec, replace(run, lora=replace(run.lora, r=run.lora.r + by))


def with_lever(run: RunSpec, **changes: object) -> RunSpec:
    return replace(run, levers=replace(run.levers, **changes))


# --------------------------------------------------------------------------------------------------- more is more
@pytest.mark.parametrize("what", ["batch", "sequence", "rank", "layers"])
@law
@given(data=st.data())
def test_more_never_takes_fewer_bytes_of_tensors(what, data):
    spec, run, gpu = data.draw(specs()), data.draw(runs()), data.draw(cards)
    by = data.draw(st.sampled_from([1, 2, 64] if what in ("sequence", "rank") else [1, 2]))
    larger = grown(spec, run, what, by)
    before, after = estimate(spec, run, gpu), estimate(*larger, gpu)
    less = 0
    if what == "rank":  # of larger tensors the optimizer may keep less on the card: test_a_higher_rank_may_save
        less = min(0, on_card(*larger) - on_card(spec, run))
    assert held(after) >= held(before) + less
    assert after.trainable_parameters >= before.trainable_parameters
    floor = held(before) + less
    for size in (after.peak.allocated_bytes, after.peak.minimum_bytes, after.peak.reserved_bytes):
        assert size >= floor
    assert after.peak.device_bytes >= floor + gpu.context_bytes
    if run.levers.allocator == "expandable":  # no tails: the allocated peak itself is monotone
        assert after.peak.allocated_bytes >= before.peak.allocated_bytes + less


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_tensors_without_elements_take_nothing(allocator):
    """One token has no next one: no row is labelled, and what is kept of the labelled rows is empty."""
    run = RunSpec(model="x", seq_len=1, levers=Levers(allocator=allocator))
    one, two = (estimate(model("smollm2-135m"), replace(run, seq_len=n)).peak for n in (1, 2))
    assert 0 < one.allocated_bytes <= two.allocated_bytes <= one.allocated_bytes + MIB


def on_card(spec: ModelSpec, run: RunSpec) -> int:
    """Bytes of the optimizer's state on the card."""
    return resident.optimizer_bytes(spec, run)[0]


@pytest.mark.parametrize(
    ("optimizer", "low", "high"),
    [("paged_adamw_32bit", 97, 98), ("adamw_8bit", 3, 4)],  # 100,000 elements are paged, 4,096 kept in 8 bits
)
def test_a_higher_rank_may_save_optimizer_state(optimizer, low, high):
    """bitsandbytes pages, and keeps in 8 bits, only tensors above a size: a rank above it takes less of the card."""
    spec = replace(model("llama-3.2-1b"), hidden_size=1024, num_heads=8, num_kv_heads=8, head_dim=128, num_layers=2)
    levers = Levers(optimizer=optimizer, kernels="stock")
    states = [
        on_card(spec, RunSpec(model="x", lora=Lora(r=r, targets=("q_proj",)), levers=levers)) for r in (low, high)
    ]
    assert states[1] < states[0]


def test_more_may_reserve_less():
    """Below 10 MiB a segment has 20 MiB, from there on what is asked for."""
    reserved = []
    for size in (10 * MIB - 512, 10 * MIB):
        memory = allocator("native")
        memory.malloc(size)
        reserved.append(memory.reserved)
    assert reserved == [20 * MIB, 10 * MIB]


# --------------------------------------------------------------------------------------------------------- levers
@law
@given(specs(layers=2), runs(shortest=256), cards)
def test_checkpointing_never_costs_at_the_peak(spec, run, gpu):
    """From two layers and 256 tokens on: see test_where_checkpointing_costs."""
    peaks = {c: peak(spec, with_lever(run, checkpointing=c, checkpoint_offload=False), gpu) for c in CHECKPOINTINGS}
    offloaded = peak(spec, with_lever(run, checkpointing="all", checkpoint_offload=True), gpu)
    for some in ("all", "every-2", "every-3"):
        assert peaks[some] <= peaks["none"], (some, peaks)
    if spec.num_layers > 2:  # of two layers, the one that is not checkpointed is the one that would be played again
        assert peaks["all"] <= min(peaks["every-2"], peaks["every-3"]), peaks
    back = 4 * run.micro_batch_size * run.seq_len * spec.hidden_size + 511  # of the first layer, beside the embeddings
    assert offloaded <= peaks["all"] + back, (offloaded, peaks)


def peak(spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> int:
    return play(spec, run, gpu).peak_bytes()


@pytest.mark.parametrize(("layers", "tokens"), [(1, 2048), (6, 2)])
def test_where_checkpointing_costs(layers, tokens):
    """One layer is wholly played again beside its input; and in transformers its input must have a gradient, for which
    the first layer dequantises weights that it need not otherwise, more than a few tokens' activations take."""
    spec = replace(model("llama-3.2-1b"), num_layers=layers)
    run = RunSpec(model="x", seq_len=tokens, levers=Levers(kernels="stock"))
    none, every = (peak(spec, with_lever(run, checkpointing=c), NO_CARD) for c in ("none", "all"))
    assert every > none


@law
@given(specs(), runs(shortest=64), cards, st.booleans())
def test_the_fused_loss_never_costs_at_the_peak(spec, run, gpu, tiny):
    """Up to the two int64 vectors that say which rows carry a loss.

    A vocabulary below the hidden size can cost at most one copy of the hidden states: the gradient is made in the
    forward, and logits that small were cheaper to keep.

    Padding is left out: with it the full loss has attention take a mask, and so another kernel.
    """
    spec, run = replace(spec, vocab_size=8) if tiny else spec, replace(run, padding=False)
    fused, full = (peak(spec, with_lever(run, loss=loss), gpu) for loss in ("fused", "full"))
    tokens = run.micro_batch_size * run.seq_len
    copy = 0 if spec.vocab_size >= spec.hidden_size else 4 * tokens * spec.hidden_size
    assert fused <= full + copy + 2 * (8 * tokens + 512) + 4096


@given(st.integers(1, 70_000), st.integers(64, 8192), st.integers(64, 300_000))
def test_chunks_of_the_fused_loss_are_about_as_large_as_the_hidden_states(tokens, hidden, vocab):
    """Rounding up to a power of two at most doubles them; more tokens never make them smaller."""
    chunk = chunk_tokens(tokens, hidden, vocab)
    assert 1 <= chunk <= tokens
    assert chunk <= chunk_tokens(tokens + 1, hidden, vocab)
    if vocab >= hidden:
        assert chunk * vocab < 2 * (tokens * hidden + vocab)


# ---------------------------------------------------------------------------------------------------- the ledger
@law
@given(specs(), runs(), cards)
def test_rows_add_up(spec, run, gpu):
    ledger = estimate(spec, run, gpu)
    top = ledger.peak
    assert sum(line.bytes for line in ledger.lines) == top.device_bytes == top.minimum_bytes + gpu.context_bytes
    assert sum(line.bytes for line in ledger.lines if line.basis == "exact") == top.allocated_bytes
    assert held(ledger) <= top.allocated_bytes <= top.minimum_bytes <= top.reserved_bytes
    assert top.allocated_bytes == max(p.peak_bytes for p in ledger.phases if p.name != "load")
    assert all(line.bytes > 0 for line in ledger.lines if line.basis == "exact")
    assert len({line.key for line in ledger.lines}) == len(ledger.lines)
    if run.levers.allocator == "expandable":
        assert tails(ledger) == 0


@law
@given(specs(), runs(), cards)
def test_the_peak_is_the_sum_of_what_lives_at_its_moment(spec, run, gpu):
    """Two ways to one number: the highest point of the played step on top of what is resident, and the allocator's."""
    sim = simulate(spec, with_lever(run, allocator="expandable"), gpu)
    still = sim.resident.with_lora_bytes + sim.optimizer_bytes + sim.workspace_bytes
    assert sim.allocated_bytes == still + sim.unrolled.peak_bytes()


# ------------------------------------------------------------------------------------------------- the allocator
scripts = st.lists(
    st.tuples(
        st.sampled_from(["malloc", "malloc", "free", "empty"]),
        st.one_of(st.integers(0, MIB), st.integers(1, 60 * MIB), st.sampled_from([10 * MIB, 11 * MIB, 20 * MIB])),
        st.integers(0, 10**6),
    ),
    max_size=120,
)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(ALLOCATORS), st.sampled_from([None, 60 * MIB, 200 * MIB]), scripts)
def test_allocator(kind, cap_bytes, script):
    """Blocks never overlap, are as large as asked, and are counted; the cap holds; everything can be given back."""
    memory = allocator(kind, cap_bytes)
    held_blocks: list[int] = []
    for what, size, pick in script:
        if what == "malloc":
            before = (memory.allocated, memory.reserved)
            try:
                held_blocks.append(memory.malloc(size))
                assert block_bytes(held_blocks[-1]) >= size
            except OutOfMemory as error:
                assert cap_bytes is not None and error.needed_bytes > cap_bytes
                assert memory.allocated == before[0] and memory.reserved <= before[1]
        elif what == "free" and held_blocks:
            memory.free(held_blocks.pop(pick % len(held_blocks)))
        else:
            memory.empty_cache()
        spans = sorted((b >= LARGE_BLOCK, b & MASK, (b & MASK) + block_bytes(b) // 512) for b in held_blocks)
        assert all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(spans)), "blocks overlap"
        assert memory.allocated == sum(map(block_bytes, held_blocks)) <= memory.pinned_now() <= memory.reserved
        assert memory.reserved <= memory.peak_reserved and memory.allocated <= memory.peak_allocated
        # torch holds the native segment's size against the cap, and then maps whole pages of 20 MiB
        page_bytes = 20 * MIB if kind == "expandable" else 0
        assert cap_bytes is None or memory.peak_reserved < cap_bytes + page_bytes + 1
    for block in held_blocks:
        memory.free(block)
    memory.empty_cache()
    assert (memory.allocated, memory.reserved) == (0, 0)


@law
@given(specs(), runs(), cards)
def test_a_run_gives_back_all_but_workspaces_and_state(spec, run, gpu):
    sim = simulate(spec, with_lever(run, allocator="expandable"), gpu)
    memory = sim.before_step.clone()
    played = play_run(sim.unrolled, memory, sim.states)
    assert memory.allocated == sim.before_step.allocated + sum(sim.states) + sim.workspace_bytes
    assert played.reserved_bytes >= max(played.allocated.values())
