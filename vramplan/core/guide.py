"""The buying guide: what each of many cards can do for a run, how fast, and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache

from .plan import CHECKPOINTING
from .room import MAX_BATCH
from .savings import changed, least_change, savings
from .sizes import Family, Sizes
from .types import Candidate, Choice, GpuProfile, Ledger, Levers, ModelSpec, Offer, RunSpec
from .units import GIB

MEMORY_CLASSES_GB = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 180, 192, 288)
SEQ_LEN_STEP = 128
GAIN = 1.01  # what twice the micro-batch must bring to be worth looking at


def memory_gb(gpu: GpuProfile) -> int:
    """The class of a card by the memory on its box: the driver shows up to a sixteenth less, more with ECC."""
    gib = -(-gpu.total_bytes // GIB)
    return next((size for size in MEMORY_CLASSES_GB if size >= gib), gib)


@cache
def lengths(limit: int) -> tuple[int, ...]:
    """Sequence lengths up to a model's limit: in steps of 128 tokens, above 32,768 of at most a 128th."""
    out, length = [], 0
    while length < limit:
        length = min(length + max(SEQ_LEN_STEP, 1 << length.bit_length() >> 8), limit)
        out.append(length)
    return tuple(out)


# -------------------------------------------------------------------------------------------------------- one card
def offers(
    model: ModelSpec,
    run: RunSpec,
    cards: Iterable[GpuProfile],
    prices: Mapping[str, float] | None = None,
    sizes: Sizes | None = None,
) -> Iterator[Offer]:
    """What each card can do for the run, in the order of `cards`; `prices` per hour by a card's key. `sizes` may know
    some of it already.

    Raises Unplannable.
    """
    sizes = sizes or Sizes(model)
    for card in cards:
        yield offer(sizes, run, card, (prices or {}).get(card.key))


def guide(
    model: ModelSpec,
    run: RunSpec,
    cards: Iterable[GpuProfile],
    prices: Mapping[str, float] | None = None,
    chip: GpuProfile | None = None,
) -> tuple[Ledger, Iterator[Offer]]:
    """The run's ledger, as `ledger.estimate` has it on `chip`, and the offers: what one played serves the others.

    Raises Unplannable.
    """
    sizes = Sizes(model)
    return sizes.estimate(run, chip), offers(model, run, cards, prices, sizes)


def offer(sizes: Sizes, run: RunSpec, gpu: GpuProfile, price_per_hour: float | None = None) -> Offer:
    """What one card can do for the run."""
    found = fitting(sizes, run, gpu)
    best = fastest(sizes, run, gpu)
    speed = best.tokens_per_s if best else None
    hours = 1e6 / speed / 3600 if speed else None
    batches = Family(replace(run, levers=found.levers), "micro_batch_size", range(1, MAX_BATCH + 1))
    return replace(
        found,
        max_batch_size=sizes.largest(batches, gpu),
        max_seq_len=longest(sizes, run, gpu),
        fastest=best,
        tokens_per_s=speed,
        hours_per_million_tokens=hours,
        price_per_hour=price_per_hour,
        cost_per_million_tokens=None if hours is None or price_per_hour is None else hours * price_per_hour * run.gpus,
    )


def fits(found: Offer) -> bool:
    return found.verdict != "does_not_fit"


def fitting(sizes: Sizes, run: RunSpec, gpu: GpuProfile) -> Offer:
    """Whether, and with which levers, the card holds the run; what it can do at most is left out."""
    chosen = least_change(sizes, run, gpu)
    need, verdict = sizes.device_bytes(chosen, gpu), sizes.verdict(chosen, gpu)
    return Offer(
        gpu=gpu.key,
        memory_gb=memory_gb(gpu),
        compute_capability=gpu.compute_capability,
        usable_bytes=gpu.usable_bytes,
        verdict=verdict,
        levers=chosen.levers,
        as_asked=verdict != "does_not_fit" and chosen.levers == run.levers,
        device_bytes=need,
        missing_bytes=max(need - gpu.usable_bytes, 0),
        max_batch_size=0,
        max_seq_len=0,
        context_levers=leanest(sizes.model, run).levers,
    )


def leanest(model: ModelSpec, run: RunSpec) -> RunSpec:
    """The run with every lever that saves memory."""
    return changed(run, savings(model, run.levers))


def longest(sizes: Sizes, run: RunSpec, gpu: GpuProfile) -> int:
    """The longest of `lengths` at micro-batch 1."""
    one = replace(leanest(sizes.model, run), micro_batch_size=1)
    family = Family(one, "seq_len", lengths(sizes.model.max_position_embeddings))
    return family.size(sizes.largest(family, gpu))


def with_cheapest(found: Sequence[Offer]) -> tuple[Offer, ...]:
    """The same offers; of those that hold the run, the one with the lowest cost per million tokens is marked."""
    costs = [each.cost_per_million_tokens if fits(each) else None for each in found]
    least = min((cost for cost in costs if cost is not None), default=None)
    best = None if least is None else costs.index(least)
    return tuple(replace(each, cheapest=number == best) for number, each in enumerate(found))


# ------------------------------------------------------------------------------------------------- the other way round
def choose(
    model: ModelSpec, run: RunSpec, cards: Sequence[GpuProfile], prices: Mapping[str, float] | None = None
) -> Choice:
    """The smallest class of cards that holds the run, with the least change of levers where that is needed.

    Raises Unplannable.
    """
    sizes, prices = Sizes(model), prices or {}
    by_key = {card.key: card for card in cards}
    every = [fitting(sizes, run, card) for card in cards]
    holding = [each for each in every if fits(each)]
    smallest = min((each.memory_gb for each in holding), default=None)
    down = [each for each in every if smallest is None or each.memory_gb < smallest]
    if smallest is not None:
        down = [each for each in down if each.memory_gb == max(other.memory_gb for other in down)]

    def full(found: Offer) -> Offer:
        return offer(sizes, run, by_key[found.gpu], prices.get(found.gpu))

    return Choice(
        memory_gb=smallest,
        as_asked_gb=min((each.memory_gb for each in holding if each.as_asked), default=None),
        offers=tuple(full(each) for each in every if each.memory_gb == smallest),
        smaller=min(down, key=lambda each: each.missing_bytes, default=None),
        priced=with_cheapest([full(each) for each in holding if each.gpu in prices]),
    )


# ----------------------------------------------------------------------------------------------------------- speed
def settings(model: ModelSpec, run: RunSpec) -> list[Levers]:
    """Levers from the fastest to the leanest: as little recomputed as fits, everything else as lean as it can be."""
    lean = leanest(model, run).levers
    kept = [replace(lean, checkpointing=name, checkpoint_offload=False) for name in CHECKPOINTING]
    return [*kept, lean]


def fastest(sizes: Sizes, run: RunSpec, gpu: GpuProfile) -> Candidate | None:
    """The most tokens per second at this sequence length, of micro-batches that are powers of two.

    None where nothing fits or the card's rates are not known. A micro-batch that could be doubled for less than
    `GAIN` is large enough, and then nothing that recomputes more is faster.
    """
    tried: list[tuple[int, RunSpec]] = []
    for levers in settings(sizes.model, run):
        found, enough = _speeds(sizes, replace(run, levers=levers), gpu)
        tried += found
        if enough and found and sizes.fits(found[-1][1], gpu):
            break
    best = next((pair for pair in sorted(tried, key=lambda pair: -pair[0]) if sizes.fits(pair[1], gpu)), None)
    if best is None:
        return None
    speed, chosen = best
    return Candidate(
        levers=chosen.levers,
        micro_batch_size=chosen.micro_batch_size,
        accumulation=chosen.accumulation,
        device_bytes=sizes.device_bytes(chosen, gpu),
        verdict=sizes.verdict(chosen, gpu),
        tokens_per_s=speed,
    )


def _speeds(sizes: Sizes, run: RunSpec, gpu: GpuProfile) -> tuple[list[tuple[int, RunSpec]], bool]:
    """(tokens per second and run of each micro-batch that may fit, whether it was not memory that ended them)"""
    out: list[tuple[int, RunSpec]] = []
    micro = 1
    while sizes.may_fit(larger := replace(run, micro_batch_size=micro), gpu):
        speed = sizes.quick.speed(larger, gpu)
        if speed is None or micro > MAX_BATCH:
            return out, True
        if out and speed < GAIN * out[-1][0] and not _lost_graphs(sizes, out[-1][1], larger, gpu):
            return out, True
        out.append((speed, larger))
        micro *= 2
    return out, False


def _lost_graphs(sizes: Sizes, smaller: RunSpec, larger: RunSpec, gpu: GpuProfile) -> bool:
    """Whether the larger micro-batch has no room for CUDA graphs any more: one larger still may be faster again."""
    return sizes.quick.lacks_graphs(larger, gpu) and not sizes.quick.lacks_graphs(smaller, gpu)
