"""The standard set of `vramplan calibrate`: short runs of small models with random weights, each in a child of its own.

Some are bound by matrix products, some by memory traffic, some by the starting of kernels, with and without CUDA
graphs. What each has measured is kept as it comes, so that an interrupted set goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from vramplan.core.ledger import estimate
from vramplan.core.recipes import RECIPES
from vramplan.core.room import judge
from vramplan.core.types import GpuProfile, Ledger, Measurement, ModelSpec, RunSpec, Schedule
from vramplan.errors import InputError, VramplanError
from vramplan.launch.probing import STEPS, Place, play
from vramplan.launch.tenants import Say, wait_until_quiet
from vramplan.sources import calibration, records
from vramplan.sources.hf_config import parse_config

LIMIT_S = 280.0  # no case is begun that would end later
CASE_S = 20.0  # what one takes, until some have been seen
FEWEST = 5  # measured cases: with fewer, nothing is learned


class Shape(NamedTuple):
    """A small Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "wide": Shape(4096, 14336, 4, 32, 8),
    "middle": Shape(2048, 8192, 8, 32, 8),
    "narrow": Shape(1024, 2816, 16, 16, 8),
}


class Case(NamedTuple):
    """One run of the set."""

    shape: str
    rows: int
    tokens: int
    recipe: str = "lean"
    checkpointing: str = "all"
    graphs: bool = True

    @property
    def name(self) -> str:
        how = self.recipe if self.graphs or self.recipe != "lean" else "no CUDA graphs"
        return f"{self.shape} {self.rows} x {self.tokens}, {how}, checkpointing {self.checkpointing}"


CASES = (
    Case("wide", 1, 2048),
    Case("narrow", 1, 128),
    Case("narrow", 16, 1024),
    Case("middle", 1, 512, recipe="peft"),
    Case("narrow", 1, 128, graphs=False),
    Case("wide", 2, 2048, checkpointing="none"),
    Case("narrow", 4, 1024, recipe="peft"),
    Case("wide", 4, 2048),
    Case("middle", 1, 12288),
    Case("narrow", 8, 1024, checkpointing="none"),
)


class Step(NamedTuple):
    """How far the set is; `left_s` is a guess."""

    done: int
    total: int
    name: str
    left_s: float


OnStep = Callable[[Step], None]


# -------------------------------------------------------------------------------------------------------- the set
def measure_set(place: Place, on_step: OnStep, say: Say, cases: Sequence[Case] = CASES) -> list[Measurement]:
    """Measure the set on a card at rest; returns a Measurement for every case that could be measured.

    VramplanError if they are too few to learn from. An interrupted set (KeyboardInterrupt) goes on where it was.
    """
    from tempfile import TemporaryDirectory

    path = calibration.rows_path(place.card)
    calibration.make_folder()
    known = kept_rows(path, place.card, say)
    begun, measured = time.monotonic(), 0
    rows: list[Measurement] = []
    with TemporaryDirectory(prefix="vramplan-models-") as folder:
        for number, case in enumerate(cases):
            run = case_run(case)
            row = known.get(run)
            if row is None:
                each = (time.monotonic() - begun) / measured if measured else CASE_S
                left = [c for c in cases[number:] if case_run(c) not in known]
                on_step(Step(number, len(cases), case.name, each * len(left)))
                if time.monotonic() - begun + each > LIMIT_S and len(rows) >= FEWEST:
                    say(f"{LIMIT_S:.0f} s are over: {len(left)} of {len(cases)} cases are left out")
                    break
                row = _measure(case, run, place, Path(folder), say)
                measured += 1
                if row is not None:
                    records.append_jsonl(path, row)
            rows += [] if row is None else [row]
    on_step(Step(len(cases), len(cases), "", 0.0))
    if len(rows) < FEWEST:
        text = f"only {len(rows)} of {len(cases)} cases could be measured: nothing was learned"
        raise VramplanError(text, "with the card free and to yourself, run vramplan calibrate again")
    return rows


def _measure(case: Case, run: RunSpec, place: Place, folder: Path, say: Say) -> Measurement | None:
    """One case; None where it cannot be believed or does not fit, which is said."""
    spec, config = case_model(case)
    ledger = estimate(spec, run, place.card)
    if judge(ledger, place.card) == "does_not_fit":
        say(f"left out, too large for this card: {case.name}")
        return None
    wait_until_quiet(place.nvml, place.index, say)
    model = folder / case.shape
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    played = play(replace(run, model=str(model)), place)
    if played.disturbances:
        say(f"left out, {'; '.join(played.disturbances)}: {case.name}")
        return None
    if not played.finished or played.measurement is None:
        say(f"left out, out of memory: {case.name}")
        return None
    return _row(played.measurement, ledger, place.card)


def _row(measurement: Measurement, ledger: Ledger, card: GpuProfile) -> Measurement:
    """As `vramplan measure` keeps them; other processes of the card stay out."""
    return replace(measurement, prediction=ledger, gpu=replace(card, processes=()))


# ---------------------------------------------------------------------------------------------------------- cases
def case_run(case: Case) -> RunSpec:
    return RunSpec(
        model=case.shape,
        micro_batch_size=case.rows,
        seq_len=case.tokens,
        recipe=case.recipe,
        levers=replace(RECIPES[case.recipe], checkpointing=case.checkpointing),
        random_weights=True,
        schedule=Schedule(max_steps=STEPS, save_steps=0, cuda_graphs=case.graphs),
    )


def case_model(case: Case) -> tuple[ModelSpec, dict[str, Any]]:
    """The model of a case, and the config.json that it is built from."""
    shape = SHAPES[case.shape]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": 32000,
        "max_position_embeddings": 16384,
    }
    return parse_config(config, name=case.shape, source="vramplan calibrate"), config


def kept_rows(path: Path, card: GpuProfile, say: Say) -> dict[RunSpec, Measurement]:
    """What an interrupted set has measured of this card under these versions, by its run."""
    if not path.is_file():
        return {}
    try:
        rows = records.read_jsonl(path, Measurement)
    except InputError as error:
        say(f"what was measured before cannot be used: {error.message}")
        path.unlink(missing_ok=True)
        return {}
    now = calibration.installed_versions(card)
    return {row.prediction.run: row for row in rows if row.prediction is not None and _same(row, card, now)}


def _same(row: Measurement, card: GpuProfile, now: dict[str, str]) -> bool:
    gpu, then = row.gpu, dict(row.versions)
    if gpu is None or (gpu.name, gpu.total_bytes) != (card.name, card.total_bytes):
        return False
    driver = (gpu.driver or "unknown").partition(".")[0]
    return driver == now["driver"] and all(then.get(name) == now[name] for name in calibration.LIBRARIES)
