"""`vramplan measure`: the command with children that are played, the real child on a CPU, and, marked, on a card.

The files golden/measure_*.txt are what people see. After a wanted change: VRAMPLAN_UPDATE_GOLDEN=1 pytest this file.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from factories import make_gpu, make_ledger, make_measurement

from vramplan.cli import run as run_cli
from vramplan.cli.measure import shortened
from vramplan.core.types import GpuProcess, Levers, Measurement, RunSpec, Schedule
from vramplan.core.units import MIB
from vramplan.errors import InputError, OutOfMemory, VramplanError
from vramplan.launch import child
from vramplan.report.measure import show_measurement
from vramplan.sources import gpu, records

GOLDEN = Path(__file__).parent / "golden"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
OTHER = GpuProcess(pid=77, name="someone-elses-job", used_bytes=MIB)
# What every played child starts with: `say` appends an event, `write` the measurement; `kept` outlives the run folder.
HEAD = """
import json, shutil, sys, time
folder, kept, line = sys.argv[1], {kept!r}, {line!r}
assert sys.argv[2:] == ["--measure"]
def say(event, **fields):
    with open(folder + "/progress.jsonl", "a") as file:
        file.write(json.dumps({{"t": time.time(), "event": event, **fields}}) + "\\n")
def write(**changes):
    with open(folder + "/measurement.jsonl", "a") as file:
        file.write(json.dumps({{**json.loads(line), **changes}}) + "\\n")
shutil.copytree(folder, kept, dirs_exist_ok=True)
"""
FINISHED = "write()\nsay('end', ended='finished', exit_code=0, message='3 steps measured', hint='')\n"
OOM_TEXT = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.95 GiB. GPU 0 has a total capacity of 23.51 GiB of"
    " which 1.10 GiB is free. Including non-PyTorch memory, this process has 22.40 GiB memory in use. Of the allocated"
    " memory 21.80 GiB is allocated by PyTorch, and 140.00 MiB is reserved by PyTorch but unallocated."
)
OOM = (
    f"print({OOM_TEXT!r}, file=sys.stderr)\nwrite(ended='oom', message='CUDA out of memory')\n"
    "say('end', ended='oom', exit_code=4, message='CUDA out of memory', hint='ask `vramplan diagnose RUN_DIR`')\n"
    "sys.exit(4)\n"
)
Play = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def play(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Play:
    """play(script, *flags): `vramplan measure tiny ...` with this child, on a card that is not there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "live_gpu", lambda index: make_gpu(processes=(OTHER,)))
    monkeypatch.setattr(child, "_LIBRARIES", ("json",))
    monkeypatch.setattr("vramplan.cli.runner.EXTRA_MODULES", ("json",))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)

    def run(script: str, *flags: object, measurement: Measurement | None = None, model: object = config) -> Any:
        line = json.dumps(records.encode(measurement or make_measurement()))
        head = HEAD.format(kept=str(tmp_path / "kept"), line=line)
        monkeypatch.setattr(
            child, "_command", lambda folder, resume: [sys.executable, "-c", head + script, str(folder)]
        )
        words = ["measure", str(model), "--seq-len", "64", *map(str, flags)]
        capsys.readouterr()
        code = run_cli(words)
        captured = capsys.readouterr()
        return SimpleNamespace(
            code=code, out=captured.out, err=captured.err, error=(captured.err.splitlines() or [""])[-1]
        )

    return run


def rows(path: Path) -> list[Measurement]:
    return records.read_jsonl(path, Measurement)


# ---------------------------------------------------------------------------------------------------- the command
def test_a_measurement_is_printed_and_appended(tmp_path: Path, play: Play) -> None:
    first = play(FINISHED, "--batch-size", 2)
    assert first.code == 0
    assert "after the 4-bit load" in first.out and "appended to  measurements.jsonl" in first.out
    assert play(FINISHED, "--recipe", "peft", "--driver", "loop", "-o", "measurements.jsonl").code == 0
    lean, peft = rows(tmp_path / "measurements.jsonl")
    assert lean.prediction is not None and peft.prediction is not None
    assert (lean.prediction.run.micro_batch_size, lean.prediction.run.driver) == (2, "trainer")
    assert (peft.prediction.run.recipe, peft.prediction.run.driver) == ("peft", "loop")
    assert lean.prediction.run.random_weights and lean.prediction.run.model_path is None
    assert lean.device_name == "NVIDIA rtx-4090" and dict(lean.versions)["torch"] == "2.13.0"
    assert lean.gpu == make_gpu()  # what else runs on the card is nobody's business
    assert "someone-elses-job" not in (tmp_path / "measurements.jsonl").read_text()


def test_the_child_gets_the_run_and_leaves_nothing_behind(
    tmp_path: Path, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    assert play(FINISHED, "--steps", 5, "--layers", 3, "--padding", "--optim", "adamw_torch").code == 0
    run = records.read_json(tmp_path / "kept" / "run.json", RunSpec)
    assert (run.schedule.max_steps, run.schedule.save_steps) == (5, 0)
    assert (run.random_weights, run.padding, run.data, run.levers.optimizer) == (True, True, None, "adamw_torch")
    assert json.loads((tmp_path / "kept/model/config.json").read_text()) == {**CONFIG, "num_hidden_layers": 3}
    (row,) = rows(tmp_path / "measurements.jsonl")
    assert row.prediction is not None and row.prediction.model.num_layers == 3
    assert list(temporary.iterdir()) == []


def test_json_alone_is_on_stdout(play: Play) -> None:
    payload = json.loads(play(FINISHED, "--json").out)
    assert (payload["ended"], payload["exit_code"], payload["output"]) == ("finished", 0, "measurements.jsonl")
    assert payload["predicted"]["model"]["num_layers"] == 4 and payload["measurement"]["steps"] == 60
    loaded = payload["comparison"]["moments"][0]
    assert loaded["key"] == "resident.loaded" and loaded["measured_bytes"] == 3_866_078_720


def test_what_was_measured_is_drawn_over_the_step(tmp_path: Path, play: Play) -> None:
    assert play(FINISHED, "--html", "a.html", "--svg", "a.svg").code == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "dotted in the picture" in page and "NVIDIA rtx-4090" in page
    assert "most allocated in a phase" in (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert play(FINISHED, "--html", "nowhere/a.html").code == 2
    assert len(rows(tmp_path / "measurements.jsonl")) == 1


def test_the_launchers_view_stands_in_where_the_driver_does_not_tell_processes_apart(
    tmp_path: Path, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vramplan.launch.watching.Card.sample", lambda self: 123 * MIB)
    phases = make_measurement().phases
    silent = replace(make_measurement(), phases=(*phases[:-1], replace(phases[-1], process_bytes=None)))
    assert play(FINISHED, measurement=silent).code == 0
    assert play(FINISHED).code == 0
    unsaid, said = rows(tmp_path / "measurements.jsonl")
    assert unsaid.phases[-1].process_bytes == 123 * MIB
    assert unsaid.phases[0].process_bytes is None  # nobody looked then
    assert said == replace(make_measurement(), prediction=said.prediction, gpu=said.gpu)


def test_out_of_memory_is_exit_4_with_a_diagnosis(tmp_path: Path, play: Play) -> None:
    large = ("--recipe", "peft", "--seq-len", 2048, "--batch-size", 4)
    result = play(OOM, *large, model="llama-3.1-8b")
    assert result.code == 4
    assert "error: CUDA out of memory\n" in result.err  # without the hint: there is no run folder to diagnose
    assert result.error.startswith("note: Whole logits of 4 x 2048 x 128256") and "Best fix: " in result.error
    assert "saves 0 B" not in play(OOM).error  # a model so small that nothing helps
    assert "Out of memory after 60 steps" in result.out
    assert [row.ended for row in rows(tmp_path / "measurements.jsonl")] == ["oom", "oom"]
    payload = json.loads(play(OOM, *large, "--json", model="llama-3.1-8b").out)
    assert payload["exit_code"] == 4 and payload["diagnosis"].startswith("Whole logits of 4 x 2048")


def test_a_killed_child_and_a_silent_log_still_get_the_ledgers_lines(tmp_path: Path, play: Play) -> None:
    result = play("say('end', ended='oom', exit_code=4, message='too much', hint='')\nsys.exit(4)")
    assert result.code == 4 and "largest lines" in result.error
    assert not (tmp_path / "measurements.jsonl").exists()


@pytest.mark.parametrize(
    ("script", "code", "said"),
    [
        ("say('end', ended='error', exit_code=2, message='torch sees no CUDA GPU', hint='h')", 2,
         "error: torch sees no CUDA GPU (h)"),
        ("say('end', ended='interrupted', exit_code=130, message='stopped', hint='continue with --resume')", 130,
         "error: stopped"),
        ("print('Traceback of the child'); say('end', ended='error', exit_code=1, message='m', hint='see log.txt')", 1,
         "error: m"),
    ],
)  # fmt: skip
def test_other_endings_append_nothing(tmp_path: Path, play: Play, script: str, code: int, said: str) -> None:
    result = play(f"write(ended='error')\n{script}\nsys.exit({code})")
    assert (result.code, result.error) == (code, said)
    assert ("Traceback of the child" in result.err) == (code == 1)  # the log is gone, so it is shown
    assert not (tmp_path / "measurements.jsonl").exists() and "appended" not in result.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--layers", 5), "--layers 5 is more than the 4 of tiny"),
        (("--steps", 1), "--steps must be a whole number from 2"),
        (("--model-path", "x"), "--model-path has no use here"),
        (("-o", "."), "-o . is a folder"),
        (("-o", "no/such/x.jsonl"), "there is no folder no/such"),
        (("--driver", "lop"), "--driver"),
    ],
)
def test_bad_input_is_said_before_anything_runs(play: Play, flags: tuple[object, ...], said: str) -> None:
    result = play("raise SystemExit('started')", *flags)
    assert result.code == 2 and said in result.error
    assert len(result.err.splitlines()) == 1


def test_no_gpu_is_exit_2(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> Any:
        raise VramplanError("no NVIDIA driver here")

    monkeypatch.setattr(gpu, "live_gpu", refuse)
    result = play("raise SystemExit('started')")
    assert result.code == 2
    assert result.err == (
        "error: there is no CUDA GPU to measure on: no NVIDIA driver here (vramplan estimate needs no GPU)\n"
    )


def test_what_may_spoil_the_comparison_is_warned_of(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "warning" not in play(FINISHED).err
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setattr(gpu, "live_gpu", lambda index: make_gpu(usable=10 * MIB))
    result = play(FINISHED)
    assert result.code == 0
    assert "PYTORCH_CUDA_ALLOC_CONF is set and stays" in result.err and "measuring anyway" in result.err


def test_a_shortened_config_cuts_what_has_an_entry_per_layer() -> None:
    long = {"num_hidden_layers": 4, "layer_types": ["a", "b", "c", "d"], "no_rope_layers": [1, 1, 1, 0], "x": [1, 2, 3]}
    short = {"num_hidden_layers": 2, "layer_types": ["a", "b"], "no_rope_layers": [1, 1], "x": [1, 2, 3]}
    assert shortened(long, 2) == short
    assert shortened({"text_config": long, "model_type": "gemma3"}, 2) == {"text_config": short, "model_type": "gemma3"}
    assert long["num_hidden_layers"] == 4


# ----------------------------------------------------------------------------------------------------- the report
def drawn(measurement: Measurement, width: int) -> str:
    stream = io.StringIO()
    show_measurement(stream, make_ledger(), measurement, "measurements.jsonl", width=width)
    return stream.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_golden(width: int) -> None:
    text = drawn(make_measurement(), width)
    file = GOLDEN / f"measure_{width}.txt"
    if os.environ.get("VRAMPLAN_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= width


def test_the_difference_is_measured_minus_predicted() -> None:
    table = {line[:24].strip(): line.split()[-4:] for line in drawn(make_measurement(), 80).splitlines()}
    assert table["peak of the backward"] == ["5,427.99", "5,435.99", "+8.00", "+0.15%"]
    assert table["after the 4-bit load"][2:] == ["+0.00", "exact"]


def test_without_a_device_allocator_nothing_is_claimed() -> None:
    bare = make_measurement(device="cpu", device_name="cpu", phases=(), lines=(), trainable_parameters=7)
    text = drawn(bare, 80)
    assert "no allocator to ask" in text and "39,976,960 predicted, 7 counted" in text


# ------------------------------------------------------------------------------------------------------- the child
torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from transformers import masking_utils  # noqa: E402

from vramplan.core.recipes import RECIPES  # noqa: E402
from vramplan.train import measure as measuring  # noqa: E402
from vramplan.train import meter as metering  # noqa: E402
from vramplan.train.__main__ import main as child_main  # noqa: E402
from vramplan.train.progress import Progress  # noqa: E402

CPU = torch.device("cpu")
NEVER: Any = SimpleNamespace(asked=False, training=False)  # a StopSignal that takes over no signals


class FakeCuda:
    """torch's memory counters, moved by hand. `peak` is what is asked for, and falls back to `now` at each reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = self.reserved = 0
        for name, answer in {
            "memory_allocated": lambda device: self.now,
            "max_memory_allocated": lambda device: self.peak,
            "memory_reserved": lambda device: self.reserved,
            "reset_peak_memory_stats": self.reset,
            "memory_stats": lambda device: {"num_alloc_retries": 0},
            "get_device_name": lambda device: "a card",
            "list_gpu_processes": lambda device: f"process {os.getpid():>10d} uses {self.reserved / MIB:>12.3f} MB GPU",
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def reset(self, device: Any) -> None:
        self.peak = self.now

    def rise(self, top: int) -> None:
        """Allocate up to `top` and free it again."""
        self.peak = max(self.peak, top)
        self.reserved = max(self.reserved, top)


@pytest.mark.parametrize(("last_step", "expected"), [(True, (33, 43, 23)), (False, (32, 90, 22))])
def test_the_meter_reports_the_phases_of_a_steady_step(
    monkeypatch: pytest.MonkeyPatch, last_step: bool, expected: tuple[int, ...]
) -> None:
    cuda = FakeCuda(monkeypatch)
    meter = metering.Meter(torch.device("cuda"), last_step=last_step)
    for forward, backward, optimizer in ((31, 41, 80), (32, 90, 22), (33, 43, 23)):  # step 1 makes the state
        for share in (1.0, 0.5):  # two micro-steps: the higher counts
            meter.open()
            cuda.rise(int(forward * share))
            meter.close("forward")
            cuda.rise(int(backward * share))
            meter.close("backward")
        cuda.rise(optimizer)
        meter.close("optimizer")
        meter.end_step()
    meter.look()
    cuda.reserved = 0  # the cache is emptied afterwards
    phases = {phase.name: phase for phase in meter.measurement("finished").phases}
    assert tuple(phases[name].peak_bytes for name in metering.STEP_PHASES) == expected
    assert phases["step"].peak_bytes == max(expected)
    assert phases["step"].reserved_bytes == 90


def test_the_steps_process_bytes_are_those_of_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    meter = metering.Meter(torch.device("cuda"), last_step=True)
    cuda.rise(64 * MIB)
    meter.look()
    cuda.reserved = 0
    assert meter.measurement("finished").phases[-1].process_bytes == 64 * MIB


def test_random_rows_have_one_length_and_are_the_same_each_time() -> None:
    run = RunSpec(model="m", micro_batch_size=3, accumulation=2, seq_len=24, schedule=Schedule(max_steps=4))
    data = measuring.RandomRows(run, 50)
    assert len(data) == len(list(data)) == 24
    assert all(len(row["input_ids"]) == 24 and row["labels"] == row["input_ids"] for row in data)
    assert all(row["attention_mask"] == [1] * 24 and min(row["input_ids"]) >= 0 for row in data)
    assert max(max(row["input_ids"]) for row in data) < 50
    assert data[0] == data[0] != data[1]
    padded = measuring.RandomRows(replace(run, padding=True), 50)
    assert all((row["attention_mask"][-1], row["labels"][-1]) == (0, -100) for row in padded)
    packed = measuring.RandomRows(replace(run, packing=True, seq_len=200), 50)
    assert all(row["lengths"] == [28] * 6 + [32] and row["labels"] == row["input_ids"] for row in packed)


class Spy(metering.Meter):
    """Notes the borders of the phases, and how many tensors with a gradient there are at each."""

    def open(self) -> None:
        NOTED.append("open")

    def close(self, phase: str) -> None:
        NOTED.append(phase)

    def end_step(self) -> None:
        NOTED.append("end")
        super().end_step()


NOTED: list[str] = []


def tiny_run(config: Path, recipe: str, **changes: Any) -> RunSpec:
    run = RunSpec(
        model="tiny", model_path=str(config), micro_batch_size=2, accumulation=2, seq_len=32, recipe=recipe,
        levers=RECIPES[recipe], random_weights=True, schedule=Schedule(max_steps=3, save_steps=0),
    )  # fmt: skip
    return replace(run, **changes)


@pytest.mark.parametrize("packing", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("driver", ["trainer", "loop"])
@pytest.mark.parametrize("recipe", ["lean", "peft"])
def test_both_drivers_play_both_recipes(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, driver: str, packing: bool
) -> None:
    monkeypatch.setattr(measuring, "Meter", Spy)
    NOTED.clear()
    run = tiny_run(config, recipe, driver=driver, packing=packing)
    message = measuring.measure(run, tmp_path, CPU, progress=Progress(tmp_path / "progress.jsonl"), stop=NEVER)
    assert message == "3 steps measured"
    assert NOTED == ["open", "forward", "backward", "open", "forward", "backward", "optimizer", "end"] * 3
    (row,) = rows(tmp_path / "measurement.jsonl")
    assert (row.ended, row.steps, row.tokens, row.device) == ("finished", 3, 3 * 2 * 2 * 32, "cpu")
    assert [phase.name for phase in row.phases] == ["loaded", "prepared", "with_lora"]
    assert all(phase.allocated_bytes is None and phase.peak_bytes is None for phase in row.phases)
    assert {"weights.nf4", "adapter.lora", "optimizer.state"} <= {line.key for line in row.lines}
    assert row.first_loss is not None and abs(row.first_loss - 6.24) < 0.3  # ln 512: the tokens are random
    left = {path.name for path in tmp_path.rglob("*")}
    assert not {name for name in left if "adapter" in name or name.startswith("checkpoint-")}
    steps = [json.loads(text) for text in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert [event["step"] for event in steps if event["event"] == "step"] == [1, 2, 3]
    assert masking_utils.find_packed_sequence_indices.__module__ == masking_utils.__name__  # given back


def test_padding_reaches_the_model_as_a_mask(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    real = measuring.Loop.loss

    def spy(self: Any, inputs: dict[str, Any]) -> Any:
        seen.append(set(inputs))
        return real(self, inputs)

    monkeypatch.setattr(measuring.Loop, "loss", spy)
    for padding in (False, True):
        run = tiny_run(config, "peft", driver="loop", padding=padding, accumulation=1, schedule=Schedule(max_steps=2))
        measuring.measure(run, tmp_path, CPU, progress=Progress(tmp_path / "p"), stop=NEVER)
    assert seen == [{"input_ids", "labels"}] * 2 + [{"input_ids", "labels", "attention_mask"}] * 2


def test_what_ended_a_run_is_said_although_its_measurement_cannot_be_written(tmp_path: Path) -> None:
    def work() -> str:
        raise OutOfMemory("a row does not fit")

    with pytest.raises(OutOfMemory):
        metering.recorded(metering.Meter(CPU), tmp_path / "no such folder" / "measurement.jsonl", work)
    with pytest.raises(InputError, match="cannot write"):
        metering.recorded(metering.Meter(CPU), tmp_path / "no such folder" / "measurement.jsonl", lambda: "done")


def test_a_failure_leaves_its_measurement(tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(measuring.Loop, "micro_step", full)
    run = tiny_run(config, "lean", driver="loop", levers=Levers(optimizer="adamw_torch"))
    with pytest.raises(torch.OutOfMemoryError):
        measuring.measure(run, tmp_path, CPU, progress=Progress(tmp_path / "p"), stop=NEVER)
    (row,) = rows(tmp_path / "measurement.jsonl")
    assert (row.ended, row.steps) == ("oom", 0) and "2.00 GiB" in row.message
    assert masking_utils.find_packed_sequence_indices.__module__ == masking_utils.__name__


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_torch_without_cuda_is_bad_input() -> None:
    with pytest.raises(InputError, match="sees no CUDA GPU"):
        measuring.cuda_device()


def test_the_child_takes_one_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert child_main([str(tmp_path), "--resume", "--measure"]) == 2
    assert "--resume | --measure" in capsys.readouterr().err


REAL_CHILD = """
import sys, torch
import vramplan.train.measure as measuring
measuring.cuda_device = lambda: torch.device("cpu")
from vramplan.train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_whole_command_with_the_real_child(
    tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU tensors can be counted one by one: those of the model and the adapter agree with the prediction."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(gpu, "live_gpu", lambda index: make_gpu())
    command = [sys.executable, "-c", REAL_CHILD]
    monkeypatch.setattr(child, "_command", lambda folder, resume: [*command, str(folder)])
    assert run_cli(["measure", str(config), "--seq-len", "32", "--layers", "2", "--steps", "2", "--json"]) == 0
    payload = json.loads(capsys.readouterr().out)
    lines = {line["key"]: line for line in payload["comparison"]["lines"]}
    for key in ("weights.nf4", "weights.constants", "weights.embeddings", "weights.lm_head", "adapter.lora"):
        assert lines[key]["measured_bytes"] == lines[key]["predicted_bytes"] > 0
    assert rows(tmp_path / "measurements.jsonl")[0].steps == 2


@pytest.mark.cuda
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--recipe", "peft"),
        ("--recipe", "peft", "--driver", "loop"),
        ("--packing", "--batch-size", "2"),
        ("--packing", "--recipe", "peft", "--checkpointing", "none"),
        ("--packing", "--driver", "loop"),
    ],
)
def test_on_a_card_measured_and_predicted_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.chdir(tmp_path)
    assert run_cli(["measure", "tinyllama-1.1b", "--seq-len", "512", "--layers", "6", "--json", *flags]) == 0
    payload = json.loads(capsys.readouterr().out)
    moments = {pair["key"]: pair for pair in payload["comparison"]["moments"]}
    wanted = ("resident.loaded", "resident.prepared", "resident.with_lora", "phase.forward", "phase.backward",
              "phase.optimizer", "peak.allocated", "peak.reserved")  # fmt: skip
    assert set(wanted) <= set(moments)
    for key in wanted[:3]:
        assert abs(moments[key]["difference"]) < 0.001, moments[key]
    assert abs(moments["peak.allocated"]["difference"]) < 0.01
    (row,) = rows(tmp_path / "measurements.jsonl")
    assert row.ended == "finished" and row.alloc_retries == 0 and row.gpu is not None
