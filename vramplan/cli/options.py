"""The flags, each defined once, in sections that the commands share; and what a value on the command line may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from vramplan.cli import complete, helping
from vramplan.cli.helping import flag_of as flag_of
from vramplan.core.types import (
    ALLOCATORS,
    ATTENTIONS,
    DATA_KINDS,
    KERNELS,
    LOSSES,
    OBJECTIVES,
    OPTIMIZERS,
    SAMPLINGS,
    TRUNCATIONS,
    UPCASTS,
)
from vramplan.errors import InputError

if TYPE_CHECKING:
    ParamType: TypeAlias = click.ParamType[Any]
else:
    ParamType = click.ParamType  # not generic before click 8.4

F = TypeVar("F", bound=Callable[..., Any])
Section = Sequence[Callable[[Any], Any]]

MOST_PER_HOUR = 1e9  # in any currency
MANY = 1_000_000  # no sensible count is larger; keeps the arithmetic fast and typing errors out


class Whole(ParamType):
    """A whole number from `low` to `high`."""

    name = "N"

    def __init__(self, low: int = 1, high: int = MANY) -> None:
        self.low, self.high = low, high

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            number = None
        if number is None or not self.low <= number <= self.high:
            raise InputError(f"{flag_of(param)} must be a whole number from {self.low} to {self.high}, not {value}")
        return number


class Number(ParamType):
    """A finite number from `low` to `high`; the bound itself is left out where it is `open`."""

    name = "X"

    def __init__(self, low: float, high: float, *, low_open: bool = False, high_open: bool = False) -> None:
        self.low, self.high, self.low_open, self.high_open = low, high, low_open, high_open

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        below = number <= self.low if self.low_open else number < self.low
        above = number >= self.high if self.high_open else number > self.high
        if math.isnan(number) or below or above:
            raise InputError(f"{flag_of(param)} must be {self._range()}, not {value}")
        return number

    def _range(self) -> str:
        low = f"above {self.low:g}" if self.low_open else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.high_open else f"at most {self.high:g}"
        return f"a number {low} and {high}"


class OneOf(ParamType):
    """One of some names, with the nearest one suggested; `aliases` are other libraries' spellings."""

    def __init__(self, names: Sequence[str], what: str, aliases: dict[str, str] | None = None) -> None:
        self.names, self.name, self.aliases = tuple(names), what, aliases or {}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = self.aliases.get(value, value)
        if name not in self.names:
            from vramplan.sources.profiles import suggest

            hint = suggest(str(value), self.names) or f"one of {', '.join(self.names)}"
            raise InputError(f"{flag_of(param)} has no {self.name} {value!r}", hint)
        return str(name)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return complete.starting(self.names, incomplete)


class Choice(click.Choice):  # type: ignore[type-arg]  # not generic before click 8.2
    """One of a few words, with the nearest one suggested."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            from vramplan.sources.profiles import suggest

            words = [str(choice) for choice in self.choices]
            hint = suggest(str(value), words) or f"one of {', '.join(words)}"
            raise InputError(f"{flag_of(param)} cannot be {value!r}", hint) from None


class Checkpointing(ParamType):
    """none, all or every-K."""

    name = "none|all|every-K"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        return complete.starting(("none", "all", "every-2", "every-4"), incomplete)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        head, _, count = str(value).partition("every-")
        if value in ("none", "all"):
            return str(value)
        if not head and count.isdecimal() and 1 <= int(count) <= MANY:
            return "all" if int(count) == 1 else f"every-{int(count)}"
        raise InputError(f"{flag_of(param)} must be none, all or every-K with K from 1, not {value}")


def names_in(value: Any) -> tuple[str, ...]:
    """Names with commas between them, each once."""
    return tuple(dict.fromkeys(name.strip() for name in str(value).split(",")))


class Targets(ParamType):
    """PEFT's target_modules: "all-linear" or module names with commas."""

    name = "all-linear|a,b,c"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = names_in(value)
        if "" in names or ("all-linear" in names and len(names) > 1):
            raise InputError(f"{flag_of(param)} must be all-linear or names with commas, not {value!r}")
        return names


class Share(ParamType):
    """A share of 1: "2%" or "0.02"."""

    name = "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 <= share < 1:
            raise InputError(f"{flag_of(param)} must be a share below 1, as 2% or 0.02, not {value}")
        return share


class Price(ParamType):
    """CARD=X: a card's name, and what an hour of it costs."""

    name = "CARD=X"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        card, equals, text = str(value).rpartition("=")
        try:
            price = float(text)
        except ValueError:
            price = math.nan
        if not equals or not card.strip() or not 0 <= price < MOST_PER_HOUR:
            raise InputError(f"{flag_of(param)} must be a card and its price per hour, as rtx-4090=0.35, not {value}")
        return card.strip(), price


SECTIONS = (
    "Data",
    "Run",
    "Schedule",
    "Evaluation, checkpoints and reports",
    "LoRA",
    "Levers, each overriding the recipe",
    "Card",
    "Output",
)


class SectionOption(click.Option):
    """An option that knows under which heading of --help it stands."""

    def __init__(self, *args: Any, section: str = "Output", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """By what the help says that follows: a file, a folder, a model, a card."""
        known = complete.for_option(flag_of(self), str(self.metavar or ""))
        return super().shell_complete(ctx, incomplete) if known is None else known(ctx, self, incomplete)


class SectionCommand(click.Command):
    """A command that takes Hugging Face's spellings, and whose --help groups the options by section."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if ctx.resilient_parsing:  # a shell asks what could follow: nothing is read
            return super().parse_args(ctx, args)
        from vramplan.cli.spelling import Translation, suggestion

        translated = Translation(self).read(args)
        for note in translated.notes:
            click.echo(f"note: {note}", err=True)
        if translated.model is not None:
            ctx.default_map = {**(ctx.default_map or {}), "model": translated.model}
        ctx.meta["vramplan.own"] = translated.own
        if translated.origin is not None:
            ctx.params["origin"] = translated.origin
        try:
            rest = super().parse_args(ctx, translated.words)
        except click.NoSuchOption as error:
            known = {name for param in self.params for name in param.opts if name.startswith("--")}
            name = error.option_name
            raise InputError(f"{self.name} has no flag {name}", suggestion(name, known, self.name)) from None
        except click.MissingParameter as error:
            if flag_of(error.param) != "MODEL":
                raise
            if translated.origin is None:
                raise InputError("MODEL is missing", "vramplan models lists the built-in ones") from None
            rest, ctx.params["model"] = [], None
        if translated.origin is not None and not ctx.params.get("model"):
            raise InputError(f"{translated.origin.path} names no model", "give it as MODEL")
        return rest

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return [*super().get_params(ctx), helping.HELP_ALL]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        helping.write_options(
            [p for p in self.get_params(ctx) if isinstance(p, click.Option)], SECTIONS, ctx, formatter
        )


def use(*sections: Section) -> Callable[[F], F]:
    """Apply the options of these sections, in reading order."""

    def decorate(function: F) -> F:
        for option in reversed([option for section in sections for option in section]):
            function = option(function)
        return function

    return decorate


def in_section(section: str) -> Callable[..., Callable[[Any], Any]]:
    def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
        return click.option(*names, cls=SectionOption, section=section, **settings)

    return option


_run, _lora, _lever = in_section("Run"), in_section("LoRA"), in_section("Levers, each overriding the recipe")
_card, _data, _out = in_section("Card"), in_section("Data"), in_section("Output")

OPTIMIZER_ALIASES = {
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_lion": "paged_lion_32bit",
}

RUN: Section = (
    _run("--config", metavar="FILE.toml", expose_value=False,
         help="Run file: flags as TOML keys. What is on the command line too counts there."),
    _run("--seq-len", type=Whole(), help="Tokens per sequence.  [default: 2048, or the model's limit]"),
    _run("--recipe", type=Choice(("lean", "peft")), default="lean", show_default=True,
         help="lean: ours. peft: the tutorials' stock run."),
    _run("--double-quant/--no-double-quant", default=True, show_default=True, help="Quantise the constants too."),
    _run("--padding/--no-padding", default=False, show_default=True, help="Batches hold padding (attention mask)."),
    _run("--packing/--no-packing", default=False, show_default=True,
         help="Several documents in a row, which do not see each other."),
    _run("--model-path", metavar="PATH", help="Where the weights are, when not at MODEL: folder, Hub id, GGUF file."),
    _run("--trust-remote-code", is_flag=True, help="Let the model's repository run its own code."),
)  # fmt: skip

FROM: Section = (
    _run("--from", metavar="FILE", expose_value=False,
         help="The run of this file: axolotl, LLaMA-Factory, TRL, TrainingArguments, run.json, plan.json. Flags win."),
)  # fmt: skip

BATCH: Section = (
    _run("--batch-size", "--per-device-train-batch-size", "batch_size", type=Whole(),
         help="Micro-batch.  [default: 1]"),
    _run("--accumulation", "--gradient-accumulation-steps", "accumulation", type=Whole(),
         help="Micro-batches per optimizer step.  [default: 1]"),
)  # fmt: skip

PARALLEL: Section = (
    _run("--gpus", type=Whole(1, 1024), default=1, show_default=True, help="GPUs that train together, all machines."),
    _run("--parallel", type=Choice(("ddp", "fsdp")),
         help="ddp: the model whole on each GPU. fsdp: its weights shared out.  [default: ddp]"),
)  # fmt: skip

LORA: Section = (
    _lora("--lora-r", type=Whole(1, 65536), default=16, show_default=True, help="Rank."),
    _lora("--lora-alpha", type=Whole(), default=32, show_default=True, help="Scale is alpha / rank."),
    _lora("--lora-targets", type=Targets(), default="all-linear", show_default=True,
          metavar="all-linear|a,b,c", help="target_modules of PEFT."),
    _lora("--lora-dropout", type=Number(0, 1, high_open=True), default=0.0, show_default=True, metavar="P",
          help="Any value above 0 costs memory."),
)  # fmt: skip

LEVERS: Section = (
    _lever("--upcast", type=Choice(UPCASTS), help="Which unquantised parameters become float32."),
    _lever("--loss", type=Choice(LOSSES), help="Full logits, or fused with the head."),
    _lever("--checkpointing", type=Checkpointing(), metavar="none|all|every-K", help="Which layers are checkpointed."),
    _lever("--gradient-checkpointing/--no-gradient-checkpointing", default=None, help="The same as all or none."),
    _lever("--checkpoint-offload/--no-checkpoint-offload", default=None, help="Keep checkpoints in host memory."),
    _lever("--optim", type=OneOf(OPTIMIZERS, "optimizer", OPTIMIZER_ALIASES), metavar="NAME",
           help="Optimizer, by its transformers name."),
    _lever("--attn", type=Choice(ATTENTIONS), help="Attention implementation."),
    _lever("--kernels", type=Choice(KERNELS), help="Fused layers, or transformers' and PEFT's own."),
    _lever("--allocator", type=Choice(ALLOCATORS), help="PyTorch's allocator, expandable segments or not."),
)  # fmt: skip

CALIBRATION: Section = (
    _card("--calibration/--no-calibration", default=True, show_default=True,
          help="Use what vramplan calibrate has measured on this machine's card."),
)  # fmt: skip

GPUS: Section = (
    _card("--gpu", "gpu", multiple=True, metavar="NAME|all|live", help="Judge these cards; may be repeated."),
    *CALIBRATION,
)

PRICES: Section = (
    _card("--price", type=Price(), multiple=True, metavar="CARD=X",
          help="What an hour of this card costs, for the cost of a million tokens; may be repeated."),
)  # fmt: skip

GUIDE: Section = (
    _card("--for", "model", metavar="MODEL", help="Name the smallest class of cards that fine-tunes this model."),
    *PRICES,
)


def _one_card(ctx: click.Context, _param: click.Parameter, names: tuple[str, ...]) -> str:
    """The one card of `fit`: where `estimate` compares several, the last would silently count."""
    several = tuple(dict.fromkeys(names))
    if len(several) > 1 or several == ("all",):
        flags = " ".join(f"--gpu {name}" for name in several)
        raise InputError(
            f"{flags}: {ctx.command.name} plans for one card", f"vramplan estimate MODEL {flags} compares them"
        )
    return several[0]


ONE_GPU: Section = (
    _card("--gpu", multiple=True, callback=_one_card, metavar="NAME|live", default=("live",), show_default=True,
          help="Plan for this card."),
)  # fmt: skip

GPU_INDEX: Section = (
    _card("--gpu-index", type=Whole(0, 1023), default=0, show_default=True, help="Which of this machine's cards."),
)

SAVE: Section = (
    _card("--save", metavar="FILE", help="Write one of this machine's cards as a profile that --gpu FILE.toml reads."),
    _card("--force", is_flag=True, help="Replace the file if it exists."),
)

DATA: Section = (
    _data("--data", metavar="FILE|DATASET", help="JSONL, Parquet, CSV or text file, or a data set's name."),
    _data("--data-kind", type=OneOf(DATA_KINDS, "kind of data"), default="auto", show_default=True,
          metavar="NAME", help=f"What a row holds: {', '.join(DATA_KINDS)}."),
    _data("--text-column", default="text", show_default=True, metavar="NAME", help="Column of plain text."),
    _data("--split", default="train", show_default=True, metavar="NAME",
          help="Split of the data set, also a part of it: train[:10%]."),
    _data("--data-config", metavar="NAME", help="Configuration of the data set."),
    _data("--data-revision", metavar="REV", help="Branch, tag or commit of the data set."),
    _data("--eval-data", metavar="FILE|DATASET", help="Rows to measure the loss on."),
    _data("--eval-split", metavar="NAME", help="Split of the data set to measure the loss on."),
    _data("--eval-fraction", type=Number(0, 1, high_open=True), default=0.0, show_default=True,
          help="Share of rows held out to measure the loss."),
    _data("--truncation", type=Choice(TRUNCATIONS), default="cut", show_default=True,
          help="What a row over --seq-len does."),
    _data("--on-bad-row", type=Choice(("fail", "skip")), default="fail", show_default=True,
          help="What a row that cannot be used does."),
    _data("--assistant-only-loss/--no-assistant-only-loss", default=True, show_default=True,
          help="Of a conversation learn only what the assistant says."),
    _data("--completion-only-loss/--no-completion-only-loss", default=True, show_default=True,
          help="Of prompt and completion learn only the completion."),
    _data("--train-sampling-strategy", type=Choice(SAMPLINGS), default="random", show_default=True,
          help="Order of the rows."),
    _data("--group-by-length", is_flag=True, help="The same as --train-sampling-strategy group_by_length."),
    _data("--show-samples", type=Whole(0, 1000), default=0, show_default=True,
          help="Show so many rows as the model sees them."),
)  # fmt: skip

OUTPUT: Section = (
    _out("--json", "as_json", is_flag=True, help="Print JSON alone on stdout."),
    _out("--width", type=Whole(40, 1000), hidden=True),
)

FILES: Section = (
    _out("--svg", metavar="FILE", help="Write memory over one optimizer step as a picture."),
    _out(
        "--html", metavar="FILE", help="Write a page for a browser: the step, what is alive at any point, the ledger."
    ),
)

PICTURES: Section = (
    _out("--timeline", is_flag=True, help="Draw memory over one optimizer step."),
    *FILES,
    _out("--measured", metavar="RUN_DIR|FILE", help="Draw too what a run, or vramplan measure, has measured of it."),
)

EXPLAIN: Section = (
    _out("--explain", metavar="LINE", help="Take one line of the ledger apart: formula, tensors, source."),
)

TRACE: Section = (
    _out("--trace", is_flag=True, help="Trace the real libraries' step, for any architecture (no GPU; needs torch)."),
    _out("--full-depth", is_flag=True, help="Trace every layer rather than a few that stand for all."),
)

FIT: Section = (
    _run("--effective-batch-size", type=Whole(), required=True, help="Micro-batch x accumulation, exactly."),
    _run("--objective", type=Choice(OBJECTIVES), default="speed", show_default=True,
         help="What to make the most of."),
    _run("--probe", is_flag=True, help="Try the plan on this machine's card, in a short run of its own."),
    _out("-o", "--output", metavar="FILE", help="Write the plan, for vramplan train."),
)  # fmt: skip

LOCK: Section = (
    _out("-o", "--output", metavar="FILE", help="Write the lock here.  [default: vramplan.lock]"),
    _out("--check", metavar="FILE", help="Estimate the run of this lock again; exit code 5 if it needs more."),
    _out("--tolerance", type=Share(), default="2%", show_default=True, help="By how much the peak may rise."),
    _card("--gpu", metavar="NAME", help="The card whose chip decides; of compute capability 8.9 without."),
)

TRAIN: Section = (
    _run("--effective-batch-size", type=Whole(), help="Micro-batch x accumulation x GPUs, exactly."),
    _run("--random-weights", is_flag=True, help="Build the model from its config alone: memory and speed only."),
    _out("--data-only", is_flag=True, help="Read and show the data, load no model, stop."),
    _run("--num-machines", type=Whole(1, 1024), default=1, help="Spread --gpus over these; with --print-launch."),
    _out("--print-launch", is_flag=True, help="Write the run folder and say how to start it, without starting it."),
    _run("--force", is_flag=True, help="Start although the prediction does not fit this machine's card."),
    _out("-o", "--output", metavar="RUN_DIR", help="Run folder.  [default: runs/MODEL-TIME]"),
    _out("--resume", is_flag=True, help="Go on from the last checkpoint in RUN_DIR."),
)

MEASURE: Section = (
    _run("--steps", type=Whole(2, 1000), default=3, show_default=True, help="Optimizer steps; the last is reported."),
    _run("--layers", type=Whole(1, 10_000), help="Only this many of the model's layers, for a quick look."),
    _run("--driver", type=Choice(("trainer", "loop")), default="trainer", show_default=True,
         help="Who plays the step: transformers' Trainer, or a plain loop under autocast."),
    _out("-o", "--output", metavar="FILE", default="measurements.jsonl", show_default=True,
         help="Append the measurement here, as one line."),
)  # fmt: skip

WATCH: Section = (_out("--once", is_flag=True, help="Show it as it is now, and stop."),)

CALIBRATE: Section = (
    _out("--show", is_flag=True, help="Show what was measured before, and measure nothing."),
    _out("--forget", is_flag=True, help="Delete what was measured before."),
)

QUICKSTART: Section = (
    _out("-o", "--output", metavar="DIR", default="./vramplan-quickstart", show_default=True, help="Where to put it."),
)
