"""`vramplan train`: run it, and print what it used beside the prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vramplan.cli import build, complete, options, pictures, runner
from vramplan.cli.options import flag_of
from vramplan.cli.schedule_options import SCHEDULE
from vramplan.core.types import GpuProfile, Ledger, ModelSpec, Plan, RunSpec, Schedule
from vramplan.errors import DoesNotFit, InputError, VramplanError

SHAPING = (  # what a plan has settled
    "batch_size", "accumulation", "effective_batch_size", "seq_len", "recipe", "double_quant", "padding", "packing",
    "lora_r", "lora_alpha", "lora_targets", "lora_dropout", "upcast", "loss", "checkpointing",
    "gradient_checkpointing", "checkpoint_offload", "optim", "attn", "allocator", "kernels", "gpus", "parallel",
)  # fmt: skip

DATA_FLAGS = (
    "data", "data_kind", "text_column", "split", "data_config", "data_revision", "eval_data", "eval_split",
    "eval_fraction",
    "truncation", "on_bad_row", "assistant_only_loss", "completion_only_loss", "train_sampling_strategy",
    "group_by_length", "show_samples", "data_only", "model_path", "random_weights",
)  # fmt: skip

EXAMPLE = "Example: vramplan train plan.json --data conversations.jsonl -o runs/first"


@click.command("train", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("model", required=False, metavar="MODEL|plan.json", shell_complete=complete.model)
@options.use(options.DATA, options.TRAIN, SCHEDULE, options.BATCH, options.PARALLEL, options.RUN, options.LORA,
             options.LEVERS, options.CALIBRATION, options.FILES, options.OUTPUT)  # fmt: skip
@click.pass_context
def command(ctx: click.Context, /, **params: Any) -> int:
    """Fine-tune MODEL, or carry out a plan that `vramplan fit -o` wrote."""
    runner.require_extra("vramplan train")
    pictures.check(params)
    if pictures.wanted(params) and (params["data_only"] or params["print_launch"]):
        raise InputError("--svg and --html draw a run, and nothing is run here", "leave them out")
    run_dir, run, plan = _what(ctx, params)
    if params["data_only"]:
        return runner.show_data(run_dir, run, plan, as_json=params["as_json"], width=params["width"])
    if params["num_machines"] > 1 and not params["print_launch"]:
        raise InputError("--num-machines needs --print-launch", "each machine then starts its own processes")
    if params["print_launch"] and run.gpus == 1:
        raise InputError("--print-launch is for several GPUs", "add --gpus N, or start it without")
    if params["print_launch"]:
        return runner.print_launch(
            run_dir, run, plan, machines=params["num_machines"], resume=params["resume"], as_json=params["as_json"]
        )
    ledger, card = _price(run, plan, force=params["force"], calibration=params["calibration"])
    build.warn(*ledger.warnings, *_evaluation_warnings(run))
    code = runner.run_training(
        run_dir, run, plan, ledger, resume=params["resume"], as_json=params["as_json"], width=params["width"]
    )
    pictures.draw_run(params, ledger, card, run_dir)
    return code


def _what(ctx: click.Context, params: build.Params) -> tuple[Path, RunSpec, Plan | None]:
    """The run folder, the run and the plan behind it, from the three ways to say them."""
    from vramplan.sources import records

    model, output = params["model"], params["output"]
    folder = Path(output) if output else Path(model) if model and params["resume"] else None
    if params["resume"] and folder is None:
        raise InputError("--resume needs the run folder", "vramplan train --resume -o RUN_DIR")
    if params["resume"] and folder is not None and (model is None or Path(model) == folder):
        if not (folder / "run.json").is_file():
            raise InputError(f"{folder} is not a run folder: it holds no run.json")
        _refuse(ctx, (*SHAPING, *DATA_FLAGS), "cannot change when a run is resumed")
        stored = folder / "plan.json"
        plan = records.read_json(stored, Plan) if stored.is_file() else None
        return folder, _with_schedule(ctx, records.read_json(folder / "run.json", RunSpec), params), plan
    if model is None:
        raise InputError("MODEL is missing", "vramplan models lists the built-in ones")
    if is_plan(model):
        _refuse(ctx, (*SHAPING, "calibration"), f"is settled by {model}")
        plan = records.read_json(model, Plan)
        run = _with_data(plan.run, params, settled=not build.given(ctx, DATA_FLAGS))
    else:
        plan, run = None, _with_data(build.run_spec(params, build.model_spec(params)), params)
    return folder or default_folder(run.model), run, plan


def _refuse(ctx: click.Context, names: tuple[str, ...], why: str) -> None:
    refused = build.given(ctx, names)
    if refused:
        flag = next(flag_of(param) for param in ctx.command.params if param.name == refused[0])
        raise InputError(f"{flag} {why}")


def _with_schedule(ctx: click.Context, run: RunSpec, params: build.Params) -> RunSpec:
    """A resumed run may go on for longer or slower: the schedule flags that were given replace the stored ones."""
    names = build.given(ctx, tuple(Schedule.__dataclass_fields__))
    return replace(run, schedule=replace(run.schedule, **{name: params[name] for name in names}))


def _evaluation_warnings(run: RunSpec) -> list[str]:
    rows = run.schedule.per_device_eval_batch_size
    if rows is None or rows <= run.micro_batch_size:
        return []
    return [
        f"--per-device-eval-batch-size {rows} is over the micro-batch of {run.micro_batch_size}: the prediction is of "
        "training alone, and an evaluation may need more"
    ]


def is_plan(path: str) -> bool:
    """True for a JSON file that is a record of ours rather than a model's config.json."""
    if not path.endswith(".json") or not Path(path).is_file():
        return False
    from vramplan.sources.records import parse_json, read_text

    data = parse_json(read_text(path), path)
    return isinstance(data, dict) and "schema_version" in data


def _with_data(run: RunSpec, params: build.Params, *, settled: bool = False) -> RunSpec:
    """settled: without a word about data, those that the plan was made for."""
    random = params["random_weights"]
    return replace(
        run,
        model_path=params["model_path"] or run.model_path or (None if random else runner.weights_of(run.model)),
        random_weights=random,
        data=run.data if settled and run.data is not None else build.data_spec(params),
        schedule=build.schedule(params),
    )


def default_folder(model: str) -> Path:
    """A new folder under runs/, named after the model and the time."""
    from time import strftime

    name = "".join(char if char.isalnum() or char in "-_." else "-" for char in Path(model).name) or "run"
    return Path("runs") / f"{name}-{strftime('%Y%m%d-%H%M%S')}"


def _price(run: RunSpec, plan: Plan | None, *, force: bool, calibration: bool) -> tuple[Ledger, GpuProfile | None]:
    """The prediction, held against this machine's card if there is one, and that card, or the one that was planned for.
    `DoesNotFit` unless forced.

    A plan's own stays as `fit` has made it; any other uses what was measured on the card, if that is wanted.
    """
    from vramplan.core.ledger import estimate
    from vramplan.core.room import judge
    from vramplan.core.units import human

    card = _card(run)
    if card is not None and plan is None:
        card = build.calibrated(card, calibration)
    ledger = plan.ledger if plan is not None else estimate(_spec(run), run, card)
    if card is not None and judge(ledger, card) == "does_not_fit":
        need, usable = human(ledger.peak.device_bytes), human(card.usable_bytes)
        text = f"this run needs {need}, {card.name} has {usable} usable now"
        if not force:
            raise DoesNotFit(text, "vramplan fit plans for this card; --force tries anyway")
        build.warn(text)
    return ledger, plan.gpu if plan is not None else card


def _card(run: RunSpec) -> GpuProfile | None:
    """The card to train on, of several the one with the least room; None for the CPU. InputError if there are fewer."""
    from vramplan.sources.gpu import live_gpu, live_gpus

    try:
        cards = (live_gpu(0),) if run.gpus == 1 else live_gpus()
    except VramplanError as error:
        build.note(f"{error.message}: training on the CPU, where GPU memory cannot be measured")
        return None
    if len(cards) < run.gpus:
        raise InputError(
            f"--gpus {run.gpus}, but this machine has {len(cards)}",
            "over several machines, start it with --print-launch",
        )
    return min(cards[: run.gpus], key=lambda card: card.usable_bytes)


def _spec(run: RunSpec) -> ModelSpec:
    from vramplan.sources.hf_config import load_model

    return load_model(run.model, trust_remote_code=run.trust_remote_code)
