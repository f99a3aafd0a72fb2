"""The least change of levers with which a run fits a card."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from .fixes import LEANER_OPTIMIZER
from .sizes import Sizes
from .types import GpuProfile, Levers, ModelSpec, RunSpec

Changes = tuple[dict[str, Any], ...]


def savings(model: ModelSpec, levers: Levers) -> Changes:
    """What can be changed to save memory, in the order in which it is tried: first what leaves every number of the
    training as it is, then the optimizer's precision, then what is rounded elsewhere."""
    eager = levers.attention == "eager" and model.attn_logit_softcapping is None  # only eager does soft-capping
    changes = (
        {"checkpointing": "all"},
        {"checkpointing": "all", "checkpoint_offload": True},
        {"optimizer": LEANER_OPTIMIZER.get(levers.optimizer, levers.optimizer)},
        {"loss": "fused"},
        {"upcast": "none"},
        {"allocator": "expandable"},
        {"kernels": "fused"},
        {"attention": "sdpa" if eager else levers.attention},
    )
    return tuple(change for change in changes if replace(levers, **change) != levers)


def changed(run: RunSpec, changes: Iterable[dict[str, Any]]) -> RunSpec:
    levers = run.levers
    for change in changes:
        levers = replace(levers, **change)
    return replace(run, levers=levers)


def least_change(sizes: Sizes, run: RunSpec, gpu: GpuProfile) -> RunSpec:
    """The run as it is where it fits, else with one lever changed, else with so many that none can be left out.

    Where all of them are not enough: with all of them, whatever that lacks. Raises Unplannable.
    """
    if sizes.fits(run, gpu):
        return run
    changes = savings(sizes.model, run.levers)
    for change in changes:
        if sizes.fits(changed(run, (change,)), gpu):
            return changed(run, (change,))
    count = next((n for n in range(2, len(changes) + 1) if sizes.fits(changed(run, changes[:n]), gpu)), None)
    if count is None:
        return changed(run, changes)
    return changed(run, _without_needless(sizes, run, gpu, changes[:count]))


def _without_needless(sizes: Sizes, run: RunSpec, gpu: GpuProfile, changes: Changes) -> Changes:
    """The same changes, less those without which it fits too; the later ones go first.

    Again after each that went: a few tokens take more with their checkpoints in host memory, so that without it
    another change may have become needless.
    """
    for change in reversed(changes):
        fewer = tuple(kept for kept in changes if kept is not change)
        if sizes.fits(changed(run, fewer), gpu):
            return _without_needless(sizes, run, gpu, fewer)
    return changes
