"""`vramplan fit`: levers and micro-batch for one card and one effective batch."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vramplan.cli import build, options, runner
from vramplan.cli.output import print_json
from vramplan.core.types import Plan
from vramplan.errors import DOES_NOT_FIT, OK, InputError

WORTH_PACKING = 1.15  # times as fast: then it is said
EXAMPLE = "Example: vramplan fit llama-2-7b --effective-batch-size 16 --gpu rtx-4090 -o plan.json"


@click.command("fit", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("model")
@options.use(options.FIT, options.ONE_GPU, options.GPU_INDEX, options.RUN, options.LORA, options.LEVERS, options.DATA,
             options.OUTPUT)  # fmt: skip
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
    lengths = None
    if params["data"]:
        run = replace(
            run, data=build.data_spec(params), model_path=params["model_path"] or runner.weights_of(run.model)
        )
        lengths = runner.read_lengths(run, width=params["width"])
    free, wanted = _free(params), (params["effective_batch_size"], params["objective"])
    plan = make_plan(spec, run, card, *wanted, free=free, lengths=lengths)
    build.warn(*plan.ledger.warnings)
    if lengths is not None:
        _say_packed(plan, make_plan(spec, replace(plan.run, packing=True), card, *wanted, free=free))
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


def _say_packed(plan: Plan, packed: Plan) -> None:
    """Whether packing would be much faster; the effective batch then counts rows of several documents."""
    before, after = (max((c.tokens_per_s or 0 for c in p.candidates), default=0) for p in (plan, packed))
    if not plan.run.packing and packed.verdict != "does_not_fit" and after > WORTH_PACKING * before > 0:
        build.note(
            f"rows differ in length: with --packing about {after:,} tokens/s (modelled), {after / before:.1f} times as "
            "many; a row of the effective batch then holds several documents"
        )
