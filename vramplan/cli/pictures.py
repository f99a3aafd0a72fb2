"""`--timeline`, `--svg` and `--html`: the step of a ledger as a picture, where a command has a ledger."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vramplan.cli import build
from vramplan.core.types import Diagnosis, GpuProfile, GpuVerdict, Ledger, Measurement, ModelSpec, RunSpec, Unplannable
from vramplan.errors import InputError, VramplanError

if TYPE_CHECKING:
    from vramplan.report.picture import Picture

FILES = ("svg", "html")
RECORDED = "measurement.jsonl"  # in a run folder
REPORTED = "card in the report"
SHAPE = (  # what of a run decides its step, as the user knows it
    "micro_batch_size", "seq_len", "lora", "double_quant", "levers", "driver", "padding", "packing", "gpus", "parallel",
)  # fmt: skip


def wanted(params: build.Params) -> bool:
    return bool(params.get("timeline")) or any(params[name] for name in FILES if name in params)


def check(params: build.Params) -> None:
    """InputError for what cannot be drawn or written, before anything is computed."""
    if params.get("timeline") and params["as_json"]:
        raise InputError("--timeline is a picture, and --json prints data alone", "--html FILE holds every point")
    if params.get("trace") and wanted(params):
        raise InputError("--timeline, --svg and --html draw the played step, not a traced one", "leave out --trace")
    if params.get("measured") and not wanted(params):
        raise InputError("--measured is drawn into a picture", "add --timeline, --svg FILE or --html FILE")
    paths = [writable(params[name], f"--{name}") for name in FILES if params.get(name)]
    if len(paths) == 2 and paths[0].absolute() == paths[1].absolute():
        raise InputError(f"--svg and --html both write {paths[0]}", "name two files")


def writable(name: str, flag: str) -> Path:
    """The file, looked at. InputError if it cannot be written."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"{flag} {name} is a folder", "name a file")
    if not path.parent.is_dir():
        raise InputError(f"{flag} {name}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not path.is_file()):
        raise InputError(f"{flag} {name} cannot be written", "name a file in a folder that can be written to")
    return path


def draw(
    params: build.Params,
    ledger: Ledger,
    card: GpuProfile | None,
    verdicts: Sequence[GpuVerdict] = (),
    measurement: Measurement | None = None,
    diagnosis: Diagnosis | None = None,
) -> None:
    """What `params` ask for, of this ledger, which was made for this card's chip."""
    if not wanted(params):
        return
    from vramplan.core.curve import timeline
    from vramplan.report.picture import Picture

    if params.get("measured"):
        measurement = _measured(params["measured"], ledger)
    step = timeline(ledger, card)
    picture = Picture(ledger=ledger, step=step, verdicts=tuple(verdicts), measurement=measurement, diagnosis=diagnosis)
    if params.get("timeline"):
        from vramplan.report.timeline import show_timeline

        click.echo()
        show_timeline(sys.stdout, picture, width=params["width"])
    _write(params, picture)


def draw_run(
    params: build.Params,
    ledger: Ledger,
    card: GpuProfile | None,
    folder: Path | None,
    diagnosis: Diagnosis | None = None,
) -> None:
    """A run that has ended, with what it has measured: what cannot be drawn does not change how it ended."""
    from vramplan.sources.records import read_jsonl

    try:
        stored = folder / RECORDED if folder is not None else None
        found = read_jsonl(stored, Measurement) if stored is not None and stored.is_file() else []
        verdicts = judged(ledger, card, diagnosis.budget_bytes if diagnosis else None)
        draw(params, ledger, card, verdicts, found[-1] if found else None, diagnosis)
    except (Unplannable, VramplanError) as error:
        build.warn(f"no picture of the run: {error.message}")


def judged(ledger: Ledger, card: GpuProfile | None, budget_bytes: int | None = None) -> tuple[GpuVerdict, ...]:
    """The run held against the one card, or against what a report says was there for it."""
    from vramplan.core.room import judge

    if budget_bytes is not None:
        verdict = "fits" if ledger.peak.device_bytes <= budget_bytes else "does_not_fit"
        return (GpuVerdict(gpu=card.key if card else REPORTED, usable_bytes=budget_bytes, verdict=verdict),)
    if card is None:
        return ()
    return (GpuVerdict(gpu=card.key, usable_bytes=card.usable_bytes, verdict=judge(ledger, card)),)


def _write(params: build.Params, picture: Picture) -> None:
    from vramplan.sources.records import write_text

    if params.get("svg"):
        from vramplan.report.svg import svg

        write_text(Path(params["svg"]).expanduser(), svg(picture))
        build.note(f"the step is drawn in {params['svg']}")
    if params.get("html"):
        from vramplan.report.page import page

        write_text(Path(params["html"]).expanduser(), page(picture))
        build.note(f"the page is {params['html']}")


# ------------------------------------------------------------------------------------------------------ measured
def _measured(name: str, ledger: Ledger) -> Measurement:
    """The last measurement of this very step in a run folder or a file of `vramplan measure`. InputError if there is
    none, with what the nearest differs in."""
    from vramplan.sources.records import read_json, read_jsonl

    path = Path(name).expanduser()
    folder = path if path.is_dir() else None
    file = path / RECORDED if folder else path
    if not file.is_file():
        what = f"--measured {name} holds no {RECORDED}" if folder else f"--measured {name} does not exist"
        raise InputError(what, "give the run folder of vramplan train, or the file of vramplan measure")
    found = read_jsonl(file, Measurement)
    if not found:
        raise InputError(f"--measured {name} holds no measurement")
    if folder is not None:
        stored = folder / "prediction.json"
        predicted = read_json(stored, Ledger) if stored.is_file() else None
        found = [replace(found[-1], prediction=predicted)]
    differing = [(differences(measurement.prediction, ledger), measurement) for measurement in reversed(found)]
    differ, nearest = min(differing, key=lambda item: len(item[0]))
    if not differ:
        return nearest
    raise InputError(
        f"--measured {name} is of another run: {', '.join(differ)} differ{'s' if len(differ) == 1 else ''}",
        "give the flags with which it ran",
    )


def differences(predicted: Ledger | None, ledger: Ledger) -> list[str]:
    """What of the two runs would make two different steps; empty: it is the same step."""
    if predicted is None:
        return ["its prediction, which is not recorded,"]
    names = [name for name in SHAPE if getattr(predicted.run, name) != getattr(ledger.run, name)]
    if _micro_steps(predicted.run) != _micro_steps(ledger.run):
        names.append("accumulation")
    return (["model"] if _shape(predicted.model) != _shape(ledger.model) else []) + names


def _micro_steps(run: RunSpec) -> int:
    return min(run.accumulation, 2)  # the second has gradients to add to, the third is like it


def _shape(model: ModelSpec) -> ModelSpec:
    return replace(model, name="", source="")
