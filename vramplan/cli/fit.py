"""`vramplan fit`: levers and micro-batch for one card and one effective batch."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vramplan.cli import build, options
from vramplan.cli.output import print_json
from vramplan.core.types import Plan
from vramplan.errors import DOES_NOT_FIT, OK, InputError

if TYPE_CHECKING:
    from vramplan.cli.probing import Prober

EXAMPLE = "Example: vramplan fit llama-2-7b --effective-batch-size 16 --gpu rtx-4090 -o plan.json"


@click.command("fit", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("model")
@options.use(options.FIT, options.ONE_GPU, options.GPU_INDEX, options.CALIBRATION, options.RUN, options.LORA,
             options.OUTPUT)  # fmt: skip
def command(**params: Any) -> int:
    """Choose the levers and the micro-batch with which MODEL trains best on one card."""
    from vramplan.core.plan import plan as make_plan

    target = Path(params["output"]) if params["output"] else None
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise InputError(f"-o {target} cannot be written", "name a file in a folder that exists")
    spec = build.model_spec(params)
    run = build.run_spec({**params, "effective_batch_size": None}, spec)
    with ExitStack() as stack:
        prober = _prober(params, stack)
        card = prober.card() if prober else build.card(params["gpu"], params["gpu_index"], params["calibration"])
        plan = make_plan(spec, run, card, params["effective_batch_size"], params["objective"])
        build.warn(*plan.ledger.warnings)
        plan = prober.verified(plan) if prober else plan
    _show(plan, target, params)
    if prober is not None and prober.failure is not None:
        prober.tell_failure()
        return prober.failure.exit_code
    return OK if plan.verdict != "does_not_fit" else DOES_NOT_FIT


def _prober(params: build.Params, stack: ExitStack) -> Prober | None:
    if not params["probe"]:
        return None
    from vramplan.cli.probing import Prober

    return stack.enter_context(Prober(params))


def _show(plan: Plan, target: Path | None, params: build.Params) -> None:
    """Write the plan, unless nothing fits, and print it."""
    fits = plan.verdict != "does_not_fit"
    if fits and target is not None:
        from vramplan.sources.records import write_json

        write_json(target, plan)
    if params["as_json"]:
        from vramplan.sources.records import encode

        print_json(encode(plan))
    else:
        from vramplan.report.fit import show_fit

        show_fit(sys.stdout, plan, written=str(target) if fits and target else None, width=params["width"])
