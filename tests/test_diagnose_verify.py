"""`diagnose --verify`: fixes that run or do not, a card that is too small or not at rest, and what is shown of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from probe_tools import Bench

from vramplan.cli import run as run_cli
from vramplan.core.types import Diagnosis, RunSpec
from vramplan.core.units import GIB, MIB
from vramplan.errors import BAD_INPUT, VramplanError
from vramplan.sources import gpu, records

FINISH, OOM = "finish()\n", "oom()\n"
LOG = (
    'Traceback (most recent call last):\n  File "/a/transformers/loss/loss_utils.py", line 37, in fixed_cross_entropy\n'
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total capacity of 15.60 GiB "
    "of which 300.00 MiB is free. Including non-PyTorch memory, this process has 15.30 GiB memory in use. Of the "
    "allocated memory 14.90 GiB is allocated by PyTorch, and 30.00 MiB is reserved by PyTorch but unallocated.\n"
)
RUN = ("--model", "llama-3.1-8b", "--recipe", "peft", "--batch-size", "2")
APPEARS = "card(sizes={'77': 150 * MIB, str(os.getpid()): 7000 * MIB, '999': 300 * MIB}, used=7500 * MIB)\n"
Ask = Callable[..., Any]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path, monkeypatch)
    bench.usable(15 * GIB)
    return bench


@pytest.fixture
def ask(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    log = tmp_path / "train.log"
    log.write_text(LOG, encoding="utf-8")

    def call(script: str, *words: str, run: tuple[str, ...] = RUN) -> Any:
        bench.children(script)
        capsys.readouterr()
        code = run_cli(["diagnose", str(log), *run, "--verify", *words])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return call


def of(result: Any) -> Diagnosis:
    return records.decode(json.loads(result.out), Diagnosis)


def test_the_first_fix_is_tried_under_what_there_was(ask: Ask, bench: Bench) -> None:
    result = ask(FINISH, "--json")
    found = of(result)
    assert result.code == 0 and bench.count() == 1
    assert [fix.tried for fix in found.fixes[:2]] == ["finished", None] and found.fixes[0].tried_bytes == 7000 * MIB
    played = records.decode(bench.played(0), RunSpec)
    assert (played.levers, played.micro_batch_size) == (found.fixes[0].run.levers, found.fixes[0].run.micro_batch_size)
    cap = int(bench.played(0, "env")["VRAMPLAN_CAP_BYTES"])
    assert found.budget_bytes is not None and 14.5 * GIB < cap < found.budget_bytes


def test_one_that_runs_goes_before_those_that_did_not(ask: Ask, bench: Bench) -> None:
    untried = of(ask(FINISH, "--json")).fixes
    found = of(ask("finish() if turn > 1 else oom()\n", "--json"))
    assert bench.count() == 3
    assert (found.fixes[0].tried, found.fixes[-1].tried) == ("finished", "oom")
    assert found.fixes[-1].title == untried[0].title and len(found.fixes) == len(untried)
    assert found.fixes[-1].tried_bytes is None


def test_three_are_tried_and_no_more(ask: Ask, bench: Bench) -> None:
    found = of(ask(OOM, "--json"))
    assert bench.count() == 3 and [fix.tried for fix in found.fixes[-3:]] == ["oom"] * 3


def test_the_table_says_what_ran(ask: Ask) -> None:
    text = ask("finish() if turn else oom()\n").out
    assert "runs" in text and "To run it with" in text


def test_others_on_the_card_meanwhile_prove_nothing(ask: Ask) -> None:
    result = ask(APPEARS + FINISH)
    assert result.code != 0 and "nothing was verified" in result.err
    assert "what to change" in result.out  # the diagnosis is there all the same


def test_without_a_card_the_diagnosis_is_there_and_the_exit_code_is_not_0(
    ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Any:
        raise VramplanError("no NVIDIA driver library")

    monkeypatch.setattr(gpu, "Nvml", none)
    result = ask(FINISH)
    assert result.code == BAD_INPUT and "what to change" in result.out
    assert "nothing was verified: there is no CUDA GPU to try fixes on" in result.err


def test_a_run_must_be_known(ask: Ask) -> None:
    result = ask(FINISH, run=())
    assert result.code == BAD_INPUT and "--verify tries changed runs (say what ran" in result.err


def test_a_card_too_small_to_try_in(ask: Ask, bench: Bench) -> None:
    bench.usable(3 * GIB)
    result = ask(FINISH)
    assert result.code == BAD_INPUT and "too little to try a fix in" in result.err and bench.count() == 0
