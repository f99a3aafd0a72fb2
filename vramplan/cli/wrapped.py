"""`vramplan run`: any training command, and what became of its memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vramplan.cli import build, options
from vramplan.cli.train import default_folder
from vramplan.core.units import human
from vramplan.errors import ENDED_IN_OOM, OK, InputError, VramplanError

EXAMPLE = "Example: vramplan run -o runs/sft -- python sft.py --model Qwen/Qwen2.5-7B"


@click.command("run", cls=options.SectionCommand, epilog=EXAMPLE,
               context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})  # fmt: skip
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
@click.option("-o", "--output", cls=options.SectionOption, section="Output", metavar="RUN_DIR",
              help="Where log, samples and snapshot go.  [default: runs/COMMAND-TIME]")  # fmt: skip
@click.option("--snapshot/--no-snapshot", cls=options.SectionOption, section="Output", default=True, show_default=True,
              help="Have a Python script record its allocations, and write them when memory runs out.")  # fmt: skip
@click.option("--every", cls=options.SectionOption, section="Output", type=click.FloatRange(min=0.1), default=1.0,
              show_default=True, metavar="SECONDS", help="Between two looks at the cards.")  # fmt: skip
@click.option("--run", "run_file", cls=options.SectionOption, section="Run", metavar="FILE",
              help="What the command trains, so that fixes have a price: run.json or plan.json.")  # fmt: skip
@click.option("--model", cls=options.SectionOption, section="Run", metavar="NAME",
              help="The same, by MODEL and the flags below.")  # fmt: skip
@click.option("--gpu", cls=options.SectionOption, section="Card", metavar="NAME|live",
              help="Hold fixes against this card.  [default: the one in the report]")  # fmt: skip
@options.use(options.BATCH, options.RUN, options.LORA, options.LEVERS)
@click.option("--width", type=int, hidden=True)
@click.pass_context
def command(ctx: click.Context, /, words: tuple[str, ...], **params: Any) -> int:
    """Run a training command as it is. Its output is kept, its memory on the cards looked at every second; if it ends
    out of memory, it is diagnosed, with priced fixes where --run or --model says what it trains. The exit code is the
    command's own, or 4."""
    from vramplan.cli.diagnose import run_and_card
    from vramplan.launch.wrapping import wrap

    given = tuple(words[1:] if words[0] == "--" else words)
    if not given:
        raise InputError("there is no command to run", "write it after --, as in the shell")
    run, card = run_and_card(ctx, params, None)  # before anything runs: what is wrong with a flag shows at once
    folder = _folder(params["output"], given)
    wrapped = wrap(given, folder, snapshot=params["snapshot"], every_s=params["every"])
    _say(wrapped, folder)
    if wrapped.exit_code == OK or not _diagnosed(wrapped, folder, run, card, params["width"]):
        return wrapped.exit_code
    return ENDED_IN_OOM


def _folder(output: str | None, words: tuple[str, ...]) -> Path:
    """A new folder, or one that is empty."""
    script = next((word for word in words if word.endswith(".py")), words[0])
    folder = Path(output) if output else default_folder(Path(script).stem)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"-o {folder} is there already, and not an empty folder", "name a new one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the run folder {folder} cannot be made: {error.strerror or error}") from error
    return folder


def _say(wrapped: Any, folder: Path) -> None:
    """What was seen, on stderr: stdout is the command's."""
    seen = [f"exit code {wrapped.exit_code} after {wrapped.seconds:,.1f} s"]
    if wrapped.process_bytes is not None:
        seen.append(f"the command had up to {human(wrapped.process_bytes)} of a card")
    elif wrapped.card_bytes is not None:
        seen.append(f"up to {human(wrapped.card_bytes)} of a card were in use")
    build.note(f"{', '.join(seen)}; kept in {folder}")
    for path in wrapped.snapshots:
        build.note(f"memory snapshot: {path}")


def _diagnosed(wrapped: Any, folder: Path, run: Any, card: Any, width: int | None) -> bool:
    """Whether the log tells of a lack of memory; then the diagnosis is printed and kept in the folder."""
    from vramplan.cli.diagnose import keep, show, show_snapshot
    from vramplan.sources.oom_text import read_run_evidence

    evidence = read_run_evidence(folder)
    if evidence is None:
        return False
    diagnosis = None
    for path in sorted(wrapped.snapshots, key=lambda path: -path.stat().st_mtime)[:1]:
        try:
            diagnosis = show_snapshot(str(path), evidence, run, card, width=width)
        except VramplanError as error:
            build.warn(f"the snapshot is left out: {error.message}")
    try:
        keep(diagnosis or show(evidence, run, card, width=width), folder)
    except VramplanError as error:  # an explanation that fails must not change how the run ended
        build.warn(error.message)
    sys.stdout.flush()
    return True
