"""`vramplan diagnose`: what took the memory, and which change fixes it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vramplan.cli import build, complete, options, pictures
from vramplan.cli.diagnosed import Given, sort_paths
from vramplan.cli.output import print_json
from vramplan.core.types import SCHEMA_VERSION, GpuProfile, ModelSpec, OomEvidence, Plan, RunSpec, Unplannable
from vramplan.errors import OK, InputError, VramplanError

if TYPE_CHECKING:
    from vramplan.cli.trying import Trial
    from vramplan.core.inverse import Known
    from vramplan.core.types import Diagnosis, Holdings

EXAMPLE = "Example: vramplan diagnose train.log --model llama-3.1-8b --recipe peft --batch-size 2 --gpu rtx-4090"
LOG, RUN, PLAN, DIAGNOSIS = "log.txt", "run.json", "plan.json", "diagnosis.json"
NOT_THE_RUN = ("paths", "words", "run_file", "model", "width")  # of `run` too
NOT_FOUND = "No out-of-memory report found in {}."


@click.command("diagnose", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("paths", metavar="LOG|RUN_DIR|SNAPSHOT|-...", nargs=-1, required=True, shell_complete=complete.path)
@click.option("--run", "run_file", cls=options.SectionOption, section="Run", metavar="FILE",
              help="The run: run.json or plan.json.")  # fmt: skip
@click.option("--model", cls=options.SectionOption, section="Run", metavar="NAME",
              help="The run, by MODEL and the flags below.")  # fmt: skip
@click.option("--gpu", cls=options.SectionOption, section="Card", metavar="NAME|live",
              help="Hold fixes against this card.  [default: the one in the report]")  # fmt: skip
@click.option("--verify", is_flag=True, cls=options.SectionOption, section="Card",
              help="Try the best fixes on this machine's card, a few steps each.")  # fmt: skip
@options.use(options.BATCH, options.RUN, options.LORA, options.LEVERS, options.FILES, options.OUTPUT)
@click.pass_context
def command(ctx: click.Context, /, **params: Any) -> int:
    """Say why a run went out of memory and which change fixes it, from its log (- reads stdin), its run folder
    or a memory snapshot of PyTorch, any of them packed by gzip; or from several of the same run, one per rank: the
    first that failed is the cause."""
    pictures.check(params)
    given = sort_paths(params["paths"])
    run, card = run_and_card(ctx, params, given.folder)
    if pictures.wanted(params) and run is None:
        raise InputError("--svg and --html draw a run's step", "say what ran: --run FILE, --model NAME, a run folder")
    if params["verify"] and run is None:
        raise InputError("--verify tries changed runs", "say what ran: --run FILE, --model NAME, a run folder")
    trial = _trial(params["width"]) if params["verify"] else None
    diagnosis = _explained(params, given, run, card, trial)
    if pictures.wanted(params):
        _draw(params, run, card, given.folder, diagnosis)
    if trial is not None and trial.failure is not None:
        trial.tell_failure()
        return trial.failure.exit_code
    return OK


def _trial(width: int | None) -> Trial:
    from vramplan.cli.trying import Trial

    return Trial(width)


def _explained(
    params: build.Params, given: Given, run: RunSpec | None, card: GpuProfile | None, trial: Trial | None
) -> Diagnosis | None:
    """What the logs and the snapshot say, printed. None: there is no out-of-memory report in them."""
    evidence = _evidence(given)
    if given.snapshots or given.snapshot_stream is not None:
        path = str(given.snapshots[0]) if given.snapshots else "stdin"
        return show_snapshot(path, evidence, run, card, as_json=params["as_json"], width=params["width"],
                             stream=given.snapshot_stream, trial=trial)  # fmt: skip
    if evidence is None:
        where = ", ".join("stdin" if path == "-" else path for path in params["paths"][:3])
        _say_nothing_found(where, as_json=params["as_json"])
        return None
    return show(evidence, run, card, as_json=params["as_json"], width=params["width"], trial=trial)


def _draw(
    params: build.Params,
    run: RunSpec | None,
    card: GpuProfile | None,
    folder: Path | None,
    diagnosis: Diagnosis | None,
) -> None:
    """The step of the run that ended so, on the card that was named or reported."""
    model = _model(run)
    if run is None or model is None:
        return
    from vramplan.core.ledger import estimate

    pictures.draw_run(params, estimate(model, run, card), card, folder, diagnosis)


def _evidence(given: Given) -> OomEvidence | None:
    """The report of the rank that failed first, the others named in a note."""
    from vramplan.sources.log_files import others_text, reports
    from vramplan.sources.oom_text import read_evidence, read_run_evidence

    if given.stream is not None:
        return read_evidence(given.stream)
    if given.folder is not None and not given.logs:
        return read_run_evidence(given.folder)
    found = reports(given.logs)
    if len(found) > 1:
        build.note(others_text(found))
    return found[0].evidence if found else None


def run_and_card(
    ctx: click.Context, params: build.Params, folder: Path | None
) -> tuple[RunSpec | None, GpuProfile | None]:
    """The run and the card, from --run or --model and --gpu, else from the run folder."""
    flags = [param for param in ctx.command.params if getattr(param, "section", "") not in ("Output", "Card")]
    given = build.given(ctx, tuple(param.name or "" for param in flags))
    shaping = [name for name in given if name not in NOT_THE_RUN]
    card = build.card(params["gpu"]) if params["gpu"] else None
    if params["run_file"] and params["model"]:
        raise InputError("--run and --model both say what ran", "give one of the two")
    if shaping and not params["model"]:
        flag = next(options.flag_of(param) for param in flags if param.name == shaping[0])
        raise InputError(f"{flag} needs --model", "--run FILE and a run folder say it all")
    if params["model"]:
        return build.run_spec(params, build.model_spec(params)), card
    if params["run_file"]:
        stored, planned = stored_run(Path(params["run_file"]))
        return stored, card or planned
    if folder is None:
        return None, card
    run = stored_run(folder / RUN)[0] if (folder / RUN).is_file() else None
    planned = stored_run(folder / PLAN)[1] if (folder / PLAN).is_file() else None
    return run, card or planned


def stored_run(path: Path) -> tuple[RunSpec, GpuProfile | None]:
    """A run.json, or a plan.json with its card."""
    from vramplan.sources.records import decode, parse_json, read_text

    data = parse_json(read_text(path), str(path))
    if isinstance(data, dict) and data.get("type") == "Plan":
        plan = decode(data, Plan, where=str(path))
        return plan.run, plan.gpu
    return decode(data, RunSpec, where=str(path)), None


def diagnosed(
    evidence: OomEvidence, run: RunSpec | None, card: GpuProfile | None, holdings: Holdings | None = None
) -> Diagnosis:
    """The diagnosis. A run that cannot be estimated is left out, with a note."""
    from vramplan.core.diagnose import diagnose

    try:
        return diagnose(evidence, _model(run), run, card, holdings, _known(evidence, run))
    except (Unplannable, VramplanError) as error:
        build.note(f"{error.message}: diagnosed from the report alone")
        return diagnose(evidence, gpu=card, holdings=holdings, known=_known(evidence, None))


def show(
    evidence: OomEvidence,
    run: RunSpec | None,
    card: GpuProfile | None,
    *,
    as_json: bool = False,
    width: int | None = None,
    holdings: Holdings | None = None,
    trial: Trial | None = None,
) -> Diagnosis:
    """Diagnose and print; what `trial` finds of the fixes is shown with them."""
    diagnosis = diagnosed(evidence, run, card, holdings)
    diagnosis = trial(diagnosis) if trial else diagnosis
    if as_json:
        from vramplan.sources.records import encode

        print_json(encode(diagnosis))
    else:
        from vramplan.report.diagnose import show_diagnosis

        if holdings is not None:
            from vramplan.report.holdings import show_holdings

            show_holdings(sys.stdout, holdings, evidence.requested_bytes, width=width)
            click.echo()
        show_diagnosis(sys.stdout, diagnosis, width=width)
    return diagnosis


def _known(evidence: OomEvidence, run: RunSpec | None) -> Known:
    """What the built-in models have, where a size is all there is; reading them takes a tenth of a second."""
    from vramplan.core.causes import phase_of
    from vramplan.core.inverse import Known

    if run is not None or phase_of(evidence.frames) not in ("loss", "eager"):
        return Known()
    from vramplan.sources.profiles import model_shapes

    return Known(*model_shapes())


def keep(diagnosis: Diagnosis, folder: Path) -> None:
    """Write it into the run folder. VramplanError if that fails."""
    from vramplan.sources.records import write_json

    write_json(folder / DIAGNOSIS, diagnosis)


def show_snapshot(
    path: str,
    report: OomEvidence | None,
    run: RunSpec | None,
    card: GpuProfile | None,
    *,
    as_json: bool = False,
    width: int | None = None,
    stream: Any = None,
    trial: Trial | None = None,
) -> Diagnosis | None:
    """The holders of a snapshot, then the diagnosis of its out-of-memory event, or of the log's report if there is one:
    the report's numbers come first, the snapshot adds what it does not say."""
    from vramplan.core.holdings import evidence_of, holdings
    from vramplan.sources.pickle_guard import uncollected
    from vramplan.sources.snapshot import read_snapshot

    with uncollected():
        snapshot = read_snapshot(path, stream)
        held = holdings(snapshot)
        evidence = evidence_of(snapshot, held)
        del snapshot  # before the collector of cycles walks through it
    if report is not None:
        evidence = _joined(report, evidence)
    if evidence is not None:
        return show(evidence, run, card, as_json=as_json, width=width, holdings=held, trial=trial)
    if not as_json:
        from vramplan.report.holdings import show_holdings

        show_holdings(sys.stdout, held, width=width)
    _say_nothing_found(path, as_json=as_json, holdings=held)
    return None


def _joined(report: OomEvidence, other: OomEvidence | None) -> OomEvidence:
    """The report with what only the snapshot knows. Two that ask for different sizes are two events."""
    if other is None or report.kind != "torch":
        return report
    missing = {
        name: getattr(other, name)
        for name in ("requested_bytes", "allocated_bytes", "reserved_unallocated_bytes", "free_bytes", "frames")
        if not getattr(report, name) and getattr(other, name)
    }
    return replace(report, **missing)


def _model(run: RunSpec | None) -> ModelSpec | None:
    if run is None:
        return None
    from vramplan.sources.hf_config import load_model

    try:
        return load_model(run.model, trust_remote_code=run.trust_remote_code)
    except VramplanError:
        if run.model_path is None:
            raise
        return replace(load_model(run.model_path, trust_remote_code=run.trust_remote_code), name=run.model)


def _say_nothing_found(where: str, *, as_json: bool, holdings: Holdings | None = None) -> None:
    text = NOT_FOUND.format(where)
    if as_json:
        nothing: dict[str, Any] = {"evidence": None, "causes": [], "cause_keys": [], "fixes": []}
        if holdings is not None:
            from vramplan.sources.records import encode

            body = encode(holdings)
            nothing["holdings"] = {key: body[key] for key in body if key not in ("schema_version", "type")}
        print_json({"schema_version": SCHEMA_VERSION, "type": "Diagnosis", **nothing})
        build.note(text)
    else:
        click.echo(text)
