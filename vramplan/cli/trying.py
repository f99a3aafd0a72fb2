"""`diagnose --verify`: fixes are tried on this machine's card before they are shown."""

from __future__ import annotations

from contextlib import ExitStack

import click

from vramplan.cli import error_line
from vramplan.cli.probing import card_at_rest, open_nvml, played_at
from vramplan.core.types import Diagnosis
from vramplan.errors import VramplanError

WITHOUT = "without --verify the diagnosis is the same, untried"


class Trial:
    """Called with a diagnosis. `failure` is why nothing was tried, if nothing was."""

    def __init__(self, width: int | None = None) -> None:
        self.width = width
        self.failure: VramplanError | None = None

    def __call__(self, diagnosis: Diagnosis) -> Diagnosis:
        try:
            return self._tried(diagnosis)
        except VramplanError as error:
            self.failure = error
            return diagnosis

    def tell_failure(self) -> None:
        if self.failure is not None:
            click.echo(error_line(f"nothing was verified: {self.failure.message}", self.failure.hint), err=True)

    def _tried(self, diagnosis: Diagnosis) -> Diagnosis:
        from vramplan.launch.trying import try_fixes

        with ExitStack() as stack:
            nvml = open_nvml(stack, 0, "to try fixes on", WITHOUT)
            card = card_at_rest(nvml, 0, "vramplan diagnose --verify")
            return try_fixes(
                diagnosis, *stack.enter_context(played_at(card, nvml, 0, diagnosis.predicted_bytes or 0, self.width))
            )
