"""`diagnose --verify`: fixes are tried on this machine's card before they are shown."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import click

from vramplan.cli import build, error_line, runner
from vramplan.cli.probing import show_log
from vramplan.core.types import Diagnosis
from vramplan.errors import InputError, VramplanError

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
        from vramplan.launch.probing import Place
        from vramplan.launch.tenants import wait_until_quiet
        from vramplan.launch.trying import try_fixes
        from vramplan.report.live import make_display
        from vramplan.sources.gpu import Nvml

        with ExitStack() as stack:
            try:
                nvml = stack.enter_context(Nvml())
            except VramplanError as error:
                raise InputError(f"there is no CUDA GPU to try fixes on: {error.message}", WITHOUT) from error
            runner.require_extra("vramplan diagnose --verify")
            wait_until_quiet(nvml, 0, build.note)
            display = stack.enter_context(make_display(sys.stderr, diagnosis.predicted_bytes or 0, width=self.width))

            def say(text: str) -> None:
                display.on_event({"event": "phase", "name": "probe", "message": text})

            return try_fixes(
                diagnosis, Place(card=nvml.gpu(0), nvml=nvml, on_event=display.on_event, log=show_log), say
            )
