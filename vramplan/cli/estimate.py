"""`vramplan estimate`: the memory of a run, line by line."""

from __future__ import annotations

import sys
from typing import Any

import click

from vramplan.cli import build, options
from vramplan.cli.output import print_json
from vramplan.core.types import GpuProfile, GpuVerdict, ModelSpec, RunSpec
from vramplan.errors import DOES_NOT_FIT, OK

EXAMPLE = "Example: vramplan estimate llama-3.1-8b --batch-size 4 --gpu rtx-4090 --gpu rtx-3090"


@click.command("estimate", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("model")
@options.use(options.BATCH, options.RUN, options.LORA, options.LEVERS, options.GPUS, options.TRACE, options.OUTPUT)
def command(**params: Any) -> int:
    """Predict the memory of fine-tuning MODEL: a built-in name, a Hub id, or a path to config.json or its folder."""
    from vramplan.core.ledger import estimate

    build.not_yet(params, "trace")
    spec = build.model_spec(params)
    run = build.run_spec(params, spec)
    cards = build.cards(params["gpu"])
    chip = next((card for card, named in cards if named), None)
    ledger = estimate(spec, run, chip)
    verdicts = _judge(spec, run, [card for card, _ in cards])
    build.warn(*ledger.warnings)
    if params["as_json"]:
        from vramplan.report.payload import estimate_payload

        print_json(estimate_payload(ledger, verdicts))
    else:
        from vramplan.report.estimate import show_estimate

        show_estimate(sys.stdout, ledger, verdicts, width=params["width"])
    refused = any(
        named and verdict.verdict == "does_not_fit" for (_, named), verdict in zip(cards, verdicts, strict=True)
    )
    return DOES_NOT_FIT if refused else OK


def _judge(spec: ModelSpec, run: RunSpec, cards: list[GpuProfile]) -> tuple[GpuVerdict, ...]:
    """Each card against the run; the search is not even imported where no card is named."""
    if not cards:
        return ()
    from vramplan.core.plan import capacity

    return tuple(capacity(spec, run, card) for card in cards)
