"""`vramplan gpus`: the stored cards, and this machine's."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import click

from vramplan.cli import build, options
from vramplan.cli.output import print_json
from vramplan.errors import OK, InputError, VramplanError


@click.command("gpus", cls=options.SectionCommand, epilog="Example: vramplan gpus --save my-card.toml")
@options.use(options.SAVE, options.GPU_INDEX, options.OUTPUT)
def command(save: str | None, force: bool, gpu_index: int, as_json: bool, width: int | None) -> int:
    """List the stored cards, the ones that --gpu knows, and the cards of this machine."""
    from vramplan.sources.gpu import live_gpus
    from vramplan.sources.profiles import gpu_names, load_gpu

    if save is not None:
        return _save(save, gpu_index, force=force, as_json=as_json, width=width)
    if force or gpu_index:
        raise InputError(f"{'--force' if force else '--gpu-index'} is about saving a card", "add --save FILE")
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
