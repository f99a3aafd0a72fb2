"""The errors a user can meet. Each is one sentence, an optional hint, and an exit code of the CLI contract."""

from __future__ import annotations

OK, OUR_ERROR, BAD_INPUT, DOES_NOT_FIT, ENDED_IN_OOM, ROSE = 0, 1, 2, 3, 4, 5


class VramplanError(Exception):
    """Something the user can be told in one sentence; `hint` says what to do about it."""

    exit_code = OUR_ERROR

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(VramplanError):
    """A flag, a file or a name that cannot be used (exit code 2)."""

    exit_code = BAD_INPUT


class UnknownArchitecture(InputError):
    """A model whose block is not described; never guessed (exit code 2)."""


class DoesNotFit(VramplanError):
    """No plan fits the card (exit code 3)."""

    exit_code = DOES_NOT_FIT


class OutOfMemory(VramplanError):
    """Memory ran out and nothing was left that would have needed less (exit code 4)."""

    exit_code = ENDED_IN_OOM


class DiskFull(VramplanError):
    """Something could not be saved; what was there before still is (exit code 1)."""


class NotFinite(VramplanError):
    """Training has no finite gradient any more (exit code 1)."""


class MissingExtra(VramplanError):
    """A library of an optional extra is not installed (exit code 1)."""

    def __init__(self, what: str, extra: str = "train") -> None:
        super().__init__(f"{what} needs the {extra!r} extra", f'pip install "vramplan[{extra}]"')
