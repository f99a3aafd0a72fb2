"""The only user of click: parse, call, render, exit code. Subcommands are loaded when they are asked for.

Exit codes: 0 done or fits; 1 our error; 2 bad input; 3 does not fit; 4 the run ended in OOM; 5 needs more than
its lock; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

import click

from vramplan.errors import BAD_INPUT, OK, OUR_ERROR, InputError, VramplanError

INTERRUPTED, BROKEN_PIPE = 130, 141  # what a shell reports of SIGINT and SIGPIPE

# name -> one line of help; the module of the same name in this package holds the command
COMMANDS = {
    "estimate": "Predict the memory of a run, line by line, without a GPU.",
    "check": "Ask whether a run fits what is free on this machine's card now.",
    "fit": "Choose levers and micro-batch for one card and one effective batch.",
    "lock": "Keep what a run is expected to need, and say later if it needs more.",
    "train": "Run QLoRA fine-tuning and print what it used beside the prediction.",
    "watch": "Show a run that was started elsewhere while it goes on.",
    "merge": "Merge an adapter into its base model, without a GPU.",
    "measure": "Measure a few steps on this machine's card, beside the prediction.",
    "calibrate": "Measure overheads and speed of this machine's card once, for its plans.",
    "run": "Run any training command; if it ends out of memory, say why.",
    "diagnose": "Say why a run went out of memory, and which change fixes it.",
    "audit": "Say what in a trainer's configuration costs memory, before anything runs.",
    "gpus": "List the stored cards and this machine's.",
    "models": "List the built-in models.",
    "completion": "Print the script that makes a shell complete all of this.",
    "quickstart": "See it all on a tiny model: no GPU, no Hub, under three minutes.",
}
MODULES = {"run": "wrapped"}  # `vramplan.cli.run` is the function below, whatever has been imported


class LazyGroup(click.Group):
    """A group that imports a subcommand when it is run, so that each starts as fast as it can."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        command: click.Command = import_module(f"vramplan.cli.{MODULES.get(cmd_name, cmd_name)}").command
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """Of the names alone: click's own would import every command for its help."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from vramplan.sources.profiles import suggest

            hint = suggest(args[0], tuple(COMMANDS)) or "vramplan --help lists the commands"
            raise InputError(f"there is no command {args[0]!r}", hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from vramplan import __version__

        click.echo(f"vramplan {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: vramplan estimate llama-2-7b --batch-size 4 --gpu rtx-4090",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
              help="Print the version.")  # fmt: skip
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def root(ctx: click.Context) -> int:
    """Plan, fit and run QLoRA fine-tuning on the GPU you can afford."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
    return OK


def run(argv: list[str]) -> int:
    """Run one command line. Every failure becomes one line on stderr and the exit code of the contract."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the caller has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115 -- for as long as the process lives
    for stream in (sys.stdout, sys.stderr):  # a terminal without UTF-8 shows "?", it does not end the program
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    if "_VRAMPLAN_COMPLETE" in os.environ:  # shell completion is click's own
        with suppress(Exception):  # a line that makes no sense so far has nothing to offer, and no traceback
            root.main(args=argv, prog_name="vramplan")
        return OK
    own = argv[: argv.index("--")] if "--" in argv else argv  # what comes after it is somebody else's
    debug = "--debug" in own
    try:
        code = _invoke([*(word for word in own if word != "--debug"), *argv[len(own) :]], debug)
        sys.stdout.flush()
    except BrokenPipeError:  # `vramplan gpus | head`: the reader has left, say nothing more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    return code


def _invoke(argv: list[str], debug: bool) -> int:
    try:
        with root.make_context("vramplan", argv) as ctx:
            return int(root.invoke(ctx) or OK)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        if debug:
            import traceback

            traceback.print_exc()
        text, code = describe(error)
        click.echo(text, err=True)
        return code


def describe(error: Exception) -> tuple[str, int]:
    """An exception as the one line a user reads, and its exit code."""
    if isinstance(error, click.ClickException):
        return f"error: {_one_line(error.format_message().rstrip('.'))}", BAD_INPUT
    if isinstance(error, VramplanError):
        return error_line(error.message, error.hint), error.exit_code
    from vramplan.core.types import Unplannable

    if isinstance(error, Unplannable):
        return error_line(error.message, error.hint), BAD_INPUT
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror}{where}", OUR_ERROR
    name = type(error).__name__
    return f"internal error: {name}: {_one_line(str(error))}, please report; --debug shows the traceback", OUR_ERROR


def error_line(message: str, hint: str = "") -> str:
    """ "error: message (hint)" on one line."""
    return _one_line(f"error: {message}" + (f" ({hint})" if hint else ""))


def _one_line(text: str) -> str:
    return " ".join(text.split())
