"""The best run of a model on one card with exactly the effective batch that was asked for."""

from __future__ import annotations

from dataclasses import replace

from .capacity import longest_sequence
from .ledger import estimate
from .lengths import longest_run
from .room import Quick, divisors, judge, largest, largest_that_survives
from .sizes import Sizes
from .speed import host_bytes
from .types import SEARCHED, Candidate, GpuProfile, Ledger, Lengths, Levers, ModelSpec, Plan, RunSpec
from .units import human

CHECKPOINTING = ("none", "every-4", "every-2", "all")
TIE = 0.02  # a difference of modelled tokens/s that decides nothing
OFFLOADED = ("every-2", "all")  # with so many checkpoints it pays to hold them in host memory


def plan(
    model: ModelSpec,
    run: RunSpec,
    gpu: GpuProfile,
    effective_batch_size: int,
    objective: str = "speed",
    *,
    free: tuple[str, ...] = SEARCHED,
    lengths: Lengths | None = None,
    host_limit_bytes: int | None = None,
    styles: tuple[str, ...] = CHECKPOINTING,
) -> Plan:
    """The best run of this model on this card with exactly this effective batch.

    Searches the micro-batches that divide the effective batch and the levers that `free` names; everything else stays
    as asked. `objective` "speed" takes the most tokens per second (modelled; the larger micro-batch and the less
    checkpointing where the card's rates are unknown), "memory" the fewest bytes, "context" the levers with the fewest
    bytes and then the longest sequence that fits with them. With `lengths`, those of the data, memory is that of the
    longest batch, and speed that of the usual one, padding not counted. `host_limit_bytes`: of the computer's memory
    for checkpoints, where that is known. `styles` are the ways of checkpointing that are searched, for a trainer that
    does not have all. What cannot fit is a Plan too, with verdict "does_not_fit" and advice. Raises Unplannable.
    """
    found = _search(model, run, gpu, effective_batch_size, objective, free, lengths, host_limit_bytes, styles)
    return found if lengths is None else replace(found, lengths=lengths)


def _search(
    model: ModelSpec,
    run: RunSpec,
    gpu: GpuProfile,
    effective_batch_size: int,
    objective: str,
    free: tuple[str, ...],
    lengths: Lengths | None,
    host_limit_bytes: int | None,
    styles: tuple[str, ...],
) -> Plan:
    quick = Quick(model, lengths)
    if lengths is not None:
        run = longest_run(run, lengths)
    limit = host_limit_bytes if "checkpoint_offload" in free else None  # what was asked for stays
    candidates: list[tuple[Candidate, RunSpec]] = []
    for variant in settings_of(run, free, styles):
        for micro in _micro_batches(quick, variant, gpu, effective_batch_size, objective):
            pair = _candidate(quick, variant, gpu, effective_batch_size, micro)
            if limit is None or _host_bytes(model, pair[1]) <= limit:
                candidates.append(pair)
    ranked = _best_first(model, candidates, objective)
    for candidate, chosen in ranked:
        if candidate.verdict == "does_not_fit":
            continue
        ledger = estimate(model, chosen, gpu)
        verdict = judge(ledger, gpu)
        if verdict != "does_not_fit":
            exact = replace(candidate, device_bytes=ledger.peak.device_bytes, verdict=verdict)
            tried = [exact if c is candidate else c for c, _ in ranked]
            if objective == "context":
                settings = settings_of(chosen, free, styles)
                return _longest(quick, ledger, settings, gpu, effective_batch_size, tried, limit)
            return _plan(ledger, gpu, effective_batch_size, verdict, tried, exact, objective)
    smallest = min((pair for pair in candidates), key=lambda pair: pair[0].device_bytes)[1]
    return _impossible(quick, model, smallest, gpu, effective_batch_size, [c for c, _ in ranked])


def settings_of(run: RunSpec, free: tuple[str, ...], styles: tuple[str, ...] = CHECKPOINTING) -> list[RunSpec]:
    """The run with every combination of the free levers that may be best, least recomputation first."""
    wanted, out = run.levers, []
    for checkpointing in styles if "checkpointing" in free else (wanted.checkpointing,):
        for offload in (False, True) if "checkpoint_offload" in free else (wanted.checkpoint_offload,):
            if offload and "checkpoint_offload" in free and checkpointing not in OFFLOADED:
                continue
            levers = replace(wanted, checkpointing=checkpointing, checkpoint_offload=offload)
            out.append(replace(run, levers=levers))
    return out


def _micro_batches(quick: Quick, run: RunSpec, gpu: GpuProfile, effective: int, objective: str) -> list[int]:
    """For speed the largest divisor that fits and its smaller neighbours, to the first with room for CUDA graphs: by
    this model none below is faster. Where rows differ in length it may be, for lack of padding."""
    options = divisors(effective)
    if objective != "speed":
        return options[:1]
    count = largest(
        lambda n: quick.bytes(_split(run, options[n - 1], effective), gpu) <= gpu.usable_bytes, len(options)
    )
    least = 0 if quick.lengths is not None and not run.packing else max(0, count - 2)
    while least and quick.lacks_graphs(_split(run, options[least], effective), gpu):
        least -= 1
    return options[least : max(count, 1)]


def _split(run: RunSpec, micro: int, effective: int) -> RunSpec:
    return replace(run, micro_batch_size=micro, accumulation=effective // micro)


def _candidate(quick: Quick, run: RunSpec, gpu: GpuProfile, effective: int, micro: int) -> tuple[Candidate, RunSpec]:
    variant = _split(run, micro, effective)
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


def _best_first(
    model: ModelSpec, candidates: list[tuple[Candidate, RunSpec]], objective: str
) -> list[tuple[Candidate, RunSpec]]:
    """By rank; but of what is as fast as the fastest, by less than the model of speed can tell, that which needs the
    least of the computer's memory comes first."""
    ranked = sorted(candidates, key=lambda pair: _rank(pair[0], objective))
    if objective != "speed" or ranked[0][0].verdict == "does_not_fit":
        return ranked
    enough = (1 - TIE) * (ranked[0][0].tokens_per_s or 0)
    near = [p for p in ranked if p[0].verdict != "does_not_fit" and (p[0].tokens_per_s or 0) >= enough]
    return sorted(near, key=lambda pair: _host_bytes(model, pair[1])) + [p for p in ranked if p not in near]


def _host_bytes(model: ModelSpec, run: RunSpec) -> int:
    return host_bytes(model, run) if run.levers.checkpoint_offload and run.levers.checkpointing != "none" else 0


def _rank(candidate: Candidate, objective: str) -> tuple[bool, int, int, bool, int]:
    misfit, levers = candidate.verdict == "does_not_fit", candidate.levers
    if objective == "speed":
        known = levers.checkpointing in CHECKPOINTING
        recomputes = CHECKPOINTING.index(levers.checkpointing) if known else 1
        speed = -(candidate.tokens_per_s or 0)
        return misfit, speed, recomputes, levers.checkpoint_offload, -candidate.micro_batch_size
    return misfit, candidate.device_bytes, candidate.micro_batch_size, False, 0


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
        f"micro-batch {run.micro_batch_size} x accumulation {run.accumulation} with {named(run.levers)} is {why} "
        f"{len(candidates)} combinations tried{speed}{_instead(candidates, chosen, objective)}{_on_host(ledger)}"
    )
    return _of(ledger, gpu, effective, verdict, reason, candidates)


def _on_host(ledger: Ledger) -> str:
    size = _host_bytes(ledger.model, ledger.run)
    return f"; the checkpoints take {human(size)} of the computer's memory" if size else ""


def named(levers: Levers) -> str:
    """The levers that a plan turns, in words."""
    if levers.checkpointing == "none":
        return "no checkpoints"
    every = levers.checkpointing.removeprefix("every-")
    layers = "every layer" if every == "all" else f"one layer in {every}"
    return f"{layers} checkpointed" + (" to host memory" if levers.checkpoint_offload else "")


def _instead(candidates: list[Candidate], chosen: Candidate, objective: str) -> str:
    """What is given up: the least recomputation that does not fit, or how much slower the next choice is."""
    if objective != "speed" or not chosen.tokens_per_s:
        return ""
    faster = [c for c in candidates if c.verdict == "does_not_fit" and (c.tokens_per_s or 0) > chosen.tokens_per_s]
    if faster:
        nearest = min(faster, key=lambda c: c.device_bytes)
        return f"; {named(nearest.levers)} would need {human(nearest.device_bytes)}"
    others = [c for c in candidates if c.levers != chosen.levers and c.verdict != "does_not_fit"]
    if not others:
        return ""
    loss = 1 - (others[0].tokens_per_s or 0) / chosen.tokens_per_s
    return f"; the next, {named(others[0].levers)}, is {max(100 * loss, 0):.0f} % slower"


def _longest(
    quick: Quick,
    ledger: Ledger,
    settings: list[RunSpec],
    gpu: GpuProfile,
    effective: int,
    candidates: list[Candidate],
    host_limit_bytes: int | None,
) -> Plan:
    """The run with the longest sequence that the card holds, in steps of 128 tokens; `ledger` is of one that fits."""
    model = quick.model
    leanest = [run for run in settings if run.levers.checkpointing == settings[-1].levers.checkpointing]
    sizes = Sizes(model)
    longest = [replace(run, seq_len=longest_sequence(sizes, run, gpu)) for run in leanest]
    if host_limit_bytes is not None:
        longest = [run for run in longest if _host_bytes(model, run) <= host_limit_bytes] or [ledger.run]
    found = max(longest, key=lambda run: (run.seq_len, not run.levers.checkpoint_offload))
    if found.seq_len > ledger.run.seq_len:
        ledger = estimate(model, found, gpu)
    run = ledger.run
    reason = (
        f"{run.seq_len:,} tokens are the longest sequence that fits, at micro-batch {run.micro_batch_size} with "
        f"{named(run.levers)}"
    )
    if run.seq_len == model.max_position_embeddings:
        reason += ", all that the model knows positions for"
    reason += _on_host(ledger)
    return _of(ledger, gpu, effective, judge(ledger, gpu), reason, candidates)


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
    asked = run.levers
    lean = replace(run, levers=Levers(attention=asked.attention, checkpoint_offload=asked.checkpoint_offload))
    if lean.levers != run.levers and fits(lean):
        out.append("--recipe lean: nothing upcast, fused loss, paged 8-bit optimizer, expandable segments")
    if not run.double_quant and fits(replace(run, double_quant=True)):
        out.append("--double-quant: quantisation constants quantised too")
    offload = replace(lean, levers=replace(lean.levers, checkpoint_offload=True))
    if not run.levers.checkpoint_offload and not fits(lean) and fits(offload):
        out.append("--checkpoint-offload: the layers' inputs wait in pinned host memory")
    also = "" if lean == run else ", with --recipe lean"
    blocks = largest_that_survives(quick, gpu, lambda n: replace(lean, seq_len=64 * n), run.seq_len // 64)
    if 0 < 64 * blocks < run.seq_len:
        out.append(f"--seq-len {64 * blocks} instead of {run.seq_len}{also}")
    rank = largest_that_survives(quick, gpu, lambda n: replace(lean, lora=replace(run.lora, r=n)), run.lora.r)
    if 0 < rank < run.lora.r:
        out.append(f"--lora-r {rank} instead of {run.lora.r}{also}")
    need = estimate(model, lean, gpu).peak.device_bytes
    out.append(f"a card with {human(need)} or more free for one process")
    return out
