"""`vramplan check`: does it fit what is free on this machine's card now?"""

from __future__ import annotations

import sys
from typing import Any

import click

from vramplan.cli import build, complete, options, pictures
from vramplan.cli.output import print_json
from vramplan.errors import DOES_NOT_FIT, OK, InputError


@click.command("check", cls=options.SectionCommand, epilog="Example: vramplan check llama-2-7b --batch-size 2")
@click.argument("model", required=False, shell_complete=complete.model)
@options.use(options.FROM, options.BATCH, options.RUN, options.LORA, options.LEVERS, options.GPU_INDEX,
             options.CALIBRATION, options.PICTURES, options.OUTPUT)  # fmt: skip
def command(**params: Any) -> int:
    """Show who holds what of this machine's card, and whether fine-tuning MODEL fits what is free."""
    from vramplan.core.check import check
    from vramplan.sources.gpu import live_gpu

    pictures.check(params)
    if pictures.wanted(params) and not params["model"]:
        raise InputError("MODEL is missing: the step that is drawn is a model's", "vramplan models lists some")
    spec = build.model_spec(params) if params["model"] else None
    run = build.run_spec(params, spec) if spec else None
    found = check(build.calibrated(live_gpu(params["gpu_index"]), params["calibration"]), spec, run)
    if found.ledger is not None:
        build.warn(*found.ledger.warnings)
    if params["as_json"]:
        from vramplan.report.payload import check_payload

        print_json(check_payload(found))
    else:
        from vramplan.report.check import show_check

        show_check(sys.stdout, found, width=params["width"])
    if found.ledger is not None and found.judged is not None:
        pictures.draw(params, found.ledger, found.card, [found.judged])
    return DOES_NOT_FIT if found.judged is not None and found.judged.verdict == "does_not_fit" else OK
