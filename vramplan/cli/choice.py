"""`vramplan gpus --for MODEL`: the smallest class of cards that holds a run."""

from __future__ import annotations

import sys
from typing import Any

from vramplan.cli import build, prices
from vramplan.cli.output import print_json
from vramplan.errors import DOES_NOT_FIT, OK


def choose_cards(params: dict[str, Any], *, as_json: bool, width: int | None) -> int:
    """Exit code 3 where no stored card holds the run."""
    from vramplan.core.guide import choose

    cards = [card for card, _ in build.able(build.cards(("all",)), packing=params["packing"])]
    costs = prices.by_key(params["price"], cards)
    spec = build.model_spec(params)
    run = build.run_spec(params, spec)
    choice = choose(spec, run, cards, costs)
    if as_json:
        from vramplan.report.payload import choice_payload

        print_json(choice_payload(spec, run, choice))
    else:
        from vramplan.report.guide import show_choice

        show_choice(sys.stdout, spec, run, choice, width=width)
    return OK if choice.memory_gb is not None else DOES_NOT_FIT
