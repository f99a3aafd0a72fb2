"""A failure for lack of memory: told from others, described, and its remains freed; and how much room a card has."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vramplan.core.causes import phase_of
from vramplan.core.units import MIB
from vramplan.train.outcome import (
    first_line,
    is_host_memory,
    is_out_of_memory,
    may_be_out_of_memory,
    requested_bytes,
)

# A card with less than this left is full: what libraries then report as internal errors is lack of memory.
FULL_BYTES = 256 * MIB
SLACK = 1.05  # what an allocator may need over what is allocated

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Failure:
    """Where memory ran out (forward | loss | backward | optimizer | evaluation) and what was asked for."""

    where: str
    message: str
    requested_bytes: int | None = None

    def fields(self) -> dict[str, Any]:
        """As fields of an event."""
        asked = {} if self.requested_bytes is None else {"requested_bytes": self.requested_bytes}
        return {"where": self.where, "message": self.message, **asked}


class Card:
    """The device that is short of memory. On a CPU there is always room: nothing counts what is left."""

    def __init__(self, device: torch.device, forget: Callable[[], None] = lambda: None) -> None:
        """forget: drops what else an interrupted step has left behind."""
        self.device, self.forget = device, forget
        self.cuda = device.type == "cuda"

    def failure(self, error: BaseException, where: str = "") -> Failure | None:
        """What `error` says, if smaller pieces may cure it; None for every other error.

        The computer's memory is not spared by smaller pieces on a card. Without `where` the traceback tells it.
        """
        out = is_out_of_memory(error) or (may_be_out_of_memory(error) and self.is_full())
        if not out or (self.cuda and is_host_memory(error)):
            return None
        return Failure(where or where_of(error), first_line(error, 300), requested_bytes(error))

    def is_full(self) -> bool:
        return self.cuda and int(torch.cuda.mem_get_info(self.device)[0]) < FULL_BYTES

    def free(self) -> None:
        """Give back what nothing refers to any more. The error itself must have been let go: see `let_go`."""
        self.forget()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def has_room(self, peak_bytes: int | None) -> bool:
        """Whether a step of this peak would fit with twice the activations, by what is free and allowed now."""
        if not self.cuda:
            return True
        if peak_bytes is None:
            return False
        resident = int(torch.cuda.memory_allocated(self.device))
        needed = SLACK * (resident + 2 * max(peak_bytes - resident, 0))
        return needed <= resident + room_bytes(self.device)


def room_bytes(device: torch.device) -> int:
    """What this process may still allocate, by what is free now and by its cap; what it has cached counts as room."""
    free, total = torch.cuda.mem_get_info(device)
    allowed = min(int(free + torch.cuda.memory_reserved(device)), int(total * _fraction(device)))
    return allowed - int(torch.cuda.memory_allocated(device))


def _fraction(device: torch.device) -> float:
    """The cap that the process has been given, as a share of the card."""
    ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch 2.9
    return float(ask(device)) if ask is not None else 1.0


def where_of(error: BaseException) -> str:
    """forward, loss or backward, by the frames of the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    phase = phase_of(tuple(f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.name}" for f in frames))
    return phase if phase in ("loss", "backward") else "forward"


def let_go(error: BaseException | None) -> None:
    """Drop the frames of an error, and of those it came from: they hold every tensor of the step that failed."""
    while error is not None:
        if error.__traceback__ is not None:
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None
        error = error.__cause__ or error.__context__
