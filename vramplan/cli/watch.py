"""`vramplan watch`: a run that was started elsewhere, as its records have it, until it ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vramplan.cli import build, complete, options
from vramplan.cli.output import print_json
from vramplan.core.types import SCHEMA_VERSION, Ledger, Plan
from vramplan.errors import OK, OUR_ERROR, VramplanError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vramplan.report.watch import Watched

INTERRUPTED = 130
EXITS = (0, 1, 2, 4, 130)
EXAMPLE = "Example: vramplan watch runs/first"


@click.command("watch", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("run_dir", metavar="RUN_DIR", shell_complete=complete.folder)
@click.option(
    "--once", cls=options.SectionOption, section="Output", is_flag=True, help="Show it as it is now, and stop."
)
@options.use(options.OUTPUT)
def command(**params: Any) -> int:
    """Show a run of `vramplan train` (or of VramplanCallback) while it goes on: memory, tokens/s, loss, time left."""
    from vramplan.launch.attaching import check_folder, follow, is_running, own_pid
    from vramplan.report.watch import Watched

    folder = Path(params["run_dir"])
    check_folder(folder)
    watched = Watched(params["run_dir"], *_predicted(folder))
    once = params["once"] or params["as_json"]
    source = follow(folder, once=once)
    if once:
        events = next(source)
        watched.add(events)
        watched.gone = watched.end is None and not is_running(folder, own_pid(events))
        _show(watched, params)
        return OK
    try:
        _follow(watched, source, params["width"])
    except KeyboardInterrupt:
        build.note("no longer watched; the run goes on")
        return INTERRUPTED
    code = (watched.end or {}).get("exit_code")
    return code if type(code) is int and code in EXITS else OUR_ERROR


def _show(watched: Watched, params: build.Params) -> None:
    if params["as_json"]:
        print_json({"schema_version": SCHEMA_VERSION, "run_dir": params["run_dir"], **watched.state()})
    else:
        from vramplan.report.tables import console
        from vramplan.report.watch import view

        screen = console(sys.stdout, params["width"])
        screen.print(view(screen, watched))


def _follow(watched: Watched, source: Iterator[list[dict[str, Any]]], width: int | None) -> None:
    """Show it until it ends."""
    from vramplan.report.watching import make_screen

    watched.add(next(source))
    with make_screen(sys.stdout, watched, width) as screen:
        for events in source:
            watched.add(events)
            screen.show(events)
        watched.gone = watched.end is None


def _predicted(folder: Path) -> tuple[Ledger | None, int | None]:
    """The ledger and the speed that the run was started with; None for what is not there or cannot be read."""
    from vramplan.sources import records

    ledger, speed = None, None
    try:
        if (folder / "prediction.json").is_file():
            ledger = records.read_json(folder / "prediction.json", Ledger)
        if (folder / "plan.json").is_file():
            plan = records.read_json(folder / "plan.json", Plan)
            ledger = ledger or plan.ledger
            run = plan.run
            chosen = (run.levers, run.micro_batch_size, run.accumulation)
            speeds = (c.tokens_per_s for c in plan.candidates
                      if (c.levers, c.micro_batch_size, c.accumulation) == chosen)  # fmt: skip
            speed = next(speeds, None)
    except VramplanError as error:
        build.note(f"{error.message}: watched without a prediction")
    return ledger, speed
