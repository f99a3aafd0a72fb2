"""Flags -> core values. What is wrong with a combination of flags is said here, before anything is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import click

from vramplan.core.types import DataSpec, GpuProfile, Levers, Lora, ModelSpec, RunSpec, Schedule
from vramplan.errors import InputError

DEFAULT_SEQ_LEN = 2048
NO_LIMIT = 2**20  # positions of a model whose config states none
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt", ".text", ".md", ".gz", ".zst")

Params = dict[str, Any]


def note(text: str) -> None:
    """One line on stderr, so that stdout stays what it should be."""
    click.echo(f"note: {text}", err=True)


def warn(*texts: str) -> None:
    """Warnings on stderr, one line each."""
    for text in texts:
        click.echo(f"warning: {text}", err=True)


def model_spec(params: Params) -> ModelSpec:
    """The model named by MODEL. `InputError` if nothing of that name can be read."""
    from vramplan.sources.hf_config import load_model

    return load_model(params["model"], trust_remote_code=params["trust_remote_code"])


def cards(names: tuple[str, ...], calibration: bool = True, index: int = 0) -> list[tuple[GpuProfile, bool]]:
    """--gpu names -> (card, was it named), each card once; "all" stands for the stored ones, "live" for this one."""
    from vramplan.sources.profiles import gpu_names

    found: dict[str, tuple[GpuProfile, bool]] = {}
    for name in sorted(names, key=lambda name: name == "all"):  # named cards first: the first is the chip assumed
        for key in gpu_names() if name == "all" else (name,):
            profile = card(key, index, calibration)
            found.setdefault(profile.key, (profile, name != "all"))
    return list(found.values())


def able(cards: list[tuple[GpuProfile, bool]], *, packing: bool) -> list[tuple[GpuProfile, bool]]:
    """Without the cards of `--gpu all` on which packed rows cannot run; a card that was named is refused later."""
    if not packing:
        return cards
    from vramplan.core.varlen import CAPABILITY

    old = [card.key for card, named in cards if not named and card.compute_capability < CAPABILITY]
    if old:
        note(f"packing needs compute capability {'.'.join(map(str, CAPABILITY))}: {', '.join(old)} left out")
    return [(card, named) for card, named in cards if card.key not in old]


def card(name: str, index: int = 0, calibration: bool = True) -> GpuProfile:
    """A stored card by name, or this machine's card for "live", with its calibration if that is wanted."""
    from vramplan.sources.profiles import load_gpu

    if name != "live":
        return load_gpu(name)
    from vramplan.sources.gpu import live_gpu

    return calibrated(live_gpu(index), calibration)


def calibrated(live: GpuProfile, wanted: bool = True) -> GpuProfile:
    """This machine's card with what `vramplan calibrate` has measured on it, and a note that it is so."""
    if not wanted:
        return live
    from vramplan.sources.calibration import apply

    profile, told, warning = apply(live)
    if told:
        note(told)
    if warning:
        warn(warning)
    return profile


def refuse_index(ctx: click.Context, names: tuple[str, ...]) -> None:
    """`InputError` for --gpu-index where no card of this machine is asked for."""
    if "live" not in names and given(ctx, ("gpu_index",)):
        raise InputError("--gpu-index is about this machine's cards", "--gpu live takes it")


class Outline(NamedTuple):
    """What the flags are held against, of a model that is traced rather than described."""

    name: str
    max_position_embeddings: int


def outline(params: Params) -> tuple[dict[str, Any], ModelSpec | None, ModelSpec | Outline]:
    """(config.json, our description of the model or None, what to hold the flags against), for --trace."""
    from vramplan.errors import UnknownArchitecture
    from vramplan.sources.hf_config import load_model, raw_config

    config = raw_config(params["model"])
    try:
        spec = load_model(params["model"])
    except UnknownArchitecture:
        text = config.get("text_config")
        part = text if isinstance(text, dict) else config
        limits = [part.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")]
        limit = next((n for n in limits if isinstance(n, int) and n > 0), NO_LIMIT)
        return config, None, Outline(params["model"], limit)
    return config, spec, spec


def run_spec(params: Params, spec: ModelSpec | Outline) -> RunSpec:
    """The run that the flags describe. `InputError` names the flag that cannot be."""
    micro, accumulation = batch(params)
    run = RunSpec(
        model=params["model"],
        model_path=params["model_path"],
        micro_batch_size=micro,
        seq_len=seq_len(params["seq_len"], spec),
        accumulation=accumulation,
        lora=Lora(
            r=params["lora_r"],
            alpha=params["lora_alpha"],
            targets=params["lora_targets"],
            dropout=params["lora_dropout"],
        ),
        double_quant=params["double_quant"],
        recipe=params["recipe"],
        levers=levers(params),
        padding=params["padding"],
        packing=packing(params),
        trust_remote_code=params["trust_remote_code"],
        gpus=params.get("gpus") or 1,
        parallel=parallel(params),
    )
    origin = params.get("origin")
    return run if origin is None else origin.completed(run, spec)


def parallel(params: Params) -> str:
    """How several GPUs train together; "none" for one."""
    gpus, chosen = params.get("gpus") or 1, params.get("parallel")
    if gpus == 1 and chosen is not None:
        raise InputError(f"--parallel {chosen} needs more than one GPU", "add --gpus N")
    return "none" if gpus == 1 else chosen or "ddp"


def seq_len(asked: int | None, spec: ModelSpec | Outline) -> int:
    """The sequence length, held against the model's limit."""
    limit = spec.max_position_embeddings
    if asked is None:
        if limit < DEFAULT_SEQ_LEN:
            note(f"--seq-len is {limit}, the limit of {spec.name}")
        return min(DEFAULT_SEQ_LEN, limit)
    if asked > limit:
        raise InputError(
            f"--seq-len {asked} is over the {limit} positions of {spec.name}",
            "to go further, pass a copy of its config.json with rope scaling and a larger max_position_embeddings",
        )
    return asked


def batch(params: Params) -> tuple[int, int]:
    """Micro-batch and accumulation, from any two of them and the effective batch, which is that of all GPUs."""
    micro, accumulation = params.get("batch_size"), params.get("accumulation")
    effective, gpus = params.get("effective_batch_size"), params.get("gpus") or 1
    if effective is None:
        return micro or 1, accumulation or 1
    if micro is None and accumulation is not None:
        micro = effective // (accumulation * gpus)
    micro = micro or 1
    accumulation = effective // (micro * gpus) if accumulation is None else accumulation
    if micro * accumulation * gpus != effective:
        product, flags = f"{micro} x {accumulation}", "--batch-size x --accumulation"
        if gpus > 1:
            product, flags = f"{product} x {gpus}", f"{flags} x --gpus"
        raise InputError(
            f"--effective-batch-size {effective} is not {product} ({flags})",
            "give two of the three, with a whole quotient",
        )
    return micro, accumulation


def packing(params: Params) -> bool:
    """--packing, and what does not go with it."""
    asked = bool(params["packing"])
    if asked and params.get("attn") == "eager":
        raise InputError("--packing needs attention that keeps documents apart, which --attn eager does not")
    if asked and params["padding"]:
        raise InputError("--packing and --padding exclude each other", "packed rows need no attention mask")
    return asked


def levers(params: Params) -> Levers:
    """The recipe's levers, with those that were given on the command line in their place."""
    from vramplan.core.recipes import RECIPES

    given: dict[str, Any] = {
        "upcast": params.get("upcast"),
        "loss": params.get("loss"),
        "checkpointing": checkpointing(params),
        "checkpoint_offload": params.get("checkpoint_offload"),
        "optimizer": params.get("optim"),
        "attention": params.get("attn"),
        "allocator": params.get("allocator"),
        "kernels": params.get("kernels"),
    }
    changes = {name: value for name, value in given.items() if value is not None}
    chosen = replace(RECIPES[params["recipe"]], **changes)
    if chosen.checkpoint_offload and chosen.checkpointing == "none":
        raise InputError("--checkpoint-offload needs checkpoints", "leave out --checkpointing none, or do not offload")
    return chosen


def checkpointing(params: Params) -> str | None:
    """--checkpointing and its Hugging Face spelling, which must not contradict each other."""
    ours, theirs = params.get("checkpointing"), params.get("gradient_checkpointing")
    if theirs is None or ours is None:
        return ours if theirs is None else ("all" if theirs else "none")
    if theirs == (ours == "none"):
        flag = "--gradient-checkpointing" if theirs else "--no-gradient-checkpointing"
        raise InputError(f"--checkpointing {ours} contradicts {flag}", "give one of the two")
    return str(ours)


def data_spec(params: Params) -> DataSpec:
    """--data and what belongs to it. A file must exist and hold something; what is no file is a data set's name."""
    if not params["data"]:
        raise InputError("--data is missing", "--data FILE (JSONL, Parquet, CSV or text) or a data set's name")
    if params["eval_fraction"] and (params["eval_data"] or params["eval_split"]):
        raise InputError("--eval-fraction excludes --eval-data and --eval-split", "say once what is held out")
    flags = {"kind": "data_kind", "config": "data_config", "revision": "data_revision"}
    same = {name: name for name in DataSpec.__dataclass_fields__ if name not in ("path", "eval_path", *flags)}
    fields = {name: params[flag] for name, flag in {**same, **flags}.items()}
    fields["path"] = data_path(params["data"], "--data")
    if params["eval_data"]:
        fields["eval_path"] = data_path(params["eval_data"], "--eval-data")
    if params["group_by_length"]:
        fields["train_sampling_strategy"] = "group_by_length"
    return DataSpec(**fields)


def data_path(path: str, flag: str) -> str:
    """A file by its absolute path, looked at; a data set by its name."""
    from pathlib import Path

    file = Path(path).expanduser()
    if file.is_file() and file.stat().st_size == 0:
        raise InputError(f"{flag} {path} is empty")
    if not file.exists() and (file.suffix.lower() in DATA_SUFFIXES or path.startswith((".", "/", "~"))):
        raise InputError(f"{flag} {path} does not exist")
    return str(file.resolve()) if file.exists() else path


def schedule(params: Params) -> Schedule:
    """The schedule flags."""
    return Schedule(**{name: params[name] for name in Schedule.__dataclass_fields__})


def given(ctx: click.Context, names: tuple[str, ...]) -> list[str]:
    """Which of these parameters were written on the command line."""
    source = click.core.ParameterSource.COMMANDLINE
    return [name for name in names if ctx.get_parameter_source(name) == source]
