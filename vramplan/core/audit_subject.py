"""What the rules of an audit look at, and what they ask it: the price of a change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from .fixes import LEANER_OPTIMIZER
from .ledger import estimate
from .types import GpuProfile, Ledger, ModelSpec, RunSpec, TrainerConfig, Unplannable
from .units import MIB


class Price(NamedTuple):
    """Bytes, None where nothing can say; `when` is added to the sentence."""

    bytes: int | None
    when: str


Change = Callable[[RunSpec], RunSpec]

AFTERWARDS = ", which shows once the others are changed"
SMALL_BYTES, SMALL_SHARE = 16 * MIB, 0.01  # less than this of a run is not worth a line


class Subject:
    """One file, its model and its run as estimated. `changes` are those that rules have priced, by their keys."""

    def __init__(
        self, config: TrainerConfig, model: ModelSpec | None, ledger: Ledger | None, card: GpuProfile | None
    ) -> None:
        self.config, self.model, self.ledger, self.card = config, model, ledger, card
        self.changes: dict[str, Change] = {}
        self._known: dict[RunSpec, int] = {}

    @property
    def run(self) -> RunSpec | None:
        """As it is estimated, or, without a model, as it is written."""
        return self.ledger.run if self.ledger else self.config.run

    def saved(self, key: str, **levers: Any) -> Price:
        """What the run would need less with these levers, which remove the cause `key`.

        Two causes can hide each other: of two tensors that never live at the same time, either alone sets the peak. So
        what does not matter as the run is written is priced again in the run without any other cause.
        """
        self.changes[key] = lever(**levers)
        size = self.difference(self.changes[key])
        if size is None or self.matters(size):
            return Price(size, "")
        hidden = self._hidden(levers)
        return Price(hidden, AFTERWARDS) if hidden is not None and self.matters(hidden) else Price(size, "")

    def _hidden(self, levers: dict[str, Any]) -> int | None:
        """What the cause costs in the run that has no other."""
        if self.ledger is None or self.model is None:
            return None
        run = self.ledger.run
        lean = lean_run(run, self.model)
        kept = lever(**{name: getattr(run.levers, name) for name in levers})(lean)
        try:
            return self._need(kept) - self._need(lean)
        except Unplannable:
            return None

    def lean_allocated_bytes(self) -> int | None:
        """The allocated peak of the run that has no cause but its batch."""
        if self.ledger is None or self.model is None:
            return None
        try:
            lean = lean_run(self.ledger.run, self.model)
            return estimate(self.model, lean, self.card).peak.allocated_bytes
        except Unplannable:
            return None

    def _need(self, run: RunSpec) -> int:
        assert self.model is not None
        if run not in self._known:
            self._known[run] = estimate(self.model, run, self.card).peak.device_bytes
        return self._known[run]

    def difference(self, change: Change) -> int | None:
        """What the run needs more than after `change`."""
        if self.ledger is None or self.model is None:
            return None
        try:
            return self.ledger.peak.device_bytes - self._need(change(self.ledger.run))
        except Unplannable:
            return None

    def matters(self, size: int | None) -> bool:
        """Worth a line: more than 16 MiB and a hundredth of the run. What cannot be priced always is."""
        if size is None:
            return True
        need = self.ledger.peak.device_bytes if self.ledger else 0
        return size > max(SMALL_BYTES, int(SMALL_SHARE * need))


def lever(**values: Any) -> Change:
    """The change that sets these levers."""
    return lambda run: replace(run, levers=replace(run.levers, **values))


def lean_run(run: RunSpec, model: ModelSpec) -> RunSpec:
    """The run with no cause in it that is a lever. Only eager attention does soft-capping."""
    attention = run.levers.attention
    if model.attn_logit_softcapping is None:
        attention = attention.replace("eager", "sdpa")
    return lever(
        loss="fused",
        upcast="none",
        checkpointing="all",
        optimizer=LEANER_OPTIMIZER.get(run.levers.optimizer, run.levers.optimizer),
        allocator="expandable",
        attention=attention,
    )(run)
