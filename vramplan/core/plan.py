"""Holds ledgers against a card: verdicts, largest batch and context, and the fastest run that fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import resident
from .chip import traits
from .ledger import MARGIN, estimate
from .parallel import nccl_bytes, shards
from .replay import workspaces
from .speed import tokens_per_s
from .timeline import play
from .types import Candidate, GpuProfile, GpuVerdict, Ledger, Levers, ModelSpec, Plan, RunSpec
from .units import human
from .unroll import Unrolled

OBJECTIVES = ("speed", "memory", "context")
CHECKPOINTING = ("none", "every-4", "every-2", "all")
MAX_BATCH = 4096


# ------------------------------------------------------------------------------------------------------- verdicts
def judge(ledger: Ledger, gpu: GpuProfile) -> str:
    """ "fits" with room for what the allocator caches, "tight" if it must return cached memory on the way, else
    "does_not_fit"."""
    if ledger.peak.device_bytes > gpu.usable_bytes:
        return "does_not_fit"
    cached = max(ledger.peak.reserved_bytes, ledger.peak.minimum_bytes)
    outside = gpu.context_bytes + nccl_bytes(ledger.run, gpu)
    return "fits" if cached + outside <= gpu.usable_bytes else "tight"


class Quick:
    """Device bytes of variants of one run, without replaying the allocator: the sum of the live tensors at the
    highest point, the stated margin and the context."""

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        self.known: dict[tuple[object, ...], tuple[int, Unrolled]] = {}

    def bytes(self, run: RunSpec, gpu: GpuProfile) -> int:
        outside = gpu.context_bytes + nccl_bytes(run, gpu)
        return int(self._played(run, gpu)[0] * (1.01 + MARGIN[run.levers.allocator])) + outside

    def speed(self, run: RunSpec, gpu: GpuProfile) -> int | None:
        return tokens_per_s(self.model, run, gpu, self._played(run, gpu)[1])

    def tensor_bytes(self, run: RunSpec, gpu: GpuProfile) -> int:
        """All tensors at the highest point: no card holds the run in less."""
        return self._played(run, gpu)[0]

    def unrolled(self, run: RunSpec, gpu: GpuProfile) -> Unrolled:
        return self._played(run, gpu)[1]

    def key(self, run: RunSpec, gpu: GpuProfile) -> tuple[object, ...]:
        """All of a run and a chip that costs memory."""
        shape = (run.micro_batch_size, run.seq_len, min(run.accumulation, 2), run.padding, run.packing,
                 run.driver)  # fmt: skip
        chip = traits(self.model, run, gpu)
        return (shape, run.levers, run.lora, run.double_quant, chip, run.gpus, run.parallel)

    def _played(self, run: RunSpec, gpu: GpuProfile) -> tuple[int, Unrolled]:
        key = self.key(run, gpu)
        if key not in self.known:
            unrolled = play(self.model, run, gpu)
            self.known[key] = (self._resident(run, unrolled) + unrolled.peak_bytes(), unrolled)
        return self.known[key]

    def _resident(self, run: RunSpec, unrolled: Unrolled) -> int:
        weights = resident.weights(self.model, run.double_quant, run.levers.upcast, shards(run)).total_bytes
        state, _ = resident.optimizer_bytes(self.model, run)
        return weights + resident.lora_bytes(self.model, run) + state + sum(workspaces(unrolled))


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in 0..most with fits(n), for a property that never comes back once lost."""
    if most < 1 or not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def capacity(model: ModelSpec, run: RunSpec, gpu: GpuProfile, quick: Quick | None = None) -> GpuVerdict:
    """One card's verdict, its largest micro-batch at this length and longest sequence at this micro-batch.

    Raises Unplannable.
    """
    quick = quick or Quick(model)

    def with_blocks(n: int) -> RunSpec:  # sequences in steps of 128 tokens, and the model's own limit
        return replace(run, seq_len=min(128 * n, model.max_position_embeddings))

    def with_batch(n: int) -> RunSpec:
        return replace(run, micro_batch_size=n)

    blocks = _largest_that_survives(quick, gpu, with_blocks, -(-model.max_position_embeddings // 128))
    return GpuVerdict(
        gpu=gpu.key,
        usable_bytes=gpu.usable_bytes,
        verdict=judge(estimate(model, run, gpu), gpu),
        max_batch_size=_largest_that_survives(quick, gpu, with_batch, MAX_BATCH),
        max_seq_len=with_blocks(blocks).seq_len if blocks else 0,
        tokens_per_s=quick.speed(run, gpu),
    )


def _largest_that_survives(quick: Quick, gpu: GpuProfile, variant: Callable[[int], RunSpec], most: int) -> int:
    """By the sum of live tensors first, then down until the replay of the allocator agrees."""
    n = largest(lambda n: quick.bytes(variant(n), gpu) <= gpu.usable_bytes, most)
    while n and judge(estimate(quick.model, variant(n), gpu), gpu) == "does_not_fit":
        n -= max(1, n // 50)
    return n


# ----------------------------------------------------------------------------------------------------------- plan
def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def plan(
    model: ModelSpec,
    run: RunSpec,
    gpu: GpuProfile,
    effective_batch_size: int,
    objective: str = "speed",
    *,
    free: tuple[str, ...] = ("checkpointing",),
) -> Plan:
    """The best run of this model on this card with exactly this effective batch.

    Searches the micro-batches that divide the effective batch and, if `free` names it, the checkpointing lever;
    everything else stays as asked. `objective` "speed" takes the most tokens per second (modelled; the larger
    micro-batch and the less checkpointing where the card's rates are unknown), "memory" and "context" the fewest
    bytes. What cannot fit is a Plan too, with verdict "does_not_fit" and advice. Raises Unplannable.
    """
    quick = Quick(model)
    settings = CHECKPOINTING if "checkpointing" in free else (run.levers.checkpointing,)
    candidates: list[tuple[Candidate, RunSpec]] = []
    for checkpointing in settings:
        for micro in _micro_batches(quick, run, gpu, effective_batch_size, checkpointing):
            candidates.append(_candidate(quick, run, gpu, effective_batch_size, checkpointing, micro))
    ranked = sorted(candidates, key=lambda pair: _rank(pair[0], objective))
    for candidate, chosen in ranked:
        if candidate.verdict == "does_not_fit":
            continue
        ledger = estimate(model, chosen, gpu)
        verdict = judge(ledger, gpu)
        if verdict != "does_not_fit":
            exact = replace(candidate, device_bytes=ledger.peak.device_bytes, verdict=verdict)
            tried = [exact if c is candidate else c for c, _ in ranked]
            return _plan(ledger, gpu, effective_batch_size, verdict, tried, exact, objective)
    smallest = min((pair for pair in candidates), key=lambda pair: pair[0].device_bytes)[1]
    return _impossible(quick, model, smallest, gpu, effective_batch_size, [c for c, _ in ranked])


def _micro_batches(quick: Quick, run: RunSpec, gpu: GpuProfile, effective: int, checkpointing: str) -> list[int]:
    """The largest divisor that fits and its smaller neighbours: smaller ones are never faster by this model."""
    options = divisors(effective)
    variant = with_checkpointing(run, checkpointing)
    count = largest(
        lambda n: quick.bytes(_split(variant, options[n - 1], effective), gpu) <= gpu.usable_bytes, len(options)
    )
    return options[max(0, count - 2) : max(count, 1)]


def _split(run: RunSpec, micro: int, effective: int) -> RunSpec:
    return replace(run, micro_batch_size=micro, accumulation=effective // micro)


def with_checkpointing(run: RunSpec, checkpointing: str) -> RunSpec:
    return replace(run, levers=replace(run.levers, checkpointing=checkpointing))


def _candidate(
    quick: Quick, run: RunSpec, gpu: GpuProfile, effective: int, checkpointing: str, micro: int
) -> tuple[Candidate, RunSpec]:
    variant = _split(with_checkpointing(run, checkpointing), micro, effective)
    size = quick.bytes(variant, gpu)
    candidate = Candidate(
        levers=variant.levers,
        micro_batch_size=micro,
        accumulation=variant.accumulation,
        device_bytes=size,
        verdict="fits" if size <= gpu.usable_bytes else "does_not_fit",
        tokens_per_s=quick.speed(variant, gpu),
    )
    return candidate, variant


def _rank(candidate: Candidate, objective: str) -> tuple[bool, int, int, int]:
    misfit = candidate.verdict == "does_not_fit"
    if objective == "speed":
        recomputes = CHECKPOINTING.index(candidate.levers.checkpointing) if (
            candidate.levers.checkpointing in CHECKPOINTING) else 1  # fmt: skip
        return misfit, -(candidate.tokens_per_s or 0), recomputes, -candidate.micro_batch_size
    return misfit, candidate.device_bytes, candidate.micro_batch_size, 0


def _plan(
    ledger: Ledger,
    gpu: GpuProfile,
    effective: int,
    verdict: str,
    candidates: list[Candidate],
    chosen: Candidate,
    objective: str,
) -> Plan:
    run = ledger.run
    speed = f", about {chosen.tokens_per_s:,} tokens/s (modelled)" if chosen.tokens_per_s else ""
    why = "the fastest of" if objective == "speed" else "the smallest of"
    reason = (
        f"micro-batch {run.micro_batch_size} x accumulation {run.accumulation} with checkpointing "
        f"{run.levers.checkpointing!r} is {why} {len(candidates)} combinations tried{speed}"
    )
    return _of(ledger, gpu, effective, verdict, reason, candidates)


def _of(
    ledger: Ledger,
    gpu: GpuProfile,
    effective: int,
    verdict: str,
    reason: str,
    candidates: list[Candidate],
    advice: list[str] | None = None,
) -> Plan:
    return Plan(
        run=ledger.run,
        ledger=ledger,
        gpu=gpu,
        effective_batch_size=effective,
        budget_bytes=gpu.usable_bytes,
        headroom_bytes=gpu.usable_bytes - ledger.peak.device_bytes,
        verdict=verdict,
        reason=reason,
        candidates=tuple(candidates),
        advice=tuple(advice or ()),
    )


# --------------------------------------------------------------------------------------------- when nothing fits
def _impossible(
    quick: Quick, model: ModelSpec, run: RunSpec, gpu: GpuProfile, effective: int, candidates: list[Candidate]
) -> Plan:
    ledger = estimate(model, run, gpu)
    missing = ledger.peak.device_bytes - gpu.usable_bytes
    reason = f"even micro-batch 1 with every saving asked for needs {human(missing)} more than {gpu.name} has"
    advice = _advice(quick, model, run, gpu)
    return _of(ledger, gpu, effective, "does_not_fit", reason, candidates, advice)


def _advice(quick: Quick, model: ModelSpec, run: RunSpec, gpu: GpuProfile) -> list[str]:
    """The smallest changes that would fit, those that leave training as it is first."""

    def fits(variant: RunSpec) -> bool:
        return judge(estimate(model, variant, gpu), gpu) != "does_not_fit"

    out = []
    lean = replace(run, levers=Levers(attention=run.levers.attention))
    if lean.levers != run.levers and fits(lean):
        out.append("--recipe lean: nothing upcast, fused loss, paged 8-bit optimizer, expandable segments")
    if not run.double_quant and fits(replace(run, double_quant=True)):
        out.append("--double-quant: quantisation constants quantised too")
    offload = replace(lean, levers=replace(lean.levers, checkpoint_offload=True))
    if not run.levers.checkpoint_offload and not fits(lean) and fits(offload):
        out.append("--checkpoint-offload: the layers' inputs wait in pinned host memory")
    also = "" if lean == run else ", with --recipe lean"
    blocks = _largest_that_survives(quick, gpu, lambda n: replace(lean, seq_len=64 * n), run.seq_len // 64)
    if 0 < 64 * blocks < run.seq_len:
        out.append(f"--seq-len {64 * blocks} instead of {run.seq_len}{also}")
    rank = _largest_that_survives(quick, gpu, lambda n: replace(lean, lora=replace(run.lora, r=n)), run.lora.r)
    if 0 < rank < run.lora.r:
        out.append(f"--lora-r {rank} instead of {run.lora.r}{also}")
    need = estimate(model, lean, gpu).peak.device_bytes
    out.append(f"a card with {human(need)} or more free for one process")
    return out
