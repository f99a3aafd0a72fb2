"""The launcher, with children that behave, misbehave and die."""

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
from factories import make_ledger

from vramplan.core.types import DataSpec, Ledger, Levers, Measurement, RunSpec, Schedule
from vramplan.errors import InputError, MissingExtra
from vramplan.launch import Outcome, child, launch, prepare_run_dir
from vramplan.launch.ending import died
from vramplan.launch.folder import Lock
from vramplan.launch.watching import Card, Tail
from vramplan.sources import records

RUN = RunSpec(model="someone/model", data=DataSpec(path="someone/data"))
MEASURED = Measurement(
    device="cpu",
    device_name="x",
    versions=(),
    phases=(),
    trainable_parameters=1,
    steps=2,
    tokens=3,
    tokens_per_s=4.0,
    ended="finished",
)
# What every fake child starts with: `say` appends an event, sys.argv[1] is the run folder.
HEAD = """
import json, os, signal, sys, time
folder = sys.argv[1]
def say(event, **fields):
    with open(folder + "/progress.jsonl", "a") as file:
        file.write(json.dumps({"t": time.time(), "event": event, **fields}) + "\\n")
"""
END = 'say("end", ended="finished", exit_code=0, message="2 steps", hint="")\n'
WAIT = "say('start')\nfor _ in range(600): time.sleep(0.1)\n"


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """play(script, **launch options) runs a child with this script; play.events and play.folder tell of it."""

    class Play:
        folder = tmp_path / "run"

        def __init__(self) -> None:
            self.events: list[dict[str, Any]] = []

        def __call__(self, script: str, run: RunSpec = RUN, **options: Any) -> Outcome:
            prepare_run_dir(self.folder, run, None, resume=options.get("resume", False))
            command = [sys.executable, "-c", HEAD + script]
            monkeypatch.setattr(child, "_command", lambda folder, resume: [*command, str(folder)])
            return launch(self.folder, on_event=options.pop("on_event", self.events.append), **options)

    monkeypatch.setattr(child, "_LIBRARIES", ("json",))
    return Play()


# ------------------------------------------------------------------------------------------------ the run folder
def test_prepare_writes_what_the_child_reads(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("{}\n")
    run = replace(RUN, data=DataSpec(path=os.path.relpath(data)))
    prepare_run_dir(tmp_path / "a" / "b", run, None, resume=False)
    written = records.read_json(tmp_path / "a" / "b" / "run.json", RunSpec)
    assert written == replace(run, data=DataSpec(path=str(data)))  # --resume may come from another folder
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run.json"]


def test_prepare_gives_random_weights_their_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.sources import hf_config

    monkeypatch.setattr(hf_config, "raw_config", lambda name: {"model_type": "llama", "name": name})
    prepare_run_dir(tmp_path / "r", replace(RUN, random_weights=True), None, resume=False)
    assert json.loads((tmp_path / "r/model/config.json").read_text()) == {"model_type": "llama", "name": RUN.model}
    assert records.read_json(tmp_path / "r/run.json", RunSpec).model_path == str(tmp_path / "r" / "model")


def test_prepare_writes_nothing_when_the_config_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.sources import hf_config

    def refuse(name: str) -> Any:
        raise InputError("no such model")

    monkeypatch.setattr(hf_config, "raw_config", refuse)
    with pytest.raises(InputError, match="no such model"):
        prepare_run_dir(tmp_path / "r", replace(RUN, random_weights=True), None, resume=False)
    assert not (tmp_path / "r").exists()


def test_prepare_refuses_folders_that_hold_something(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    for name, words in {"file": "is a file", "foreign": "not empty and holds no run"}.items():
        with pytest.raises(InputError, match=words):
            prepare_run_dir(tmp_path / name, RUN, None, resume=False)
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("result", ["adapter", "checkpoints"])
def test_prepare_refuses_to_overwrite_results_but_not_a_failed_start(tmp_path: Path, result: str) -> None:
    prepare_run_dir(tmp_path, RUN, None, resume=False)
    (tmp_path / result).mkdir()
    (tmp_path / "progress.jsonl").write_text("old\n")
    prepare_run_dir(tmp_path, RUN, None, resume=False)  # it had nothing to show
    assert not (tmp_path / "progress.jsonl").exists()
    (tmp_path / result / "x").write_text("x")
    with pytest.raises(InputError, match=f"already holds a run with its {result}") as error:
        prepare_run_dir(tmp_path, RUN, None, resume=False)
    assert "--resume" in error.value.hint
    prepare_run_dir(tmp_path, RUN, None, resume=True)


def test_the_prediction_goes_with_the_run_and_not_with_the_next(tmp_path: Path) -> None:
    ledger = make_ledger()
    prepare_run_dir(tmp_path, RUN, None, resume=False, prediction=ledger)
    assert records.read_json(tmp_path / "prediction.json", Ledger) == ledger
    prepare_run_dir(tmp_path, RUN, None, resume=True)
    assert (tmp_path / "prediction.json").is_file()
    prepare_run_dir(tmp_path, RUN, None, resume=False)
    assert not (tmp_path / "prediction.json").exists()


def test_resume_may_change_only_the_schedule(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run to resume"):
        prepare_run_dir(tmp_path, RUN, None, resume=True)
    prepare_run_dir(tmp_path, RUN, None, resume=False)
    with pytest.raises(InputError, match="started with another seq_len, levers"):
        prepare_run_dir(tmp_path, replace(RUN, seq_len=64, levers=Levers(loss="full")), None, resume=True)
    assert records.read_json(tmp_path / "run.json", RunSpec) == RUN
    longer = replace(RUN, schedule=Schedule(max_steps=999))
    prepare_run_dir(tmp_path, longer, None, resume=True)
    assert records.read_json(tmp_path / "run.json", RunSpec) == longer


def test_resume_of_random_weights_needs_no_config_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.sources import hf_config

    run = replace(RUN, random_weights=True)
    monkeypatch.setattr(hf_config, "raw_config", lambda name: {})
    prepare_run_dir(tmp_path, run, None, resume=False)
    monkeypatch.delattr(hf_config, "raw_config")
    prepare_run_dir(tmp_path, run, None, resume=True)


def test_a_folder_in_use(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)  # vramplan"]
    other = subprocess.Popen(command)
    try:
        (tmp_path / "lock").write_text(f"{other.pid}\n")
        for resume in (False, True):
            with pytest.raises(InputError, match=f"output folder in use: process {other.pid}"):
                prepare_run_dir(tmp_path, RUN, None, resume=resume)
        with pytest.raises(InputError, match="output folder in use"), Lock(tmp_path):
            pass
        assert (tmp_path / "lock").read_text() == f"{other.pid}\n"
    finally:
        other.kill()
        other.wait()
    with Lock(tmp_path):  # its process is gone
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "lock").exists()


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_lock_whose_number_went_to_another_program_is_stale(tmp_path: Path) -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        while not Path(f"/proc/{other.pid}/cmdline").read_bytes():
            time.sleep(0.01)  # it is being started
        (tmp_path / "lock").write_text(f"{other.pid}\n")
        with Lock(tmp_path):
            pass
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("text", ["", "not a number", "-5", "0", "9" * 30])
def test_a_broken_lock_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text)
    with Lock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


# ----------------------------------------------------------------------------------------------- children that end
def test_a_child_that_finishes(play: Any) -> None:
    line = json.dumps(records.encode(MEASURED))
    script = (
        "say('start', total_steps=2)\n"
        "print('hello', os.path.exists(folder + '/lock'), sys.stdin.read() == '')\n"
        f"open(folder + '/measurement.jsonl', 'w').write({line!r} + chr(10))\n"
    )
    outcome = play(script + END)
    assert outcome == Outcome(exit_code=0, ended="finished", message="2 steps", measurement=MEASURED)
    assert [event["event"] for event in play.events] == ["start", "end"]
    assert (play.folder / "log.txt").read_text() == "hello True True\n"
    assert not (play.folder / "lock").exists()


def test_the_childs_own_last_words_count(play: Any) -> None:
    outcome = play('say("end", ended="oom", exit_code=4, message="too much", hint="less")\nsys.exit(4)')
    assert (outcome.exit_code, outcome.ended, outcome.message, outcome.hint) == (4, "oom", "too much", "less")


def test_last_words_that_make_no_sense(play: Any) -> None:
    outcome = play('say("end", ended="glorious", exit_code="x", message=None)\nsys.exit(7)')
    assert (outcome.exit_code, outcome.ended, outcome.message) == (1, "error", "")


def test_a_traceback_without_last_words(play: Any) -> None:
    outcome = play("raise KeyError('wheels')")
    assert (outcome.exit_code, outcome.ended) == (1, "error")
    assert "exit code 1" in outcome.message and "KeyError: 'wheels'" in outcome.message


def test_a_child_that_refuses_the_folder(play: Any) -> None:
    outcome = play("print('error: the folder is in use', file=sys.stderr)\nsys.exit(2)")
    assert (outcome.exit_code, outcome.message) == (2, "the folder is in use")


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("number", "words"), [("SIGKILL", "host memory"), ("SIGSEGV", "native library")])
def test_a_child_that_is_killed(play: Any, number: str, words: str) -> None:
    outcome = play(f"say('start')\nos.kill(os.getpid(), signal.{number})")
    assert (outcome.exit_code, outcome.ended, outcome.measurement) == (1, "error", None)
    assert number in outcome.message and words in outcome.hint
    assert not (play.folder / "lock").exists()


def test_out_of_memory_in_the_log_only() -> None:
    log = "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert died(1, 0, log)[::3] == ("oom", 4)
    assert died(1, 0, log)[1].startswith("torch.OutOfMemoryError")
    assert died(1, 0, "")[::3] == ("error", 1)


def test_resume_appends_and_tells_only_what_is_new(play: Any) -> None:
    line = json.dumps(records.encode(MEASURED)) + "\n"
    play("say('start')\nprint('one')\n" + f"open(folder + '/measurement.jsonl', 'a').write({line!r})\n" + END)
    with (play.folder / "progress.jsonl").open("a") as file:
        file.write('{"event": "st')  # killed while writing
    play.events.clear()
    outcome = play("say('start', resumed_from=2)\nprint('two')\n" + END, resume=True)
    assert [event["event"] for event in play.events] == ["start", "end"]
    assert (play.folder / "log.txt").read_text() == "one\ntwo\n"
    assert outcome.measurement is None  # that one is of the run before


def test_a_measurement_that_cannot_be_read_is_none(play: Any) -> None:
    outcome = play("open(folder + '/measurement.jsonl', 'w').write('{}' + chr(10))\n" + END)
    assert (outcome.exit_code, outcome.measurement) == (0, None)


# --------------------------------------------------------------------------------------------------------- stopping
def stopper(times: int) -> Any:
    """An event handler that sends this process SIGINT after the child's first event, and again after each warning."""
    left = [times]

    def on_event(event: dict[str, Any]) -> None:
        if left[0] and event["event"] in ("start", "warning"):
            left[0] -= 1
            os.kill(os.getpid(), signal.SIGINT)

    return on_event


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_first_interrupt_lets_the_child_save(play: Any) -> None:
    script = (
        "def stop(*_):\n"
        "    time.sleep(0.3)\n"
        "    say('end', ended='interrupted', exit_code=130, message='saved', hint='--resume')\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
    )
    handler = signal.getsignal(signal.SIGINT)
    outcome = play(script + WAIT, on_event=stopper(1))
    assert (outcome.exit_code, outcome.ended, outcome.message) == (130, "interrupted", "saved")
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_the_second_interrupt_ends_a_child_that_does_not_listen(play: Any) -> None:
    outcome = play("signal.signal(signal.SIGINT, signal.SIG_IGN)\n" + WAIT, on_event=stopper(2))
    assert (outcome.exit_code, outcome.ended) == (130, "interrupted")
    assert "before the state was saved" in outcome.message


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_failing_display_leaves_no_child_behind(play: Any) -> None:
    def fail(event: dict[str, Any]) -> None:
        raise ZeroDivisionError

    script = "open(folder + '/pid', 'w').write(str(os.getpid()))\n" + WAIT
    with pytest.raises(ZeroDivisionError):
        play(script, on_event=fail)
    with pytest.raises(ProcessLookupError):
        os.kill(int((play.folder / "pid").read_text()), 0)
    assert not (play.folder / "lock").exists()


def test_outside_the_main_thread(play: Any) -> None:
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(play(END)))
    thread.start()
    thread.join(60)
    assert [outcome.exit_code for outcome in outcomes] == [0]


# ---------------------------------------------------------------------------------------------------- environment
@pytest.mark.parametrize(
    ("allocator", "outer", "expected"),
    [
        ("expandable", {}, "expandable_segments:True"),
        ("native", {}, None),
        ("expandable", {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ("expandable", {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_the_allocator_setting(allocator: str, outer: dict[str, str], expected: str | None) -> None:
    env = child._environment(replace(RUN, levers=Levers(allocator=allocator)), outer)
    assert env.get("PYTORCH_CUDA_ALLOC_CONF") == expected
    assert env["TOKENIZERS_PARALLELISM"] == "false" and env["PYTHONUNBUFFERED"] == "1"
    assert {name: env[name] for name in outer} == outer


def test_missing_libraries_are_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_LIBRARIES", ("json", "no_such_library"))
    with pytest.raises(MissingExtra, match=r"vramplan train needs the 'train' extra"):
        launch(tmp_path)


def test_a_folder_that_was_not_prepared(tmp_path: Path, play: Any) -> None:
    with pytest.raises(InputError, match=r"run\.json"):
        launch(tmp_path / "nothing")


# ------------------------------------------------------------------------------------------------------- watching
def test_the_tail_waits_for_whole_lines_and_drops_nonsense(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    with path.open("ab") as file:
        for text, expected in [
            (b'{"event": "a"}\n{"eve', ["a"]),
            (b"", []),
            (b'nt": "b"}\n', ["b"]),
            (b'nonsense\n[1]\n{"no": "event"}\n{"event": 3}\n\xff\n' + b"[" * 99_999 + b'\n{"event": "c"}\n', ["c"]),
            (b"x" * (2**20 + 1), []),
            (b'\n{"event": "d"}\n', ["d"]),
        ]:
            file.write(text)
            file.flush()
            assert [event["event"] for event in tail.read()] == expected


class FakeNvml:
    """NVML as it is seen from the launcher; `readings` are what `process_bytes` and `used_bytes` say in turn."""

    def __init__(self, process: Any, used: list[Any]) -> None:
        self.process, self.used, self.closed = process, iter(used), False

    def __enter__(self) -> FakeNvml:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def process_bytes(self, index: int, pid: int) -> Any:
        return self.process

    def used_bytes(self, index: int) -> Any:
        value = next(self.used)
        if isinstance(value, Exception):
            raise value
        return value


@pytest.mark.parametrize(
    ("process", "used", "expected"),
    [
        (700, [100], [700, 700, 700]),
        (None, [100, 400, 900, 300], [300, 800, 800]),  # growth of the whole card, the most so far
        (None, [100, RuntimeError("lost"), 300, None], [None, 200, 200]),
    ],
)
def test_the_card_is_sampled(
    monkeypatch: pytest.MonkeyPatch, process: Any, used: list[Any], expected: list[int | None]
) -> None:
    from vramplan.sources import gpu

    fake = FakeNvml(process, used)
    monkeypatch.setattr(gpu, "Nvml", lambda: fake)
    with Card(pid=1) as card:
        assert [card.sample() for _ in expected] == expected
    assert fake.closed


def test_without_nvml_there_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from vramplan.sources import gpu

    def refuse() -> Any:
        raise OSError("no driver")

    monkeypatch.setattr(gpu, "Nvml", refuse)
    with Card(pid=1) as card:
        assert card.sample() is None


# ------------------------------------------------------------------------------------------------- the real child
@pytest.mark.slow
def test_the_real_child_trains_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "transformers", "peft", "bitsandbytes"):
        pytest.importorskip(name)
    from vramplan.train import tiny

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = tmp_path / "model"
    tiny.make(model, warm_up_steps=0, report=lambda text: None)
    run = RunSpec(
        model=str(model),
        seq_len=32,
        data=DataSpec(path=str(model / "train.jsonl")),
        schedule=Schedule(max_steps=2, save_steps=1),
    )
    events: list[dict[str, Any]] = []
    prepare_run_dir(tmp_path / "run", run, None, resume=False)
    started = time.time()
    outcome = launch(tmp_path / "run", on_event=events.append)
    assert (outcome.exit_code, outcome.ended) == (0, "finished"), outcome
    assert outcome.measurement is not None and outcome.measurement.steps == 2
    assert all(event["t"] >= started - 1 for event in events)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    longer = replace(run, schedule=Schedule(max_steps=3, save_steps=1))
    prepare_run_dir(tmp_path / "run", longer, None, resume=True)
    events.clear()
    assert launch(tmp_path / "run", resume=True, on_event=events.append).exit_code == 0
    assert [event["step"] for event in events if event["event"] == "step"] == [3]
