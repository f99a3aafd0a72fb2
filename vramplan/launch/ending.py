"""How a run ended: from the child's own last words, or from what it left behind when it had none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vramplan.core.types import Measurement
from vramplan.errors import BAD_INPUT, ENDED_IN_OOM, OK, OUR_ERROR
from vramplan.launch.watching import size_of

INTERRUPTED = 130
_EXIT_CODES = (OK, OUR_ERROR, BAD_INPUT, ENDED_IN_OOM, INTERRUPTED)
_RESUME = "--resume starts at the last checkpoint"
_TAIL_BYTES, _TAIL_LINES = 16 * 1024, 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended. `exit_code` is 0, 1, 2, 4 or 130; `ended` finished, interrupted, oom or error.

    `peak_process_bytes` is the most that NVML showed for the child, or, where it cannot tell processes apart, the
    most by which the card's use grew; None without NVML.
    """

    exit_code: int
    ended: str
    message: str = ""
    hint: str = ""
    measurement: Measurement | None = None
    peak_process_bytes: int | None = None


def said(end: dict[str, Any]) -> tuple[str, str, str, int]:
    """The child's own last words: (ended, message, hint, exit code)."""
    code = end.get("exit_code")
    if code not in _EXIT_CODES or isinstance(code, bool):
        code = OUR_ERROR
    ended = end.get("ended")
    if ended not in ("finished", "interrupted", "oom", "error"):
        ended = "error"
    return str(ended), str(end.get("message") or ""), str(end.get("hint") or ""), code


def died(returncode: int, stops: int, output: str) -> tuple[str, str, str, int]:
    """(ended, message, hint, exit code) of a child that ended without a word. `output` is the end of its log."""
    last = output.splitlines()[-1].strip() if output else ""
    if stops:
        return (
            "interrupted",
            "stopped before the state was saved",
            "--resume starts at the last checkpoint",
            INTERRUPTED,
        )
    if "OutOfMemoryError" in output or "CUDA out of memory" in output:
        return "oom", last, "vramplan diagnose RUN_DIR says what would fit", ENDED_IN_OOM
    if returncode < 0:
        return "error", *_signal_words(-returncode, output), OUR_ERROR
    if returncode == BAD_INPUT and last.startswith("error: "):  # refused before it could open progress.jsonl
        return "error", last.removeprefix("error: "), "", BAD_INPUT
    message = f"the training process ended with exit code {returncode} and did not say why"
    return "error", f"{message}\n{output}".rstrip(), "log.txt in the run folder has its whole output", OUR_ERROR


def died_silently(exit_code: int, local_rank: int) -> tuple[str, str, str, int]:
    """(ended, message, hint, exit code) where one of several processes ended without a word and torchrun the others."""
    if exit_code < 0:
        message, hint = _signal_words(-exit_code, "")
        return "error", message.replace("the training process", f"the process of GPU {local_rank}"), hint, OUR_ERROR
    name = "log.txt" if local_rank == 0 else f"log.rank{local_rank}.txt"
    message = f"the process of GPU {local_rank} ended with exit code {exit_code} and did not say why"
    return "error", message, f"{name} in the run folder has its whole output", OUR_ERROR


def _signal_words(number: int, output: str) -> tuple[str, str]:
    """(message, hint) for a child that a signal ended."""
    import signal

    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    if name == "SIGKILL":
        return (
            "the training process was ended by the kernel (SIGKILL)",
            f"host memory ran out? look at dmesg or the container's memory limit; {_RESUME}",
        )
    message = f"the training process crashed ({name})\n{output}".rstrip()
    return message, "a native library failed: do the versions of torch, bitsandbytes and the driver fit together?"


def log_tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(size_of(path) - _TAIL_BYTES, 0))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.strip().splitlines()[-_TAIL_LINES:])
