"""`vramplan gpus`: the stored cards and this machine's, which of them a run needs, and a live one as a file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vramplan.cli import build, options
from vramplan.cli.output import print_json
from vramplan.errors import OK, InputError, VramplanError

EXAMPLE = "Example: vramplan gpus --for llama-3.1-8b --seq-len 4096"
OF_A_CARD = ("save", "force", "gpu_index")


@click.command("gpus", cls=options.SectionCommand, epilog=EXAMPLE, context_settings={"allow_extra_args": True})
@options.use(options.GUIDE, options.SAVE, options.GPU_INDEX, options.BATCH, options.PARALLEL, options.RUN, options.LORA,
             options.LEVERS, options.OUTPUT)  # fmt: skip
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, width: int | None, **params: Any) -> int:
    """List the stored cards, the ones that --gpu knows, and the cards of this machine; or name those that suffice."""
    if ctx.args:
        raise InputError(
            f"gpus does not know what to do with {ctx.args[0]}", "--for MODEL names the cards that hold it"
        )
    saving = build.given(ctx, OF_A_CARD)
    if saving and (params["save"] is None or params["model"]):
        flag = "--" + saving[0].replace("_", "-")
        if params["model"]:
            raise InputError(f"{flag} is about one of this machine's cards", "leave out --for")
        raise InputError(f"{flag} is about saving a card", "add --save FILE")
    if params["model"]:
        from vramplan.cli.choice import choose_cards

        return choose_cards(params, as_json=as_json, width=width)
    refuse_run_flags(ctx, params)
    if params["save"] is not None:
        return _save(params["save"], params["gpu_index"], force=params["force"], as_json=as_json, width=width)
    return _list(as_json=as_json, width=width)


def _list(*, as_json: bool, width: int | None) -> int:
    from vramplan.sources.gpu import live_gpus
    from vramplan.sources.profiles import gpu_names, load_gpu

    stored = tuple(load_gpu(name) for name in gpu_names())
    try:
        live = live_gpus()
    except VramplanError as error:
        live = ()
        build.note(error.message)
    if as_json:
        from vramplan.report.payload import gpus_payload

        print_json(gpus_payload(stored, live))
    else:
        from vramplan.report.gpus import show_gpus

        show_gpus(sys.stdout, stored, live, width=width)
    return OK


def _save(name: str, index: int, *, force: bool, as_json: bool, width: int | None) -> int:
    """Write a live card as a profile. A file that is there, perhaps completed by hand, is kept unless forced."""
    from vramplan.sources.gpu import live_gpu
    from vramplan.sources.gpu_file import idle, save_gpu

    path = Path(name if name.endswith(".toml") else f"{name}.toml").expanduser()
    if path.name == ".toml":
        raise InputError(f"--save {name!r} names no file", "--save my-card.toml")
    if path.exists() and not force:
        raise InputError(f"--save {path} exists already", "name another file, or replace it with --force")
    card = replace(idle(live_gpu(index)), key=path.stem)  # as `--gpu FILE` reads it back
    save_gpu(card, path)
    if as_json:
        from vramplan.report.payload import saved_payload

        print_json(saved_payload(card, str(path)))
    else:
        from vramplan.report.gpus import show_saved

        show_saved(sys.stdout, card, str(path), width=width)
    return OK


def refuse_run_flags(ctx: click.Context, params: dict[str, Any]) -> None:
    """What describes a run has nothing to say about a list of cards."""
    given = build.given(ctx, tuple(name for name in params if name not in OF_A_CARD))
    if given:
        flag = next(options.flag_of(param) for param in ctx.command.params if param.name == given[0])
        raise InputError(f"{flag} is about a run", "add --for MODEL")
