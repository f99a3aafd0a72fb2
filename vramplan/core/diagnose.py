"""Why a run went out of memory, and what would fix it: evidence and ledger -> causes with numbers, priced fixes.

Works with whatever there is: the text alone gives causes; with the run, the requested size is matched against the
tensors of the played step and every fix is estimated in full; with a snapshot, the holders are known.
"""

from __future__ import annotations

from .case import NOT_THE_CARD, Case
from .causes import TEXT_RULES, Finding, full
from .inverse import NOTHING, Known
from .other_causes import OTHER_RULES
from .types import Diagnosis, Fix, GpuProfile, Holdings, Ledger, ModelSpec, OomEvidence, RunSpec
from .units import GIB, MIB, human

OWN_EXTRA_BYTES = 3 * GIB  # context and libraries: what a process may hold beside PyTorch's memory
ROUNDING_BYTES = 32 * MIB  # the text's numbers have two digits
HIDDEN_BYTES = 512 * MIB  # less than this beside our process is rounding and the driver
UNKNOWN_CARD = GpuProfile(key="generic", name="a card", total_bytes=0, usable_bytes=0)
FAINT = 45  # a cause below this score does not explain a full card alone
FAINTEST = 19  # where the run is known, whatever takes more than a little of it does


def diagnose(
    evidence: OomEvidence,
    model: ModelSpec | None = None,
    run: RunSpec | None = None,
    gpu: GpuProfile | None = None,
    holdings: Holdings | None = None,
    known: Known = NOTHING,
) -> Diagnosis:
    """Causes, likeliest first, and fixes, best first. `holdings`: of a memory snapshot; `known`: of models, to tell
    shapes by where there is no run.

    Raises Unplannable if the run cannot be estimated.
    """
    case = Case(evidence, model, run, gpu or UNKNOWN_CARD, gpu is not None, known, holdings=holdings)
    _share_out(case)
    case.budget_bytes = budget(case)
    pricer = None
    if model is not None and run is not None:
        from .fixes import Pricer  # as all that plays a step: a message alone needs none of it
        from .ledger import NO_CARD, estimate

        case.card = gpu or NO_CARD
        case.ledger = estimate(model, run, case.card)
        if evidence.kind not in NOT_THE_CARD:
            pricer = Pricer(model, case.ledger, case.card, case.budget_bytes)
            case.fixes = pricer.fixes()
            case.saved, case.floor_bytes = pricer.saved, pricer.floor_bytes
    findings = [finding for rule in (*TEXT_RULES, *OTHER_RULES) for finding in rule(case)]
    if case.ledger is not None:
        from .run_causes import RUN_RULES
        from .script_causes import SCRIPT_RULES, symptoms

        findings += [finding for rule in (*RUN_RULES, *SCRIPT_RULES) for finding in rule(case)]
    if holdings is not None:
        from .holding_causes import HOLDING_RULES

        findings += [finding for held in HOLDING_RULES for finding in held(case, holdings)]
    if all(finding.score < (FAINT if case.ledger is None else FAINTEST) for finding in findings):
        findings += full(case)
    findings = ranked(findings)
    if case.ledger is not None:
        findings = ranked(symptoms(case, findings))
    if pricer is not None:
        key = findings[0].key
        case.fixes = (*_alone(case), *_as_described(case, key), *pricer.ranked(case.fixes, key))
    return Diagnosis(
        evidence=evidence,
        causes=tuple(finding.text for finding in findings),
        cause_keys=tuple(finding.key for finding in findings),
        fixes=case.fixes,
        more=tuple(_more(case)),
        predicted_bytes=case.ledger.peak.device_bytes if case.ledger else None,
        budget_bytes=case.budget_bytes,
        holdings=holdings,
    )


def ranked(findings: list[Finding]) -> list[Finding]:
    """One finding per cause, the highest score first: what several rules say is likelier, and said together."""
    merged: dict[str, Finding] = {}
    for finding in sorted(findings, key=lambda finding: -finding.score):
        known = merged.get(finding.key)
        merged[finding.key] = finding if known is None else Finding(
            finding.key, known.score + finding.score // 4, f"{known.text} {finding.text}")  # fmt: skip
    return sorted(merged.values(), key=lambda finding: -finding.score)


def _alone(case: Case) -> tuple[Fix, ...]:
    """The run as it is, where it would fit the card without the others on it."""
    ledger = case.ledger
    if ledger is None or case.budget_bytes is None or case.evidence.allowed_bytes is not None:
        return ()
    need = ledger.peak.device_bytes
    if not case.budget_bytes < need <= case.budget_bytes + case.others_bytes:
        return ()
    return _same_run(ledger, f"the same run, with the {human(case.others_bytes)} of others freed")


def _as_described(case: Case, key: str) -> tuple[Fix, ...]:
    """The run itself, where it would have fitted had the script done what was said of it."""
    from .script_causes import remedied

    ledger, title = case.ledger, remedied(case, key)
    return () if ledger is None or title is None else _same_run(ledger, title)


def _same_run(ledger: Ledger, title: str) -> tuple[Fix, ...]:
    """A fix that changes nothing of the run."""
    from .fixes import command

    need = ledger.peak.device_bytes
    return (Fix(title=title, run=ledger.run, device_bytes=need, saves_bytes=0, fits=True, command=command(ledger.run)),)


def _share_out(case: Case) -> None:
    """Who holds what: in a container torch does not know its own pid, and lists itself as "Process N"."""
    evidence = case.evidence
    if evidence.process_bytes is None and evidence.allocated_bytes is not None:
        own = evidence.allocated_bytes + (evidence.reserved_unallocated_bytes or 0)
        room = (evidence.total_bytes or 0) - (evidence.free_bytes or 0) - own if evidence.total_bytes else None
        able = [(p.used_bytes, p.pid) for p in evidence.others if p.used_bytes and p.used_bytes >= own - ROUNDING_BYTES]
        for used, pid in sorted(able):  # ours is near what PyTorch holds, or too large to stand beside it on the card
            if used - own <= OWN_EXTRA_BYTES or (room is not None and used > room + ROUNDING_BYTES):
                case.own_pid = pid
                break
    case.others = tuple(p for p in evidence.others if p.pid != case.own_pid)
    case.others_bytes = sum(p.used_bytes or 0 for p in case.others) or _hidden(case)


def _hidden(case: Case) -> int:
    """What is in use and not ours, where the report does not list it; 0 if that cannot be told."""
    evidence = case.evidence
    total, free, own = evidence.total_bytes, evidence.free_bytes, evidence.process_bytes
    if total is None or free is None:
        return 0
    if own is None:
        known = [p.used_bytes for p in evidence.others if p.pid == case.own_pid and p.used_bytes]
        own = known[0] if known else None
    if own is None:  # only PyTorch's own part is known: the context and the libraries may be the rest
        if evidence.allocated_bytes is None:
            return 0
        held = evidence.allocated_bytes + (evidence.reserved_unallocated_bytes or 0)
        rest = total - free - held - OWN_EXTRA_BYTES
        return rest if rest > 0 else 0
    rest = total - free - own
    return rest if rest > HIDDEN_BYTES else 0


def budget(case: Case) -> int | None:
    """What one process could fill: the card, named or reported, less what others hold; or the allocator's cap."""
    evidence = case.evidence
    sizes = []
    live = case.card.source == "nvml"  # its usable bytes are what was free beside the others
    if case.named and case.card.usable_bytes:
        sizes.append(case.card.usable_bytes - (0 if live else case.others_bytes))
    if evidence.total_bytes is not None and (not sizes or (live and case.others_bytes)):
        sizes.append(evidence.total_bytes - case.others_bytes)
    if evidence.allowed_bytes is not None:  # the cap counts PyTorch's memory, not the context
        sizes.append(evidence.allowed_bytes + case.card.context_bytes)
    return max(min(sizes), 0) if sizes else None


def _more(case: Case) -> list[str]:
    """What else would make this sharper."""
    evidence, out = case.evidence, []
    if case.run is None:
        out.append(
            "the run: --run run.json, or --model NAME with the flags of vramplan estimate; "
            "then sizes are matched with tensors and fixes are priced"
        )
    if evidence.kind in NOT_THE_CARD:
        return out
    if evidence.requested_bytes is None:
        out.append("the whole message: this one does not say how much was asked for")
    if not evidence.frames:
        out.append("the traceback above the message: it tells the phase")
    if case.run is not None and case.budget_bytes is None:
        out.append("the card: --gpu NAME; the message does not say its size")
    return out
