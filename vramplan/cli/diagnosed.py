"""What the paths given to `vramplan diagnose` are: logs, memory snapshots, a run folder, a folder of logs, stdin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vramplan.cli import build
from vramplan.errors import InputError

LOG = "log.txt"
OWN_SNAPSHOTS = ("oom-*.pickle", "oom-*.pickle.gz")  # as `vramplan run` leaves them


@dataclass(slots=True)
class Given:
    """Told apart by what the files hold. `folder`: of a run of ours, whose log is read with those of its ranks."""

    folder: Path | None = None
    logs: list[Path] = field(default_factory=list)
    snapshots: list[Path] = field(default_factory=list)
    stream: Any = None  # stdin, if it is a log
    snapshot_stream: Any = None  # or a snapshot


def sort_paths(paths: Sequence[str]) -> Given:
    """InputError for a folder without logs, and for two run folders."""
    given = Given()
    if [*paths].count("-") > 1:
        raise InputError("- is given twice", "stdin can be read once")
    folders: list[Path] = []
    for path in paths:
        if path == "-":
            _stdin(given)
        elif Path(path).is_dir() and (Path(path) / LOG).is_file():
            folders.append(Path(path))
        else:
            _file_or_folder(given, Path(path))
    if len(folders) > 1:
        raise InputError(f"{folders[0]} and {folders[1]} are two run folders", "give the logs of one run")
    given.folder = next(iter(folders), None)
    if given.folder is not None:
        given.snapshots += [p for name in OWN_SNAPSHOTS for p in given.folder.glob(name) if _is_snapshot(p)]
        if given.logs:
            given.logs += [*sorted(given.folder.glob("log.rank*.txt")), given.folder / LOG]
    if given.stream is not None and given.logs:
        raise InputError("stdin and a file are two logs", "give - alone, or with a snapshot")
    _first_snapshot(given)
    return given


def _stdin(given: Given) -> None:
    from vramplan.sources.snapshot_head import HEAD_BYTES, is_snapshot
    from vramplan.sources.unpacked import Ahead, head_of

    ahead = Ahead(sys.stdin.buffer, HEAD_BYTES)
    if is_snapshot(head_of(ahead.head)):
        given.snapshot_stream = ahead
    else:
        given.stream = ahead


def _file_or_folder(given: Given, path: Path) -> None:
    if not path.is_dir():
        (given.snapshots if _is_snapshot(path) else given.logs).append(path)
        return
    from vramplan.sources.log_files import logs_in

    given.snapshots += [p for name in ("*.pickle", "*.pkl", "*.pickle.gz") for p in path.glob(name) if _is_snapshot(p)]
    given.logs += logs_in(path)


def _is_snapshot(path: Path) -> bool:
    from vramplan.sources.snapshot_head import is_snapshot_file

    return is_snapshot_file(path)


def _first_snapshot(given: Given) -> None:
    """Of several the one that was written first: by the rank that failed first."""
    if given.snapshot_stream is not None and given.snapshots:
        raise InputError("stdin and a file are two snapshots", "give one of them")
    if len(given.snapshots) > 1:
        given.snapshots.sort(key=lambda path: (path.stat().st_mtime_ns, str(path)))
        others = ", ".join(path.name for path in given.snapshots[1:5])
        build.note(f"{given.snapshots[0].name} was written first; left out: {others}")
