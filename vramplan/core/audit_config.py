"""What a trainer's configuration shows of the causes in docs/oom-playbook.md before anything runs.

Each rule looks at one thing and says what it sees, what that costs, and what to change. A price is the difference of
two estimates of the whole run, with the cause and without; where the cause is no lever of ours, it is the bytes of the
tensors that the change would spare, from their shapes.
"""

from __future__ import annotations

from dataclasses import replace

from .audit_rows import unmatched
from .audit_rules import RULES
from .audit_subject import Change, Subject
from .ledger import estimate
from .recipes import RECIPES
from .room import judge
from .types import (
    ConfigAudit,
    ConfigFinding,
    GpuProfile,
    GpuVerdict,
    Ledger,
    ModelSpec,
    RunSpec,
    TrainerConfig,
    Unplannable,
)

MODEL_SEQ_LEN = 2048


def of_model(model: ModelSpec) -> TrainerConfig:
    """A model by itself: what the tutorials' stock run of it would meet, 1 x 2048 tokens."""
    length = min(MODEL_SEQ_LEN, model.max_position_embeddings)
    run = RunSpec(model=model.name, recipe="peft", levers=RECIPES["peft"], seq_len=length)
    return TrainerConfig(tool="model", source=model.name, model=model.name, run=run, quantised=True, prepared=True,
                         input_grads=True, assumed=(f"the tutorials' stock run, 1 x {length} tokens",))  # fmt: skip


def audit(config: TrainerConfig, model: ModelSpec | None = None, card: GpuProfile | None = None) -> ConfigAudit:
    """Every rule over the file, largest first. Without a model there are findings, but no bytes."""
    config, ledger = _estimated(config, model, card)
    subject = Subject(config, model, ledger, card)
    found = [finding for rule in RULES for finding in rule(subject)]
    need = ledger.peak.device_bytes if ledger else None
    return ConfigAudit(
        config=config,
        findings=tuple(sorted(found, key=_rank)),
        device_bytes=need,
        fixed_bytes=_fixed(subject, found),
        judged=_judged(ledger, card),
    )


def _estimated(
    config: TrainerConfig, model: ModelSpec | None, card: GpuProfile | None
) -> tuple[TrainerConfig, Ledger | None]:
    """The run as it is written. Targets that match nothing are left out, as PEFT leaves them out."""
    if model is None or config.run is None or config.unplanned:
        return config, None
    try:
        return config, estimate(model, _playable(model, config.run), card)
    except Unplannable as error:
        return replace(config, unplanned=error.message), None


def _playable(model: ModelSpec, run: RunSpec) -> RunSpec:
    lost = unmatched(model, run.lora)
    kept = tuple(name for name in run.lora.targets if name not in lost)
    return replace(run, model=run.model or model.name, lora=replace(run.lora, targets=kept)) if kept else run


def _rank(finding: ConfigFinding) -> tuple[bool, int, bool]:
    """Bytes first, the most of them first; what is certain before what is not."""
    return (finding.bytes is None, -(finding.bytes or 0), not finding.certain)


def _fixed(subject: Subject, found: list[ConfigFinding]) -> int | None:
    """What the run needs with every lever changed that a certain finding names."""
    certain = {finding.key for finding in found if finding.certain}
    changes = [change for key, change in subject.changes.items() if key in certain]
    if subject.ledger is None or subject.model is None or not changes:
        return None
    try:
        return estimate(subject.model, _all(subject.ledger.run, changes), subject.card).peak.device_bytes
    except Unplannable:
        return None


def _all(run: RunSpec, changes: list[Change]) -> RunSpec:
    for change in changes:
        run = change(run)
    return run


def _judged(ledger: Ledger | None, card: GpuProfile | None) -> GpuVerdict | None:
    if ledger is None or card is None:
        return None
    return GpuVerdict(gpu=card.key, usable_bytes=card.usable_bytes, verdict=judge(ledger, card))
