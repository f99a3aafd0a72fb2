"""Tries a plan on the real card, and takes the next best one where it does not fit."""

from __future__ import annotations

from dataclasses import replace

from vramplan.core import timeline
from vramplan.core.ledger import estimate
from vramplan.core.parallel import outside_bytes
from vramplan.core.recipes import checkpointing_text
from vramplan.core.room import judge, largest
from vramplan.core.speed import graphs_fit, tokens_per_s
from vramplan.core.types import Candidate, Plan, Probe, RunSpec, Unplannable
from vramplan.core.units import human
from vramplan.errors import VramplanError
from vramplan.launch.probing import Place, Played, most, play, probe_run
from vramplan.launch.tenants import Say, wait_until_quiet

MOST_PROBES = 3  # two in the usual case
BLOCK = 128  # tokens by which a sequence is shortened
STEP_SHARE = 0.05  # of the budget: a candidate that needs less by so much may fit where one did not


def verify(
    plan: Plan, place: Place, say: Say, *, capped: bool = False, shorten: bool = False
) -> tuple[Plan, VramplanError | None]:
    """(the plan with what its probe measured, or the next best that fits; why there was no end, if there was none).

    "does_not_fit" if none fits. `capped`: the budget is that of another, smaller card, to which PyTorch is held.
    `shorten`: the plan is for the longest sequence, so that a shorter one is a next best too. Where others came or grew
    meanwhile a probe proves nothing: its plan stays as it was, unverified.
    """
    probes: list[Probe] = []
    while True:
        try:
            if probes:
                wait_until_quiet(place.nvml, place.index, say)
            say(f"probing {batch_text(plan)} on {place.card.name}")
            probe = _probe(plan, place, capped)
        except VramplanError as error:
            return replace(plan, probes=tuple(probes)), error
        probes.append(probe)
        if probe.fits or probe.disturbances:
            return replace(plan, verified=probe.fits and not probe.disturbances, probes=tuple(probes)), None
        left = MOST_PROBES - len(probes)
        following = next_plan(plan, probe, last=left == 1, shorten=shorten) if left else None
        if following is None:
            return _refuted(plan, probes), None
        say(f"{batch_text(plan)}: {why(probe, plan.budget_bytes)}")
        plan = following


def batch_text(plan: Plan) -> str:
    run = plan.run
    batch = f"{run.micro_batch_size} x {run.accumulation} rows of {run.seq_len:,} tokens"
    return f"{batch} with checkpointing {checkpointing_text(run.levers)}"


def why(probe: Probe, budget_bytes: int) -> str:
    """How a probe failed, in a few words."""
    if probe.ended == "oom" or probe.process_bytes is None:
        return "out of memory"
    return f"took {human(probe.process_bytes)}, more than the {human(budget_bytes)} there are"


# ------------------------------------------------------------------------------------------------------ one probe
def _probe(plan: Plan, place: Place, capped: bool) -> Probe:
    outside = outside_bytes(plan.run, plan.gpu)
    cap = plan.budget_bytes - outside if capped else None
    played = play(probe_run(plan.run), place, cap_bytes=cap)
    same_card = plan.gpu.key == place.card.key
    return probe_of(plan, played, outside, cap, speed=same_card)


def probe_of(plan: Plan, played: Played, outside_bytes: int, cap_bytes: int | None, *, speed: bool = True) -> Probe:
    """What was played, beside the plan. Under a cap the context is another card's: then surviving is what counts."""
    measured, peak = played.measurement, plan.ledger.peak
    process = most(measured, "process_bytes") if played.finished and cap_bytes is None else None
    over = process is not None and process > plan.budget_bytes
    rate = measured.tokens_per_s if measured is not None and played.finished and speed else 0.0
    model, gpu = plan.ledger.model, plan.gpu
    graphs = graphs_fit(peak.device_bytes, gpu)
    predicted = tokens_per_s(model, plan.run, gpu, timeline.play(model, plan.run, gpu), graphs) if speed else None
    return Probe(
        levers=plan.run.levers,
        micro_batch_size=plan.run.micro_batch_size,
        accumulation=plan.run.accumulation,
        ended="finished" if played.finished else "oom",
        fits=played.finished and not over,
        predicted_bytes=peak.allocated_bytes,
        predicted_process_bytes=max(peak.reserved_bytes, peak.minimum_bytes) + outside_bytes,
        process_bytes=process,
        allocated_bytes=most(measured, "peak_bytes") if played.finished else None,
        reserved_bytes=most(measured, "reserved_bytes") if played.finished else None,
        predicted_tokens_per_s=predicted,
        tokens_per_s=round(rate) or None,
        cap_bytes=cap_bytes,
        disturbances=played.disturbances,
    )


# ------------------------------------------------------------------------------------------------- the next best
def next_plan(plan: Plan, failed: Probe, *, last: bool = False, shorten: bool = False) -> Plan | None:
    """The fastest other candidate that needs enough less than the one that failed; None if there is none.

    Where it is the last that will be tried, the smallest. With `shorten` a shorter sequence where no candidate will do.
    """
    excess = max((failed.process_bytes or 0) - plan.budget_bytes, 0)
    most_bytes = plan.ledger.peak.device_bytes - max(int(STEP_SHARE * plan.budget_bytes), excess)
    able = [c for c in plan.candidates if c.verdict != "does_not_fit" and c.device_bytes <= most_bytes]
    for candidate in sorted(able, key=lambda c: c.device_bytes if last else -(c.tokens_per_s or 0)):
        taken = _take(plan, _with(plan.run, candidate), failed, candidate.tokens_per_s)
        if taken is not None and taken.ledger.peak.device_bytes <= most_bytes:
            return taken
    return _shorter(plan, failed, most_bytes) if shorten else None


def _with(run: RunSpec, candidate: Candidate) -> RunSpec:
    return replace(
        run,
        levers=candidate.levers,
        micro_batch_size=candidate.micro_batch_size,
        accumulation=candidate.accumulation,
    )


def _shorter(plan: Plan, failed: Probe, most_bytes: int) -> Plan | None:
    """The longest sequence that needs at most so much, in steps of `BLOCK` tokens."""

    def with_blocks(n: int) -> RunSpec:
        return replace(plan.run, seq_len=BLOCK * n)

    def fits(n: int) -> bool:
        return estimate(plan.ledger.model, with_blocks(n), plan.gpu).peak.device_bytes <= most_bytes

    blocks = largest(fits, (plan.run.seq_len - 1) // BLOCK)
    return _take(plan, with_blocks(blocks), failed) if blocks else None


def _take(plan: Plan, run: RunSpec, failed: Probe, modelled: int | None = None) -> Plan | None:
    """The plan with another run, priced exactly; None if it cannot be."""
    try:
        ledger = estimate(plan.ledger.model, run, plan.gpu)
    except Unplannable:
        return None
    verdict = judge(ledger, plan.gpu)
    if verdict == "does_not_fit":
        return None
    need = ledger.peak.device_bytes
    taken = replace(plan, run=run, ledger=ledger, verdict=verdict, headroom_bytes=plan.budget_bytes - need)
    less = human(plan.ledger.peak.device_bytes - need)
    speed = f", about {modelled:,} tokens/s (modelled)" if modelled else ""
    reason = (
        f"on the card {batch_text(plan)} {_past(failed)}; {batch_text(taken)} is the next best, which needs {less} "
        f"less{speed}"
    )
    return replace(taken, reason=reason)


def _past(failed: Probe) -> str:
    return "ran out of memory" if failed.ended == "oom" else "took more than there is"


def _refuted(plan: Plan, probes: list[Probe]) -> Plan:
    """What was predicted to fit did not, and nothing smaller is at hand."""
    times = f"{len(probes)} probes" if len(probes) > 1 else "the probe"
    reason = f"predicted to fit, but {times} on the card did not: {why(probes[-1], plan.budget_bytes)}"
    advice = (
        f"--seq-len below {plan.run.seq_len}, or --objective memory",
        "vramplan calibrate: plans that know this card's overheads",
    )
    return replace(plan, verdict="does_not_fit", reason=reason, advice=advice, probes=tuple(probes))
