"""Calls of NVML that answer, answer None, or fail in one sentence.

The library is handed in, because `sources/gpu.py` alone opens it. What WSL, containers and old drivers report in place
of an answer (0, -1, "N/A", sizes beyond the card) is told apart here: `whole` and `words` make None of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vramplan.errors import VramplanError

ELSEWHERE = "estimate and fit take --gpu NAME for a card that is not in this machine"
_FAILURES = {  # end of pynvml's constant -> what to say, what to do
    "LIBRARY_NOT_FOUND": ("no NVIDIA driver library (NVML) on this machine", ""),
    "DRIVER_NOT_LOADED": ("the NVIDIA driver is not loaded", "does `nvidia-smi` work?"),
    "NO_PERMISSION": ("NVML may not read the card", "in a container, start it with --gpus all"),
    "GPU_IS_LOST": ("the GPU has fallen off the bus", "restart the machine and look at dmesg for Xid 79"),
    "RESET_REQUIRED": ("the GPU has to be reset", "restart the machine"),
    "GPU_NOT_FOUND": ("NVML finds no such GPU", ""),
    "LIB_RM_VERSION_MISMATCH": (
        "the NVIDIA driver and its library have different versions",
        "the driver was updated while loaded: restart the machine",
    ),
}
_LOST = ("GPU_IS_LOST", "RESET_REQUIRED")
_NO_WORDS = {"", "-", "n/a", "[n/a]", "none", "unknown", "[unknown]", "[not found]", "not found", "[not supported]",
             "[insufficient permissions]"}  # fmt: skip
MAX_WORDS = 120


class Calls:
    """An open NVML, called by name."""

    def __init__(self, nvml: Any) -> None:
        self.nvml = nvml
        # what pynvml raises where the driver is older than the library is no NVMLError
        self.errors: tuple[type[Exception], ...] = (
            nvml.NVMLError,
            getattr(nvml, "NVMLLibraryMismatchError", nvml.NVMLError),
        )

    def must(self, name: str, *arguments: Any) -> Any:
        """The answer, or a VramplanError."""
        try:
            return getattr(self.nvml, name)(*arguments)
        except self.errors as error:
            raise self.failure(error) from None

    def may(self, name: str, *arguments: Any) -> Any:
        """None where the card, the driver or the library does not answer this; a lost card is an error still."""
        try:
            return getattr(self.nvml, name)(*arguments)
        except self.errors as error:
            if self.code(error) in _LOST:
                raise self.failure(error) from None
        except (TypeError, AttributeError, ValueError):  # an older pynvml without it; a text that is no UTF-8
            pass
        return None

    def first(self, names: Iterable[str], *arguments: Any) -> Any:
        """The answer of the first of these calls that has one: newer name before older."""
        return next((answer for name in names if (answer := self.may(name, *arguments)) is not None), None)

    def code(self, error: Exception) -> str | None:
        """The end of the error's constant, of those that are told apart."""
        value = getattr(error, "value", None)
        return next((code for code in _FAILURES if getattr(self.nvml, f"NVML_ERROR_{code}", code) == value), None)

    def failure(self, error: Exception) -> VramplanError:
        code = self.code(error)
        if code is None:
            hint = "does `nvidia-smi` work? A container that has lost its card finds it again after a restart"
            return VramplanError(f"NVML does not answer: {error}", f"{hint}; {ELSEWHERE}")
        message, hint = _FAILURES[code]
        return VramplanError(message, f"{hint.rstrip('?')}; {ELSEWHERE}" if hint else ELSEWHERE)


# -------------------------------------------------------------------------------------------- answers that are none
def whole(value: Any, low: int, high: int) -> int | None:
    """A whole number of a size that it can have, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high else None


def switch(value: Any) -> bool | None:
    """NVML's enabled or disabled."""
    return {0: False, 1: True}.get(value) if isinstance(value, int) else None


def text(value: Any) -> str:
    """NVML's text, which older libraries give as bytes, without anything that would steer a terminal."""
    plain = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in plain)


def words(value: Any) -> str | None:
    """A text that says something, cut to a sensible length."""
    plain = text(value).strip() if isinstance(value, (str, bytes)) else ""
    return None if plain.lower() in _NO_WORDS else plain[:MAX_WORDS]
