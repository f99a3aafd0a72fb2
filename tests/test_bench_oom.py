"""The bench of out-of-memory runs, without a card: its cases are what they say, its scripts run, its rows are whole."""

from __future__ import annotations

import json
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import bench_oom
import pytest
from oom_cases import Case, Job, Sides, cases, lean, sides, stock

from vramplan.cli.diagnose import diagnosed
from vramplan.core import architecture as arch
from vramplan.core.loading import warmup_bytes
from vramplan.core.types import Diagnosis, GpuProfile
from vramplan.core.units import GIB, MIB
from vramplan.sources.oom_text import parse
from vramplan.sources.profiles import load_gpu

ALL = {case.name: case for case in cases()}
# Of each cause one; `bench_oom.py --list` computes the caps of all.
FIRST = sorted({case.cause: case.name for case in reversed(ALL.values())}.values())
TRAIN = ("tests/train.py", "main"), ("transformers/trainer.py", "train"), ("transformers/trainer.py", "training_step")
LAYER = (("transformers/models/llama/modeling_llama.py", "forward"), ("transformers/modeling_layers.py", "__call__"))
CHECKPOINT = (("torch/utils/checkpoint.py", "checkpoint"),)
CALLED = (("torch/nn/modules/module.py", "_call_impl"),)
PHASES: dict[str, tuple[tuple[str, str], ...]] = {
    "loss": (("transformers/loss/loss_utils.py", "ForCausalLMLoss"),),
    "layer": (*LAYER, *CALLED, ("peft/tuners/lora/bnb.py", "forward")),
    "checkpointed": (*LAYER, *CHECKPOINT, *CALLED, ("peft/tuners/lora/bnb.py", "forward")),
    "eager": (*LAYER, *CHECKPOINT, ("transformers/models/llama/modeling_llama.py", "eager_attention_forward")),
    "backward": (("torch/autograd/graph.py", "_engine_run_backward"),),
    "optimizer": (("torch/optim/adamw.py", "_init_group"),),
    "load": (("transformers/modeling_utils.py", "from_pretrained"),
             ("transformers/modeling_utils.py", "caching_allocator_warmup")),
    "prepare": (("peft/utils/other.py", "prepare_model_for_kbit_training"),),
    "evaluation": (("transformers/trainer.py", "evaluation_loop"),
                   ("transformers/loss/loss_utils.py", "ForCausalLMLoss")),
    "matmul": (*LAYER, *CHECKPOINT, ("bitsandbytes/nn/modules.py", "forward"),
               ("bitsandbytes/autograd/_functions.py", "forward")),
    "merge": (("peft/tuners/tuners_utils.py", "merge_and_unload"), ("peft/tuners/lora/bnb.py", "merge")),
}  # fmt: skip


@cache
def h200() -> GpuProfile:
    return load_gpu("h200")


@cache
def between(name: str) -> Sides:
    """The case's sides; where only playing tells the upper one, half as much again."""
    found = sides(ALL[name], h200())
    return found if found.high_bytes else replace(found, high_bytes=int(1.5 * found.low_bytes))


def said(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"


def log(frames: str, asked: int, cap: int | None, *, idle: int = 40 * MIB, held: int | None = None,
        process: int | None = None) -> str:  # fmt: skip
    """What a script prints that asks for too much in those frames, as torch 2.11 words it."""
    total = h200().total_bytes
    allocated = held if held is not None else max((cap or total // 2) - asked // 2 - idle, 0)
    own = process or allocated + idle + 700 * MIB
    lines = [f'  File "/x/{file}", line 1, in {name}' for file, name in (*TRAIN, *PHASES[frames])]
    text = (
        f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {said(asked)}. GPU 0 has a total capacity of "
        f"{said(total)} of which {said(0 if process else total - own)} is free. Including non-PyTorch memory, this "
        f"process has {said(own)} memory in use. " + (f"{said(cap)} allowed; " if cap else "") + "Of the allocated "
        f"memory {said(allocated)} is allocated by PyTorch, and {said(idle)} is reserved by PyTorch but unallocated. "
        "If reserved but unallocated memory is large try setting ..."
    )
    return "\n".join(["Traceback (most recent call last):", *lines, text])


def synthetic(case: Case) -> str:
    """The log that the case's failure would leave."""
    cap, spec, run = between(case.name).cap(case.share), case.spec, case.run
    tokens, vocab, hidden = run.micro_batch_size * run.seq_len, spec.vocab_size, spec.hidden_size
    head, widest = vocab * hidden, max(x.in_features * x.out_features for x in arch.layer_linears(spec))
    activation = round(4 * tokens * spec.intermediate_size)
    match case.cause:
        case "logits":
            return log("loss", 4 * tokens * vocab, cap)
        case "checkpointing" | "inactive":
            return log("layer", activation, cap)
        case "eager_attention":
            return log("eager", 4 * run.micro_batch_size * spec.num_heads * run.seq_len**2, cap)
        case "long_sample":
            return log("loss", 4 * case.twist["long"] * vocab, cap)
        case "fragmentation":
            return log("checkpointed", activation, cap, idle=cap // 4)
        case "other_process":
            return log("backward", activation, None, held=cap, process=cap + 800 * MIB)
        case "evaluation":
            return log("evaluation", 4 * case.twist["eval_batch"] * run.seq_len * vocab, cap)
        case "optimizer":
            return log("optimizer", 4 * run.lora.r * spec.intermediate_size, cap)
        case "loaded_twice":
            return log("load", warmup_bytes(spec), cap, held=warmup_bytes(spec))
        case "whole_weights":
            return log(
                "load", (4 if case.twist["dtype"] == "float32" else 2) * arch.total_parameters(spec), cap, held=0
            )
        case "float32_base":
            return log("load", warmup_bytes(spec, 4), cap, held=0)
        case "upcast":
            return log("prepare", 4 * head, cap)
        case "batch" | "sequence":
            return log("backward", 2 * tokens * spec.intermediate_size, cap)
        case "larger_than_card":
            return log("loss", 400 * GIB, None, held=3 * GIB)
        case "too_large":
            return log("load", 2 * widest, cap)
        case "float32_compute":
            return log("matmul", 4 * widest, cap)
        case "trainable_head":
            return log("optimizer", 4 * head, cap)
        case "saving":
            return log("merge", 4 * widest, cap)
    raise AssertionError(case.cause)


def diagnosis(name: str, root: Path) -> Diagnosis:
    evidence = parse(synthetic(ALL[name]))
    assert evidence is not None
    return diagnosed(evidence, ALL[name].placed(root).run, h200())


# ------------------------------------------------------------------------------------------------------------ the cases
def test_there_are_enough_of_each() -> None:
    assert len(ALL) == len(cases()) >= 72  # names are unique
    assert {case.cause for case in cases()[:20]} == {case.cause for case in cases()}  # a cut bench has seen all causes
    assert {case.script for case in ALL.values()} == {"trainer", "loop", "vramplan"}


@pytest.mark.parametrize("name", [name for name in FIRST if ALL[name].rule != "no_cap"])
def test_a_cap_lies_between_the_run_without_its_cause_and_with_it(name: str) -> None:
    found, case = between(name), ALL[name]
    cap = found.cap(case.share)
    assert found.apart and found.low_bytes < cap < (found.high_bytes or 0)
    assert cap < 32 * GIB


def test_a_case_whose_sides_meet_is_not_played() -> None:
    assert not Sides(1000, 1010).apart and Sides(1000, None).apart


@pytest.mark.parametrize("name", FIRST)
def test_each_cause_is_told_from_the_log_that_it_leaves(name: str, tmp_path: Path) -> None:
    case, found = ALL[name], diagnosis(name, tmp_path)
    assert found.cause_keys[0] in case.expected
    words, job = bench_oom.remedy(case, found, 8 * GIB, h200(), tmp_path)
    assert words and job is not None
    if case.twist and "lengths" not in case.twist:  # the fault of the script is gone
        assert not set(job.twist) & set(case.twist) - {"eval_batch"}


def test_a_fault_of_the_script_that_is_not_found_is_not_remedied(tmp_path: Path) -> None:
    case = replace(ALL["long_sample/1-llama-3.2-1b"], expected=("another",))
    assert bench_oom.remedy(case, diagnosis(case.name, tmp_path), 8 * GIB, h200(), tmp_path)[1] is None


# ---------------------------------------------------------------------------------------------------------- the scripts
TINY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu"}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    pytest.importorskip("bitsandbytes")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "job").mkdir()
    return tmp_path


def ended(tiny: Path, run: Any, script: str, twist: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    import oom_child

    job = Job(replace(run, model=str(tiny / "model")), script, tiny / "job", None, twist, "cpu")
    return oom_child.play(job), json.loads((tiny / "job" / "result.json").read_text())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("run", "script", "twist"),
    [(stock(1, 16), "trainer", {"eval_batch": 2, "keep_logits": 2}),
     (stock(1, 32, driver="loop", upcast="none"), "loop", {"lengths": [8, 16, 32], "keep": 8, "merge": True}),
     (stock(2, 32, driver="loop"), "loop", {"long": 64, "modules_to_save": ["lm_head"]}),
     (lean(2, 32), "vramplan", {})],
)  # fmt: skip
def test_scripts_run(tiny: Path, run: Any, script: str, twist: dict[str, Any], capsys: Any) -> None:
    code, row = ended(tiny, run, script, twist)
    assert (code, row["ended"]) == (0, "ok"), capsys.readouterr().err


@pytest.mark.usefixtures("one_thread")
def test_a_checkpoint_of_zeros_is_loaded(tiny: Path) -> None:
    import oom_child

    oom_child.checkpoint_of_zeros(tiny / "model")
    twist = {"dtype": "float32", "quantised": False, "twice": True}
    assert ended(tiny, stock(1, 16, driver="loop", upcast="none"), "loop", twist)[0] == 0


@pytest.mark.usefixtures("one_thread")
def test_a_script_that_fails_leaves_its_traceback(tiny: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError(log("loss", 300 * MIB, 2 * GIB).rpartition("Error: ")[2])

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", full)
    code, row = ended(tiny, stock(1, 32), "trainer", {})
    assert (code, row["ended"]) == (3, "oom")
    evidence = parse(capsys.readouterr().err)
    assert evidence is not None and (evidence.requested_bytes, evidence.allowed_bytes) == (300 * MIB, 2 * GIB)
    assert any("loss_utils.py" in frame for frame in evidence.frames)
    assert any("with_trainer" in frame for frame in evidence.frames)


# ------------------------------------------------------------------------------------------------------------- the rows
def test_rows_are_whole_and_are_not_played_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Case by case through the bench with processes that are not there: the log is the synthetic one."""

    def played(job: Job) -> dict[str, Any]:
        job.folder.mkdir(parents=True, exist_ok=True)
        name = next((n for n in names if ALL[n].model in job.run.model and "provoked" in job.folder.name), None)
        (job.folder / "log.txt").write_text(synthetic(ALL[name]) if name else "")
        return {"ended": "oom" if name else "ok", "peak_bytes": 1, "cap_bytes": job.cap_bytes}

    names = ["logits/5-qwen2.5-3b", "checkpointing/2-mistral-7b-v0.1", "optimizer/2-tinyllama-1.1b"]
    monkeypatch.setattr(bench_oom, "played", played)
    file, pool = tmp_path / "rows.jsonl", ThreadPoolExecutor(1)
    options = Namespace(write=file, until=1e9)
    bench = bench_oom.Bench(options, h200(), pool, tmp_path)  # type: ignore[arg-type]
    bench.run(bench_oom.chosen(names, set()))
    rows = bench_oom.rows_in(file)
    assert sorted(row["name"] for row in rows) == sorted(names)
    for row in rows:
        assert row["right"] and row["passes"] and row["rerun"]["ended"] == "ok"
        assert row["run"].startswith("vramplan train ") and "Tried to allocate" in row["evidence"]
        assert set(row["versions"]) == {"torch", "transformers", "bitsandbytes", "peft", "accelerate"} and row["gpu"]
        assert row["low_bytes"] < row["cap_bytes"] < row["high_bytes"]
    assert not bench_oom.chosen(names, bench_oom.finished(rows))
    assert len(bench_oom.chosen(names, bench_oom.finished([rows[0] | {"ended": "error"}, *rows[1:]]))) == 1
    rows[0] |= {"right": False, "passes": False}
    rows.append(rows[1] | {"name": "logits/0", "ended": "ok", "diagnosis": None})
    text = bench_oom.summary(rows)
    assert "all                    3      2 (67%)     2 (67%)" in text
    assert "not counted: logits/0" in text and f"wrong cause: {rows[0]['name']}" in text


def test_rows_do_not_say_where_things_lie(tmp_path: Path) -> None:
    import click

    text = f'File "{click.__file__}", line 1\n--model {tmp_path}/tiny-2 --data FILE'
    assert bench_oom.placeless(text, tmp_path) == 'File "click/__init__.py", line 1\n--model tiny-2 --data FILE'
