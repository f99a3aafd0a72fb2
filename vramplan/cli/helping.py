"""What `--help` shows: flags by section; of a command with many the main ones in full and the others by name."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import click

SCREEN = 44  # lines: a help that is longer is shortened
SHOW_ALL = "vramplan.help_all"
MAIN = frozenset(
    (
        "--from", "--data", "--effective-batch-size", "--batch-size", "--accumulation", "--seq-len", "--objective",
        "--probe", "--config", "--recipe", "--steps", "--num-train-epochs", "--learning-rate", "--eval-strategy",
        "--lora-r", "--checkpointing", "--optim", "--gpu", "--price", "--for", "--explain", "--check", "--tolerance",
        "--output", "--resume", "--json", "--help", "--help-all",
    )
)  # fmt: skip


def flag_of(param: click.Parameter | None) -> str:
    """The flag as the user knows it: "--batch-size", or "MODEL" for an argument."""
    if isinstance(param, click.Option):
        return next((name for name in param.opts if name.startswith("--")), param.opts[0])
    return param.human_readable_name if param is not None else "value"


def write_options(
    options: Sequence[click.Option], titles: Sequence[str], ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    """The flags under their headings; all of them with their text if that fits, or if all are asked for."""
    shown = [(option, record) for option in options if (record := option.get_help_record(ctx)) is not None]
    if ctx.meta.get(SHOW_ALL):
        _write([(o, *record) for o, record in shown if o is not HELP_ALL], titles, formatter, main_alone=False)
        return
    short = [(option, _label(option, label), text) for option, (label, text) in shown]
    draft = click.HelpFormatter(width=formatter.width)
    _write([row for row in short if row[0] is not HELP_ALL], titles, draft, main_alone=False)
    fits = (formatter.getvalue() + draft.getvalue()).count("\n") <= SCREEN - 3  # the example follows
    rows = [row for row in short if not (fits and row[0] is HELP_ALL)]
    _write(rows, titles, formatter, main_alone=not fits)


def _write(
    rows: Sequence[tuple[click.Option, str, str]],
    titles: Sequence[str],
    formatter: click.HelpFormatter,
    *,
    main_alone: bool,
) -> None:
    for title in titles:
        here = [row for row in rows if getattr(row[0], "section", "Output") == title]
        told = [row for row in here if not main_alone or flag_of(row[0]) in MAIN]
        if not here:
            continue
        with formatter.section(title):
            if told:
                formatter.write_dl([(label, text) for _, label, text in told])
            others = ", ".join(label.partition(" ")[0] for row in here if row not in told for label in row[1:2])
            if others:
                room = formatter.width - formatter.current_indent
                for line in textwrap.wrap(("also " if told else "") + others, room, break_on_hyphens=False):
                    formatter.write(" " * formatter.current_indent + line + "\n")


def _label(option: click.Option, label: str) -> str:
    """One name of several, and "--[no-]x"."""
    name = flag_of(option)
    if option.secondary_opts:
        return "--[no-]" + name[2:]
    if name in ("--help", "--output"):
        return label
    return name + label.removeprefix(", ".join(option.opts))


def _show_all(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        ctx.meta[SHOW_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


HELP_ALL = click.Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all,
                        help="Show every flag with its text.")  # fmt: skip
