"""Causes with their numbers, fixes with their price, and the command line around them."""

# ruff: noqa: E501 -- quoted texts
from __future__ import annotations

import io
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import make_gpu, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from vramplan.cli import build, run
from vramplan.cli.train import command as train_command
from vramplan.core.causes import phase_of
from vramplan.core.diagnose import diagnose
from vramplan.core.fixes import command, split
from vramplan.core.ledger import estimate
from vramplan.core.recipes import RECIPES
from vramplan.core.run_causes import same_size
from vramplan.core.types import (
    ATTENTIONS,
    LOSSES,
    OPTIMIZERS,
    UPCASTS,
    DataSpec,
    Diagnosis,
    Fix,
    GpuProcess,
    Levers,
    Lora,
    OomEvidence,
    RunSpec,
    Schedule,
    Unplannable,
)
from vramplan.core.units import GIB, MIB
from vramplan.sources import records
from vramplan.sources.hf_config import load_model
from vramplan.sources.oom_text import parse

TINY = load_model("tinyllama-1.1b")
PEFT = RunSpec(model="tinyllama-1.1b", micro_batch_size=4, recipe="peft", levers=RECIPES["peft"])
CARD = make_gpu()


def card(size: int, **changes: Any) -> Any:
    return make_gpu(usable=size, **changes)


def report(asked: float = 2 * GIB, **fields: Any) -> OomEvidence:
    """A full card of 24 GiB."""
    values: dict[str, Any] = {
        "requested_bytes": round(asked), "total_bytes": 24 * GIB, "free_bytes": 10 * MIB,
        "process_bytes": 24 * GIB - 10 * MIB, "allocated_bytes": 23 * GIB, "reserved_unallocated_bytes": 200 * MIB,
    }  # fmt: skip
    return OomEvidence(message="CUDA out of memory.", **(values | fields))


def first(diagnosis: Diagnosis) -> tuple[str, str]:
    return diagnosis.cause_keys[0], diagnosis.causes[0]


# ------------------------------------------------------------------------------------------- causes, text alone
def test_fragmentation() -> None:
    key, text = first(diagnose(report(2.87 * GIB, allocated_bytes=9 * GIB, reserved_unallocated_bytes=5 * GIB)))
    assert key == "fragmentation" and "5.00 GiB" in text and "2.87 GiB" in text and "expandable_segments" in text


def test_a_full_card_with_a_little_idle_memory_is_full_not_fragmented() -> None:
    diagnosis = diagnose(report(20 * MIB, reserved_unallocated_bytes=121 * MIB))
    assert diagnosis.cause_keys == ("full", "fragmentation")
    assert "96%" in diagnosis.causes[0] and "step of the allocator" in diagnosis.causes[0]


def test_another_process() -> None:
    others = (GpuProcess(pid=4242, used_bytes=18 * GIB), GpuProcess(pid=1))
    key, text = first(diagnose(report(process_bytes=5 * GIB, allocated_bytes=4 * GIB, others=others)))
    assert key == "other_process" and "process 4242 (18.00 GiB)" in text


def test_memory_that_no_listed_process_holds() -> None:
    key, text = first(diagnose(report(process_bytes=5 * GIB, allocated_bytes=4 * GIB)))
    assert key == "other_process" and "18.99 GiB" in text and "does not list" in text


@pytest.mark.parametrize(("used", "allocated"), [(79.29, 69.59), (23.9, 23.0)])
def test_in_a_container_our_own_process_is_listed_as_another(used: float, allocated: float) -> None:
    own = (GpuProcess(pid=37008, used_bytes=round(used * GIB)),)
    diagnosis = diagnose(report(process_bytes=None, total_bytes=round((used + 0.04) * GIB), free_bytes=16 * MIB,
                                allocated_bytes=round(allocated * GIB), others=own))  # fmt: skip
    assert "other_process" not in diagnosis.cause_keys


def test_a_cap() -> None:
    key, text = first(diagnose(report(allowed_bytes=8 * GIB, allocated_bytes=7 * GIB, process_bytes=8 * GIB,
                                      free_bytes=16 * GIB)))  # fmt: skip
    assert key == "cap" and "8.00 GiB" in text and "16.00 GiB" in text


def test_larger_than_the_card() -> None:
    key, text = first(diagnose(report(400 * GIB)))
    assert key == "larger_than_card" and "400.00 GiB" in text


def test_spill_and_refusal() -> None:
    assert "spill" in diagnose(report(20 * MIB, allocated_bytes=30 * GIB, process_bytes=None)).cause_keys
    refused = report(432 * MIB, free_bytes=7 * GIB, process_bytes=17 * GIB, allocated_bytes=16 * GIB)
    assert first(diagnose(refused))[0] == "refused"


@pytest.mark.parametrize("sign", ["checkpointing_inactive", "float32_compute"])
def test_signs(sign: str) -> None:
    expected = {"checkpointing_inactive": "checkpointing"}.get(sign, sign)
    assert first(diagnose(report(signs=(sign,))))[0] == expected


@pytest.mark.parametrize(
    ("frame", "cause"),
    [
        ("loss/loss_utils.py:37 fixed_cross_entropy", "logits"),
        ("llama/modeling_llama.py:190 eager_attention_forward", "eager_attention"),
        ("peft/utils/other.py:151 prepare_model_for_kbit_training", "upcast"),
        ("transformers/modeling_utils.py:4100 from_pretrained", "loading"),
        ("transformers/trainer.py:4500 evaluation_loop", "evaluation"),
        ("peft/peft_model.py:300 save_pretrained", "saving"),
        ("bitsandbytes/optim/optimizer.py:287 step", "optimizer"),
    ],
)
def test_where_it_failed(frame: str, cause: str) -> None:
    frames = ("a/train.py:1 <module>", frame, "torch/nn/functional.py:1 softmax")
    assert first(diagnose(report(frames=frames)))[0] == cause


def test_a_layer_played_again_is_in_the_backward() -> None:
    frames = ("torch/autograd/graph.py:1 _engine_run_backward", "llama/modeling_llama.py:1 forward")
    assert phase_of(frames) == "backward"
    assert phase_of(frames[1:]) == "forward"
    assert phase_of(()) is None


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("Error out of memory at line 380 in file /b/csrc/pythonInterface.c", "outside_pytorch"),
        ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling", "outside_pytorch"),
        ("failed (exitcode: -9) local_rank: 0", "host_memory"),
    ],
)
def test_reports_without_numbers(text: str, cause: str) -> None:
    evidence = parse(text)
    assert evidence is not None
    diagnosis = diagnose(evidence)
    assert first(diagnosis)[0] == cause and diagnosis.more


def test_there_is_always_a_cause_and_what_would_help() -> None:
    diagnosis = diagnose(OomEvidence(message="CUDA out of memory."))
    assert diagnosis.causes and diagnosis.fixes == ()
    assert any("--run" in text for text in diagnosis.more)


# -------------------------------------------------------------------------------------------- causes with the run
def with_levers(**changes: Any) -> RunSpec:
    return replace(PEFT, levers=replace(PEFT.levers, **changes))


def test_checkpointing_off_on_a_real_message() -> None:
    """TinyLlama without checkpointing, 4 x 2048, under a cap of 8 GiB: torch 2.11's own words."""
    evidence = parse(
        "CUDA out of memory. Tried to allocate 176.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 131.13 GiB is "
        "free. Including non-PyTorch memory, this process has 8.66 GiB memory in use. 8.00 GiB allowed; Of the allocated "
        "memory 7.83 GiB is allocated by PyTorch, and 165.78 MiB is reserved by PyTorch but unallocated."
    )
    assert evidence is not None
    diagnosis = diagnose(evidence, TINY, with_levers(checkpointing="none"))
    key, text = first(diagnosis)
    assert key == "checkpointing" and "[8192 x 5632] of float32" in text
    assert diagnosis.fixes[0].title == "every layer checkpointed" and diagnosis.fixes[0].fits


def test_the_logits_by_the_size_asked_for() -> None:
    key, text = first(
        diagnose(report(1000 * MIB, total_bytes=6 * GIB, allocated_bytes=5 * GIB), TINY, PEFT, card(6 * GIB))
    )
    assert key == "logits" and "[8192 x 32000] of float32" in text


def test_eager_scores_by_the_size_asked_for() -> None:
    run = with_levers(attention="eager")
    key, text = first(diagnose(report(2 * GIB, total_bytes=8 * GIB, allocated_bytes=6 * GIB), TINY, run, card(8 * GIB)))
    assert key == "eager_attention" and "4 x 32 x 2048 x 2048" in text


def test_the_plan_was_right_the_card_was_not_free() -> None:
    need = estimate(TINY, PEFT, CARD).peak.device_bytes
    others = (GpuProcess(pid=7, used_bytes=CARD.usable_bytes - need + GIB),)
    diagnosis = diagnose(
        report(GIB, process_bytes=need - GIB, allocated_bytes=4 * GIB, others=others), TINY, PEFT, CARD
    )
    assert first(diagnosis)[0] == "other_process" and "plan was right" in diagnosis.causes[0]
    best = diagnosis.fixes[0]
    assert best.run == PEFT and best.fits and best.saves_bytes == 0


def test_a_run_that_is_not_as_described() -> None:
    """More is held than the described run ever takes: a longer sample, or checkpointing that does nothing."""
    key, text = first(diagnose(report(GIB / 2, allocated_bytes=4 * GIB), TINY, replace(PEFT, seq_len=512), CARD))
    assert key == "not_as_described" and "a sample of about" in text


def test_simply_too_large() -> None:
    run = RunSpec(model="tinyllama-1.1b")
    diagnosis = diagnose(report(90 * MIB, total_bytes=GIB, process_bytes=GIB, free_bytes=0), TINY, run, card(GIB))
    assert first(diagnosis)[0] == "too_large" and not any(fix.fits for fix in diagnosis.fixes)


def test_a_dead_host_gets_no_gpu_fixes() -> None:
    evidence = OomEvidence(message="Killed", kind="host")
    assert diagnose(evidence, TINY, PEFT, CARD).fixes == ()


@pytest.mark.parametrize("size", [513, 700 * 1024, 3 * MIB, 30 * MIB + 1, 1000 * MIB, 5 * GIB + 12345])
def test_a_tensor_is_known_by_its_size_as_torch_prints_it(size: int) -> None:
    unit = GIB if size >= GIB else MIB if size >= MIB else 1024
    printed = round(float(f"{-(-size // (2 * MIB)) * 2 * MIB / unit:.2f}") * unit)
    if size > 20 * MIB:
        assert same_size(size, printed)
    assert not same_size(size, printed + 40 * MIB)


# ---------------------------------------------------------------------------------------------------------- fixes
@pytest.fixture(scope="module")
def priced() -> Diagnosis:
    return diagnose(
        report(total_bytes=7 * GIB), TINY, with_levers(checkpointing="every-2", attention="eager"), card(7 * GIB)
    )


def test_fixes_are_priced_in_full_and_ranked(priced: Diagnosis) -> None:
    titles = [fix.title for fix in priced.fixes]
    for word in (
        "expandable",
        "bf16",
        "checkpointed",
        "paged_adamw_8bit",
        "micro-batch 1 x accum",
        "sdpa",
    ):
        assert any(word in title for title in titles), word
    for fix in priced.fixes:
        ledger = estimate(TINY, fix.run, card(7 * GIB))
        assert fix.device_bytes == ledger.peak.device_bytes
        assert fix.saves_bytes == (priced.predicted_bytes or 0) - fix.device_bytes
        assert fix.fits == (fix.device_bytes <= (priced.budget_bytes or 0))
        assert fix.changes_training == ((fix.run.seq_len, fix.run.lora) != (2048, PEFT.lora))
        assert fix.run.micro_batch_size * fix.run.accumulation == 4
        assert fix.command == command(fix.run)
    keys = [(fix.changes_training, not fix.fits) for fix in priced.fixes]
    assert keys == sorted(keys)


def test_where_one_change_is_not_enough_several_are_combined() -> None:
    """A budget between the leanest run and the best single change."""
    alone = diagnose(report(), TINY, PEFT, card(3 * GIB))
    singles = [fix for fix in alone.fixes if " + " not in fix.title and not fix.changes_training]
    lean = estimate(TINY, replace(PEFT, micro_batch_size=1, accumulation=4, levers=Levers())).peak.device_bytes
    budget = (min(fix.device_bytes for fix in singles) + lean) // 2
    best = diagnose(report(total_bytes=budget, process_bytes=budget, free_bytes=0), TINY, PEFT, card(budget)).fixes[0]
    assert " + " in best.title and best.fits and not best.changes_training


def test_checkpoints_in_host_memory_are_offered_where_that_saves() -> None:
    moved = replace(Levers(), checkpoint_offload=True)
    for levers, title in (
        (Levers(checkpointing="all"), "checkpoints in host memory"),
        (Levers(checkpointing="none"), "every layer checkpointed to host memory"),
    ):
        run = RunSpec(model="tinyllama-1.1b", micro_batch_size=4, levers=levers)
        (fix,) = (fix for fix in diagnose(report(), TINY, run, card(8 * GIB)).fixes if fix.title == title)
        assert (fix.run, fix.changes_training) == (replace(run, levers=moved), False)
        assert fix.device_bytes == estimate(TINY, fix.run, card(8 * GIB)).peak.device_bytes
        assert fix.saves_bytes > 600 * MIB and "--checkpoint-offload" in fix.command
    few = replace(run, micro_batch_size=1, seq_len=16, levers=Levers())
    same = estimate(TINY, replace(few, levers=moved), CARD).peak.device_bytes
    assert same == estimate(TINY, few, CARD).peak.device_bytes  # the checkpoints of 16 tokens are not what fills it
    for helpless in (few, replace(run, levers=moved)):
        assert not any("host memory" in fix.title for fix in diagnose(report(), TINY, helpless, CARD).fixes)


@pytest.mark.parametrize("checkpointing", ["none", "every-2", "all"])
def test_what_only_host_memory_makes_fit_fits_unchanged(checkpointing: str) -> None:
    """Two rows of 2048 tokens cannot be split into less than one: the budget is between its checkpoints here and there."""
    run = RunSpec(model="tinyllama-1.1b", micro_batch_size=2, levers=Levers(checkpointing=checkpointing))
    single = replace(run, micro_batch_size=1, accumulation=2, levers=Levers())
    needs = [estimate(TINY, replace(single, levers=Levers(checkpoint_offload=there))).peak.device_bytes
             for there in (False, True)]  # fmt: skip
    budget = sum(needs) // 2
    diagnosis = diagnose(report(total_bytes=budget, process_bytes=budget, free_bytes=0), TINY, run, card(budget))
    best = diagnosis.fixes[0]
    assert best.fits and not best.changes_training and "host memory" in best.title
    assert best.run == replace(single, levers=Levers(checkpoint_offload=True))
    titles = best.title.split(" + ")
    assert len(titles) == (3 if checkpointing == "every-2" else 2)  # none that changes nothing any more


def test_the_first_fix_removes_the_first_cause_where_it_fits() -> None:
    need = estimate(TINY, PEFT, CARD).peak.device_bytes
    evidence = report(1000 * MIB, total_bytes=need - 200 * MIB, process_bytes=None, allocated_bytes=need - GIB)
    diagnosis = diagnose(evidence, TINY, PEFT, card(need - 200 * MIB))
    assert diagnosis.cause_keys[0] == "logits" and diagnosis.fixes[1].title.startswith("fused loss")
    assert diagnosis.fixes[0].run.recipe == "lean"  # that too, and faster
    assert any(fix.fits and "bf16" in fix.title for fix in diagnosis.fixes[1:])  # cheaper in speed, not the cause


def test_without_a_card_the_largest_saving_comes_first() -> None:
    diagnosis = diagnose(OomEvidence(message="x"), TINY, PEFT)
    same = [fix for fix in diagnosis.fixes if not fix.changes_training]
    assert all(fix.fits is None for fix in diagnosis.fixes) and diagnosis.budget_bytes is None
    assert [fix.saves_bytes for fix in same] == sorted((fix.saves_bytes for fix in same), reverse=True)
    assert diagnosis.fixes[-1].changes_training


LEAN_TITLE = "the lean recipe (fused layers and loss, nothing upcast)"


def recipe_fix(run: RunSpec) -> tuple[int, Fix] | None:
    fixes = diagnose(report(), TINY, run, CARD).fixes
    return next(((n, fix) for n, fix in enumerate(fixes) if "fused layers" in fix.title), None)


def test_a_stock_run_is_offered_the_lean_recipe() -> None:
    found = recipe_fix(replace(PEFT, levers=replace(PEFT.levers, checkpointing="every-2", attention="eager")))
    assert found is not None and found[1].title == LEAN_TITLE and not found[1].changes_training
    assert found[1].run == replace(PEFT, recipe="lean", levers=Levers(checkpointing="every-2"))
    assert "--recipe" not in found[1].command and "--checkpointing every-2" in found[1].command
    alone = diagnose(report(), TINY, PEFT).fixes  # without a card the largest saving of levers is the first
    alone = tuple(fix for fix in alone if fix.saves_bytes)  # not the run as it was described
    levers = [fix for fix in alone if fix.run.micro_batch_size == PEFT.micro_batch_size and not fix.changes_training]
    assert levers[0].title == LEAN_TITLE and levers[0].saves_bytes > levers[1].saves_bytes


def test_a_run_that_lacks_only_fused_layers_is_offered_those() -> None:
    found = recipe_fix(replace(PEFT, recipe="lean", levers=Levers(kernels="stock")))
    assert found is not None and found[1].title == "fused layers" and found[1].run.levers == Levers()


@pytest.mark.parametrize(
    "run",
    [
        replace(PEFT, recipe="lean", levers=Levers()),
        replace(PEFT, lora=Lora(dropout=0.1)),  # what has no fused form
        replace(PEFT, levers=replace(PEFT.levers, optimizer="adafactor")),
    ],
)
def test_where_layers_cannot_be_fused_or_are_the_recipe_is_not_offered(run: RunSpec) -> None:
    assert recipe_fix(run) is None


def test_fragmentation_alone_needs_no_other_recipe() -> None:
    ledger = estimate(TINY, PEFT, CARD)
    budget = ledger.peak.device_bytes - 64 * MIB
    evidence = report(GIB, total_bytes=budget, process_bytes=budget, free_bytes=0, allocated_bytes=4 * GIB,
                      reserved_unallocated_bytes=2 * GIB)  # fmt: skip
    diagnosis = diagnose(evidence, TINY, PEFT, card(budget))
    assert diagnosis.cause_keys[0] == "fragmentation" and diagnosis.fixes[0].title == "expandable segments"
    assert any(fix.title == LEAN_TITLE and fix.fits for fix in diagnosis.fixes)


@given(st.integers(1, 64), st.integers(1, 16))
def test_splitting_keeps_the_effective_batch(micro: int, accumulation: int) -> None:
    run = RunSpec(model="x", micro_batch_size=micro, accumulation=accumulation)
    for smaller in (d for d in range(1, micro + 1) if micro % d == 0):
        new = split(run, smaller)
        assert new.micro_batch_size == smaller and new.micro_batch_size * new.accumulation == micro * accumulation


def test_a_run_without_an_answer_is_refused() -> None:
    with pytest.raises(Unplannable):
        diagnose(report(), TINY, replace(PEFT, seq_len=10**6))


# -------------------------------------------------------------------------------------------------------- command
LEVERS = st.builds(
    Levers,
    upcast=st.sampled_from(UPCASTS),
    loss=st.sampled_from(LOSSES),
    checkpointing=st.sampled_from(["all", "every-3"]),
    checkpoint_offload=st.booleans(),
    optimizer=st.sampled_from(OPTIMIZERS),
    attention=st.sampled_from(ATTENTIONS),
    allocator=st.sampled_from(["native", "expandable"]),
)
RUNS = st.builds(
    RunSpec,
    model=st.just("tinyllama-1.1b"),
    model_path=st.sampled_from([None, "org/model", "a folder/with $signs"]),
    micro_batch_size=st.integers(1, 64),
    seq_len=st.integers(1, 2048),
    accumulation=st.integers(1, 64),
    lora=st.builds(
        Lora,
        r=st.integers(1, 256),
        alpha=st.integers(1, 256),
        targets=st.sampled_from([("all-linear",), ("q_proj",), ("q_proj", "v_proj")]),
        dropout=st.sampled_from([0.0, 0.05]),
    ),
    double_quant=st.booleans(),
    recipe=st.sampled_from(["lean", "peft"]),
    levers=LEVERS,
    padding=st.booleans(),
    trust_remote_code=st.booleans(),
    data=st.builds(DataSpec, path=st.just("org/data set"), split=st.sampled_from(["train", "train_sft"])),
    schedule=st.builds(
        Schedule,
        max_steps=st.sampled_from([None, 10]),
        learning_rate=st.sampled_from([2e-4, 1e-5]),
        lr_scheduler_kwargs=st.sampled_from([None, '{"num_cycles": 2}']),
        warmup_steps=st.sampled_from([None, 0.0, 12.0]),
        full_determinism=st.booleans(),
        report_to=st.sampled_from([(), ("all",), ("wandb", "trackio")]),
        run_name=st.sampled_from([None, "my run"]),
        load_best_model_at_end=st.booleans(),
    ),
)


@given(RUNS)
@settings(max_examples=60, deadline=None)
def test_the_command_means_the_run(spec: RunSpec) -> None:
    words = shlex.split(command(spec))
    assert words[:2] == ["vramplan", "train"]
    with train_command.make_context("train", words[2:]) as context:
        params = context.params
    parsed = replace(build.run_spec(params, TINY), data=build.data_spec(params), schedule=build.schedule(params))
    assert parsed == spec


# --------------------------------------------------------------------------------------------------- command line
LOG = (
    "step 1\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1000.00 MiB. GPU 0 has a total capacity of 6.00 "
    "GiB of which 100.00 MiB is free. Including non-PyTorch memory, this process has 5.90 GiB memory in use. Of the "
    "allocated memory 5.20 GiB is allocated by PyTorch, and 300.00 MiB is reserved by PyTorch but unallocated.\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "log.txt").write_text(LOG)
    records.write_json(tmp_path / "run.json", PEFT)
    return tmp_path


def called(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run(["diagnose", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_log_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, folder / "log.txt")
    assert code == 0 and out.startswith("Out of memory: 1000.0 MiB asked for, 100.0 MiB free.")
    assert "Why, likeliest first" in out and "--run run.json" in out


@pytest.mark.parametrize("width", [80, 120])
def test_a_run_folder(folder: Path, capsys: pytest.CaptureFixture[str], width: int) -> None:
    code, out, _ = called(capsys, folder, "--width", width)
    assert code == 0 and "logits in fp32" in " ".join(out.split()) and "what to change" in out
    commands = [line for line in out.splitlines() if line.startswith("  vramplan train")]
    assert len(commands) == 1
    assert all(len(line) <= width for line in out.splitlines() if line not in commands)


def test_the_three_ways_to_say_the_run_agree(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = folder / "log.txt"
    flags = ("--model", "tinyllama-1.1b", "--recipe", "peft", "--batch-size", 4)
    answers = [
        called(capsys, folder, "--json")[1],
        called(capsys, log, "--run", folder / "run.json", "--json")[1],
        called(capsys, log, *flags, "--json")[1],
    ]
    assert answers[0] == answers[1] == answers[2]
    diagnosis = records.decode(json.loads(answers[0]), Diagnosis)
    assert diagnosis.cause_keys[0] == "logits" and diagnosis.fixes


def test_the_card_comes_from_the_flag_or_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records.write_json(folder / "plan.json", make_plan(run=PEFT, gpu=card(9 * GIB)))

    def held_against(*words: object) -> int:
        return int(json.loads(called(capsys, folder, "--json", *words)[1])["budget_bytes"])

    assert held_against() == 9 * GIB
    assert held_against("--gpu", "rtx-4090") > 20 * GIB
    assert (
        json.loads(called(capsys, folder / "log.txt", "--run", folder / "plan.json", "--json")[1])["budget_bytes"]
        == 9 * GIB
    )


def test_stdin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LOG.encode())))
    code, out, _ = called(capsys, "-")
    assert code == 0 and "1000.0 MiB asked for" in out


def test_nothing_found_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    log.write_text("all fine\n")
    code, out, _ = called(capsys, log)
    assert code == 0 and out == f"No out-of-memory report found in {log}.\n"
    code, out, err = called(capsys, log, "--json")
    assert code == 0 and json.loads(out)["evidence"] is None and "No out-of-memory" in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("missing.log",), "missing.log"),
        ((".",), "log.txt"),
        (("log", "--run", "missing.json"), "missing.json"),
        (("log", "--batch-size", "2"), "--batch-size needs --model"),
        (("log", "--model", "tinyllama-1.1b", "--run", "x"), "--run and --model"),
        (("log", "--model", "no-such-model"), "no-such-model"),
        (("log", "--gpu", "rtx-4091"), "rtx-4091"),
        (("snapshot.pickle",), "snapshot.pickle is no memory snapshot of PyTorch"),
    ],
)
def test_bad_input_is_one_line(
    words: tuple[str, ...],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "log").write_text(LOG)
    (tmp_path / "snapshot.pickle").write_bytes(b"\x80\x04\x95abc")
    code, out, err = called(capsys, *words)
    assert code == 2 and out == "" and part in err and err.count("\n") == 1 and err.startswith("error: ")


def test_a_run_that_cannot_be_estimated_leaves_the_report(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records.write_json(folder / "run.json", replace(PEFT, seq_len=10**6))
    code, out, err = called(capsys, folder)
    assert code == 0 and "1000.0 MiB asked for" in out
    assert "diagnosed from the report alone" in err


@pytest.mark.parametrize("as_json", [False, True])
def test_train_keeps_its_diagnosis_in_the_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    from vramplan.cli.runner import _explain_oom

    (tmp_path / "log.txt").write_text(
        "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 23.65 GiB total capacity)"
    )
    run = RunSpec(model="llama-2-7b")
    _explain_oom(tmp_path, run, None, estimate(load_model("llama-2-7b"), run), as_json=as_json, width=80)
    assert ("Why, likeliest first" in capsys.readouterr().out) == (not as_json)
    kept = json.loads((tmp_path / "diagnosis.json").read_text())
    assert kept["evidence"]["requested_bytes"] == 2 * GIB and kept["fixes"] and kept["predicted_bytes"]
