"""Graphs without a card: a piece of work that is noted down and done whenever the graph is played."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from guard_tools import Made, make_trainer

from vramplan.train import trainer as trainer_module
from vramplan.train.fast.graphs import Graphs
from vramplan.train.fused_loss import labelled_rows


class Noted:
    """Records by remembering the work, which then runs whenever the graph is played."""

    def __init__(self) -> None:
        self.has_room = self.waits = True
        self.error: Exception | None = None
        self.played = self.dropped = self.asked = 0
        self.reserved_bytes = 0
        self.replayed: Callable[[], None] = lambda: None

    def room(self) -> bool:
        self.asked += 1
        return self.has_room

    def caught_up(self, patience_s: float) -> bool:
        return self.waits

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        if self.error is not None:
            raise self.error

        def play() -> Any:
            self.played += 1
            self.replayed()
            return work()

        return play

    def drop(self) -> None:
        self.dropped += 1


def rows(count: int, lengths: tuple[int, ...] = (16,)) -> list[dict[str, list[int]]]:
    """Rows whose length changes from micro-batch to micro-batch of two, the first third without labels."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for index in range(count):
        size = lengths[index // 2 % len(lengths)]
        ids = torch.randint(3, 64, (size,), generator=draw).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (size // 3) + ids[size // 3 :], "attention_mask": [1] * size})
    return made


def make(folder: Path, noted: Noted | None, said: list[str] | None = None, **options: Any) -> Made:
    options = {"rows": 2, "accumulation": 2, "steps": 4, "optimizer": "adamw_torch", "dataset": rows(16), **options}
    made = make_trainer(folder, **options)
    if noted is not None:
        trainer, tell = made.trainer, (lambda _: None) if said is None else said.append
        trainer.graphs = Graphs(trainer.static_micro_step, trainer.trained, lambda: None, tell, noted)
    return made


@pytest.fixture
def loss_of_labelled_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss that runs without a card knows no rows without a label."""
    monkeypatch.setattr(trainer_module, "every_row", labelled_rows)
