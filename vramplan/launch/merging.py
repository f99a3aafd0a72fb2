"""Starts the merge, a process of its own: this one never imports torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vramplan.core.types import MergeSpec
from vramplan.errors import OUR_ERROR
from vramplan.launch.ending import INTERRUPTED, Outcome, said
from vramplan.sources import records

if TYPE_CHECKING:
    import subprocess

OnEvent = Callable[[dict[str, Any]], None]
COMMAND = (sys.executable, "-m", "vramplan.train.merge")


def merge(spec: MergeSpec, on_event: OnEvent = lambda event: None) -> Outcome:
    """Merge; returns when the process has ended, however it did. Nothing is left of an output that is not whole.

    The first Ctrl-C lets it clean up, the second ends it at once.
    """
    import subprocess
    import tempfile

    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        outcome = _follow(child, spec, on_event)
        if outcome is None:
            errors.seek(0)
            outcome = _died(child.returncode, errors.read().decode(errors="replace"))
    if outcome.exit_code:  # a process that was killed could not
        _remove_parts(Path(spec.output))
    return outcome


def _follow(child: subprocess.Popen[bytes], spec: MergeSpec, on_event: OnEvent) -> Outcome | None:
    """Its own last words, or "interrupted"; None if it died without any."""
    end: dict[str, Any] | None = None
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(records.encode(spec)).encode())
        child.stdin.close()
        for line in child.stdout:
            event = _event(line)
            if event is not None and event["event"] == "end":
                end = event
            elif event is not None:
                on_event(event)
    except KeyboardInterrupt:
        _stop(child)
        return Outcome(exit_code=INTERRUPTED, ended="interrupted", message="interrupted: nothing was written")
    except BrokenPipeError:  # it died before it could read
        pass
    finally:
        if child.poll() is None and sys.exc_info()[0] is not None:
            child.kill()
        child.wait()
    if end is None:
        return None
    ended, message, hint, code = said(end)
    return Outcome(exit_code=code, ended=ended, message=message, hint=hint)


def _event(line: bytes) -> dict[str, Any] | None:
    """A library may print too: what is no event is passed over."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _stop(child: subprocess.Popen[bytes]) -> None:
    import signal

    child.send_signal(signal.SIGINT)
    try:
        child.wait()
    except KeyboardInterrupt:
        child.kill()
        child.wait()


def _died(returncode: int, errors: str) -> Outcome:
    if returncode == -9:
        message, hint = "the merge was ended by the kernel (SIGKILL)", "host memory ran out? look at dmesg"
    else:
        last = errors.strip().splitlines()[-1:]
        message, hint = f"the merge died (exit code {returncode})", "".join(last)[:300]
    return Outcome(exit_code=OUR_ERROR, ended="error", message=message, hint=hint)


def _remove_parts(output: Path) -> None:
    import shutil

    shutil.rmtree(output.with_name(f".tmp-{output.name}"), ignore_errors=True)
