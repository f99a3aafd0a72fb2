"""The trainer as one rank of several (`parallel.py`): everything it does beside the work of a single one."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vramplan.train.data import IGNORED, Example
from vramplan.train.parallel import World
from vramplan.train.trainer import QloraTrainer


class RankTrainer(QloraTrainer):
    """accelerate gives each rank its micro-batches, in one order for all. The main rank writes what is saved."""

    def __init__(self, *, world: World, **keywords: Any) -> None:
        self.world = world
        arguments = keywords["args"]
        if arguments.data_seed is None:
            arguments.data_seed = arguments.seed  # the ranks' other random numbers differ
        super().__init__(**keywords)
        self.window.sum = lambda tokens: int(world.sum(tokens)[0])
        self._random_states: list[tuple[str, bytes]] = []
        self._divisor = 1  # of what is summed over the ranks, where their losses are means

    def create_accelerator_and_postprocess(self) -> None:
        """The model stays as it is, and where it is: no DistributedDataParallel around it, no copies of what is a view
        of a flat adapter (accelerate moves a model on CPUs from "cpu" to "cpu:0")."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)

    # ------------------------------------------------------------------------------------------------- training
    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Labelled tokens of a step on all ranks, which the loss is divided by; gradients are summed, not averaged."""
        return self.world.sum_items(super()._get_num_items_in_batch(batch_samples, device))

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-step; after the last of an optimizer step the ranks meet. Returns the loss times their number,
        because transformers logs the mean of what the ranks return, and theirs add up to the whole batch's."""
        self._divisor = self.world.size if num_items_in_batch is None else 1
        loss = self.world.together(partial(super().training_step, model, inputs, num_items_in_batch))
        if self.accelerator.sync_gradients:
            self.world.sync(self.trained, self._divisor)
        return loss * self.world.size / self._divisor

    # ----------------------------------------------------------------------------------------------- evaluation
    def evaluation_loss(self, dataset: Any) -> float:
        share = Share(dataset, self.world)
        loss = self.world.together(partial(super().evaluation_loss, share))
        self.world.meet()
        labelled = share.labelled()
        total, count = self.world.sum(loss * labelled if labelled else 0.0, labelled)
        return total / count if count else float("nan")

    # --------------------------------------------------------------------------------------------------- saving
    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._random_states = self.world.gather(self._own_random_state())
        super()._save_checkpoint(model, trial)

    def _store_checkpoint(self) -> None:
        if self.world.main:
            super()._store_checkpoint()

    def _save_rng_state(self, output_dir: str) -> None:
        for name, content in self._random_states:
            (Path(output_dir) / name).write_bytes(content)

    def _own_random_state(self) -> tuple[str, bytes]:
        """The file that transformers would write for this rank."""
        with tempfile.TemporaryDirectory() as folder:
            super()._save_rng_state(folder)
            (file,) = Path(folder).iterdir()
            return file.name, file.read_bytes()


class Share(Sequence[Example]):
    """Every N-th row of a data set: one rank's. Where there are fewer rows than others have, one that counts for
    nothing: with sharded weights all ranks must run the same number of batches."""

    def __init__(self, dataset: Sequence[Example], world: World) -> None:
        self.dataset, self.world = dataset, world

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world.size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = index * self.world.size + self.world.rank
        if row < len(self.dataset):
            return self.dataset[row]
        filler = self.dataset[0]
        return {**filler, "labels": [IGNORED] * len(filler["labels"])}

    def labelled(self) -> int:
        """Tokens that count in the loss: a row's first has nothing before it to be predicted from."""
        return sum(label != IGNORED for index in range(len(self)) for label in self[index]["labels"][1:])
