"""`vramplan merge`: an adapter and its base become one model, without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vramplan.cli import build, complete, error_line, options, runner
from vramplan.cli.output import print_json
from vramplan.core.names import public_name
from vramplan.core.types import MERGE_BASES, MERGE_DTYPES, SCHEMA_VERSION, MergeSpec, RunSpec
from vramplan.errors import OK, InputError

EXAMPLE = "Example: vramplan merge runs/first -o merged"
CONFIG = "adapter_config.json"


class Size(options.ParamType):
    """A number of bytes: 5GB, 500MiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from vramplan.core.units import parse_size

        try:
            size = parse_size(str(value))
        except ValueError:
            size = 0
        if not 0 < size < 2**60:
            raise InputError(f"{options.flag_of(param)} must be a size such as 5GB or 500MiB, not {value}")
        return size


_run, _out = options.in_section("Run"), options.in_section("Output")
OPTIONS: options.Section = (
    _run("--base", metavar="MODEL", help="Base model: folder, Hub id or built-in name.  [default: the adapter's own]"),
    _run("--onto", type=options.Choice(MERGE_BASES), default="original", show_default=True,
         help="original: the base's weights. nf4: those weights as 4 bits had rounded them, as in training."),
    _run("--double-quant/--no-double-quant", default=None,
         help="How they were rounded.  [default: as in the run, else double-quant]"),
    _out("-o", "--output", metavar="DIR", required=True, help="Folder to make."),
    _out("--dtype", type=options.Choice(MERGE_DTYPES), default="bfloat16", show_default=True, help="Of the result."),
    _out("--max-shard-size", type=Size(), default="5GB", show_default=True, metavar="SIZE", help="Of one file."),
)  # fmt: skip


@click.command("merge", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("source", metavar="RUN_DIR|ADAPTER", shell_complete=complete.folder)
@options.use(OPTIONS, options.OUTPUT)
def command(**params: Any) -> int:
    """Merge the adapter of RUN_DIR (or the folder ADAPTER of a plain PEFT adapter) into its base model.

    The result is a folder that transformers loads and llama.cpp converts to GGUF. Memory holds about one tensor.
    """
    runner.require_extra("vramplan merge")
    spec = _spec(params)
    from vramplan.launch.merging import merge
    from vramplan.report.merge import make_display

    with make_display(sys.stderr, width=params["width"]) as display:
        outcome = merge(spec, display.on_event)
    if params["as_json"]:
        print_json(
            {
                "schema_version": SCHEMA_VERSION,
                "output": spec.output if outcome.exit_code == OK else None,
                "ended": outcome.ended,
                "exit_code": outcome.exit_code,
                "message": outcome.message,
            }
        )
    elif outcome.exit_code == OK:
        click.echo(f"Done: {outcome.message}")
    if outcome.exit_code != OK:
        click.echo(error_line(outcome.message, outcome.hint), err=True)
    return outcome.exit_code


def _spec(params: build.Params) -> MergeSpec:
    """What to merge into what; everything that can be looked up without torch is."""
    source = Path(params["source"]).expanduser()
    adapter = source if (source / CONFIG).is_file() else source / "adapter"
    if not (adapter / CONFIG).is_file():
        raise InputError(f"{source} is neither a run folder with an adapter nor an adapter", f"it holds no {CONFIG}")
    run = _run_of(source)
    base = _base(params["base"], source, adapter, run)
    double_quant = params["double_quant"]
    if double_quant is None:
        double_quant = run.double_quant if run is not None else True
    return MergeSpec(
        adapter=str(adapter),
        base=base,
        base_name=public_name(base if run is None or params["base"] else run.model_path or run.model),
        output=str(_output(params["output"])),
        dtype=params["dtype"],
        max_shard_bytes=params["max_shard_size"],
        onto=params["onto"],
        double_quant=double_quant,
    )


def _run_of(folder: Path) -> RunSpec | None:
    """The run that made the adapter, if `folder` or the one above it is its run folder."""
    from vramplan.sources import records

    for place in (folder, folder.absolute().parent):
        if (place / "run.json").is_file():
            return records.read_json(place / "run.json", RunSpec)
    return None


def _base(named: str | None, source: Path, adapter: Path, run: RunSpec | None) -> str:
    """The base as a folder or a Hub id: as named, else what the adapter was trained on."""
    from vramplan.cli.runner import weights_of

    if named:
        return weights_of(named) or named
    if run is not None and run.random_weights:
        raise InputError("this adapter was trained on random weights: there is nothing to merge it into")
    unpacked = source / "model"  # of a GGUF file; the run folder may have been moved since
    if run is not None and (run.model_path or "").lower().endswith(".gguf") and (unpacked / "config.json").is_file():
        return str(unpacked)
    from vramplan.sources.records import parse_json, read_text

    config = parse_json(read_text(adapter / CONFIG), str(adapter / CONFIG))
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(f"{adapter / CONFIG} names no base model", "name it with --base")
    return str(Path(base).absolute()) if Path(base).exists() else base


def _output(name: str) -> Path:
    path = Path(name).expanduser().absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"-o {name} exists already", "name a new folder")
    if not path.parent.is_dir():
        raise InputError(f"-o {name}: there is no folder {path.parent}")
    return path
