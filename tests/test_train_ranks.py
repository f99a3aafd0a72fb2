"""Two processes that train one adapter, on a CPU over gloo: the same update as one, and every way to end."""

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

torch = pytest.importorskip("torch")
pytest.importorskip("bitsandbytes")

from test_train_finetune import tune  # noqa: E402
from train_tools import ROOT, events, make_model, make_run, make_text, measurement, write_rows  # noqa: E402

from vramplan.core.types import DataSpec, Levers, Lora, RunSpec, Schedule  # noqa: E402
from vramplan.errors import InputError  # noqa: E402
from vramplan.launch import Outcome, child, launch, prepare_run_dir  # noqa: E402
from vramplan.sources import records  # noqa: E402
from vramplan.sources.oom_text import read_run_evidence  # noqa: E402

HERE = Path(__file__).parent
STEPS = 5
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    make_model(root / "model", make_text(root / "text.jsonl"))
    return root


def spec(root: Path, **changes: Any) -> RunSpec:
    """Two rows a micro-batch, two micro-batches a step, on each of two ranks. SGD: a wrong sum would show at once."""
    run = make_run(
        root / "model",
        root / "text.jsonl",
        gpus=2,
        parallel="ddp",
        lora=Lora(r=4),
        levers=Levers(optimizer="sgd"),
        schedule=Schedule(max_steps=STEPS, learning_rate=0.5, save_steps=2, warmup_ratio=0.0, max_grad_norm=0.5),
        data=DataSpec(path=str(root / "text.jsonl"), kind="text", eval_fraction=0.175),  # 21 rows: an odd number
    )
    return replace(run, **changes)


@pytest.fixture(scope="module")
def alone(root: Path) -> Path:
    """The same steps by one process: twice the accumulation."""
    torch.set_num_threads(1)
    tune(spec(root, gpus=1, parallel="none", accumulation=4), root / "alone")
    return root / "alone"


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """go(run, scenario) launches the run with tests/rank_child.py as the training child; `go.events` are what came."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stock = child._several_command

    def command(run: RunSpec, run_dir: Path, resume: bool) -> list[str]:
        words = stock(run, run_dir, resume)
        at = words.index("vramplan.train")
        return [*words[: at - 1], str(HERE / "rank_child.py"), *words[at + 1 :]]

    monkeypatch.setattr(child, "_several_command", command)

    class Go:
        folder = tmp_path / "run"

        def __init__(self) -> None:
            self.events: list[dict[str, Any]] = []

        def __call__(self, run: RunSpec, scenario: str) -> Outcome:
            monkeypatch.setenv("SCENARIO", scenario)
            prepare_run_dir(self.folder, run, None, resume=False)
            return launch(self.folder, on_event=self.events.append)

    return Go()


def losses(run_dir: Path) -> list[float]:
    """Of each step the last time it was done."""
    return list({e["step"]: e["loss"] for e in events(run_dir, "step")}.values())


def adapter(run_dir: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def assert_same_run(run_dir: Path, alone: Path) -> None:
    """The same losses, held-out losses and adapter, to floating-point noise (bf16 autocast, another order of sums)."""
    assert losses(run_dir) == pytest.approx(losses(alone), abs=5e-3)
    assert [e["loss"] for e in events(run_dir, "eval")] == pytest.approx(
        [e["loss"] for e in events(alone, "eval")], abs=5e-3
    )
    assert measurement(run_dir).tokens == measurement(alone).tokens
    one, two = adapter(alone), adapter(run_dir)
    assert one.keys() == two.keys()
    moved = max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name)  # they begin at zero
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0.05, atol=0.02 * moved)


# ---------------------------------------------------------------------------------------------------------- ddp
def test_two_ranks_take_the_step_of_one_though_one_redoes_its_micro_batches(root: Path, alone: Path, go: Any) -> None:
    outcome = go(spec(root), "halves")
    assert (outcome.exit_code, outcome.ended) == (0, "finished"), outcome
    assert events(go.folder, "start")[0]["effective_batch_size"] == 8
    assert_same_run(go.folder, alone)
    assert outcome.measurement.gpus == 2
    assert not (go.folder / "lock").exists()
    assert {"log.rank1.txt", "progress.rank1.jsonl"} <= {path.name for path in go.folder.iterdir()}
    assert len(list((go.folder / "checkpoints" / f"checkpoint-{STEPS}").glob("rng_state_*.pth"))) == 2


def test_a_rank_without_memory_ends_both(root: Path, go: Any) -> None:
    run = spec(root, data=DataSpec(path=str(root / "text.jsonl")))
    outcome = go(run, "no_memory")
    assert (outcome.exit_code, outcome.ended) == (4, "oom"), outcome
    assert outcome.message == "rank 1: CUDA out of memory. Tried to allocate 2.00 GiB."
    ends = {rank: [e for e in read(go.folder / name) if e["event"] == "end"][-1] for rank, name in FILES.items()}
    assert {end["exit_code"] for end in ends.values()} == {4}
    assert abs(ends[0]["t"] - ends[1]["t"]) < 5
    assert measurement(go.folder).ended == "oom"
    evidence = read_run_evidence(go.folder)
    assert evidence is not None and evidence.requested_bytes == 2 * 2**30
    assert "rank_child.py" in evidence.frames[-1]  # the traceback of the rank that failed


FILES = {0: "progress.jsonl", 1: "progress.rank1.jsonl"}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rank_that_is_killed_is_named(root: Path, go: Any) -> None:
    outcome = go(spec(root, data=DataSpec(path=str(root / "text.jsonl"))), "killed")
    assert (outcome.exit_code, outcome.ended) == (1, "error"), outcome
    assert "the process of GPU 1 was ended by the kernel (SIGKILL)" in outcome.message


def test_an_interrupted_run_is_saved_by_all_and_resumed_to_the_same_end(
    root: Path, alone: Path, go: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while not ((go.folder / "progress.jsonl").exists() and events(go.folder, "step")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    other = threading.Thread(target=interrupt)
    other.start()
    outcome = go(spec(root), "slow")
    other.join()
    assert (outcome.exit_code, outcome.ended) == (130, "interrupted"), outcome
    saved = measurement(go.folder).steps
    assert 0 < saved < STEPS
    assert (go.folder / "checkpoints" / f"checkpoint-{saved}").is_dir()
    with pytest.raises(InputError, match="started with another gpus"):
        prepare_run_dir(go.folder, spec(root, gpus=4), None, resume=True)

    prepare_run_dir(go.folder, spec(root), None, resume=True)
    outcome = launch(go.folder, resume=True)
    assert (outcome.exit_code, outcome.ended) == (0, "finished"), outcome
    assert events(go.folder, "start")[-1]["resumed_from"] == saved
    assert_same_run(go.folder, alone)


# --------------------------------------------------------------------------------------------------------- fsdp
def test_sharded_ranks_start_again_with_smaller_micro_batches(root: Path, alone: Path, go: Any) -> None:
    outcome = go(spec(root, parallel="fsdp"), "no_memory_for_two")
    assert (outcome.exit_code, outcome.ended) == (0, "finished"), outcome
    (restart,) = [event for event in go.events if event["event"] == "restart"]
    assert restart in read(go.folder / "progress.jsonl")
    assert (restart["micro_batch_size"], restart["accumulation"]) == (1, 4)
    assert "rank 1: CUDA out of memory" in restart["message"]
    run = records.read_json(go.folder / "run.json", RunSpec)
    assert (run.micro_batch_size, run.accumulation) == (1, 4)
    assert [e["resumed_from"] for e in events(go.folder, "start")] == [0, 2]
    assert_same_run(go.folder, alone)
    whole, part = ({line.key: line.bytes for line in measurement(each).lines} for each in (alone, go.folder))
    for key in ("weights.nf4", "weights.embeddings", "weights.lm_head"):
        assert part[key] * 2 == whole[key]
    assert part["weights.constants"] == whole["weights.constants"]


@pytest.mark.cuda
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_cards_measure_what_was_predicted_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], parallel: str
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("fewer than two CUDA devices")
    from vramplan.cli import run as run_cli

    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "long.jsonl", ["the cat sat on a mat " * 40 + str(i) for i in range(64)])
    flags = [
        "--gpus",
        "2",
        "--parallel",
        parallel,
        "--seq-len",
        "512",
        "--batch-size",
        "2",
        "--max-steps",
        "4",
        "--json",
    ]
    words = ["train", "tinyllama-1.1b", "--random-weights", "--data", "long.jsonl", "-o", "run", *flags]
    assert run_cli(words) == 0, (tmp_path / "run" / "log.txt").read_text()[-3000:]
    payload = json.loads(capsys.readouterr().out)
    moments = {pair["key"]: pair for pair in payload["comparison"]["moments"]}
    for key in ("resident.loaded", "resident.prepared", "resident.with_lora", "peak.allocated"):
        assert abs(moments[key]["difference"]) < 0.02, moments[key]
    assert len(payload["measurement"]["rank_peak_bytes"]) == 2
    whole = {line["key"]: line["bytes"] for line in payload["predicted"]["lines"]}["weights.nf4"]
    counted = {line["key"]: line["bytes"] for line in payload["measurement"]["lines"]}["weights.nf4"]
    assert counted == whole


CASES = {
    "checkpointed": {},
    "not checkpointed": {"checkpointing": "none"},
    "reentrant": {"reentrant": True},
    "full loss, all float32": {"loss": "full", "upcast": "all"},
    "tied": {"tie_word_embeddings": True},
    "odd sizes": {"hidden_size": 36, "intermediate_size": 37, "num_attention_heads": 3, "num_key_value_heads": 1,
                  "vocab_size": 513},
    "random weights": {"random_weights": True},
    "experts": {"cls": "MixtralForCausalLM", "num_local_experts": 3, "num_experts_per_tok": 2},
    "not quantised": {"cls": "FalconForCausalLM", "tie_word_embeddings": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def compared(root: Path) -> dict[str, dict[str, Any]]:
    """Loss and gradients of a sharded model beside those of a whole one, for each case: tests/rank_fsdp.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CASES": json.dumps(CASES)}
    env = {**os.environ, **settings}
    script = [str(HERE / "rank_fsdp.py"), str(root)]
    done = subprocess.run([*command, *script], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "compared.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_model_computes_what_a_whole_one_does(compared: dict[str, dict[str, Any]], case: str) -> None:
    result = compared[case]
    assert result["loss"] == result["loss of the whole"]
    assert result["checkpointed"] == (case != "not checkpointed")
    assert result["largest gradient"] > 1e-4
    assert result["largest difference"] == 0.0
    assert result["bytes"] == result["planned bytes"]
    layer, most = result["gathered layer"], result["gathered at most"]
    assert most["forward"] == 3 * layer  # as core/gathering.py plays it
    assert 2 * layer <= most["backward"] <= 3 * layer  # two; gloo's own thread may hold a buffer for longer
