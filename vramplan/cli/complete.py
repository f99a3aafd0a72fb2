"""What a shell may write for a word: names of models and cards, files. Nothing is read but the names of files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click
    from click.shell_completion import CompletionItem

    Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def starting(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """Those of `names` that start so, upper and lower case being the same."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(name) for name in names if name.lower().startswith(incomplete.lower())]


def path(_ctx: Any, _param: Any, incomplete: str) -> list[CompletionItem]:
    """A file or a folder, which the shell knows itself."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def folder(_ctx: Any, _param: Any, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]


def model(ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
    """A built-in model; where none starts so, or a path is meant, a file."""
    from vramplan.sources.profiles import model_names

    found = [] if incomplete.startswith((".", "/", "~")) else starting(model_names(), incomplete)
    return found or path(ctx, param, incomplete)


def card(*others: str) -> Complete:
    """A stored card, or one of the words that stand for cards."""

    def complete(_ctx: Any, _param: Any, incomplete: str) -> list[CompletionItem]:
        from vramplan.sources.profiles import gpu_names

        return starting((*gpu_names(), *others), incomplete)

    return complete


def priced(_ctx: Any, _param: Any, incomplete: str) -> list[CompletionItem]:
    """A stored card, with the sign that its price follows."""
    from vramplan.sources.profiles import gpu_names

    return starting([f"{name}=" for name in gpu_names()], incomplete)


def for_option(flag: str, metavar: str) -> Complete | None:
    """What follows a flag whose help says `metavar`; None: nothing special."""
    words = metavar.split("|")
    if flag == "--gpu":
        return card(*words[1:])
    if flag in ("--model", "--for"):
        return model
    if flag == "--price":
        return priced
    if words[0] in ("DIR", "RUN_DIR"):
        return folder
    return path if words[0].startswith(("FILE", "PATH")) else None
