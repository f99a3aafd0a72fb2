"""How a run ends: exceptions to words, the lock, the events, and the child's console for bad input."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vramplan.errors import InputError, OutOfMemory, VramplanError
from vramplan.train.outcome import (
    Interrupted,
    first_line,
    is_disk_full,
    is_out_of_memory,
    outcome_of,
    requested_bytes,
)
from vramplan.train.progress import Lock, Progress

OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB.\nMore lines."


class OutOfMemoryError(RuntimeError):
    """Named as torch's: told by name, since torch is not imported."""


class AcceleratorError(RuntimeError):
    pass


class SafetensorError(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError(OOM),
        AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("HIP error: hipErrorOutOfMemory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        OutOfMemoryError("Allocation on device 0 would exceed allowed memory. (out of memory)\nRequested : 2.00 GiB"),
        OutOfMemory("row 1 does not fit by itself"),
    ],
)
def test_out_of_memory_has_many_faces(error: BaseException) -> None:
    outcome = outcome_of(error)
    assert (outcome.ended, outcome.exit_code) == ("oom", 4)
    assert "\n" not in outcome.message
    assert outcome.message


def test_oom_message_is_the_first_line() -> None:
    assert outcome_of(OutOfMemoryError(OOM)).message == OOM.splitlines()[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (OOM, 2 * 2**30),
        ("HIP out of memory. Tried to allocate 512.00 MiB.", 2**29),
        ("CUDA out of memory. Allocation was preemptively rejected. Requested size: 20.00 MiB", 20 * 2**20),
        ("Currently allocated     : 16.66 GiB\nRequested               : 2.50 GiB", 5 * 2**29),
        ("CUDA error: out of memory", None),
        ("Tried to allocate 1.2.3 GiB", None),
    ],
)
def test_what_was_asked_for(text: str, size: int | None) -> None:
    assert requested_bytes(OutOfMemoryError(text)) == size


def test_what_only_mentions_memory_is_no_oom() -> None:
    assert not is_out_of_memory(ValueError("the manual says: out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_disk_full_is_seen_through_wrappers() -> None:
    wrapped = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_disk_full(wrapped)
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as inner:
            raise RuntimeError("unexpected pos 64 vs 0") from inner
    except RuntimeError as outer:
        assert is_disk_full(outer)
        assert outcome_of(outer).exit_code == 1
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))


@pytest.mark.parametrize(
    ("error", "ended", "code"),
    [
        (InputError("no such file", "look again"), "error", 2),
        (VramplanError("broken"), "error", 1),
        (Interrupted("stopped"), "interrupted", 130),
        (KeyboardInterrupt(), "interrupted", 130),
        (ZeroDivisionError("x"), "error", 1),
        (ModuleNotFoundError("no", name="torch"), "error", 1),
    ],
)
def test_every_error_has_its_exit_code(error: BaseException, ended: str, code: int) -> None:
    outcome = outcome_of(error)
    assert (outcome.ended, outcome.exit_code) == (ended, code)


def test_a_missing_library_is_told_with_the_command() -> None:
    outcome = outcome_of(ModuleNotFoundError("no", name="bitsandbytes"))
    assert "vramplan[train]" in outcome.hint


def test_first_line_is_short_and_never_empty() -> None:
    assert first_line(ValueError("\n\n a \n b")) == "a"
    assert first_line(ValueError("")) == "ValueError"
    assert len(first_line(ValueError("x" * 5000))) == 2000


# ------------------------------------------------------------------------------------------------ lock and events
def test_lock_is_held_and_released(tmp_path: Path) -> None:
    with Lock(tmp_path):
        assert (tmp_path / "lock").read_text().strip() == str(os.getpid())
    assert not (tmp_path / "lock").exists()


def test_lock_of_a_living_process_is_respected(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "lock").write_text(str(sleeper.pid))
        with pytest.raises(InputError, match=f"in use by process {sleeper.pid}"), Lock(tmp_path):
            pass
        assert (tmp_path / "lock").exists()
    finally:
        sleeper.kill()
        sleeper.wait()
    with Lock(tmp_path):  # the process is gone: taken over
        assert (tmp_path / "lock").read_text().strip() == str(os.getpid())


@pytest.mark.parametrize("content", ["", "abc", "-1", "0"])
def test_broken_lock_is_taken_over(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content)
    with Lock(tmp_path):
        pass
    assert not (tmp_path / "lock").exists()


def test_events_are_json_lines_without_nan(tmp_path: Path) -> None:
    progress = Progress(tmp_path / "progress.jsonl")
    progress("step", loss=float("nan"), step=1)
    progress.warning("careful")
    lines = [json.loads(line) for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["step", "warning"]
    assert lines[0]["loss"] is None
    assert lines[0]["t"] > 1e9


# ------------------------------------------------------------------------------------- the child, before torch
def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vramplan.train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_usage(tmp_path: Path) -> None:
    assert child().returncode == 2
    result = child(str(tmp_path / "nowhere"))
    assert result.returncode == 2
    assert "is not a folder" in result.stderr


@pytest.mark.parametrize("content", [None, "{", '{"schema_version": 1, "type": "RunSpec", "model": 3}'])
def test_bad_run_file_is_one_line_and_an_end_event(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    result = child(str(tmp_path))
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "run.json" in result.stderr
    assert result.stdout == ""
    end = json.loads((tmp_path / "progress.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["ended"], end["exit_code"]) == ("end", "error", 2)
    assert "Traceback" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "lock").exists()


def test_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / "lock").write_text(str(sleeper.pid))
        result = child(str(tmp_path))
        assert result.returncode == 2
        assert "in use" in result.stderr
        assert sorted(p.name for p in tmp_path.iterdir()) == ["lock"]
    finally:
        sleeper.kill()
        sleeper.wait()
