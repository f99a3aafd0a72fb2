"""Which of a run's processes this is, as torchrun or `accelerate launch` say in the environment. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vramplan.core.types import RunSpec
from vramplan.errors import InputError


@dataclass(frozen=True)
class Place:
    """Process `rank` of `size`, number `local_rank` on its machine. One process is 0 of 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this one writes what all share: checkpoints, adapter, the main events."""
        return self.rank == 0

    def file(self, run_dir: Path, name: str) -> Path:
        """`RUN_DIR/log.txt` of the main process, `RUN_DIR/log.rank1.txt` of the next."""
        stem, _, suffix = name.rpartition(".")
        return run_dir / (name if self.main else f"{stem}.rank{self.rank}.{suffix}")


def place_in(environment: Mapping[str, str]) -> Place:
    """InputError if the variables are not numbers that fit together."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if any(name not in environment for name in names):
        return Place()
    try:
        rank, size, local_rank = (int(environment[name]) for name in names)
    except ValueError:
        rank = size = local_rank = -1
    if not (0 <= rank < size and 0 <= local_rank < size):
        said = ", ".join(f"{name}={environment[name]}" for name in names)
        raise InputError(f"the environment is not that of a process of several: {said}")
    return Place(rank, size, local_rank)


def check_size(run: RunSpec, place: Place) -> None:
    """InputError unless as many processes were started as the run is for: another number is another effective batch."""
    if place.size != run.gpus:
        raise InputError(
            f"the run is for {run.gpus} GPU{'s' if run.gpus > 1 else ''}, but {place.size} "
            f"process{'es were' if place.size > 1 else ' was'} started",
            f"torchrun --nproc-per-node {run.gpus} -m vramplan.train RUN_DIR, or a new run with --gpus {place.size}",
        )
