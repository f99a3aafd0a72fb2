"""`vramplan gpus`: the stored cards, and this machine's."""

from __future__ import annotations

import sys
from typing import Any

import click

from vramplan.cli import build, options
from vramplan.cli.output import print_json
from vramplan.errors import OK, InputError, VramplanError

EXAMPLE = "Example: vramplan gpus --for llama-3.1-8b --seq-len 4096"


@click.command("gpus", cls=options.SectionCommand, epilog=EXAMPLE)
@options.use(options.GUIDE, options.BATCH, options.PARALLEL, options.RUN, options.LORA, options.LEVERS, options.OUTPUT)
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, width: int | None, **params: Any) -> int:
    """List the stored cards, the ones that --gpu knows, and the cards of this machine; or name those that suffice."""
    if params["model"]:
        from vramplan.cli.choice import choose_cards

        return choose_cards(params, as_json=as_json, width=width)
    refuse_run_flags(ctx, params)
    from vramplan.sources.gpu import live_gpus
    from vramplan.sources.profiles import gpu_names, load_gpu

    stored = tuple(load_gpu(name) for name in gpu_names())
    try:
        live = live_gpus()
    except VramplanError as error:
        live = ()
        build.note(error.message)
    if as_json:
        from vramplan.report.payload import gpus_payload

        print_json(gpus_payload(stored, live))
    else:
        from vramplan.report.gpus import show_gpus

        show_gpus(sys.stdout, stored, live, width=width)
    return OK


def refuse_run_flags(ctx: click.Context, params: dict[str, Any]) -> None:
    """What describes a run has nothing to say about a list of cards."""
    given = build.given(ctx, tuple(params))
    if given:
        flag = next(options.flag_of(param) for param in ctx.command.params if param.name == given[0])
        raise InputError(f"{flag} is about a run", "add --for MODEL")
