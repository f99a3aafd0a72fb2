"""What torchrun starts in test_train_ranks.py: the training child, with a failure built in that SCENARIO names."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import torch

from vramplan.train.__main__ import main
from vramplan.train.trainer import QloraTrainer

RANK = int(os.environ["RANK"])
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"
stock = QloraTrainer.training_step


def halves(self: Any, model: Any, inputs: dict[str, Any], items: Any) -> Any:
    """Rank 1 does its micro-batches row by row, and takes its time: the others must wait, and nothing else changes."""
    if RANK != 1:
        return stock(self, model, inputs, items)
    time.sleep(0.3)
    rows = range(inputs["input_ids"].shape[0])
    return sum(stock(self, model, {k: v[row : row + 1] for k, v in inputs.items()}, items) for row in rows)


def no_memory(self: Any, model: Any, inputs: dict[str, Any], items: Any) -> Any:
    """Rank 1 cannot do the second step."""
    if RANK == 1 and self.state.global_step == 1:
        raise torch.OutOfMemoryError(MESSAGE)
    return stock(self, model, inputs, items)


def no_memory_for_two(self: Any, model: Any, inputs: dict[str, Any], items: Any) -> Any:
    """Rank 1 cannot do two rows at once in the fourth step: the checkpoint of the second is there by then."""
    if RANK == 1 and self.state.global_step == 3 and inputs["input_ids"].shape[0] > 1:
        raise torch.OutOfMemoryError(MESSAGE)
    return stock(self, model, inputs, items)


def killed(self: Any, model: Any, inputs: dict[str, Any], items: Any) -> Any:
    if RANK == 1 and self.state.global_step == 1:
        os.kill(os.getpid(), 9)
    return stock(self, model, inputs, items)


def slow(self: Any, model: Any, inputs: dict[str, Any], items: Any) -> Any:
    """Time for a signal to come."""
    time.sleep(0.2)
    return stock(self, model, inputs, items)


if __name__ == "__main__":
    torch.set_num_threads(1)
    QloraTrainer.training_step = globals()[os.environ["SCENARIO"]]
    sys.exit(main(sys.argv[1:]))
