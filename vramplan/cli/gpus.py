"""`vramplan gpus`: the stored cards, and this machine's."""

from __future__ import annotations

import sys

import click

from vramplan.cli import build, options
from vramplan.cli.output import print_json
from vramplan.errors import OK, VramplanError


@click.command("gpus", cls=options.SectionCommand, epilog="Example: vramplan gpus --json")
@options.use(options.OUTPUT)
def command(as_json: bool, width: int | None) -> int:
    """List the stored cards, the ones that --gpu knows, and the cards of this machine."""
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
