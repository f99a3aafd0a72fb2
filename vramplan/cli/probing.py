"""`fit --probe`: the card is looked at before the plan is made, and the plan tried on it afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from vramplan.cli import build, error_line, runner
from vramplan.core.types import GpuProfile, Plan
from vramplan.core.units import human
from vramplan.errors import InputError, VramplanError

if TYPE_CHECKING:
    from vramplan.launch.probing import Place
    from vramplan.launch.tenants import Say

WITHOUT = "without --probe the plan is the same, unverified"


class Prober:
    """--probe from start to end, a context manager. `failure` is why nothing was verified, if nothing was."""

    def __init__(self, params: build.Params) -> None:
        self.params, self.index = params, params["gpu_index"]
        self.named = params["gpu"] != "live"
        self.stack = ExitStack()
        self.nvml: Any = None
        self.here: GpuProfile | None = None  # this machine's card, once it was at rest
        self.failure: VramplanError | None = None

    def __enter__(self) -> Prober:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def card(self) -> GpuProfile:
        """The card to plan for, read when it has come to rest. Raises where there is neither a card nor a name."""
        try:
            self._open()
        except VramplanError as error:
            self.failure = error
        if self.named:
            return build.card(self.params["gpu"])
        if self.nvml is None and self.failure is not None:
            raise self.failure
        return build.calibrated(self.here or self.nvml.gpu(self.index), self.params["calibration"])

    def verified(self, plan: Plan) -> Plan:
        """The plan after its probes; as it was where `failure` says why there were none."""
        if self.failure is not None or plan.verdict == "does_not_fit":
            return plan
        try:
            self._check_room(plan)
        except VramplanError as error:
            self.failure = error
            return plan
        plan, self.failure = self._verify(plan)
        for text in plan.probes[-1].disturbances if plan.probes else ():
            build.warn(f"{text} while the plan was tried: the probe proves nothing")
        return plan

    def tell_failure(self) -> None:
        if self.failure is not None:
            click.echo(error_line(f"nothing was verified: {self.failure.message}", self.failure.hint), err=True)

    def _open(self) -> None:
        self.nvml = open_nvml(self.stack, self.index, "to probe on", WITHOUT)
        self.here = card_at_rest(self.nvml, self.index, "vramplan fit --probe")

    def _check_room(self, plan: Plan) -> None:
        """A plan for another card is tried in as much memory as that one has."""
        assert self.here is not None
        free = self.here.usable_bytes
        if self.named and free < plan.budget_bytes:
            text = f"{self.here.name} has {human(free)} free, too little to stand in for {plan.gpu.key}"
            raise InputError(text, WITHOUT)

    def _verify(self, plan: Plan) -> tuple[Plan, VramplanError | None]:
        from vramplan.launch.verifying import verify

        assert self.here is not None
        with played_at(self.here, self.nvml, self.index, plan.ledger.peak.allocated_bytes, self.params["width"]) as at:
            return verify(plan, *at, capped=self.named, shorten=self.params["objective"] == "context")


# ------------------------------------------------------------------------------ what `diagnose --verify` does too
def open_nvml(stack: ExitStack, index: int, what_for: str, without: str) -> Any:
    """A session with the driver, as long as `stack` is open. InputError, with `without` as its hint, without a card."""
    from vramplan.sources.gpu import Nvml

    try:
        nvml = stack.enter_context(Nvml())
        nvml.gpu(index)
    except VramplanError as error:
        raise InputError(f"there is no CUDA GPU {what_for}: {error.message}", without) from error
    return nvml


def card_at_rest(nvml: Any, index: int, command: str) -> GpuProfile:
    """The card when nobody works on it any more; `command` needs the libraries of training."""
    from vramplan.launch.tenants import wait_until_quiet

    runner.require_extra(command)
    wait_until_quiet(nvml, index, build.note)
    card: GpuProfile = nvml.gpu(index)
    return card


@contextmanager
def played_at(
    card: GpuProfile, nvml: Any, index: int, planned_bytes: int, width: int | None
) -> Iterator[tuple[Place, Say]]:
    """Where children play, and who tells of it, on a display that is there meanwhile."""
    from vramplan.launch.probing import Place
    from vramplan.report.live import make_display

    with make_display(sys.stderr, planned_bytes, width=width) as display:

        def say(text: str) -> None:
            display.on_event({"event": "phase", "name": "probe", "message": text})

        yield Place(card=card, nvml=nvml, index=index, on_event=display.on_event, log=_show_log), say


def _show_log(text: str) -> None:
    click.echo(text, err=True)
