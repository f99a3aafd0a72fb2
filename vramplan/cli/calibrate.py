"""`vramplan calibrate`: measure this machine's card once, for better predictions of overheads and speed."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from vramplan.cli import INTERRUPTED, build, error_line, options, runner
from vramplan.cli.output import print_json
from vramplan.core.types import Calibration
from vramplan.errors import OK, InputError, VramplanError

if TYPE_CHECKING:
    from vramplan.launch.calibrating import Step


@click.command("calibrate", cls=options.SectionCommand, epilog="Example: vramplan calibrate")
@options.use(options.CALIBRATE, options.GPU_INDEX, options.OUTPUT)
def command(**params: Any) -> int:
    """Measure overheads and speed of this machine's card, in less than five minutes; plans for it then use them."""
    if params["show"] and params["forget"]:
        raise InputError("--show and --forget exclude each other")
    if params["forget"]:
        return _forget(params)
    if params["show"]:
        return _show(params)
    runner.require_extra("vramplan calibrate")
    try:
        return _calibrate(params)
    except KeyboardInterrupt:
        click.echo(error_line("interrupted", "what was measured is kept: the same command goes on"), err=True)
        return INTERRUPTED


def _forget(params: build.Params) -> int:
    from vramplan.sources.calibration import folder, forget

    count = forget()
    if params["as_json"]:
        print_json({"schema_version": 1, "forgotten": count})
    else:
        click.echo(f"{count} file{'s' if count != 1 else ''} deleted in {folder()}")
    return OK


def _show(params: build.Params) -> int:
    from vramplan.sources.calibration import folder, stored
    from vramplan.sources.records import encode

    found, wrong = stored()
    build.warn(*wrong)
    if params["as_json"]:
        files = [{"path": str(path), "calibration": encode(each)} for path, each in found]
        print_json({"schema_version": 1, "calibrations": files})
    for path, each in [] if params["as_json"] else found:
        _print(each, str(path), params)
    if not found:
        build.note(f"no card is calibrated ({folder()})")
    return OK


def _print(found: Calibration, written: str, params: build.Params) -> None:
    from vramplan.report.calibrate import show_calibration

    show_calibration(sys.stdout, found, written, width=params["width"])


def _calibrate(params: build.Params) -> int:
    from datetime import date

    from vramplan.core.calibrate import calibrate
    from vramplan.launch.calibrating import measure_set
    from vramplan.launch.probing import Place
    from vramplan.report.calibrate import make_bar
    from vramplan.sources.calibration import installed_versions, save
    from vramplan.sources.gpu import Nvml
    from vramplan.sources.records import encode

    index = params["gpu_index"]
    with ExitStack() as stack:
        try:
            nvml = stack.enter_context(Nvml())
        except VramplanError as error:
            raise InputError(f"there is no CUDA GPU to calibrate: {error.message}", error.hint) from error
        card = nvml.gpu(index)
        bar = stack.enter_context(make_bar(sys.stderr, params["width"]))

        def on_step(step: Step) -> None:
            bar.step(*step)

        rows = measure_set(Place(card=card, nvml=nvml, index=index, log=bar.say), on_step, bar.say)
    found = calibrate(rows, card, installed_versions(card), date.today().isoformat())
    path = save(found, card)
    if params["as_json"]:
        print_json({"schema_version": 1, "path": str(path), "calibration": encode(found)})
    else:
        _print(found, str(path), params)
    return OK
