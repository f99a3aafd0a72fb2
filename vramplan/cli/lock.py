"""`vramplan lock`: the expected memory of a run, kept beside it, and held against it later."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vramplan.cli import build, complete, options
from vramplan.cli.output import print_json
from vramplan.core.types import Lock
from vramplan.errors import OK, ROSE, InputError

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")
DEFAULT_FILE = "vramplan.lock"
NOT_THE_RUN = ("output", "check", "tolerance", "as_json", "width")
EXAMPLE = "Example: vramplan lock --from qlora.yml, then in CI: vramplan lock --check vramplan.lock"


@click.command("lock", cls=options.SectionCommand, epilog=EXAMPLE)
@click.argument("model", required=False, shell_complete=complete.model)
@options.use(options.FROM, options.LOCK, options.BATCH, options.PARALLEL, options.RUN, options.LORA, options.LEVERS,
             options.OUTPUT)  # fmt: skip
@click.pass_context
def command(ctx: click.Context, /, **params: Any) -> int:
    """Write down what fine-tuning MODEL is expected to need; with --check, say whether it needs more now."""
    own = _own(ctx)
    if params["check"] is None:
        if build.given(ctx, ("tolerance",)):
            raise InputError("--tolerance is about a lock that exists", "add --check FILE")
        return _write(_lock(params, own), Path(params["output"] or DEFAULT_FILE), params)
    if params["output"]:
        raise InputError("--check and -o exclude each other", "without --check the lock is written anew")
    return _check(params, own)


def _write(made: Lock, target: Path, params: build.Params) -> int:
    from vramplan.sources.records import encode, write_json

    write_json(target, made)
    if params["as_json"]:
        print_json(encode(made))
    else:
        from vramplan.report.lock import show_lock

        show_lock(sys.stdout, made, str(target), width=params["width"])
    return OK


def _check(params: build.Params, own: dict[str, list[str]]) -> int:
    """The run of the lock, with the flags that were given in place of its own, as it is estimated now."""
    from vramplan.core.lock import Drift
    from vramplan.sources.records import read_json

    then = read_json(params["check"], Lock)
    words = _merged(then, own, params["check"])
    now = _lock(command.make_context("lock", words).params, own_words=words)
    drift = Drift(then, now, params["tolerance"])
    if params["as_json"]:
        from vramplan.report.payload import lock_payload

        print_json(lock_payload(drift))
    else:
        from vramplan.report.lock import show_drift

        show_drift(sys.stdout, drift, params["check"], width=params["width"])
    return ROSE if drift.is_too_much else OK


def _lock(params: build.Params, own: dict[str, list[str]] | None = None, own_words: list[str] | None = None) -> Lock:
    from vramplan.core.ledger import estimate
    from vramplan.core.lock import lock_of

    if params["model"] is None:
        raise InputError("MODEL is missing", "vramplan models lists the built-in ones")
    if params["gpu"] == "live":
        raise InputError("--gpu live is another card on another machine", "name a stored one")
    card = build.card(params["gpu"]) if params["gpu"] else None
    spec = build.model_spec(params)
    ledger = estimate(spec, build.run_spec(params, spec), card)
    build.warn(*ledger.warnings)
    words = own_words if own_words is not None else [word for each in (own or {}).values() for word in each]
    return lock_of(ledger, tuple(words), _versions(), params["gpu"])


def _own(ctx: click.Context) -> dict[str, list[str]]:
    """What the command line itself says of the run, by parameter, in words that say it again; files stay unread."""
    values = ctx.command.make_parser(ctx).parse_args(list(ctx.meta["vramplan.own"]))[0]
    out = {"model": [str(values["model"])]} if isinstance(values.get("model"), str) else {}
    for param in ctx.command.params:
        name = param.name or ""
        if not isinstance(param, click.Option) or name in NOT_THE_RUN or name not in values:
            continue
        value = values[name]
        flag = options.flag_of(param)
        if isinstance(value, bool):
            out[name] = [flag if value else param.secondary_opts[0]]
        else:
            out[name] = [f"{flag}={item}" for item in (value if isinstance(value, list) else [value])]
    return out


def _merged(then: Lock, own: dict[str, list[str]], path: str) -> list[str]:
    """The lock's words with those of the command line in their place."""
    ctx = click.Context(command)
    ctx.meta["vramplan.own"] = list(then.words)
    try:
        stored = _own(ctx)
    except click.ClickException as error:
        raise InputError(f"{path} holds a flag that is not one: {error.format_message()}", "write it anew") from None
    if "trust_remote_code" in stored and "trust_remote_code" not in own:
        raise InputError(f"{path} asks for --trust-remote-code", "give it on the command line, if you do trust it")
    return [word for words in {**stored, **own}.values() for word in words]


def _versions() -> tuple[tuple[str, str], ...]:
    """Of vramplan, and of the libraries that are installed."""
    from importlib import metadata

    from vramplan import __version__

    found = [("vramplan", __version__)]
    for name in LIBRARIES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)
