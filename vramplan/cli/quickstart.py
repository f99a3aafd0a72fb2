"""`vramplan quickstart`: estimate, fit and train, on a model made on the spot. No GPU, no Hub."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vramplan.cli import build, options, runner
from vramplan.core.types import DataSpec, GpuProfile, Plan, RunSpec, Schedule
from vramplan.errors import OUR_ERROR, InputError, VramplanError

SHOWN_MODEL, SHOWN_CARDS = "llama-2-7b", ("rtx-3060-12gb", "rtx-4090", "a100-80gb")
EFFECTIVE_BATCH, SEQ_LEN, STEPS, LEARNING_RATE = 8, 128, 60, 2e-3
PROMPT = "She had been"


@click.command("quickstart", cls=options.SectionCommand, epilog="Example: vramplan quickstart -o try-it")
@options.use(options.QUICKSTART, options.OUTPUT)
def command(**params: Any) -> int:
    """Estimate a 7B model on a few cards, then fit and train a tiny one: no GPU, no Hub, a minute or two."""
    runner.require_extra("vramplan quickstart")
    folder = Path(params["output"])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"-o {folder} exists and is not an empty folder", "name a new one")
    quiet, width = params["as_json"], params["width"]
    _say(quiet, f"1/4  What does fine-tuning {SHOWN_MODEL} take?\n")
    if not quiet:
        _show_estimate(width)
    _say(quiet, "\n2/4  Make a tiny Llama with its own tokenizer, from a public-domain novel.\n")
    _make_model(folder / "model", quiet)
    plan = _plan(folder)
    if not quiet:
        from vramplan.report.fit import show_fit

        text = f"\n3/4  Fit it to a stored card ({plan.gpu.key}), for an effective batch of {EFFECTIVE_BATCH}.\n"
        _say(quiet, text)
        show_fit(sys.stdout, plan, written=str(folder / "plan.json"), width=width)
    _say(quiet, f"\n4/4  Train it on this machine for {STEPS} steps.\n")
    os.environ.setdefault("VRAMPLAN_SAMPLE_PROMPT", PROMPT)  # the child writes a line with it at the end
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a model this small gains nothing from a second, busy cores lose
    code = runner.run_training(folder / "run", plan.run, plan, plan.ledger, as_json=quiet, width=width)
    if code == 0:
        _say(quiet, _where(folder))
    return code


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        click.echo(text)


def _show_estimate(width: int | None) -> None:
    from vramplan.core.capacity import capacity
    from vramplan.core.ledger import estimate
    from vramplan.core.sizes import Sizes
    from vramplan.report.estimate import show_estimate
    from vramplan.sources.hf_config import load_model
    from vramplan.sources.profiles import gpu_names, load_gpu

    spec, run = load_model(SHOWN_MODEL), RunSpec(model=SHOWN_MODEL)
    cards = [load_gpu(name) for name in SHOWN_CARDS if name in gpu_names()]
    sizes = Sizes(spec)
    verdicts = [capacity(sizes, run, card) for card in cards]
    show_estimate(sys.stdout, estimate(spec, run), verdicts, width=width)


def _make_model(folder: Path, quiet: bool) -> None:
    """Run the maker in a process of its own: this one stays free of torch."""
    import subprocess

    sys.stdout.flush()
    output = sys.stderr if quiet else None
    done = subprocess.run([sys.executable, "-m", "vramplan.train.tiny", str(folder)], stdout=output, check=False)
    if done.returncode:
        error = VramplanError(f"the tiny model could not be made in {folder}", "the lines above say why")
        error.exit_code = done.returncode if done.returncode in runner.KNOWN_EXITS else OUR_ERROR
        raise error


def _plan(folder: Path) -> Plan:
    """The plan for the smallest stored card, written to plan.json, with data and schedule filled in."""
    from vramplan.core.plan import plan as make_plan
    from vramplan.sources.hf_config import load_model
    from vramplan.sources.records import write_json

    model = str((folder / "model").resolve())
    run = RunSpec(
        model=model,
        model_path=model,
        seq_len=SEQ_LEN,
        data=DataSpec(path=str(Path(model) / "train.jsonl"), eval_fraction=0.05),
        schedule=Schedule(max_steps=STEPS, learning_rate=LEARNING_RATE, save_steps=STEPS),
    )
    plan = make_plan(replace(load_model(model), name="tiny"), run, _smallest_card(), EFFECTIVE_BATCH)
    build.warn(*plan.ledger.warnings)
    write_json(folder / "plan.json", plan)
    return plan


def _smallest_card() -> GpuProfile:
    from vramplan.sources.profiles import gpu_names, load_gpu

    return min((load_gpu(name) for name in gpu_names()), key=lambda card: (card.usable_bytes, card.key))


def _where(folder: Path) -> str:
    rows = (
        (folder / "model", "the tiny model, its tokenizer, train.jsonl"),
        (folder / "plan.json", "the plan; vramplan train takes it as it is"),
        (folder / "run" / "adapter", "the adapter, for peft.PeftModel.from_pretrained"),
        (folder / "run" / "measurement.jsonl", "what the run used"),
        (folder / "run" / "log.txt", "everything the training process printed"),
    )
    width = max(len(str(path)) for path, _ in rows)
    lines = [f"  {path!s:<{width}}  {text}" for path, text in rows]
    return "\n".join(["", "Everything is here:", *lines, "", "Next, with a model of your own:",
                      "  vramplan estimate MODEL --gpu all"])  # fmt: skip
