"""`vramplan run`: the command as it is, its output and memory kept, the snapshot's hook, the diagnosis."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vramplan.cli import run as run_cli
from vramplan.launch import wrapping
from vramplan.launch.wrapping import HOOK, descendants, wrap

OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB "
    "of which 1.20 GiB is free. Including non-PyTorch memory, this process has 22.40 GiB memory in use. Of the "
    "allocated memory 21.10 GiB is allocated by PyTorch, and 800.00 MiB is reserved by PyTorch but unallocated."
)

# A torch that is as the hook needs it: CUDA is used with `use`, memory runs out with `fail`.
FAKE_TORCH = """
import types
queued, observers, recorded = [], [], []
cuda = types.SimpleNamespace(_lazy_call=queued.append, memory=types.SimpleNamespace(
    _record_memory_history=lambda **k: recorded.append(k),
    _dump_snapshot=lambda path: open(path, "wb").write(b"snapshot %d" % len(observers))))
_C = types.SimpleNamespace(_cuda_attach_out_of_memory_observer=observers.append)
def use():
    for call in queued: call()
def fail():
    for observe in observers: observe(0, 1, 2, 3)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """script(text) is the command that runs it, beside a stand-in for torch."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(FAKE_TORCH)

    def make(text: str) -> list[str]:
        (tmp_path / "train.py").write_text(text)
        return [sys.executable, "train.py"]

    return make


def test_the_command_runs_as_it_is_and_all_is_kept(script: Any, capfdbinary: Any, tmp_path: Path) -> None:
    text = "import sys; print('one'); print('two', file=sys.stderr); sys.stdout.buffer.write(b'\\xff 10%\\r 20%\\n')"
    words = [*script(text), "--debug", "-o", "x", "--help"]
    assert run_cli(["run", "-o", "kept", "--", *words]) == 0
    out, err = capfdbinary.readouterr()
    assert out.replace(os.linesep.encode(), b"\n") == b"one\n\xff 10%\r 20%\n"
    assert b"two" in err and b"exit code 0" in err
    log = (tmp_path / "kept" / "log.txt").read_bytes()
    assert b"one" in log and b"two" in log and b"\xff 10%\r 20%" in log
    ended = json.loads((tmp_path / "kept" / "ended.json").read_text())
    assert ended["command"] == words and ended["exit_code"] == 0


@pytest.mark.parametrize("code", [0, 1, 3, 77])
def test_the_exit_code_is_the_commands(script: Any, code: int) -> None:
    assert run_cli(["run", "-o", "kept", "--", *script(f"raise SystemExit({code})")]) == code


def test_fixes_are_priced_by_the_flags_of_a_run(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--model", "tinyllama-1.1b", "--recipe", "peft", "--batch-size", "4", "--gpu", "rtx-4090"]
    assert run_cli(["run", "-o", "kept", *flags, "--", *script(f"raise SystemExit({OOM!r})"), "--batch-size", "9"]) == 4
    kept = json.loads((tmp_path / "kept" / "diagnosis.json").read_text())
    assert kept["fixes"] and kept["fixes"][0]["run"]["micro_batch_size"] <= 4 and kept["predicted_bytes"]
    assert "--batch-size" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--batch-size", "4"], "--batch-size needs --model"),
        (["--model", "no-such-model-x"], "no-such-model-x"),
        (["--model", "tinyllama-1.1b", "--run", "run.json"], "--run and --model"),
        (["--gpu", "no-such-card"], "no-such-card"),
    ],
)
def test_wrong_flags_are_told_before_anything_runs(
    script: Any, flags: list[str], part: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_cli(["run", "-o", "kept", *flags, "--", *script("open('ran', 'w')")]) == 2
    assert part in capsys.readouterr().err and not (tmp_path / "ran").exists() and not (tmp_path / "kept").exists()


def test_lack_of_memory_is_diagnosed_and_kept(script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_cli(["run", "-o", "kept", "--", *script(f"raise SystemExit({OOM!r})")]) == 4
    out = capsys.readouterr().out
    assert "2.00 GiB" in out and "23.64 GiB" in out
    kept = json.loads((tmp_path / "kept" / "diagnosis.json").read_text())
    assert kept["evidence"]["requested_bytes"] == 2 * 2**30 and kept["causes"]


@pytest.mark.parametrize("whole", [True, False])
def test_the_snapshot_is_read_with_the_log(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, whole: bool
) -> None:
    import pickle

    from snapshot_tools import out_of_memory

    (tmp_path / "made.pickle").write_bytes(pickle.dumps(out_of_memory().snapshot()) if whole else b"\x80\x04no pickle")
    copy = "import os, shutil; shutil.copy('made.pickle', os.environ['VRAMPLAN_SNAPSHOT_DIR'] + '/oom-1.pickle')"
    assert run_cli(["run", "-o", "kept", "--", *script(f"{copy}\nraise SystemExit({OOM!r})")]) == 4
    kept = json.loads((tmp_path / "kept" / "diagnosis.json").read_text())
    captured = capsys.readouterr()
    assert (kept["holdings"] is not None) == whole == ("the snapshot is left out" not in captured.err)
    assert "Why, likeliest first" in captured.out


def test_a_lack_of_memory_that_was_survived_is_no_end(script: Any, tmp_path: Path) -> None:
    assert run_cli(["run", "-o", "kept", "--", *script(f"print({OOM!r})")]) == 0
    assert not (tmp_path / "kept" / "diagnosis.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--", "no-such-command"], "there is no command 'no-such-command'"),
        (["run"], "Missing argument"),
        (["run", "--"], "Missing argument"),
        (["run", "-o", "full", "--", sys.executable, "-c", "0"], "is there already"),
        (["run", "--run", "none.json", "--", sys.executable, "-c", "0"], "none.json"),
    ],
)
def test_bad_input_is_one_line(
    script: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert run_cli(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert (tmp_path / "full" / "file").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------ the snapshot
def test_a_snapshot_is_written_when_memory_runs_out(script: Any, tmp_path: Path) -> None:
    words = script("import torch; torch.use(); torch.fail(); print(torch.recorded)")
    wrapped = wrap(words, _made(tmp_path / "kept"))
    (path,) = wrapped.snapshots
    assert path.read_bytes() == b"snapshot 1"
    assert b"max_entries" in (tmp_path / "kept" / "log.txt").read_bytes()


def test_nothing_is_recorded_before_cuda_is_used_or_without_the_flag(script: Any, tmp_path: Path) -> None:
    text = "import torch, sys; assert not torch.recorded and not torch.observers; torch.use(); torch.fail()"
    assert wrap(script(text), _made(tmp_path / "with")).exit_code == 0
    text = "import torch; assert not torch.queued; torch.fail()"
    wrapped = wrap(script(text), _made(tmp_path / "without"), snapshot=False)
    assert (wrapped.exit_code, wrapped.snapshots) == (0, ())


def test_somebody_elses_sitecustomize_runs_too(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "sitecustomize.py").write_text("import os; os.environ['OWN'] = 'ran'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "own"))
    text = "import os, torch; assert os.environ['OWN'] == 'ran' and torch.queued"
    assert wrap(script(text), _made(tmp_path / "kept")).exit_code == 0


@pytest.mark.parametrize(
    "torch", ["", "raise ImportError('broken')", "def __getattr__(name): raise RuntimeError(name)"]
)
def test_a_torch_that_is_otherwise_changes_nothing(script: Any, tmp_path: Path, torch: str) -> None:
    words = script("try:\n    import torch\nexcept ImportError:\n    print('no torch')\nprint('on')")
    (tmp_path / "torch" / "__init__.py").write_text(torch)
    wrapped = wrap(words, _made(tmp_path / "kept"))
    assert wrapped.exit_code == 0
    log = (tmp_path / "kept" / "log.txt").read_text()
    assert log.endswith("on\n") and ("no torch" in log) == ("broken" in torch)


def test_a_failing_dump_leaves_no_half_a_file(script: Any, tmp_path: Path) -> None:
    words = script("import torch; torch.use(); torch.fail(); torch.fail()")
    text = FAKE_TORCH.replace('open(path, "wb").write(b"snapshot %d" % len(observers))', "1 / 0")
    (tmp_path / "torch" / "__init__.py").write_text(text)
    wrapped = wrap(words, _made(tmp_path / "kept"))
    assert (wrapped.exit_code, wrapped.snapshots) == (0, ())


def test_the_hook_is_imported_by_scripts_alone() -> None:
    assert (HOOK / "sitecustomize.py").is_file() and not (HOOK / "__init__.py").exists()


# ------------------------------------------------------------------------------------------------ processes and cards
def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_family_of_a_process_is_found() -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here")
    text = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    child = subprocess.Popen([sys.executable, "-c", text])
    try:
        deadline = time.monotonic() + 20
        while len(family := descendants(child.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert child.pid in family and len(family) == 2 and os.getpid() not in family
        assert family < descendants(os.getpid())
    finally:
        for pid in sorted(family, reverse=True):
            os.kill(pid, signal.SIGKILL)
        child.wait()


class FakeNvml:
    """A card of which 7 GiB are used, 2 and 3 of them by the command and its child."""

    def __init__(self, family: set[int]) -> None:
        self.family = family

    def __enter__(self) -> FakeNvml:
        return self

    def __exit__(self, *_: object) -> None: ...

    def count(self) -> int:
        return 1

    def used_bytes(self, index: int) -> int:
        return 7 * 2**30

    def sizes(self, index: int) -> dict[int, int | None]:
        return {**dict(zip(sorted(self.family), (2 * 2**30, 3 * 2**30), strict=False)), 1: 2**30, 0: None}


def test_the_cards_are_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wrapping, "descendants", lambda pid: {501, 502})
    monkeypatch.setattr("vramplan.sources.gpu.Nvml", lambda: FakeNvml({501, 502}))
    words = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    wrapped = wrap(words, _made(tmp_path / "kept"), every_s=0.1)
    assert (wrapped.card_bytes, wrapped.process_bytes) == (7 * 2**30, 5 * 2**30)
    rows = [json.loads(line) for line in (tmp_path / "kept" / "gpu.jsonl").read_text().splitlines()]
    assert len(rows) >= 2 and rows[0]["gpu"] == 0 and rows[0]["process_bytes"] == 5 * 2**30


def test_a_command_that_a_signal_ends(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    assert wrap(words, _made(tmp_path / "kept")).exit_code == 137


def test_a_signal_reaches_the_command(tmp_path: Path) -> None:
    text = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *a: sys.exit(5))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "wait.py").write_text(text)
    words = [sys.executable, "-m", "vramplan", "run", "-o", str(tmp_path / "kept"), "--", sys.executable]
    outer = subprocess.Popen([*words, str(tmp_path / "wait.py")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert outer.stdout is not None and outer.stdout.readline() == b"ready\n"
    outer.send_signal(signal.SIGTERM)
    assert outer.wait(timeout=30) == 5
    outer.stdout.close()
