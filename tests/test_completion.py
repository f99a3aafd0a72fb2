"""What a shell may write for a word, asked as a shell asks it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest
from test_imports import loaded_by

from vramplan.cli import COMMANDS, run
from vramplan.sources.profiles import gpu_names, model_names


def complete(line: str) -> list[tuple[str, str]]:
    """(kind, word) pairs that bash gets for the last word of `line`; the child says nothing else."""
    words = line.split(" ")
    env = {**os.environ, "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), "_VRAMPLAN_COMPLETE": "bash_complete"}
    done = subprocess.run([sys.executable, "-m", "vramplan"], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    pairs = [line.partition(",") for line in done.stdout.splitlines()]
    return [(kind, word) for kind, _, word in pairs]


def words(line: str) -> list[str]:
    return [word for kind, word in complete(line) if kind == "plain"]


def test_commands() -> None:
    assert words("vramplan ") == list(COMMANDS)
    assert words("vramplan me") == ["merge", "measure"]


@pytest.mark.parametrize("command", ["estimate", "check", "fit", "train", "measure", "lock"])
def test_models(command: str) -> None:
    assert words(f"vramplan {command} llama-2") == [name for name in model_names() if name.startswith("llama-2")]


def test_a_path_is_a_file() -> None:
    assert complete("vramplan estimate ./ll") == [("file", "./ll")]
    assert complete("vramplan estimate my-model") == [("file", "my-model")]
    assert complete("vramplan fit --from a") == [("file", "a")]
    assert complete("vramplan train x -o r") == [("dir", "r")]
    assert complete("vramplan diagnose lo") == [("file", "lo")]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("vramplan fit x --gpu rtx-4090", ["rtx-4090"]),
        ("vramplan estimate x --gpu RTX-4090", ["rtx-4090"]),
        ("vramplan estimate x --gpu a100-80gb --gpu al", ["all"]),
        ("vramplan fit x --gpu li", ["live"]),
        ("vramplan estimate x --price rtx-4090", ["rtx-4090="]),
        ("vramplan estimate x --optim paged_lion", ["paged_lion_8bit", "paged_lion_32bit"]),
        ("vramplan estimate x --checkpointing e", ["every-2", "every-4"]),
        ("vramplan estimate x --recipe ", ["lean", "peft"]),
        ("vramplan estimate x --check", ["--checkpointing", "--checkpoint-offload"]),
        ("vramplan gpus --for tinyl", [name for name in model_names() if name.startswith("tinyl")]),
        ("vramplan completion z", ["zsh"]),
    ],
)
def test_flags(line: str, wanted: list[str]) -> None:
    assert words(line) == wanted


def test_every_card() -> None:
    assert words("vramplan fit x --gpu ") == [*gpu_names(), "live"]


@pytest.mark.parametrize(
    "line",
    [
        "vramplan nonsense ",
        "vramplan estimate --from /missing.yml --gpu rtx-40900",
        "vramplan fit --lora-r x --zz",
        "vramplan check --config /missing.toml l --zz",
    ],
)
def test_a_line_that_makes_no_sense_says_nothing(line: str) -> None:
    assert words(line) == []


def test_it_imports_next_to_nothing_and_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_VRAMPLAN_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "vramplan fit x --gpu rtx")
    monkeypatch.setenv("COMP_CWORD", "4")
    start = time.perf_counter()
    code = "from contextlib import suppress\nfrom vramplan.__main__ import main\nwith suppress(SystemExit): main([])"
    modules, packages = loaded_by(code)
    assert time.perf_counter() - start < 2  # it takes about 0.1 s; a busy machine is slow
    assert packages == {"click"}
    ours = {name for name in modules if name.startswith(("vramplan.core", "vramplan.report", "vramplan.launch"))}
    assert ours <= {"vramplan.core", "vramplan.core.types", "vramplan.core.lengths", "vramplan.core.dialects",
                    "vramplan.core.units"}  # fmt: skip


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_one(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_VRAMPLAN_COMPLETE={shell}_complete" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


def test_another_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "sh"]) == 2
    assert "there is no script for 'sh' (one of bash, zsh, fish)" in capsys.readouterr().err
