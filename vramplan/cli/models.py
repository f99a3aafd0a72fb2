"""`vramplan models`: the built-in models."""

from __future__ import annotations

import sys

import click

from vramplan.cli import options
from vramplan.cli.output import print_json
from vramplan.errors import OK


@click.command("models", cls=options.SectionCommand, epilog="Example: vramplan models --json")
@options.use(options.OUTPUT)
def command(as_json: bool, width: int | None) -> int:
    """List the built-in models: names that every command takes as MODEL."""
    from vramplan.core.architecture import total_parameters
    from vramplan.sources.hf_config import load_model
    from vramplan.sources.profiles import model_names, model_profile

    specs = [(name, load_model(name)) for name in model_names()]
    rows = tuple(
        (name, spec, total_parameters(spec), str(model_profile(name).get("hub_id") or "")) for name, spec in specs
    )
    if as_json:
        from vramplan.report.payload import models_payload

        print_json(models_payload(rows))
    else:
        from vramplan.report.models import show_models

        show_models(sys.stdout, rows, width=width)
    return OK
