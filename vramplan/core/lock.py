"""The expected memory of a run, kept beside it, and what became of it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from .groups import by_group
from .types import Ledger, Lock, RunSpec

NOT_MEMORY = ("data", "schedule", "model_path", "trust_remote_code")  # of a run: they change no byte


def lock_of(
    ledger: Ledger, words: tuple[str, ...], versions: tuple[tuple[str, str], ...], gpu: str | None = None
) -> Lock:
    """What is kept of an estimate; `words` are the flags that make it again."""
    return Lock(
        words=words, run=ledger.run, versions=versions, trainable_parameters=ledger.trainable_parameters,
        total_parameters=ledger.total_parameters, resident=ledger.resident, peak=ledger.peak,
        groups=tuple(by_group(ledger).items()), gpu=gpu,
    )  # fmt: skip


class Drift(NamedTuple):
    """A lock beside the same run as it is now. `tolerance` is the share by which the peak may rise."""

    then: Lock
    now: Lock
    tolerance: float

    @property
    def rose_bytes(self) -> int:
        return self.now.peak.device_bytes - self.then.peak.device_bytes

    @property
    def share(self) -> float:
        """By how much of the locked peak it rose; negative where it fell."""
        return self.rose_bytes / self.then.peak.device_bytes if self.then.peak.device_bytes else 0.0

    @property
    def is_too_much(self) -> bool:
        return self.rose_bytes > self.tolerance * self.then.peak.device_bytes

    def rows(self) -> list[tuple[str, int, int]]:
        """(group, bytes then, bytes now), what rose most first. Both columns add up to the device bytes."""
        then, now = dict(self.then.groups), dict(self.now.groups)
        names = dict.fromkeys((*now, *then))
        rows = [(name, then.get(name, 0), now.get(name, 0)) for name in names]
        return sorted(rows, key=lambda row: (row[1] - row[2], row[0]))

    def changes(self) -> list[tuple[str, str, str]]:
        """(setting, then, now): what of the run, its model and the versions is another."""
        before, after = dict(self.then.versions), dict(self.now.versions)
        versions = [(name, before.get(name, "-"), after.get(name, "-")) for name in dict.fromkeys((*before, *after))]
        parameters = ("parameters", f"{self.then.total_parameters:,}", f"{self.now.total_parameters:,}")
        card = ("gpu", self.then.gpu or "-", self.now.gpu or "-")
        return [row for row in (*_settings(self.then.run, self.now.run), parameters, card, *versions)
                if row[1] != row[2]]  # fmt: skip


def _settings(then: RunSpec, now: RunSpec) -> list[tuple[str, str, str]]:
    before, after = _flat(then), _flat(now)
    return [(name, before[name], after[name]) for name in before]


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """The settings of a run, those inside others by their path: "levers.loss"."""
    out: dict[str, str] = {}
    for field in fields(value):
        inner = getattr(value, field.name)
        if field.name in NOT_MEMORY:
            continue
        if is_dataclass(inner):
            out |= _flat(inner, f"{field.name}.")
        else:
            out[prefix + field.name] = ",".join(inner) if isinstance(inner, tuple) else str(inner)
    return out
