"""`vramplan estimate`: the memory of a run, line by line."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import click

from vramplan.cli import build, complete, options, pictures
from vramplan.cli.output import print_json
from vramplan.core.types import GpuProfile, GpuVerdict, Ledger, ModelSpec, Offer
from vramplan.errors import DOES_NOT_FIT, OK, InputError

EXAMPLE = "Example: vramplan estimate llama-3.1-8b --batch-size 4 --gpu all --price rtx-4090=0.35"


@click.command("estimate", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("model", shell_complete=complete.model)
@options.use(options.FROM, options.BATCH, options.PARALLEL, options.RUN, options.LORA, options.LEVERS, options.GPUS,
             options.GPU_INDEX, options.PRICES, options.EXPLAIN, options.TRACE, options.PICTURES,
             options.OUTPUT)  # fmt: skip
@click.pass_context
def command(ctx: click.Context, /, **params: Any) -> int:
    """Predict the memory of fine-tuning MODEL: a built-in name, a Hub id, or a path to config.json or its folder."""
    if params["full_depth"] and not params["trace"]:
        raise InputError("--full-depth is about tracing", "add --trace")
    if params["trace"] and params["gpus"] > 1:
        raise InputError("--trace plays one GPU", "leave out --gpus, or --trace")
    if params["trace"] and params["explain"] is not None:
        raise InputError("--explain is of a run that is played, not traced", "leave out --trace, or --explain")
    if params["trace"] and params["price"]:
        raise InputError("--price is for runs that are played, not traced", "leave out --trace, or --price")
    pictures.check(params)
    build.refuse_index(ctx, params["gpu"])
    names = params["gpu"] or (("all",) if params["price"] else ())
    found = build.cards(names, params["calibration"], params["gpu_index"])
    cards = build.able(found, packing=params["packing"])
    chip = next((card for card, named in cards if named), None)
    if params["explain"] is not None:
        return _explain(params, chip)
    if not params["trace"] and ("all" in names or params["price"]):
        return _guide(params, cards, chip)
    ledger, spec = _traced(params, chip) if params["trace"] else _played(params, chip)
    verdicts = _judge(ledger, spec, [card for card, _ in cards])
    build.warn(*ledger.warnings)
    if params["as_json"]:
        from vramplan.report.payload import estimate_payload

        print_json(estimate_payload(ledger, verdicts))
    else:
        from vramplan.report.estimate import show_estimate

        origin = params.get("origin")
        show_estimate(sys.stdout, ledger, verdicts, source=origin.path if origin else None, width=params["width"])
    pictures.draw(params, ledger, chip, verdicts)
    return _exit_code(cards, [verdict.verdict != "does_not_fit" for verdict in verdicts])


def _explain(params: dict[str, Any], chip: GpuProfile | None) -> int:
    """One line of the ledger, taken apart."""
    from vramplan.core.explain import explain, find
    from vramplan.sources.profiles import suggest

    ledger, _ = _played(params, chip)
    line = find(ledger, params["explain"])
    if line is None:
        keys = [line.key for line in ledger.lines]
        near = suggest(params["explain"], [*keys, *(key.partition(".")[2] for key in keys)])
        raise InputError(
            f"--explain {params['explain']}: the ledger of this run has no such line",
            near or f"one of {', '.join(keys)}",
        )
    found = explain(ledger, line, chip)
    if params["as_json"]:
        from vramplan.report.payload import explain_payload

        print_json(explain_payload(found))
    else:
        from vramplan.report.explain import show_explanation

        show_explanation(sys.stdout, found, width=params["width"])
    return OK


def _guide(params: dict[str, Any], cards: list[tuple[GpuProfile, bool]], chip: GpuProfile | None) -> int:
    """Many cards, or cards with prices: what each can do, with which levers, how fast, for how much."""
    from vramplan.cli import prices
    from vramplan.core.guide import guide, with_cheapest
    from vramplan.report.waiting import watched

    profiles = [card for card, _ in cards]
    costs = prices.by_key(params["price"], profiles)
    spec = build.model_spec(params)
    ledger, offers = guide(spec, build.run_spec(params, spec), profiles, costs, chip)
    found = watched(offers, len(profiles), "cards", sys.stderr)
    rows = with_cheapest(tuple(found))
    build.warn(*ledger.warnings)
    if params["as_json"]:
        from vramplan.report.payload import guide_payload

        print_json(guide_payload(ledger, rows))
    else:
        from vramplan.report.guide import show_guide

        show_guide(sys.stdout, ledger, rows, width=params["width"])
    pictures.draw(params, ledger, chip, [_as_asked(row) for row in rows])
    return _exit_code(cards, [row.as_asked for row in rows])


def _as_asked(row: Offer) -> GpuVerdict:
    """The card against the run as it was asked for, with no lever changed."""
    verdict = row.verdict if row.as_asked else "does_not_fit"
    return GpuVerdict(gpu=row.gpu, usable_bytes=row.usable_bytes, verdict=verdict)


def _exit_code(cards: list[tuple[GpuProfile, bool]], fit: list[bool]) -> int:
    """A card that was named must hold the run as it was asked for."""
    refused = any(named and not fits for (_, named), fits in zip(cards, fit, strict=True))
    return DOES_NOT_FIT if refused else OK


def _played(params: dict[str, Any], chip: GpuProfile | None) -> tuple[Ledger, ModelSpec]:
    from vramplan.core.ledger import estimate

    spec = build.model_spec(params)
    return estimate(spec, build.run_spec(params, spec), chip), spec


def _traced(params: dict[str, Any], chip: GpuProfile | None) -> tuple[Ledger, ModelSpec | None]:
    """The real libraries' own step; the model may be one that is not described here."""
    from vramplan.core.ledger import NO_CARD
    from vramplan.launch.tracing import trace

    config, spec, limits = build.outline(params)
    run = build.run_spec(params, limits)
    if sys.stderr.isatty():
        build.note("tracing the real libraries, about 10 seconds" + (" or more" if params["full_depth"] else ""))
    return trace(config, spec, run, chip or NO_CARD, full_depth=params["full_depth"]), spec


def _judge(ledger: Ledger, spec: ModelSpec | None, cards: list[GpuProfile]) -> tuple[GpuVerdict, ...]:
    """Each card against the run; the search is not even imported where no card is named.

    A model that is not described has a verdict, but no largest batch: nobody traces hundreds of batches.
    """
    if not cards:
        return ()
    from vramplan.core.room import judge

    if spec is None:
        return tuple(
            GpuVerdict(gpu=card.key, usable_bytes=card.usable_bytes, verdict=judge(ledger, card)) for card in cards
        )
    from vramplan.core.capacity import capacity
    from vramplan.core.sizes import Sizes

    sizes = Sizes(spec)
    return tuple(replace(capacity(sizes, ledger.run, card), verdict=judge(ledger, card)) for card in cards)
