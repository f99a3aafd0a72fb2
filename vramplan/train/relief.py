"""What can still be done when a single row does not fit: levers that trade time for memory, turned while training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from vramplan.core.types import Levers
from vramplan.train.fast.install import Fused

MEASURES = {"checkpoint": "every layer checkpointed", "offload": "checkpoints in host memory"}


class Relief(Protocol):
    """Measures in order, cheapest first; names as in MEASURES. One that was taken stays; none changes the result."""

    taken: list[str]

    def take(self) -> str | None:
        """Take the next measure and return its name, or None if none is left."""


class NoRelief:
    """Nothing can be done."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def take(self) -> str | None:
        return None


class CheckpointRelief:
    """transformers' own levers: first checkpoint every layer, then hold the checkpoints in host memory.

    model: the causal language model inside PEFT. levers: what is in force when training starts.
    """

    def __init__(self, model: Any, levers: Levers, device: torch.device) -> None:
        self.model = model
        self.taken: list[str] = []
        self._offload = levers.checkpoint_offload
        possible = {
            "checkpoint": levers.checkpointing != "all",
            "offload": device.type == "cuda" and not levers.checkpoint_offload,
        }
        can = bool(model.supports_gradient_checkpointing)
        self._left = [name for name, useful in possible.items() if can and useful]

    def take(self) -> str | None:
        if not self._left:
            return None
        name = self._left.pop(0)
        self._offload = self._offload or name == "offload"
        if getattr(self.model, "_require_grads_hooks", None):  # enabling again would hook the embeddings twice
            self.model.disable_input_require_grads()
        self.model.gradient_checkpointing_enable({"use_reentrant": False}, every_n_layers=1, offload=self._offload)
        self.taken.append(name)
        return name


class FusedRelief:
    """The same of fused layers, whose checkpoints are ours."""

    def __init__(self, fused: Fused, levers: Levers, device: torch.device) -> None:
        self.fused = fused
        self.taken: list[str] = []
        self._left = ["checkpoint"] if levers.checkpointing != "all" else []
        if device.type == "cuda" and not levers.checkpoint_offload:
            self._left.append("offload")

    def take(self) -> str | None:
        if not self._left:
            return None
        name = self._left.pop(0)
        if name == "checkpoint":
            self.fused.checkpoint_all()
        else:
            self.fused.offload()
        self.taken.append(name)
        return name


def retake(relief: Relief, names: Iterable[str]) -> None:
    """Take what an earlier process of the run had taken."""
    wanted = set(names)
    while wanted - set(relief.taken) and relief.take() is not None:
        pass
