"""Medians of one estimate and of the buying guide, in process, start-up not included.

python tests/bench_estimate.py [REPETITIONS]

"again": the model is loaded already, as for all estimates of a search but the first.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product

from vramplan.core import ledger
from vramplan.core.guide import choose, guide
from vramplan.core.recipes import RECIPES
from vramplan.core.timeline import play
from vramplan.core.types import ModelSpec, RunSpec
from vramplan.sources.hf_config import load_model
from vramplan.sources.profiles import gpu_names, load_gpu

MODELS = ("llama-2-7b", "llama-3.1-70b", "gemma-2-9b")
GUIDED = ("llama-3.1-8b", "gemma-3-4b")  # Gemma 3: layers repeat with a period of six


def median_ms(work: Callable[[], object], repetitions: int) -> float:
    work()
    gc.collect()
    found = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found)


def afresh(spec: ModelSpec, run: RunSpec) -> None:
    ledger._loaded.cache_clear()
    ledger.estimate(spec, run)


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    print("| model, recipe | play, ms | simulate, ms | estimate, ms | again, ms |\n|---|---|---|---|---|")
    for name, recipe in product(MODELS, RECIPES):
        spec, run = load_model(name), RunSpec(model=name, recipe=recipe, levers=RECIPES[recipe])
        played = median_ms(partial(play, spec, run, ledger.NO_CARD), repetitions)
        simulated = median_ms(partial(ledger.simulate, spec, run), repetitions)
        estimated = median_ms(partial(afresh, spec, run), repetitions)
        again = median_ms(partial(ledger.estimate, spec, run), repetitions)
        print(f"| {name}, {recipe} | {played:.1f} | {simulated:.1f} | {estimated:.1f} | {again:.1f} |")
    cards = [load_gpu(name) for name in gpu_names()]
    print(f"\n| model, recipe | {len(cards)} cards, ms | choice, ms |\n|---|---|---|")
    for name, recipe in product((*MODELS, *GUIDED), RECIPES):
        spec, run = load_model(name), RunSpec(model=name, recipe=recipe, levers=RECIPES[recipe])
        guided = median_ms(lambda spec=spec, run=run: list(guide(spec, run, cards)[1]), max(repetitions // 5, 1))
        chosen = median_ms(partial(choose, spec, run, cards), max(repetitions // 5, 1))
        print(f"| {name}, {recipe} | {guided:.0f} | {chosen:.0f} |")


if __name__ == "__main__":
    main()
