"""What the rules of a diagnosis look at."""

from __future__ import annotations

from dataclasses import dataclass, field

from .inverse import NOTHING, Known
from .types import Fix, GpuProcess, GpuProfile, Holdings, Ledger, ModelSpec, OomEvidence, RunSpec

NOT_THE_CARD = ("host", "shm")  # kinds of report that no change of the run's memory on the card removes


@dataclass(slots=True)
class Case:
    """The report, the run if it is known, and what has been worked out so far."""

    evidence: OomEvidence
    model: ModelSpec | None
    run: RunSpec | None
    card: GpuProfile
    named: bool  # the card was named, it is not only the default chip
    known: Known = NOTHING  # of models, for a report without a run
    ledger: Ledger | None = None
    fixes: tuple[Fix, ...] = ()
    saved: dict[str, int] = field(default_factory=dict)  # by the key of a cause
    floor_bytes: int | None = None  # the least that was tried, where nothing fits
    own_pid: int | None = None  # of a "Process N" that is this very process
    others: tuple[GpuProcess, ...] = ()
    others_bytes: int = 0
    budget_bytes: int | None = None
    holdings: Holdings | None = None

    @property
    def should_fit(self) -> bool:
        """Whether the run as described fits what is there."""
        if self.ledger is None or self.budget_bytes is None or self.evidence.kind in NOT_THE_CARD:
            return False
        return self.ledger.peak.device_bytes <= self.budget_bytes
