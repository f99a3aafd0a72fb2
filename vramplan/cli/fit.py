"""`vramplan fit`: levers and micro-batch for one card and one effective batch."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vramplan.cli import build, complete, options, pictures, rewriting, runner
from vramplan.cli.output import print_json
from vramplan.core.lengths import longest_run
from vramplan.core.types import GpuProfile, GpuVerdict, Lengths, ModelSpec, Plan, RunSpec
from vramplan.errors import DOES_NOT_FIT, OK, InputError

if TYPE_CHECKING:
    from vramplan.cli.probing import Prober

WORTH_PACKING = 1.15  # times as fast: then it is said
EXAMPLE = "Example: vramplan fit llama-2-7b --effective-batch-size 16 --gpu rtx-4090 -o plan.json"


@click.command("fit", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("model", shell_complete=complete.model)
@options.use(options.FROM, options.FIT, options.ONE_GPU, options.GPU_INDEX, options.CALIBRATION, options.RUN,
             options.LORA, options.LEVERS, options.DATA, options.PICTURES, options.OUTPUT)  # fmt: skip
@click.pass_context
def command(ctx: click.Context, /, **params: Any) -> int:
    """Choose the levers and the micro-batch with which MODEL trains best on one card."""
    pictures.check(params)
    if not params["probe"]:
        build.refuse_index(ctx, (params["gpu"],))
    target = Path(params["output"]) if params["output"] else None
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise InputError(f"-o {target} cannot be written", "name a file in a folder that exists")
    rewriting.in_words(params.get("origin"), target)
    spec = build.model_spec(params)
    run, lengths = _run(params, spec)
    with ExitStack() as stack:
        prober = _prober(params, stack)
        card = prober.card() if prober else build.card(params["gpu"], params["gpu_index"], params["calibration"])
        plan = _plan(params, spec, run, card, lengths)
        plan = prober.verified(plan) if prober else plan
    _show(plan, target, params, longest_run(run, lengths).seq_len if lengths else run.seq_len)
    verdict = GpuVerdict(gpu=plan.gpu.key, usable_bytes=plan.budget_bytes, verdict=plan.verdict)
    pictures.draw(params, plan.ledger, plan.gpu, [verdict])
    if prober is not None and prober.failure is not None:
        prober.tell_failure()
        return prober.failure.exit_code
    return OK if plan.verdict != "does_not_fit" else DOES_NOT_FIT


def _run(params: build.Params, spec: ModelSpec) -> tuple[RunSpec, Lengths | None]:
    """The run that is asked for, and how long its rows are where it names data."""
    run = build.run_spec({**params, "effective_batch_size": None}, spec)
    if not params["data"]:
        return run, None
    weights = params["model_path"] or runner.weights_of(run.model)
    run = replace(run, data=build.data_spec(params), model_path=weights)
    return run, runner.read_lengths(run, width=params["width"])


def _plan(params: build.Params, spec: ModelSpec, run: RunSpec, card: GpuProfile, lengths: Lengths | None) -> Plan:
    """The plan, and warnings about it on stderr."""
    from vramplan.core.plan import plan as make_plan
    from vramplan.sources.host import checkpoint_limit_bytes

    free, wanted = _free(params), (params["effective_batch_size"], params["objective"])
    limit = checkpoint_limit_bytes() if params["gpu"] == "live" else None  # another card's computer is not known
    search = rewriting.searched(params.get("origin"))
    plan = make_plan(spec, run, card, *wanted, free=free, lengths=lengths, host_limit_bytes=limit, **search)
    build.warn(*plan.ledger.warnings)
    if lengths is not None:
        _say_packed(plan, make_plan(spec, replace(plan.run, packing=True), card, *wanted, free=free))
    return plan


def _prober(params: build.Params, stack: ExitStack) -> Prober | None:
    if not params["probe"]:
        return None
    from vramplan.cli.probing import Prober

    return stack.enter_context(Prober(params))


def _show(plan: Plan, target: Path | None, params: build.Params, compared_at: int) -> None:
    """Write the plan, unless nothing fits, and print it; its combinations are of rows of so many tokens."""
    fits, origin = plan.verdict != "does_not_fit", params.get("origin")
    in_words = rewriting.in_words(origin, target)
    words = None
    if fits and origin is not None and origin.config is not None and (in_words or target is None):
        words = rewriting.words_of(origin, plan, target)
    elif fits and target is not None:
        from vramplan.sources.records import write_json

        write_json(target, plan)
    if params["as_json"]:
        from vramplan.sources.records import encode

        print_json(encode(plan))
        if words is not None:
            rewriting.tell(words)
    else:
        from vramplan.report.fit import show_fit

        written = str(target) if fits and target else None
        show_fit(sys.stdout, plan, written=written, compared_at=compared_at, words=words, width=params["width"])


def _free(params: build.Params) -> tuple[str, ...]:
    """The levers that are searched: those that no flag and no run file settles."""
    settled = set()
    if params["checkpointing"] is not None or params["gradient_checkpointing"] is not None:
        settled.add("checkpointing")
    if params["checkpoint_offload"] is not None:
        settled.add("checkpoint_offload")
    return tuple(lever for lever in rewriting.levers_of(params.get("origin")) if lever not in settled)


def _say_packed(plan: Plan, packed: Plan) -> None:
    """Whether packing would be much faster; the effective batch then counts rows of several documents."""
    before, after = (max((c.tokens_per_s or 0 for c in p.candidates), default=0) for p in (plan, packed))
    if not plan.run.packing and packed.verdict != "does_not_fit" and after > WORTH_PACKING * before > 0:
        build.note(
            f"rows differ in length: with --packing about {after:,} tokens/s (modelled), {after / before:.1f} times as "
            "many; a row of the effective batch then holds several documents"
        )
