"""The flags of the schedule: one for each field of `Schedule`, which has their defaults."""

from __future__ import annotations

from typing import Any

import click

from vramplan.cli.options import Choice, Number, OneOf, ParamType, Section, SectionOption, Whole, flag_of, names_in
from vramplan.core.types import INTERVALS, LR_SCHEDULERS, ON_NAN, REPORTERS, SAVE_STRATEGIES, Schedule
from vramplan.errors import InputError

DEFAULTS = Schedule()
STEPS = 10**9


class Reporters(ParamType):
    """Names with commas, "all", or "none"."""

    name = "a,b|all|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = names_in(value)
        if names == ("none",):
            return ()
        unknown = [name for name in names if name not in REPORTERS]
        if unknown and names != ("all",):
            raise InputError(
                f"{flag_of(param)} must be all, none, or names with commas, not {value!r}", f"of {', '.join(REPORTERS)}"
            )
        return names


class MaxSteps(Whole):
    """A number of steps, or transformers' -1: as many as the epochs have."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:  # type: ignore[override]
        return None if value == "-1" else super().convert(value, param, ctx)


def _in(section: str) -> Any:
    def option(flag: str, help: str = "", **settings: Any) -> Any:
        name = flag.partition("/")[0].removeprefix("--").replace("-", "_")
        default = getattr(DEFAULTS, name)
        shown = {"default": default, "show_default": default not in (None, (), False)}
        return click.option(flag, cls=SectionOption, section=section, help=help, **{**shown, **settings})

    return option


_sched, _eval = _in("Schedule"), _in("Evaluation, checkpoints and reports")

SCHEDULE: Section = (
    _sched("--max-steps", "Optimizer steps; overrides epochs.", type=MaxSteps(1, STEPS)),
    _sched("--num-train-epochs", "Epochs.", type=Number(0, 10**6, low_open=True)),
    _sched("--learning-rate", "Peak rate.", type=Number(0, 100, low_open=True)),
    _sched("--lr-scheduler-type", "As in transformers.", type=OneOf(LR_SCHEDULERS, "schedule"), metavar="NAME"),
    _sched("--lr-scheduler-kwargs", "What the schedule takes besides, as a JSON object.", metavar="JSON"),
    _sched("--warmup-ratio", "Share of steps.", type=Number(0, 1)),
    _sched("--warmup-steps", "Steps, or a share below 1; overrides the ratio.", type=Number(0, STEPS)),
    _sched("--weight-decay", "Of the optimizer.", type=Number(0, 100)),
    _sched("--max-grad-norm", "Clip gradients; 0: do not.", type=Number(0, 10**6)),
    _sched("--adam-beta1", "Of Adam and Lion.", type=Number(0, 1, high_open=True)),
    _sched("--adam-beta2", "Of Adam and Lion.", type=Number(0, 1, high_open=True)),
    _sched("--adam-epsilon", "Of Adam.", type=Number(0, 1)),
    _sched("--optim-args", "What the optimizer takes besides (sgd: momentum=0.9,nesterov=true).", metavar="A=X,B=Y"),
    _sched("--rehearsal/--no-rehearsal", "Try the largest batch, evaluation too, before the first step."),
    _sched("--cuda-graphs/--no-cuda-graphs", "Start short micro-steps as one, where memory is to spare."),
    _sched("--on-nan", "Steps without a finite gradient are left out; stop: three in a row end the run.",
           type=Choice(ON_NAN)),
    _sched("--seed", "Of data order and adapter.", type=Whole(0, 2**32 - 1)),
    _sched("--data-seed", "Of data order alone.", type=Whole(0, 2**32 - 1)),
    _sched("--full-determinism", "Deterministic kernels: slower, the same to the last bit.", is_flag=True),
    _eval("--logging-steps", "Steps between reports; the loss is their mean.", type=Whole()),
    _eval("--report-to", f"Who else gets the numbers: {', '.join(REPORTERS)}.", type=Reporters(),
          metavar="a,b|all|none"),
    _eval("--run-name", "Its name there.  [default: the run folder's]", metavar="NAME"),
    _eval("--save-strategy", "When to save a checkpoint.", type=Choice(SAVE_STRATEGIES)),
    _eval("--save-steps", "Steps between checkpoints.", type=Whole(1, STEPS)),
    _eval("--save-total-limit", "Checkpoints kept, the best one among them; 0: all.", type=Whole(0)),
    _eval("--eval-strategy", "When to measure the held-out loss, besides before and after.",
          type=Choice(INTERVALS)),
    _eval("--eval-steps", "Steps between evaluations.  [default: --save-steps]", type=Whole(1, STEPS)),
    _eval("--per-device-eval-batch-size", "Rows at a time.  [default: the micro-batch]", type=Whole()),
    _eval("--load-best-model-at-end", "Keep the adapter with the lowest held-out loss.", is_flag=True),
    _eval("--early-stopping-patience", "Stop after N evaluations without a better loss.", type=Whole()),
    _eval("--early-stopping-threshold", "By how much it must be better.", type=Number(0, 1000)),
)  # fmt: skip
