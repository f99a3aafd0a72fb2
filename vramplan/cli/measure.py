"""`vramplan measure`: a few steps on this machine's card, with random weights, beside the prediction."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vramplan.cli import build, complete, error_line, options, pictures, runner
from vramplan.cli.output import print_json
from vramplan.core.types import GpuProfile, Ledger, Measurement, ModelSpec, Schedule, Unplannable
from vramplan.errors import ENDED_IN_OOM, OK, OUR_ERROR, InputError, VramplanError

if TYPE_CHECKING:
    from vramplan.launch import Outcome

EXAMPLE = "Example: vramplan measure llama-3.1-8b --recipe peft --batch-size 4"
PER_LAYER = ("layer_types", "no_rope_layers")  # lists in a config.json with one entry a layer
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@click.command("measure", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("model", shell_complete=complete.model)
@options.use(options.BATCH, options.RUN, options.MEASURE, options.LORA, options.LEVERS, options.CALIBRATION,
             options.FILES, options.OUTPUT)  # fmt: skip
def command(**params: Any) -> int:
    """Play a few steps of fine-tuning MODEL on this machine's card, with random weights, beside the prediction."""
    from vramplan.core.ledger import estimate

    if params["model_path"]:
        raise InputError("--model-path has no use here", "the weights are random: memory does not depend on them")
    output = _writable(params["output"])
    pictures.check(params)
    spec, config = _model(params)
    schedule = Schedule(max_steps=params["steps"], save_steps=0, cuda_graphs=False)  # it makes none
    run = replace(build.run_spec(params, spec), driver=params["driver"], random_weights=True, schedule=schedule)
    card = build.calibrated(_card(), params["calibration"])
    runner.require_extra("vramplan measure")
    ledger = estimate(spec, run, card)
    _warn(ledger, card)
    outcome, diagnosis = _measure(ledger, card, config, params["width"])
    measurement = _whole(outcome, ledger, card)
    _report(ledger, outcome, measurement, diagnosis, output, params)
    if measurement is not None:
        pictures.draw(params, ledger, card, pictures.judged(ledger, card), measurement=measurement)
    return _exit_code(outcome)


# ------------------------------------------------------------------------------------------------------ before it
def _model(params: build.Params) -> tuple[ModelSpec, dict[str, Any] | None]:
    """The model, and with --layers the shortened config.json that it is built from."""
    spec, layers = build.model_spec(params), params["layers"]
    if layers is None:
        return spec, None
    from vramplan.sources.hf_config import parse_config, raw_config

    if layers > spec.num_layers:
        raise InputError(f"--layers {layers} is more than the {spec.num_layers} of {spec.name}")
    config = shortened(raw_config(params["model"]), layers)
    return parse_config(config, name=spec.name, source=spec.source), config


def shortened(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A `config.json` with its first `layers` layers alone."""
    short = dict(config)
    if isinstance(config.get("text_config"), dict):
        short["text_config"] = shortened(config["text_config"], layers)
    else:
        short["num_hidden_layers"] = layers
    for name in PER_LAYER:
        if isinstance(config.get(name), list):
            short[name] = config[name][:layers]
    return short


def _writable(name: str) -> Path:
    """-o, looked at before anything is measured."""
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"-o {name} is a folder", "give a file")
    if not path.parent.is_dir():
        raise InputError(f"-o {name}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"-o {name} cannot be written")
    return path


def _card() -> GpuProfile:
    from vramplan.sources.gpu import live_gpu

    try:
        return live_gpu(0)
    except VramplanError as error:
        hint = "vramplan estimate needs no GPU"
        raise InputError(f"there is no CUDA GPU to measure on: {error.message}", hint) from error


def _warn(ledger: Ledger, card: GpuProfile) -> None:
    from vramplan.core.room import judge
    from vramplan.core.units import human

    build.warn(*ledger.warnings)
    if judge(ledger, card) == "does_not_fit":
        need, usable = human(ledger.peak.device_bytes), human(card.usable_bytes)
        build.warn(f"this run needs {need}, {card.name} has {usable} usable now: measuring anyway")
    for name in ALLOCATOR_VARIABLES:
        if name in os.environ:
            build.warn(f"{name} is set and stays: what PyTorch reserves may not be what --allocator predicts")


# ------------------------------------------------------------------------------------------------------ measuring
def _measure(
    ledger: Ledger, card: GpuProfile, config: dict[str, Any] | None, width: int | None
) -> tuple[Outcome, str | None]:
    """Run the child in a folder that is gone afterwards. With an out-of-memory end: what the log says of it."""
    from tempfile import TemporaryDirectory

    from vramplan.launch import launch, prepare_run_dir
    from vramplan.report.live import make_display

    with TemporaryDirectory(prefix="vramplan-measure-") as name:
        folder = Path(name)
        prepare_run_dir(folder, ledger.run, None, resume=False)
        if config is not None:
            (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with make_display(sys.stderr, ledger.peak.allocated_bytes, width=width) as display:
            outcome = launch(folder, measure=True, on_event=display.on_event)
        if outcome.exit_code == OUR_ERROR and (folder / "log.txt").is_file():
            click.echo((folder / "log.txt").read_text(encoding="utf-8", errors="replace"), err=True)
        diagnosis = _diagnosis(folder / "log.txt", ledger, card) if outcome.exit_code == ENDED_IN_OOM else None
        return outcome, diagnosis


def _diagnosis(log: Path, ledger: Ledger, card: GpuProfile) -> str:
    """One line: the likeliest cause, and the best fix with its bytes."""
    from vramplan.core.diagnose import diagnose
    from vramplan.core.units import human
    from vramplan.sources.oom_text import read_evidence

    try:  # an explanation that fails must not change how the run ended
        evidence = read_evidence(log)
        if evidence is not None:
            found = diagnose(evidence, ledger.model, ledger.run, card)
            useful = [fix for fix in found.fixes if fix.saves_bytes > 0]
            best = [f"Best fix: {fix.title}, saves {human(fix.saves_bytes)}." for fix in useful[:1]]
            return " ".join([found.causes[0], *best])
    except (Unplannable, VramplanError):
        pass
    return "; ".join(runner.oom_lines(ledger))


def _whole(outcome: Outcome, ledger: Ledger, card: GpuProfile) -> Measurement | None:
    """The child's measurement with what only the parent knows; other processes on the card stay out of the file.

    Where the child cannot ask the driver about itself (a container), the launcher's view of the card stands in.
    """
    if outcome.measurement is None:
        return None
    phases = tuple(
        replace(phase, process_bytes=outcome.peak_process_bytes)
        if phase.name == "step" and phase.process_bytes is None
        else phase
        for phase in outcome.measurement.phases
    )
    return replace(outcome.measurement, phases=phases, prediction=ledger, gpu=replace(card, processes=()))


# ----------------------------------------------------------------------------------------------------- after it
def _report(
    ledger: Ledger,
    outcome: Outcome,
    measurement: Measurement | None,
    diagnosis: str | None,
    output: Path,
    params: build.Params,
) -> None:
    """Append, print, and say on stderr what went wrong."""
    from vramplan.sources.records import append_jsonl

    code = _exit_code(outcome)
    kept = measurement if code in (OK, ENDED_IN_OOM) else None
    if kept is not None:
        append_jsonl(output, kept)
    written = str(output) if kept is not None else None
    if params["as_json"]:
        from vramplan.report.payload import measure_payload

        print_json(measure_payload(ledger, kept, outcome.ended, code, outcome.message, diagnosis, written))
    elif kept is not None and written is not None:
        from vramplan.report.measure import show_measurement

        show_measurement(sys.stdout, ledger, kept, written, width=params["width"])
    if code != OK:
        # What the child says of a run folder or of resuming has no meaning here: the folder is gone.
        hint = outcome.hint if code not in (OUR_ERROR, ENDED_IN_OOM, 130) else ""
        click.echo(error_line(outcome.message or f"the measuring process ended with {code}", hint), err=True)
    if diagnosis is not None:
        build.note(diagnosis)


def _exit_code(outcome: Outcome) -> int:
    return outcome.exit_code if outcome.exit_code in runner.KNOWN_EXITS else OUR_ERROR
