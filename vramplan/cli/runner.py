"""Starting a run, watching it, and saying what came of it: what `train` and `quickstart` share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vramplan.cli import build, error_line
from vramplan.cli.output import print_json
from vramplan.core.types import Ledger, Lengths, Plan, RunSpec
from vramplan.errors import (
    BAD_INPUT,
    DOES_NOT_FIT,
    ENDED_IN_OOM,
    OK,
    OUR_ERROR,
    InputError,
    MissingExtra,
    VramplanError,
)

if TYPE_CHECKING:
    from vramplan.launch import Outcome

EXTRA_MODULES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "safetensors")
KNOWN_EXITS = (OK, OUR_ERROR, BAD_INPUT, DOES_NOT_FIT, ENDED_IN_OOM, 130)


def require_extra(what: str) -> None:
    """`MissingExtra` unless every library of the train extra is installed. Looks, without importing any."""
    from importlib.util import find_spec

    if any(find_spec(name) is None for name in EXTRA_MODULES):
        raise MissingExtra(what)


def run_training(
    run_dir: Path,
    run: RunSpec,
    plan: Plan | None,
    ledger: Ledger,
    *,
    resume: bool = False,
    as_json: bool = False,
    width: int | None = None,
) -> int:
    """Prepare the run folder, run the child with a live display, report. Returns the exit code of the contract."""
    from vramplan.launch import launch, prepare_run_dir
    from vramplan.report.live import make_display

    prepare_run_dir(run_dir, run, plan, resume=resume, prediction=ledger)
    if not as_json:
        from vramplan.report.train import show_start

        show_start(sys.stdout, ledger, f"Run folder: {run_dir}", width=width)
    with make_display(sys.stderr, ledger.peak.allocated_bytes, width=width) as display:
        outcome = launch(run_dir, resume=resume, on_event=display.on_event)
    code = outcome.exit_code if outcome.exit_code in KNOWN_EXITS else OUR_ERROR
    if as_json:
        from vramplan.report.payload import train_payload

        payload = train_payload(str(run_dir), outcome.ended, code, ledger, outcome.measurement, outcome.message)
        print_json(payload)
    elif outcome.measurement is not None and outcome.measurement.steps:
        from vramplan.report.train import show_result

        adapter = run_dir / "adapter"
        where = str(adapter) if adapter.is_dir() else "none was written"
        show_result(sys.stdout, ledger, outcome.measurement, where, width=width)
    if code != OK:
        click.echo(error_line(outcome.message or f"the training process ended with {code}", outcome.hint), err=True)
        if code == ENDED_IN_OOM:
            _explain_oom(run_dir, run, plan, ledger, as_json=as_json, width=width)
        build.note(f"log: {run_dir / 'log.txt'}")
    return code


def show_data(run_dir: Path, run: RunSpec, plan: Plan | None, *, as_json: bool, width: int | None) -> int:
    """Have the child read the data and show it; nothing is loaded or trained. Returns the exit code."""
    outcome, summary = _read_data(run_dir, run, plan, width)
    code = outcome.exit_code if outcome.exit_code in KNOWN_EXITS else OUR_ERROR
    if as_json:
        print_json({"run_dir": str(run_dir), "ended": outcome.ended, "exit_code": code, "data": summary or None})
    if code != OK:
        click.echo(error_line(outcome.message or f"the training process ended with {code}", outcome.hint), err=True)
        build.note(f"log: {run_dir / 'log.txt'}")
    return code


def read_lengths(run: RunSpec, *, width: int | None) -> Lengths:
    """How long the rows of the run's data are: the child reads them, in a folder that is gone afterwards.

    VramplanError as the child ended, InputError for data that cannot be used.
    """
    from tempfile import TemporaryDirectory

    require_extra("vramplan fit --data")
    with TemporaryDirectory(prefix="vramplan-") as folder:
        outcome, summary = _read_data(Path(folder) / "run", run, None, width)
    if outcome.exit_code != OK or not summary.get("histogram"):
        kind = InputError if outcome.exit_code == BAD_INPUT else VramplanError
        raise kind(outcome.message or "the data could not be read", outcome.hint)
    bars = tuple((int(tokens), int(rows)) for tokens, rows in summary["histogram"])
    return Lengths(bars=bars, tokens=summary["tokens"])


def _read_data(run_dir: Path, run: RunSpec, plan: Plan | None, width: int | None) -> tuple[Outcome, dict[str, Any]]:
    """How a child that reads the data, with a display, has ended; and its event `data`, {} if there was none."""
    from vramplan.launch import launch, prepare_run_dir
    from vramplan.report.live import make_display

    summary: dict[str, Any] = {}

    def on_event(event: dict[str, Any]) -> None:
        if event.get("event") == "data":
            summary.update(event)
        display.on_event(event)

    prepare_run_dir(run_dir, run, plan, resume=False)
    with make_display(sys.stderr, 0, width=width) as display:
        return launch(run_dir, data_only=True, on_event=on_event), summary


def weights_of(model: str) -> str | None:
    """Where the weights of MODEL are: the Hub id of a built-in name, the folder of a path; None: MODEL itself."""
    from vramplan.sources.profiles import model_profile

    path = Path(model)
    if path.exists():
        return str((path if path.is_dir() else path.parent).resolve())
    try:
        return str(model_profile(model).get("hub_id") or model)
    except InputError:  # no built-in name: a Hub id, which is where its weights are
        return None


def print_launch(run_dir: Path, run: RunSpec, plan: Plan | None, *, machines: int, resume: bool, as_json: bool) -> int:
    """Write the run folder and accelerate's config, and say how to start the run with either launcher."""
    from vramplan.launch import prepare_run_dir
    from vramplan.launch.torchrun import CONFIG, HOST, per_machine, write_launch

    count = per_machine(run, machines)
    prepare_run_dir(run_dir, run, plan, resume=resume)
    commands = write_launch(run, run_dir, resume=resume, machines=machines)
    if as_json:
        print_json({"schema_version": 1, "run_dir": str(run_dir), **commands, "config": str(run_dir / CONFIG)})
        return OK
    where = f"on each of {machines} machines" if machines > 1 else "on this machine"
    click.echo(f"{count} process{'es' if count > 1 else ''} {where}, by one of")
    for command in commands.values():
        click.echo(f"  {command}")
    if machines > 1:
        build.note(f"{HOST} is a name or address of the first machine that the others can reach; --machine_rank counts")
        build.note("the run folder, the model and the data must be at the same place on all of them")
    return OK


def _explain_oom(
    run_dir: Path, run: RunSpec, plan: Plan | None, ledger: Ledger, *, as_json: bool, width: int | None
) -> None:
    """The diagnosis of the run's log, also kept in its folder; where the log says nothing, what the ledger says."""
    from vramplan.sources.oom_text import read_run_evidence

    try:  # an explanation that fails must not change how the run ended
        evidence = read_run_evidence(run_dir)
        if evidence is not None:
            from vramplan.cli.diagnose import diagnosed, keep
            from vramplan.report.diagnose import show_diagnosis

            diagnosis = diagnosed(evidence, run, plan.gpu if plan else None)
            if not as_json:
                show_diagnosis(sys.stdout, diagnosis, width=width)
            keep(diagnosis, run_dir)
            if not as_json:
                return
    except VramplanError:
        pass
    for text in oom_lines(ledger):
        build.note(text)


def oom_lines(ledger: Ledger, count: int = 4) -> list[str]:
    """What the ledger says after an out-of-memory end: the need, and the largest lines."""
    from vramplan.core.units import human

    peak = ledger.peak
    largest = sorted(ledger.lines, key=lambda line: -line.bytes)[:count]
    names = ", ".join(f"{line.label or line.key} {human(line.bytes)}" for line in largest)
    return [
        f"predicted {human(peak.device_bytes)} on the device, {human(peak.allocated_bytes)} allocated in {peak.phase}",
        f"largest lines: {names}",
    ]
