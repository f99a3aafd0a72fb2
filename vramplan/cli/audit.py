"""`vramplan audit`: what in a trainer's configuration costs memory without need, before anything runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vramplan.cli import build, complete, options
from vramplan.cli.output import print_json
from vramplan.core.types import ModelSpec, TrainerConfig
from vramplan.errors import DOES_NOT_FIT, OK, InputError, VramplanError

EXAMPLE = "Example: vramplan audit qlora.yml --model llama-3.1-8b --gpu rtx-4090"
FILES = (".yaml", ".yml", ".toml", ".json")


@click.command("audit", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("path", metavar="FILE|MODEL", shell_complete=complete.path)
@click.option("--model", cls=options.SectionOption, section="Run", metavar="NAME",
              help="The model, where the file names none, or another.")  # fmt: skip
@click.option("--gpu", cls=options.SectionOption, section="Card", metavar="NAME|live",
              help="Hold the run as it is written against this card.")  # fmt: skip
@options.use(options.CALIBRATION, options.OUTPUT)
def command(**params: Any) -> int:
    """Say what in FILE costs memory: TrainingArguments, SFTConfig, axolotl, LLaMA-Factory, or a run file of ours."""
    from vramplan.core.audit_config import audit

    card = build.card(params["gpu"], calibration=params["calibration"]) if params["gpu"] else None
    config, model = _read(params["path"], params["model"])
    found = audit(config, model, card)
    if params["as_json"]:
        from vramplan.sources.records import encode

        print_json(encode(found))
    else:
        from vramplan.report.audit_config import show_config_audit

        show_config_audit(sys.stdout, found, width=params["width"])
    return DOES_NOT_FIT if found.judged is not None and found.judged.verdict == "does_not_fit" else OK


def _read(path: str, name: str | None) -> tuple[TrainerConfig, ModelSpec | None]:
    """The file and its model; or the model alone, where the path is one."""
    from vramplan.core.audit_config import of_model

    if _is_model(path):
        if name is not None:
            raise InputError(f"{path} is a model, and so is --model {name}", "give one of the two")
        spec = _load(path)
        return of_model(spec), spec
    if path.lower().endswith(".toml"):
        return _run_file(path, name)
    from vramplan.sources.foreign import read_foreign

    config = read_foreign(path)
    return config, _load(name) if name is not None else _named(config)


def _is_model(path: str) -> bool:
    """A name, a folder, or a config.json of a model."""
    file = Path(path)
    if not path.lower().endswith(FILES):
        return not file.is_file()
    if not file.is_file():
        raise InputError(f"no such file: {path}")
    if not path.lower().endswith(".json"):
        return False
    from vramplan.sources.foreign import is_model_config
    from vramplan.sources.records import parse_json, read_text

    return is_model_config(parse_json(read_text(file), path))


def _load(name: str) -> ModelSpec:
    from vramplan.sources.hf_config import load_model

    return load_model(name)


def _named(config: TrainerConfig) -> ModelSpec | None:
    """The model that the file names, if it can be read here."""
    if config.model is None:
        build.note("the file names no model: --model NAME adds the bytes")
        return None
    try:
        return _load(config.model)
    except VramplanError as error:
        build.note(f"{error.message}: audited without bytes, --model NAME adds them")
        return None


def _run_file(path: str, name: str | None) -> tuple[TrainerConfig, ModelSpec]:
    """A run file, read as `vramplan train` reads it."""
    from vramplan.cli.train import command as train

    words = ["--config", path] if name is None else [name, "--config", path]
    params = train.make_context("train", words, resilient_parsing=False).params
    if not params["model"]:
        raise InputError(f"{path} names no model", "add --model NAME")
    spec = build.model_spec(params)
    run = build.run_spec(params, spec)
    evaluates = params["eval_strategy"] != "no"
    return TrainerConfig(
        tool="vramplan", source=path, model=run.model, run=run, quantised=True, compute_dtype="bfloat16",
        base_dtype="bfloat16", quant_storage="bfloat16", prepared=run.levers.upcast == "all", input_grads=True,
        evaluates=evaluates, eval_batch_size=params["per_device_eval_batch_size"] or run.micro_batch_size,
        sharded=run.parallel == "fsdp",
    ), spec  # fmt: skip
