"""What can still be done when a single row does not fit: levers that trade time for memory, turned while training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from vramplan.core.types import Levers
from vramplan.train.fast.install import Fused

MEASURES = {"checkpoint": "every layer checkpointed", "offload": "checkpoints in host memory"}


class Relief:
    """Measures in order, cheapest first; names as in MEASURES. One that was taken stays; none changes the result.

    left: those that can be taken. Without any nothing can be done.
    """

    def __init__(self, *left: str) -> None:
        self.taken: list[str] = []
        self._left = list(left)

    def take(self) -> str | None:
        """Take the next measure and return its name, or None if none is left."""
        if not self._left:
            return None
        name = self._left.pop(0)
        self._apply(name)
        self.taken.append(name)
        return name

    def _apply(self, name: str) -> None:
        raise NotImplementedError


def _useful(levers: Levers, device: torch.device) -> list[str]:
    """The measures that save something where these levers are in force."""
    everywhere = [] if levers.checkpointing == "all" else ["checkpoint"]
    return [*everywhere, "offload"] if device.type == "cuda" and not levers.checkpoint_offload else everywhere


class CheckpointRelief(Relief):
    """transformers' own levers: first checkpoint every layer, then hold the checkpoints in host memory.

    model: the causal language model inside PEFT. levers: what is in force when training starts.
    """

    def __init__(self, model: Any, levers: Levers, device: torch.device) -> None:
        super().__init__(*(_useful(levers, device) if model.supports_gradient_checkpointing else ()))
        self.model = model
        self._offload = levers.checkpoint_offload and device.type == "cuda"

    def _apply(self, name: str) -> None:
        self._offload = self._offload or name == "offload"
        if getattr(self.model, "_require_grads_hooks", None):  # enabling again would hook the embeddings twice
            self.model.disable_input_require_grads()
        self.model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=1, offload=self._offload)


class FusedRelief(Relief):
    """The same of fused layers, whose checkpoints are ours."""

    def __init__(self, fused: Fused, levers: Levers, device: torch.device) -> None:
        super().__init__(*_useful(levers, device))
        self.fused = fused

    def _apply(self, name: str) -> None:
        if name == "checkpoint":
            self.fused.checkpoint_all()
        else:
            self.fused.offload()


def retake(relief: Relief, names: Iterable[str]) -> None:
    """Take what an earlier process of the run had taken."""
    wanted = set(names)
    while wanted - set(relief.taken) and relief.take() is not None:
        pass
