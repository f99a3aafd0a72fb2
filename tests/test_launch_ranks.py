"""Launching several processes, with stand-ins for torchrun: who failed first, what is shown, when it starts again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.core.types import DataSpec, RunSpec
from vramplan.errors import InputError
from vramplan.launch import Outcome, child, launch, prepare_run_dir
from vramplan.launch.ranks import Ranks, smaller_micro_batch
from vramplan.launch.torchrun import accelerate_config, torchrun_words, write_launch
from vramplan.sources import records

RUN = RunSpec(
    model="someone/model",
    data=DataSpec(path="someone/data"),
    gpus=2,
    parallel="ddp",
    micro_batch_size=2,
    accumulation=3,
)
# `say(rank, event, ...)` appends to the rank's file; sys.argv[1] is the run folder.
HEAD = """
import json, os, sys, time
folder, again = sys.argv[1], "--resume" in sys.argv
def say(who, event, **fields):
    name = "progress.jsonl" if who == 0 else f"progress.rank{who}.jsonl"
    with open(f"{folder}/{name}", "a") as file:
        file.write(json.dumps({"t": time.time(), "event": event, **fields}) + "\\n")
def end(rank, ended, code, message):
    say(rank, "end", ended=ended, exit_code=code, message=message, hint="")
"""
FAILED = 'print("E1124 api.py:1002] failed (exitcode: -9) local_rank: 1 (pid: 7) of binary: /usr/bin/python")\n'


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """play(script, run) launches with this script in the place of torchrun; `play.events` are what was shown."""

    class Play:
        folder = tmp_path / "run"

        def __init__(self) -> None:
            self.events: list[dict[str, Any]] = []

        def __call__(self, script: str, run: RunSpec = RUN) -> Outcome:
            def command(run: RunSpec, run_dir: Path, resume: bool) -> list[str]:
                return [sys.executable, "-c", HEAD + script, str(run_dir), *(["--resume"] if resume else [])]

            monkeypatch.setattr(child, "_several_command", command)
            prepare_run_dir(self.folder, run, None, resume=False)
            return launch(self.folder, on_event=self.events.append)

    monkeypatch.setattr(child, "_LIBRARIES", ("json",))
    return Play()


# ---------------------------------------------------------------------------------------------------- the endings
def test_all_is_well(play: Any) -> None:
    outcome = play(
        "say(1, 'warning', message='hot')\nsay(1, 'step', step=1)\nsay(0, 'step', step=1)\n"
        "end(1, 'finished', 0, '2 steps')\nend(0, 'finished', 0, '2 steps')"
    )
    assert (outcome.exit_code, outcome.ended, outcome.message) == (0, "finished", "2 steps")
    assert sorted((e["event"], e.get("message")) for e in play.events) == [
        ("end", "2 steps"), ("step", None), ("warning", "rank 1: hot"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        # the cause came first, what followed from it later; torchrun itself always ends with 1
        ("end(1, 'oom', 4, 'no room')\ntime.sleep(0.01)\nend(0, 'error', 1, 'lost')", (4, "rank 1: no room")),
        ("end(0, 'oom', 4, 'no room')\ntime.sleep(0.01)\nend(1, 'error', 1, 'lost')", (4, "no room")),
        # torchrun stops the rest with a signal: they may even be quicker to say so
        ("end(0, 'interrupted', 130, 'x')\ntime.sleep(0.01)\nend(1, 'oom', 4, 'no room')", (4, "rank 1: no room")),
        # the main rank has heard it from the other
        ("end(0, 'oom', 4, 'rank 1: no room')\ntime.sleep(0.01)\nend(1, 'oom', 4, 'no room')", (4, "rank 1: no room")),
        ("end(0, 'interrupted', 130, 'saved')\nend(1, 'interrupted', 130, 'saved')", (130, "saved")),
        ("end(0, 'finished', 0, 'done')\nend(1, 'error', 1, 'at the very end')", (1, "rank 1: at the very end")),
    ],
)  # fmt: skip
def test_the_first_failure_counts(play: Any, script: str, expected: tuple[int, str]) -> None:
    outcome = play(script + "\nsys.exit(1)")
    assert (outcome.exit_code, outcome.message) == expected


@pytest.mark.parametrize(
    "words", ["", "end(0, 'error', 1, 'Connection closed by peer')", "end(0, 'interrupted', 130, 'x')"]
)
def test_a_rank_that_died_without_a_word_is_named(play: Any, words: str) -> None:
    outcome = play(f"{FAILED}{words}\nsys.exit(1)")
    assert (outcome.exit_code, outcome.ended) == (1, "error")
    assert outcome.message == "the process of GPU 1 was ended by the kernel (SIGKILL)"
    assert "host memory" in outcome.hint


def test_a_rank_that_lost_its_connection_in_the_same_second_was_not_the_first(tmp_path: Path) -> None:
    """torchrun's times are whole seconds: it then names the lower rank."""
    table = "".join(
        f"[{i}]:\n  time      : 2026-11-25\n  host      : x\n  rank      : {rank} (local_rank: {rank})\n"
        f"  exitcode  : {code} (pid: 7)\n"
        for i, (rank, code) in enumerate(((0, 1), (1, -9)))
    )
    (tmp_path / "log.txt").write_text(f"failed (exitcode: 1) local_rank: 0 (pid: 7)\n{table}")
    ranks = Ranks(tmp_path, 2, from_end=False)
    ranks.note(0, {"event": "end", "message": "RuntimeError: Connection closed by peer [127.0.0.1]"})
    assert ranks.silent_death() == (-9, 1)
    ranks.note(0, {"event": "end", "message": "the disk is full"})
    assert ranks.silent_death() is None


def test_a_death_of_an_earlier_run_is_forgotten(play: Any, tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, from_end=False)
    (tmp_path / "log.txt").write_text(FAILED.removeprefix('print("').replace('")', ""))
    assert ranks.silent_death() == (-9, 1)
    assert Ranks(tmp_path, 2, from_end=True).silent_death() is None
    ranks.note(1, {"event": "end"})
    assert ranks.silent_death() is None
    assert Ranks(tmp_path / "none", 2, from_end=False).silent_death() is None


# ------------------------------------------------------------------------------------------------------- restarts
OOM_ONCE = (
    "say(0, 'start')\nend(1, 'oom', 4, 'no room') if not again else end(0, 'finished', 0, 'done')\nsys.exit(not again)"
)


def test_sharded_ranks_start_once_more_with_smaller_micro_batches(play: Any) -> None:
    outcome = play(OOM_ONCE, replace(RUN, parallel="fsdp"))
    assert (outcome.exit_code, outcome.ended) == (0, "finished")
    (event,) = [e for e in play.events if e["event"] == "restart"]
    assert (event["micro_batch_size"], event["accumulation"]) == (1, 6)
    assert "rank 1: no room" in event["message"] and "the same effective batch" in event["message"]
    assert event in [json.loads(line) for line in (play.folder / "progress.jsonl").read_text().splitlines()]
    run = records.read_json(play.folder / "run.json", RunSpec)
    assert run == replace(RUN, parallel="fsdp", micro_batch_size=1, accumulation=6)
    assert run.gpus * run.micro_batch_size * run.accumulation == RUN.gpus * RUN.micro_batch_size * RUN.accumulation


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        (OOM_ONCE, {"parallel": "ddp"}),  # there a rank splits its micro-batch by itself
        (OOM_ONCE, {"parallel": "fsdp", "micro_batch_size": 1}),
        (OOM_ONCE.replace("'oom', 4", "'error', 1"), {"parallel": "fsdp"}),
        (OOM_ONCE.replace("'start'", "'phase'"), {"parallel": "fsdp"}),  # the model itself has no room
    ],
)
def test_others_do_not(play: Any, script: str, changes: dict[str, Any]) -> None:
    outcome = play(script, replace(RUN, **changes))
    assert outcome.exit_code in (1, 4)
    assert not [e for e in play.events if e["event"] == "restart"]
    assert (
        records.read_json(play.folder / "run.json", RunSpec).micro_batch_size
        == replace(RUN, **changes).micro_batch_size
    )


def test_it_starts_again_only_once(play: Any) -> None:
    outcome = play(
        "say(0, 'start')\nend(1, 'oom', 4, 'no room')\nsys.exit(1)", replace(RUN, parallel="fsdp", micro_batch_size=8)
    )
    assert outcome.exit_code == 4
    assert len([e for e in play.events if e["event"] == "restart"]) == 1


@given(st.integers(1, 64), st.integers(1, 64))
def test_smaller_micro_batches_keep_the_effective_batch(micro: int, accumulation: int) -> None:
    run = replace(RUN, micro_batch_size=micro, accumulation=accumulation)
    smaller = smaller_micro_batch(run)
    if micro == 1:
        assert smaller is None
        return
    assert smaller is not None
    assert smaller.micro_batch_size * smaller.accumulation == micro * accumulation
    assert smaller.micro_batch_size <= micro // 2
    assert replace(smaller, micro_batch_size=micro, accumulation=accumulation) == run


# -------------------------------------------------------------------------------------------------------- signals
def test_the_second_stop_ends_processes_that_torchrun_would_leave_behind(play: Any) -> None:
    """A rank in a session of its own, as torchrun starts them, that listens to no signal."""
    script = (
        "import signal, subprocess\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "deaf = 'import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)'\n"
        "rank = subprocess.Popen([sys.executable, '-c', deaf], start_new_session=True)\n"
        "say(1, 'process', rank=1, local_rank=1, pid=rank.pid)\nsay(0, 'start')\nrank.wait()\ntime.sleep(100)"
    )

    def stop() -> None:
        for count in (1, 2):
            deadline = time.monotonic() + 30
            while len([e for e in play.events if e["event"] in ("start", "warning")]) < count:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=stop)
    other.start()
    outcome = play(script)
    other.join()
    assert (outcome.exit_code, outcome.ended) == (130, "interrupted")
    pid = json.loads((play.folder / "progress.rank1.jsonl").read_text())["pid"]
    deadline = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(status.stdout.strip()) and not status.stdout.startswith("Z")


# ------------------------------------------------------------------------------------------------ folder and words
def test_a_new_start_leaves_no_words_of_other_ranks(tmp_path: Path) -> None:
    prepare_run_dir(tmp_path, RUN, None, resume=False)
    for name in ("progress.rank1.jsonl", "log.rank1.txt", "measurement.rank3.jsonl"):
        (tmp_path / name).write_text("old\n")
    prepare_run_dir(tmp_path, RUN, None, resume=True)
    assert len(list(tmp_path.iterdir())) == 4
    prepare_run_dir(tmp_path, RUN, None, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_another_number_of_gpus_is_another_run(tmp_path: Path) -> None:
    prepare_run_dir(tmp_path, RUN, None, resume=False)
    with pytest.raises(InputError, match="started with another gpus, parallel"):
        prepare_run_dir(tmp_path, replace(RUN, gpus=4, parallel="fsdp"), None, resume=True)


def test_the_environment_of_one_and_of_several() -> None:
    outer = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "HOME": "/h"}
    one = child._environment(replace(RUN, gpus=1, parallel="none"), outer)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"} & one.keys()
    several = child._environment(RUN, {**outer, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9"})
    assert several["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "9"
    assert several["VRAMPLAN_LAUNCHER"] == one["VRAMPLAN_LAUNCHER"] == str(os.getpid())


def test_the_words_for_torchrun_are_the_ones_we_start_it_with(tmp_path: Path) -> None:
    words = torchrun_words(RUN, tmp_path, resume=True)
    assert words == ["--standalone", "--nproc-per-node", "2", "-m", "vramplan.train", str(tmp_path), "--resume"]
    assert child._several_command(RUN, tmp_path, True) == [sys.executable, "-m", "torch.distributed.run", *words]
    said = write_launch(RUN, tmp_path, resume=True, machines=1)
    assert said["torchrun"].split() == ["torchrun", *words]


def test_what_we_tell_the_launchers_they_understand(tmp_path: Path) -> None:
    """torchrun's own parser, and accelerate's own reader of its config."""
    run = pytest.importorskip("torch.distributed.run")
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    eight = replace(RUN, gpus=8)
    parsed = run.parse_args(torchrun_words(eight, tmp_path, resume=False, machines=2))
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.module, parsed.training_script) == (
        "2",
        "4",
        True,
        "vramplan.train",
    )
    assert parsed.training_script_args == [str(tmp_path)]
    assert (parsed.rdzv_backend, parsed.rdzv_endpoint) == ("c10d", "FIRST_MACHINE:29400")
    for machines in (1, 2):
        (tmp_path / "accelerate.yaml").write_text(accelerate_config(eight, machines))
        config = config_args.load_config_from_file(str(tmp_path / "accelerate.yaml"))
        assert (config.num_processes, config.num_machines) == (8, machines)
        assert str(config.distributed_type) in ("MULTI_GPU", "DistributedType.MULTI_GPU")
        assert config.mixed_precision == "bf16" and config.use_cpu is False
