"""`vramplan completion`: the script that makes a shell complete commands, flags, models and cards."""

from __future__ import annotations

import click

from vramplan.cli import options
from vramplan.cli.complete import starting
from vramplan.cli.output import print_json
from vramplan.core.types import SCHEMA_VERSION
from vramplan.errors import OK, InputError

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_VRAMPLAN_COMPLETE"
EXAMPLE = "Example: echo 'eval \"$(vramplan completion bash)\"' >> ~/.bashrc"


@click.command("completion", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("shell", metavar="bash|zsh|fish", shell_complete=lambda _ctx, _param, word: starting(SHELLS, word))
@options.use(options.OUTPUT)
def command(shell: str, as_json: bool, width: int | None) -> int:
    """Print the script that makes a shell complete commands, flags, models and cards."""
    if shell not in SHELLS:
        raise InputError(f"there is no script for {shell!r}", f"one of {', '.join(SHELLS)}")
    from click.shell_completion import ShellComplete, get_completion_class

    from vramplan.cli import root

    kind = get_completion_class(shell)
    assert kind is not None
    # The shell's version is not asked for: the script may be made on one machine for another.
    script = ShellComplete.source(kind(root, {}, "vramplan", VARIABLE))
    if as_json:
        print_json({"schema_version": SCHEMA_VERSION, "shell": shell, "script": script})
    else:
        click.echo(script)
    return OK
