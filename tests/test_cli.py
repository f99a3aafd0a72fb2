"""The command line: flags become the right run, failures become one line and the right exit code.

Where a test is about the command line alone, the rooms behind it are stood in for by hand-built values; the tests at
the end run the real thing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
from factories import make_choice, make_gpu, make_ledger, make_measurement, make_offer, make_plan, make_verdict

import vramplan
from vramplan.cli import BROKEN_PIPE, COMMANDS, INTERRUPTED, describe, root, run
from vramplan.core.guide import fits
from vramplan.core.occupancy import segments
from vramplan.core.types import (
    CardCheck,
    Choice,
    DataSpec,
    GpuProfile,
    GpuVerdict,
    Ledger,
    Lengths,
    Levers,
    Measurement,
    ModelSpec,
    Offer,
    Plan,
    RunSpec,
    Unplannable,
)
from vramplan.core.units import GIB
from vramplan.errors import InputError, MissingExtra, VramplanError


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr."""
        return self.err.splitlines()[-1] if self.err else ""


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: object) -> Result:
        capsys.readouterr()
        code = run([str(word) for word in words])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


@dataclass
class Rooms:
    """What stands in for the rooms behind the command line, and what it was asked."""

    run: RunSpec | None = None
    verdict: str = "fits"
    plan: Plan | None = None
    live: GpuProfile | None = None
    others: tuple[GpuProfile, ...] = ()
    exit_code: int = 0
    ended: str = "finished"
    message: str = ""
    measurement: Measurement | None = None
    prepared: tuple[Path, RunSpec, Plan | None, bool] | None = None
    predicted: Ledger | None = None
    objective: str = ""
    free: tuple[str, ...] = ()
    lengths: Lengths | None = None
    chip: str | None = None
    prices: dict[str, float] | None = None
    cards: tuple[str, ...] = ()

    def estimate(self, model: ModelSpec, run: RunSpec, gpu: GpuProfile | None = None) -> Ledger:
        self.run, self.chip = run, gpu.key if gpu else None
        return replace(make_ledger(), model=model, run=run, warnings=("a warning",))

    def capacity(self, sizes: Any, run: RunSpec, gpu: GpuProfile) -> GpuVerdict:
        return make_verdict(gpu.key, gpu.usable_bytes, self.verdict)

    def offers(
        self, model: ModelSpec, run: RunSpec, cards: Sequence[GpuProfile], prices: dict[str, float]
    ) -> Iterator[Offer]:
        self.run, self.prices = run, prices
        fits = self.verdict != "does_not_fit"
        for card in cards:
            yield make_offer(card.key, usable=card.usable_bytes, verdict=self.verdict, as_asked=fits)

    def guide(
        self,
        model: ModelSpec,
        run: RunSpec,
        cards: Sequence[GpuProfile],
        prices: dict[str, float],
        chip: GpuProfile | None,
    ) -> tuple[Ledger, Iterator[Offer]]:
        return self.estimate(model, run, chip), self.offers(model, run, cards, prices)

    def choose(self, model: ModelSpec, run: RunSpec, cards: Sequence[GpuProfile], prices: dict[str, float]) -> Choice:
        self.run, self.prices, self.cards = run, prices, tuple(card.key for card in cards)
        return make_choice() if self.verdict != "does_not_fit" else make_choice(memory_gb=None, offers=(), priced=())

    def judge(self, ledger: Ledger, gpu: GpuProfile) -> str:
        return self.verdict

    def check(self, card: GpuProfile, model: ModelSpec | None = None, run: RunSpec | None = None) -> CardCheck:
        if model is None or run is None:
            return CardCheck(card=card, segments=segments(card))
        ledger = self.estimate(model, run, card)
        judged = self.capacity(model, run, card)
        return CardCheck(card=card, segments=segments(card, ledger), ledger=ledger, judged=judged)

    def make_plan(
        self,
        model: ModelSpec,
        run: RunSpec,
        gpu: GpuProfile,
        effective_batch_size: int,
        objective: str = "speed",
        *,
        free: tuple[str, ...] = (),
        lengths: Lengths | None = None,
        host_limit_bytes: int | None = None,
    ) -> Plan:
        self.host_limit_bytes = host_limit_bytes
        if not run.packing:  # with data packing is priced too, to say what it would bring
            self.run, self.objective, self.free, self.lengths = run, objective, free, lengths
        plan = make_plan(gpu=gpu, effective_batch_size=effective_batch_size)
        return self.plan or replace(plan, verdict=self.verdict, advice=("--seq-len 512 needs 3 GiB",))

    def live_gpu(self, index: int) -> GpuProfile:
        if self.live is None:
            raise VramplanError("no NVIDIA GPU here", "hint of nvml")
        return self.live

    def live_gpus(self) -> tuple[GpuProfile, ...]:
        return (self.live_gpu(0), *self.others)

    def prepare_run_dir(
        self, run_dir: Path, run: RunSpec, plan: Plan | None, *, resume: bool, prediction: Ledger | None = None
    ) -> None:
        self.prepared, self.predicted = (run_dir, run, plan, resume), prediction
        if run.gpus > 1:
            run_dir.mkdir(parents=True, exist_ok=True)

    def launch(self, run_dir: Path, *, resume: bool = False, on_event: Callable[[dict[str, Any]], None]) -> Any:
        on_event({"event": "phase", "t": 0.0, "name": "load", "message": "loading"})
        outcome = ModuleType("outcome")
        outcome.__dict__.update(
            exit_code=self.exit_code, ended=self.ended, message=self.message, hint="a hint",
            measurement=self.measurement, peak_process_bytes=None,
        )  # fmt: skip
        return outcome


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> Rooms:
    stand_in = Rooms()
    modules: dict[str, dict[str, Any]] = {
        "vramplan.core.ledger": {"estimate": stand_in.estimate},
        "vramplan.core.check": {"check": stand_in.check},
        "vramplan.core.capacity": {"capacity": stand_in.capacity},
        "vramplan.core.room": {"judge": stand_in.judge},
        "vramplan.core.sizes": {"Sizes": lambda model: model},
        "vramplan.core.plan": {"plan": stand_in.make_plan},
        "vramplan.core.guide": {"guide": stand_in.guide, "choose": stand_in.choose, "with_cheapest": tuple,
                                "fits": fits},
        "vramplan.sources.gpu": {"live_gpu": stand_in.live_gpu, "live_gpus": stand_in.live_gpus},
        "vramplan.launch": {
            "prepare_run_dir": stand_in.prepare_run_dir, "launch": stand_in.launch,
            "__path__": [str(Path(vramplan.__file__).parent / "launch")],  # its modules are the real ones
        },
    }  # fmt: skip
    for name, values in modules.items():
        module = ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in


ESTIMATE = ("estimate", "llama-2-7b")


# ------------------------------------------------------------------------------------------------ flags become runs
def test_defaults_are_the_lean_recipe(cli: Cli, rooms: Rooms) -> None:
    assert cli(*ESTIMATE).code == 0
    assert rooms.run == RunSpec(model="llama-2-7b")
    assert rooms.chip is None


def test_every_run_flag_arrives(cli: Cli, rooms: Rooms) -> None:
    result = cli(
        *ESTIMATE, "--batch-size", 4, "--accumulation", 2, "--seq-len", 512, "--lora-r", 8, "--lora-alpha", 16,
        "--lora-targets", "q_proj, v_proj", "--lora-dropout", 0.05, "--no-double-quant", "--padding",
        "--model-path", "w.gguf", "--trust-remote-code",
    )  # fmt: skip
    assert result.code == 0
    run = rooms.run
    assert run is not None
    assert (run.micro_batch_size, run.accumulation, run.seq_len) == (4, 2, 512)
    assert (run.lora.r, run.lora.alpha, run.lora.targets, run.lora.dropout) == (8, 16, ("q_proj", "v_proj"), 0.05)
    assert (run.double_quant, run.padding, run.model_path, run.trust_remote_code) == (False, True, "w.gguf", True)


def test_levers_override_the_recipe(cli: Cli, rooms: Rooms) -> None:
    cli(*ESTIMATE, "--recipe", "peft", "--loss", "fused", "--attn", "eager", "--checkpointing", "every-3")
    assert rooms.run is not None
    assert rooms.run.recipe == "peft"
    assert rooms.run.levers == Levers(
        upcast="all", loss="fused", checkpointing="every-3", optimizer="adamw_torch_fused", attention="eager",
        kernels="stock", allocator="native",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--gradient-checkpointing", "all"),
        ("--no-gradient-checkpointing", "none"),
        ("--checkpointing every-1", "all"),
        ("--checkpointing every-4 --gradient-checkpointing", "every-4"),
        ("--checkpointing none --no-gradient-checkpointing", "none"),
    ],
)
def test_checkpointing_spellings(cli: Cli, rooms: Rooms, flags: str, expected: str) -> None:
    assert cli(*ESTIMATE, *flags.split()).code == 0
    assert rooms.run is not None and rooms.run.levers.checkpointing == expected


def test_hugging_face_names(cli: Cli, rooms: Rooms) -> None:
    flags = "--per-device-train-batch-size 3 --gradient-accumulation-steps 5 --optim adamw_bnb_8bit"
    assert cli(*ESTIMATE, *flags.split()).code == 0
    assert rooms.run is not None
    assert (rooms.run.micro_batch_size, rooms.run.accumulation) == (3, 5)
    assert rooms.run.levers.optimizer == "adamw_8bit"


# -------------------------------------------------------------------------------------------------------- bad input
BAD = {
    "--batch-size 0": "--batch-size must be a whole number from 1",
    "--batch-size two": "--batch-size must be a whole number",
    "--per-device-train-batch-size -1": "--batch-size must be",
    "--accumulation 0": "--accumulation must be",
    "--seq-len 0": "--seq-len must be",
    "--seq-len 4097": "--seq-len 4097 is over the 4096 positions of llama-2-7b (to go further,",
    "--lora-r 0": "--lora-r must be a whole number from 1 to 65536, not 0",
    "--lora-dropout 1": "--lora-dropout must be a number at least 0 and below 1, not 1",
    "--lora-dropout nan": "--lora-dropout must be",
    "--lora-dropout -0.1": "--lora-dropout must be",
    "--lora-targets q_proj,,v_proj": "--lora-targets must be",
    "--lora-targets all-linear,q_proj": "--lora-targets must be",
    "--optim adamw_8bits": "--optim has no optimizer 'adamw_8bits' (did you mean",
    "--optim zzz": "one of adamw_torch_fused",
    "--upcast some": "--upcast cannot be 'some'",
    "--checkpointing every-0": "--checkpointing must be none, all or every-K",
    "--checkpointing sometimes": "--checkpointing must be",
    "--checkpointing none --gradient-checkpointing": "contradicts --gradient-checkpointing",
    "--checkpointing all --no-gradient-checkpointing": "contradicts --no-gradient-checkpointing",
    "--no-gradient-checkpointing --checkpoint-offload": "--checkpoint-offload needs checkpoints",
    "--gpu rtx-4099": "rtx-4099",
    "--full-depth": "add --trace",
    "--batchsize 3": "--batchsize",
}


@pytest.mark.parametrize("flags", BAD)
@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_bad_input_is_one_line_and_exit_2(cli: Cli, rooms: Rooms, flags: str, extra: tuple[str, ...]) -> None:
    result = cli(*ESTIMATE, *flags.split(), *extra)
    assert result.code == 2
    assert result.out == ""
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("error: ") and BAD[flags] in result.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("estimat", "llama-2-7b"), "did you mean estimate?"),
        (("zzzzzz",), "vramplan --help"),
        (("estimate",), "MODEL is missing (vramplan models"),
        (("gpus", "llama-2-7b"), "what to do with llama-2-7b (--for MODEL names"),
        (("estimate", "llama-2-7bb"), "llama-2-7b"),
        (("fit", "llama-2-7b", "--gpu", "rtx-4090"), "--effective-batch-size"),
        (("fit", "llama-2-7b", "--effective-batch-size", "0"), "--effective-batch-size must be"),
        (("fit", "llama-2-7b", "--effective-batch-size", "4", "--gpu", "rtx-4090", "-o", "no/p.json"), "-o no/p.json"),
        (("train",), "MODEL is missing"),
        (("train", "llama-2-7b"), "--data is missing"),
        (("train", "llama-2-7b", "--data", "missing.jsonl"), "--data missing.jsonl does not exist"),
        (("train", "--resume"), "--resume needs the run folder"),
        (("train", "--resume", "-o", "nowhere"), "nowhere is not a run folder"),
        (("train", "llama-2-7b", "--data", "x/y", "--learning-rate", "0"), "--learning-rate must be"),
        (("train", "llama-2-7b", "--data", "x/y", "--lr-scheduler-type", "cosin"), "did you mean cosine"),
        (
            ("train", "llama-2-7b", "--data", "x/y", "--effective-batch-size", "7", "--batch-size", "2"),
            "7 is not 2 x 3",
        ),
    ],
)
def test_bad_commands(
    cli: Cli, rooms: Rooms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vramplan.cli.runner.EXTRA_MODULES", ("json",))
    result = cli(*words)
    assert result.code == 2
    assert text in result.error and result.error.startswith("error: ")
    assert result.out == ""
    assert rooms.prepared is None and list(tmp_path.iterdir()) == []


def test_a_short_model_lowers_the_default_length_aloud(cli: Cli, rooms: Rooms, tmp_path: Path) -> None:
    from vramplan.sources.hf_config import raw_config

    config = {**raw_config("llama-2-7b"), "max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = cli("estimate", tmp_path)
    assert result.code == 0
    assert rooms.run is not None and rooms.run.seq_len == 1024
    assert "note: --seq-len is 1024" in result.err


# ----------------------------------------------------------------------------------------------- output, exit codes
def test_estimate_prints_the_table_and_warns_on_stderr(cli: Cli, rooms: Rooms) -> None:
    result = cli(*ESTIMATE)
    assert result.out.startswith("Needs 5.86 GiB of one GPU")
    assert result.err == "warning: a warning\n"


def test_json_is_alone_on_stdout(cli: Cli, rooms: Rooms) -> None:
    result = cli(*ESTIMATE, "--json", "--gpu", "rtx-4090")
    data = json.loads(result.out)
    assert data["run"]["model"] == "llama-2-7b"
    assert [card["gpu"] for card in data["gpus"]] == ["rtx-4090"]
    assert result.err == "warning: a warning\n"


def test_a_named_card_that_does_not_hold_it_is_exit_3_but_all_is_not(cli: Cli, rooms: Rooms) -> None:
    rooms.verdict = "does_not_fit"
    assert cli(*ESTIMATE, "--gpu", "rtx-4090").code == 3
    assert cli(*ESTIMATE, "--gpu", "all", "--gpu", "rtx-4090", "--json").code == 3
    assert cli(*ESTIMATE, "--gpu", "all").code == 0


def test_the_first_named_card_is_the_chip_and_each_card_comes_once(cli: Cli, rooms: Rooms) -> None:
    from vramplan.sources.profiles import gpu_names

    result = cli(*ESTIMATE, "--gpu", "all", "--gpu", "h200", "--gpu", "rtx-4090", "--gpu", "h200", "--json")
    cards = [card["gpu"] for card in json.loads(result.out)["gpus"]]
    assert rooms.chip == "h200"
    assert cards[:2] == ["h200", "rtx-4090"]
    assert sorted(cards) == sorted(gpu_names())


def test_check_judges_the_live_card(cli: Cli, rooms: Rooms) -> None:
    assert cli("check", "llama-2-7b").code == 1  # no card
    rooms.live = make_gpu("live-card")
    assert cli("check").out.startswith("NVIDIA live-card: 23.52 GiB usable")
    assert cli("check", "llama-2-7b").code == 0
    rooms.verdict = "does_not_fit"
    result = cli("check", "llama-2-7b", "--json")
    assert result.code == 3
    assert json.loads(result.out)["verdict"] == "does_not_fit"
    assert result.err == "warning: a warning\n"


FIT = ("fit", "llama-2-7b", "--effective-batch-size", 16)


def test_fit_writes_the_plan_it_prints(cli: Cli, rooms: Rooms, tmp_path: Path) -> None:
    from vramplan.sources.records import read_json

    file = tmp_path / "plan.json"
    result = cli(*FIT, "--gpu", "rtx-4090", "--objective", "memory", "-o", file, "--json")
    assert result.code == 0 and rooms.objective == "memory"
    assert read_json(file, Plan).effective_batch_size == 16
    assert json.loads(result.out) == json.loads(file.read_text())
    assert f"vramplan train {file} --data FILE" in cli(*FIT, "--gpu", "rtx-4090", "-o", file).out


@pytest.mark.parametrize(
    ("flags", "free"),
    [
        ("", ("checkpointing", "checkpoint_offload")),
        ("--checkpointing all", ("checkpoint_offload",)),
        ("--no-gradient-checkpointing", ("checkpoint_offload",)),
        ("--no-checkpoint-offload --optim adamw_8bit", ("checkpointing",)),
    ],
)
def test_what_a_flag_settles_is_not_searched(cli: Cli, rooms: Rooms, flags: str, free: tuple[str, ...]) -> None:
    assert cli(*FIT, "--gpu", "rtx-4090", *flags.split()).code == 0
    assert rooms.free == free
    assert rooms.run is not None
    if "--optim" in flags:
        assert rooms.run.levers.optimizer == "adamw_8bit"
    if "--checkpointing" in flags:
        assert rooms.run.levers.checkpointing == "all"


def test_fit_reads_the_data_it_plans_for(cli: Cli, rooms: Rooms, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Lengths(bars=((64, 9), (700, 1)), tokens=1000)
    monkeypatch.setattr("vramplan.cli.runner.read_lengths", lambda run, width: rows)
    assert cli(*FIT, "--gpu", "rtx-4090", "--data", data, "--group-by-length").code == 0
    assert rooms.lengths == rows and rooms.run is not None and rooms.run.data is not None
    assert (rooms.run.data.path, rooms.run.data.train_sampling_strategy) == (str(data), "group_by_length")
    assert rooms.run.model_path == "meta-llama/Llama-2-7b-hf"
    assert "compared with rows of 704 tokens" in cli(*FIT, "--gpu", "rtx-4090", "--data", data).out  # 700 are 88 x 8
    assert "compared with rows of 512 tokens" in cli(*FIT, "--gpu", "rtx-4090", "--seq-len", 512).out
    assert cli(*FIT, "--gpu", "rtx-4090", "--data", "nowhere.jsonl").code == 2


def test_an_impossible_fit_advises_writes_nothing_and_exits_3(cli: Cli, rooms: Rooms, tmp_path: Path) -> None:
    rooms.verdict = "does_not_fit"
    result = cli(*FIT, "--gpu", "rtx-4090", "-o", tmp_path / "plan.json")
    assert result.code == 3
    assert "--seq-len 512 needs 3 GiB" in result.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((*FIT, "--gpu", "t4", "--gpu", "rtx-4090"), "fit plans for one card (vramplan estimate MODEL --gpu t4"),
        ((*FIT, "--gpu", "all"), "fit plans for one card (vramplan estimate MODEL --gpu all compares them)"),
        ((*FIT, "--gpu", "t4", "--gpu-index", 1), "--gpu-index is about this machine's cards (--gpu live takes it)"),
        ((*ESTIMATE, "--gpu", "t4", "--gpu-index", 0), "--gpu-index is about this machine's cards"),
        ((*ESTIMATE, "--gpu-index", 1), "--gpu-index is about this machine's cards"),
    ],
)
def test_what_would_silently_not_count_is_refused(cli: Cli, rooms: Rooms, words: tuple[object, ...], text: str) -> None:
    result = cli(*words)
    assert result.code == 2 and text in result.error


def test_one_card_may_be_named_twice(cli: Cli, rooms: Rooms) -> None:
    assert cli(*FIT, "--gpu", "t4", "--gpu", "t4").code == 0
    assert cli(*FIT, "--gpu", "rtx-4090").out.startswith("Fits rtx-4090")


def test_the_index_arrives(cli: Cli, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    rooms.live = make_gpu()
    monkeypatch.setattr(
        sys.modules["vramplan.sources.gpu"], "live_gpu", lambda index: asked.append(index) or make_gpu()
    )
    for words in ((*ESTIMATE, "--gpu", "live"), FIT):
        assert cli(*words, "--gpu-index", 3).code == 0
    assert asked == [3, 3]


def test_fit_without_a_card_says_how_to_name_one(cli: Cli, rooms: Rooms) -> None:
    result = cli(*FIT)
    assert result.code == 1
    assert result.error == "error: no NVIDIA GPU here (hint of nvml)"


def test_gpus_and_models(cli: Cli, rooms: Rooms) -> None:
    result = cli("gpus", "--json")
    assert result.err == "note: no NVIDIA GPU here\n"
    data = json.loads(result.out)
    assert data["live"] == [] and {"rtx-4090", "t4"} <= {card["key"] for card in data["gpus"]}
    rooms.live = make_gpu("mine")
    assert "This machine has 1 card;" in cli("gpus").out
    models = {model["name"]: model for model in json.loads(cli("models", "--json").out)["models"]}
    assert models["llama-2-7b"]["parameters"] == 6_738_415_616
    assert models["llama-2-7b"]["hub_id"] == "meta-llama/Llama-2-7b-hf"
    assert len(models) >= 25


def test_help_and_version(cli: Cli) -> None:
    from vramplan import __version__

    assert cli("--version").out == f"vramplan {__version__}\n"
    listing = cli("--help")
    assert listing.code == 0 and all(name in listing.out for name in COMMANDS)
    assert cli().out == listing.out
    for name in COMMANDS:
        text = cli(name, "--help").out
        assert "Example:" in text
        assert max(map(len, text.splitlines())) <= 100


def test_every_command_takes_json() -> None:
    context = click.Context(root)
    for name in COMMANDS.keys() - {"run"}:  # its stdout is that of the command it runs; it leaves JSON files
        command = root.get_command(context, name)
        assert command is not None
        assert any("--json" in param.opts for param in command.params), name


# ------------------------------------------------------------------------------------------------------------ train
@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vramplan.cli.runner.EXTRA_MODULES", ("json",))
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    return tmp_path / "d.jsonl"


def test_train_builds_the_run(cli: Cli, rooms: Rooms, data: Path) -> None:
    rooms.measurement = make_measurement()
    flags = "--effective-batch-size 8 --batch-size 2 --max-steps 5 --learning-rate 1e-3 --eval-fraction 0.1 --seed 7"
    flags += " --no-rehearsal --on-nan skip"
    result = cli("train", "llama-2-7b", "--data", "d.jsonl", "-o", "out", *flags.split())
    assert result.code == 0
    assert rooms.prepared is not None
    folder, spec, plan, resume = rooms.prepared
    assert (folder, plan, resume) == (Path("out"), None, False)
    assert (spec.micro_batch_size, spec.accumulation) == (2, 4)
    assert spec.model_path == "meta-llama/Llama-2-7b-hf"
    assert spec.data is not None and spec.data.path == str(data) and spec.data.eval_fraction == 0.1
    assert (spec.schedule.max_steps, spec.schedule.learning_rate, spec.schedule.seed) == (5, 1e-3, 7)
    assert (spec.schedule.rehearsal, spec.schedule.on_nan) == (False, "skip")
    assert rooms.predicted is not None and rooms.predicted.run == spec
    assert "Done: 60 steps" in result.out and "predicted   measured" in result.out
    assert "load: loading" in result.err and "training on the CPU" in result.err


def test_gpus_become_part_of_the_run_and_of_the_effective_batch(cli: Cli, rooms: Rooms, data: Path) -> None:
    words = ("train", "llama-2-7b", "--data", "d.jsonl", "-o", "out", "--gpus", 4, "--batch-size", 2)
    for flags, expected in (((), "ddp"), (("--parallel", "fsdp"), "fsdp")):
        assert cli(*words, "--effective-batch-size", 24, *flags).code == 0
        assert rooms.prepared is not None
        spec = rooms.prepared[1]
        assert (spec.gpus, spec.parallel, spec.micro_batch_size, spec.accumulation) == (4, expected, 2, 3)
    result = cli(*words, "--effective-batch-size", 12)
    assert result.code == 2
    assert "is not 2 x 1 x 4 (--batch-size x --accumulation x --gpus)" in result.error
    cli(*ESTIMATE, "--gpus", 2)
    assert rooms.run is not None and (rooms.run.gpus, rooms.run.parallel) == (2, "ddp")


def test_every_one_of_several_gpus_must_be_there_and_large_enough(cli: Cli, rooms: Rooms, data: Path) -> None:
    words = ("train", "llama-2-7b", "--data", "d.jsonl", "--gpus", 2)
    rooms.live = make_gpu(usable=4 * GIB)
    result = cli(*words)
    assert result.code == 2 and result.error.startswith("error: --gpus 2, but this machine has 1")
    rooms.others = (make_gpu(usable=3 * GIB),)
    assert cli(*words).code == 0
    rooms.verdict = "does_not_fit"
    result = cli(*words)
    assert result.code == 3 and "has 3.00 GiB usable" in result.error


@pytest.mark.parametrize("machines", [1, 2])
def test_print_launch_starts_nothing(cli: Cli, rooms: Rooms, data: Path, machines: int) -> None:
    words = ("train", "llama-2-7b", "--data", "d.jsonl", "-o", "out", "--gpus", 4, "--num-machines", machines)
    rooms.exit_code = 1  # of a launch that must not come
    result = cli(*words, "--print-launch")
    assert result.code == 0, result.err
    assert rooms.prepared is not None and rooms.prepared[1].gpus == 4
    torchrun, accelerate = (line.strip() for line in result.out.splitlines()[1:])
    folder = data.parent / "out"
    assert torchrun.startswith("torchrun --standalone " if machines == 1 else "torchrun --nnodes 2 --rdzv-backend c10d")
    assert torchrun.endswith(f"--nproc-per-node {4 // machines} -m vramplan.train {folder}")
    assert accelerate.startswith(f"accelerate launch --config_file {folder / 'accelerate.yaml'}")
    config = (folder / "accelerate.yaml").read_text().splitlines()
    assert "num_processes: 4" in config and f"num_machines: {machines}" in config
    payload = json.loads(cli(*words, "--print-launch", "--json").out)
    assert payload["torchrun"] == torchrun and payload["accelerate"] == accelerate


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--parallel fsdp", "--parallel fsdp needs more than one GPU"),
        ("--gpus 0", "--gpus must be a whole number from 1"),
        ("--gpus 4 --num-machines 2", "--num-machines needs --print-launch"),
        ("--gpus 4 --num-machines 3 --print-launch", "--gpus 4 cannot be spread evenly over --num-machines 3"),
        ("--print-launch", "--print-launch is for several GPUs"),
    ],
)
def test_gpus_that_cannot_be(cli: Cli, rooms: Rooms, data: Path, flags: str, said: str) -> None:
    result = cli("train", "llama-2-7b", "--data", "d.jsonl", "-o", "out", *flags.split())
    assert result.code == 2 and said in result.error
    assert rooms.prepared is None and not (data.parent / "out").exists()


def test_a_trace_is_of_one_gpu(cli: Cli, rooms: Rooms) -> None:
    result = cli(*ESTIMATE, "--trace", "--gpus", 2)
    assert result.code == 2 and "--trace plays one GPU" in result.error


def test_train_json(cli: Cli, rooms: Rooms, data: Path) -> None:
    rooms.measurement = make_measurement()
    result = cli("train", "llama-2-7b", "--data", "d.jsonl", "--json")
    payload = json.loads(result.out)
    assert payload["ended"] == "finished" and payload["run_dir"].startswith("runs/llama-2-7b-")
    assert payload["comparison"]["lines"]


def test_train_takes_a_plan_but_no_flag_that_the_plan_has_settled(cli: Cli, rooms: Rooms, data: Path) -> None:
    cli(*FIT, "--gpu", "rtx-4090", "-o", "plan.json")
    assert cli("train", "plan.json", "--data", "d.jsonl", "--max-steps", 3).code == 0
    assert rooms.prepared is not None
    _, spec, plan, _ = rooms.prepared
    assert plan is not None and plan.effective_batch_size == 16
    assert (spec.micro_batch_size, spec.accumulation, spec.schedule.max_steps) == (4, 4, 3)
    result = cli("train", "plan.json", "--data", "d.jsonl", "--batch-size", 2)
    assert result.code == 2 and result.error == "error: --batch-size is settled by plan.json"


def test_train_takes_the_data_that_a_plan_was_made_for(cli: Cli, rooms: Rooms, data: Path) -> None:
    from vramplan.sources.records import write_json

    made = make_plan()
    write_json(data.parent / "plan.json", replace(made, run=replace(made.run, data=DataSpec(path=str(data)))))
    assert cli("train", "plan.json").code == 0
    assert rooms.prepared is not None and rooms.prepared[1].data == DataSpec(path=str(data))
    assert cli("train", "plan.json", "--eval-fraction", 0.1).code == 2  # of which data?
    cli(*FIT, "--gpu", "rtx-4090", "-o", "plan.json")
    result = cli("train", "plan.json")
    assert result.code == 2 and "--data is missing" in result.error


def test_train_resumes_from_the_folder_alone(cli: Cli, rooms: Rooms, data: Path) -> None:
    from vramplan.sources.records import write_json

    folder = data.parent / "out"
    folder.mkdir()
    stored = RunSpec(model="llama-2-7b", micro_batch_size=3)
    write_json(folder / "run.json", stored)
    for words in (("--resume", "-o", "out"), ("out", "--resume")):
        assert cli("train", *words).code == 0
        assert rooms.prepared == (Path("out"), stored, None, True)
    assert cli("train", "--resume", "-o", "out", "--max-steps", 9).code == 0
    longer = replace(stored, schedule=replace(stored.schedule, max_steps=9))
    assert rooms.prepared == (Path("out"), longer, None, True)
    result = cli("train", "--resume", "-o", "out", "--lora-r", 4)
    assert result.code == 2 and "--lora-r cannot change" in result.error


def test_train_out_of_memory_is_exit_4_with_what_the_ledger_says(cli: Cli, rooms: Rooms, data: Path) -> None:
    rooms.exit_code, rooms.ended, rooms.message = 4, "oom", "CUDA out of memory. Tried to allocate 2 GiB"
    result = cli("train", "llama-2-7b", "--data", "d.jsonl", "-o", "out")
    assert result.code == 4
    assert "error: CUDA out of memory. Tried to allocate 2 GiB (a hint)" in result.err
    assert "note: predicted 5.86 GiB on the device" in result.err
    assert "largest lines: NF4 weights, packed 3.02 GiB" in result.err


@pytest.mark.parametrize(("child", "expected"), [(1, 1), (2, 2), (130, 130), (-9, 1)])
def test_train_passes_the_exit_code_on(cli: Cli, rooms: Rooms, data: Path, child: int, expected: int) -> None:
    rooms.exit_code, rooms.message = child, "what happened"
    result = cli("train", "llama-2-7b", "--data", "d.jsonl", "-o", "out")
    assert result.code == expected
    assert "error: what happened (a hint)" in result.err


def test_train_refuses_what_does_not_fit_unless_forced(cli: Cli, rooms: Rooms, data: Path) -> None:
    rooms.live, rooms.verdict = make_gpu(usable=4 * GIB), "does_not_fit"
    result = cli("train", "llama-2-7b", "--data", "d.jsonl")
    assert result.code == 3 and rooms.prepared is None
    assert "needs 5.86 GiB" in result.error and "--force" in result.error
    assert cli("train", "llama-2-7b", "--data", "d.jsonl", "--force").code == 0


def test_train_without_the_extra_says_how_to_get_it(cli: Cli, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vramplan.cli.runner.EXTRA_MODULES", ("no_such_library",))
    for words in (("train", "llama-2-7b", "--data", "x/y"), ("quickstart",)):
        result = cli(*words)
        assert result.code == 1
        assert "needs the 'train' extra (pip install \"vramplan[train]\")" in result.error


def test_an_empty_data_file_is_refused(cli: Cli, rooms: Rooms, data: Path) -> None:
    data.write_text("")
    result = cli("train", "llama-2-7b", "--data", "d.jsonl")
    assert result.code == 2 and result.error == "error: --data d.jsonl is empty"


def test_local_weights_are_absolute(cli: Cli, rooms: Rooms, data: Path) -> None:
    from vramplan.sources.hf_config import raw_config

    folder = data.parent / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw_config("llama-2-7b")))
    for name in ("m", "m/config.json"):
        assert cli("train", name, "--data", "d.jsonl", "-o", "out").code == 0
        assert rooms.prepared is not None and rooms.prepared[1].model_path == str(folder)


def test_quickstart_refuses_a_folder_with_something_in_it(cli: Cli, data: Path) -> None:
    result = cli("quickstart", "-o", data.parent)
    assert result.code == 2 and "not an empty folder" in result.error


# ----------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (InputError("bad", "do this"), "error: bad (do this)", 2),
        (MissingExtra("x"), "error: x needs the 'train' extra (pip install \"vramplan[train]\")", 1),
        (Unplannable("cannot"), "error: cannot", 2),
        (OSError(28, "No space left on device", "plan.json"), "error: No space left on device: plan.json", 1),
        (VramplanError("two\nlines"), "error: two lines", 1),
        (ZeroDivisionError("x\ny"),
         "internal error: ZeroDivisionError: x y, please report; --debug shows the traceback", 1),
    ],
)  # fmt: skip
def test_every_error_is_one_line(error: Exception, text: str, code: int) -> None:
    assert describe(error) == (text, code)


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*args: object, **kwargs: object) -> Any:
        raise error

    return fail


def test_debug_shows_the_traceback(cli: Cli, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vramplan.core.ledger"], "estimate", fail_with(KeyError("gone")))
    quiet, loud = cli(*ESTIMATE), cli(*ESTIMATE, "--debug")
    assert quiet.code == loud.code == 1
    assert quiet.err.startswith("internal error: KeyError: 'gone'") and "Traceback" not in quiet.err
    assert "Traceback" in loud.err and loud.error == quiet.error


def test_ctrl_c_is_quiet(cli: Cli, rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vramplan.core.ledger"], "estimate", fail_with(KeyboardInterrupt()))
    result = cli(*ESTIMATE)
    assert (result.code, result.out, result.err) == (INTERRUPTED, "", "")


# --------------------------------------------------------------------------------------------------- the real thing
def process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vramplan", *words]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "vramplan", "models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == ""
        assert child.wait() == BROKEN_PIPE


def test_a_closed_stdout_is_no_error() -> None:
    script = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'vramplan', 'models'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_real_estimate_adds_up() -> None:
    done = process("estimate", "llama-2-7b", "--gpu", "rtx-4090", "--gpu", "a100-80gb", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert sum(line["bytes"] for line in data["lines"]) == data["peak"]["device_bytes"]
    assert data["trainable_parameters"] == 39_976_960
    assert {card["verdict"] for card in data["gpus"]} == {"fits"}
    table = process("estimate", "llama-2-7b", "--gpu", "rtx-4090", env={"PATH": "", "COLUMNS": "80"})
    assert table.returncode == 0, table.stderr
    assert table.stdout.startswith("Fits rtx-4090: needs ")
    assert max(map(len, table.stdout.splitlines())) <= 80


def test_real_estimate_on_a_dumb_ascii_terminal() -> None:
    env = {"PATH": "", "PYTHONIOENCODING": "ascii", "TERM": "dumb", "COLUMNS": "120"}
    done = process("estimate", "llama-2-7b", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "?" not in done.stdout


def test_real_fit_then_exact_product(tmp_path: Path) -> None:
    from vramplan.sources.records import read_json

    file = tmp_path / "plan.json"
    done = process("fit", "llama-2-7b", "--effective-batch-size", "12", "--gpu", "rtx-4090", "-o", str(file))
    assert done.returncode == 0, done.stderr
    plan = read_json(file, Plan)
    assert plan.run.micro_batch_size * plan.run.accumulation == 12
    assert f"batch {plan.run.micro_batch_size} x {plan.run.accumulation} = 12" in done.stdout
    assert plan.ledger.peak.device_bytes <= plan.gpu.usable_bytes


def test_real_impossible_fit(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = process("fit", "llama-2-70b", "--effective-batch-size", "4", "--gpu", "rtx-4060", "-o", str(file))
    assert done.returncode == 3
    assert done.stdout.startswith("Does not fit rtx-4060") and not file.exists()
    assert "What would fit" in done.stdout
