"""How a run can end: every exception becomes one word, one exit code and one clear line. No torch here."""

from __future__ import annotations

import errno
import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from vramplan.core.units import parse_size
from vramplan.errors import ENDED_IN_OOM, OUR_ERROR, MissingExtra, VramplanError

INTERRUPTED_EXIT = 130
TRAIN_MODULES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "datasets", "safetensors", "tokenizers")
HOST_TEXTS = ("can't allocate memory", "cannot allocate memory", "defaultcpuallocator: not enough memory")
OOM_TEXTS = (
    *HOST_TEXTS,
    "out of memory",  # torch, CUDA and HIP runtime and driver, Triton, NCCL, cudaMallocAsync
    "exceed allowed memory",
    "preemptively rejected",  # torch 2.15, at the cap of set_per_process_memory_fraction
    "_status_alloc_failed",  # cuBLAS, cuSPARSE, cuSOLVER, cuDNN, hipBLAS
    "error_out_of_memory",
    "errormemoryallocation",
    "erroroutofmemory",
)
# A full card, but also a bug: only somebody who can look at the card can tell.
WEAK_TEXTS = ("cudnn_status_internal_error", "cublas_status_not_initialized")
OOM_CLASSES = ("OutOfMemoryError", "AcceleratorError", "RuntimeError", "MemoryError")
_REQUEST = re.compile(r"(?:tried to allocate|requested size:?|requested\s*:)\s*([\d.]+\s*(?:bytes|[kmgt]i?b))", re.I)


class Interrupted(BaseException):
    """SIGINT or SIGTERM; the message says what was saved. Not an Exception: no library's `except` may swallow it."""


@dataclass(frozen=True)
class Outcome:
    ended: str  # finished | interrupted | oom | error
    exit_code: int
    message: str
    hint: str = ""


class PeerFailed(Exception):
    """Another process of the run cannot go on; all of them end the way it did."""

    def __init__(self, rank: int, outcome: Outcome) -> None:
        super().__init__(f"rank {rank} failed; its log says why")
        self.outcome = replace(outcome, message=f"rank {rank}: {outcome.message}")


def outcome_of(error: BaseException) -> Outcome:
    """What an exception means to the user. The message is one line."""
    if isinstance(error, PeerFailed):
        return error.outcome
    if isinstance(error, VramplanError):
        ended = "oom" if error.exit_code == ENDED_IN_OOM else "error"
        return Outcome(ended, error.exit_code, error.message, error.hint)
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return Outcome("interrupted", INTERRUPTED_EXIT, str(error) or "interrupted", "continue with --resume")
    if is_out_of_memory(error):
        return Outcome("oom", ENDED_IN_OOM, first_line(error), "ask `vramplan diagnose RUN_DIR` what would fit")
    if is_disk_full(error):
        return Outcome("error", OUR_ERROR, f"the disk is full: {first_line(error)}", "free space, then --resume")
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in TRAIN_MODULES:
        missing = MissingExtra(f"training (no module named {error.name!r})")
        return Outcome("error", missing.exit_code, missing.message, missing.hint)
    return Outcome("error", OUR_ERROR, f"{type(error).__name__}: {first_line(error)}", "see log.txt in the run folder")


def first_line(error: BaseException, limit: int = 2000) -> str:
    """The first line of an exception's text that is not empty, cut to `limit` characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def is_out_of_memory(error: BaseException) -> bool:
    """Told by class name and text: torch may not even be importable where this is asked.

    An error that was raised from such a one (by a compiler, say) is one too. Triton's OutOfResources is not: a kernel
    that wants more shared memory than a chip has fails on an empty card as well.
    """
    seen: BaseException | None = error
    while seen is not None:
        if _names(seen) & {"OutOfMemoryError", "MemoryError"} or _says(seen, OOM_TEXTS):
            return True
        seen = seen.__cause__
    return False


def is_host_memory(error: BaseException) -> bool:
    """Of an out-of-memory error: the computer's memory, not the card's."""
    return "MemoryError" in _names(error) or _says(error, HOST_TEXTS)


def may_be_out_of_memory(error: BaseException) -> bool:
    """What libraries say when they get no memory, and at other times too: believe it only if the card is full."""
    return _says(error, WEAK_TEXTS)


def requested_bytes(error: BaseException) -> int | None:
    """The size in "Tried to allocate 2.00 GiB"; None where the message names none."""
    match = _REQUEST.search(str(error))
    try:
        return parse_size(match[1]) if match else None
    except ValueError:
        return None


def _names(error: BaseException) -> set[str]:
    return {cls.__name__ for cls in type(error).__mro__}


def _says(error: BaseException, texts: Iterable[str]) -> bool:
    text = str(error).lower()
    return bool(_names(error) & set(OOM_CLASSES)) and any(known in text for known in texts)


def is_disk_full(error: BaseException) -> bool:
    """ENOSPC or EDQUOT, also when a library (safetensors, torch.save) has wrapped it in an error of its own."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            return True
        if "No space left on device" in str(seen) or "Disk quota exceeded" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class StopSignal:
    """SIGINT and SIGTERM. While training they only set `asked`, so that the trainer ends the step and saves; at any
    other time, and on the second signal, they raise Interrupted where the program stands."""

    def __init__(self) -> None:
        self.asked = False
        self.training = False
        for name in ("SIGINT", "SIGTERM"):
            signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> Any:
        if self.training and not self.asked:
            self.asked = True
            return
        raise Interrupted(f"stopped by {signal.Signals(number).name}")
