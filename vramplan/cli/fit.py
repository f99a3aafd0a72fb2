"""`vramplan fit`: levers and micro-batch for one card and one effective batch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vramplan.cli import build, options
from vramplan.cli.output import print_json
from vramplan.errors import DOES_NOT_FIT, OK, InputError

EXAMPLE = "Example: vramplan fit llama-2-7b --effective-batch-size 16 --gpu rtx-4090 -o plan.json"


@click.command("fit", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("model")
@options.use(options.FIT, options.ONE_GPU, options.GPU_INDEX, options.RUN, options.LORA, options.LEVERS, options.OUTPUT)
def command(**params: Any) -> int:
    """Choose the levers and the micro-batch with which MODEL trains best on one card."""
    from vramplan.core.plan import plan as make_plan

    build.not_yet(params, "probe")
    target = Path(params["output"]) if params["output"] else None
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise InputError(f"-o {target} cannot be written", "name a file in a folder that exists")
    card = build.card(params["gpu"], params["gpu_index"])
    spec = build.model_spec(params)
    run = build.run_spec({**params, "effective_batch_size": None}, spec)
    plan = make_plan(spec, run, card, params["effective_batch_size"], params["objective"], free=_free(params))
    build.warn(*plan.ledger.warnings)
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
    return OK if fits else DOES_NOT_FIT


def _free(params: build.Params) -> tuple[str, ...]:
    """The levers that are searched: those that no flag and no run file settles."""
    settled = set()
    if params["checkpointing"] is not None or params["gradient_checkpointing"] is not None:
        settled.add("checkpointing")
    if params["checkpoint_offload"] is not None:
        settled.add("checkpoint_offload")
    return tuple(lever for lever in ("checkpointing", "checkpoint_offload") if lever not in settled)
