"""The run folder: who may use it, and what is written into it before the child starts."""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vramplan.core.types import Ledger, Plan, RunSpec
from vramplan.errors import InputError
from vramplan.sources import records

LAUNCHER = "VRAMPLAN_LAUNCHER"  # tells the child our pid, which may be in the lock (train/progress.py)


def prepare_run_dir(
    run_dir: Path, run: RunSpec, plan: Plan | None, *, resume: bool, prediction: Ledger | None = None
) -> None:
    """Make the folder and write what the child reads. Nothing is written unless everything is in order.

    ledger: the prediction, which the child holds what it loads against.

    InputError for a folder in use, one that holds something else or a run with results (without `resume`), and, with
    `resume`, for one that holds no run or a different one; only the schedule may change.
    """
    run = _with_fixed_paths(run_dir, run)
    _refuse_if_in_use(run_dir)
    if resume:
        _check_same_run(run_dir, run)
    else:
        _check_free(run_dir)
    config = _model_config(run_dir, run)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            for name in ("progress.jsonl", "measurement.jsonl", "log.txt", "plan.json", "prediction.json"):
                (run_dir / name).unlink(missing_ok=True)
            for path in run_dir.glob("*.rank*.*"):  # those of the other processes of several
                path.unlink()
        if config is not None:
            (run_dir / "model").mkdir(exist_ok=True)
            records.write_text(run_dir / "model" / "config.json", json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"the run folder {run_dir} cannot be written: {error.strerror or error}") from error
    if plan is not None:
        records.write_json(run_dir / "plan.json", plan)
    if prediction is not None:
        records.write_json(run_dir / "prediction.json", prediction)
    records.write_json(run_dir / "run.json", run)


def _with_fixed_paths(run_dir: Path, run: RunSpec) -> RunSpec:
    """Files by their absolute paths, so that --resume works from any folder; random weights by their config."""
    if run.data is not None:
        run = replace(run, data=replace(run.data, path=_fixed(run.data.path)))
    if run.data is not None and run.data.eval_path:
        run = replace(run, data=replace(run.data, eval_path=_fixed(run.data.eval_path)))
    if run.random_weights:
        return replace(run, model_path=_absolute(run_dir / "model"))
    path = run.model_path or run.model
    return replace(run, model_path=_absolute(path)) if Path(path).expanduser().exists() else run


def _fixed(path: str) -> str:
    """A file that is there by its absolute path, the name of a data set as it is."""
    return _absolute(path) if Path(path).expanduser().exists() else path


def _absolute(path: Path | str) -> str:
    # Not resolve(): the Hub's cache links `train.jsonl` to a file whose name is a hash and has no extension.
    return os.path.abspath(Path(path).expanduser())  # noqa: PTH100


def _model_config(run_dir: Path, run: RunSpec) -> dict[str, Any] | None:
    """The config of a model that is built from nothing else; None where weights are loaded."""
    if not run.random_weights or (run_dir / "model" / "config.json").is_file():
        return None
    from vramplan.sources.hf_config import raw_config

    return raw_config(run.model)


def _check_free(run_dir: Path) -> None:
    """An absent or empty folder, or one in which a run failed before it had anything to show."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"the run folder {run_dir} is a file", "name another with -o")
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else []
    if names and "run.json" not in names:
        raise InputError(f"the folder {run_dir} is not empty and holds no run", "name a new one with -o")
    results = [name for name in ("adapter", "checkpoints") if _holds_something(run_dir / name)]
    if results:
        raise InputError(
            f"{run_dir} already holds a run with its {' and '.join(results)}",
            "name a new folder with -o, or continue that run with --resume",
        )


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _check_same_run(run_dir: Path, run: RunSpec) -> None:
    if not (run_dir / "run.json").is_file():
        raise InputError(f"there is no run to resume in {run_dir}", "leave out --resume to start one")
    old = records.read_json(run_dir / "run.json", RunSpec)
    changed = [
        field.name
        for field in fields(RunSpec)
        if field.name != "schedule" and getattr(old, field.name) != getattr(run, field.name)
    ]
    if changed:
        raise InputError(
            f"the run in {run_dir} was started with another {', '.join(changed)}",
            "a resumed run may only change its schedule; start a new one with -o",
        )


# ------------------------------------------------------------------------------------------------------ the lock
def _refuse_if_in_use(run_dir: Path) -> None:
    pid = lock_pid(run_dir)
    if pid is not None and _alive(pid):
        raise InputError(
            f"output folder in use: process {pid} is working in {run_dir}",
            f"wait for it, name another folder with -o, or delete {run_dir / 'lock'} if that process is something else",
        )


def lock_pid(run_dir: Path) -> int | None:
    """The process that the folder's lock names; None without one."""
    try:
        with (run_dir / "lock").open("rb") as file:
            pid = int(file.read(32))
    except (OSError, ValueError):
        return None
    return pid if 0 < pid < 2**31 else None


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # left by an earlier process that had our number, as happens in containers
    if os.name == "nt":  # os.kill would end the process there; better a wrong refusal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    try:  # the number may have gone to another program since
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        return not command or b"vramplan" in command  # empty for a moment while a program starts
    except OSError:
        return True


class Lock:
    """Holds the folder from before the child starts until it has ended. The child takes the lock over from us."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / "lock"
        self.pids = {os.getpid()}

    def __enter__(self) -> Lock:
        for _ in range(2):
            try:
                with self.path.open("x") as file:
                    file.write(f"{os.getpid()}\n")
                return self
            except FileExistsError:
                _refuse_if_in_use(self.run_dir)
                self.path.unlink(missing_ok=True)
        raise InputError(f"output folder in use: another process took {self.run_dir} just now")

    def __exit__(self, *error: object) -> None:
        if lock_pid(self.run_dir) in self.pids:
            self.path.unlink(missing_ok=True)
