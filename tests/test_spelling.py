"""Hugging Face's spellings, run files, and what happens to flags that are not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import test_cli
from test_cli import Cli, Rooms

from vramplan.cli import train as train_module
from vramplan.cli.spelling import ABSENT, ALIASES, GIVEN, REFUSED, Translation
from vramplan.core.types import RunSpec, Schedule
from vramplan.errors import InputError

COMMAND = train_module.command
cli, rooms, data = test_cli.cli, test_cli.rooms, test_cli.data  # fixtures
HF_COMMAND_LINE = """
--model_name_or_path llama-2-7b --dataset_name d.jsonl --output_dir out --max_length 1024 --learning_rate 1e-4
--per_device_train_batch_size 2 --per_device_eval_batch_size 1 --gradient_accumulation_steps 4 --num_train_epochs 2
--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-5} --warmup_steps 10 --weight_decay 0.01
--adam_beta2 0.95 --max_grad_norm 0.3 --optim paged_adamw_32bit --logging_steps 10 --save_strategy steps
--save_steps 50 --save_total_limit 3 --eval_strategy steps --eval_steps 25 --load_best_model_at_end True
--metric_for_best_model eval_loss --greater_is_better False --report_to tensorboard,wandb --run_name first
--seed 7 --data_seed 8 --full_determinism False --bf16 True --load_in_4bit --use_bnb_nested_quant False
--bnb_4bit_quant_type nf4 --gradient_checkpointing True --use_peft --lora_r 8 --lora_alpha 16 --lora_dropout 0.05
--lora_target_modules q_proj,v_proj --attn_implementation sdpa --push_to_hub False --fp16 False --max_steps -1
--remove_unused_columns False --eval_accumulation_steps 4 --do_train --do_eval --use_liger_kernel
"""


def asked(rooms: Rooms) -> RunSpec:
    assert rooms.prepared is not None
    return rooms.prepared[1]


def test_a_whole_command_line_of_trl_is_understood(cli: Cli, rooms: Rooms, data: Path) -> None:
    result = cli("train", *HF_COMMAND_LINE.split(), "--eval-fraction", "0.1")
    assert result.code == 0, result.err
    run = asked(rooms)
    assert rooms.prepared is not None and rooms.prepared[0] == Path("out")
    assert (run.model, run.seq_len, run.micro_batch_size, run.accumulation) == ("llama-2-7b", 1024, 2, 4)
    assert (run.lora.r, run.lora.alpha, run.lora.dropout, run.lora.targets) == (8, 16, 0.05, ("q_proj", "v_proj"))
    assert (run.levers.optimizer, run.levers.checkpointing, run.double_quant) == ("paged_adamw_32bit", "all", False)
    assert run.schedule == Schedule(
        num_train_epochs=2, learning_rate=1e-4, lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs='{"min_lr":1e-5}', warmup_steps=10, weight_decay=0.01, max_grad_norm=0.3,
        adam_beta2=0.95, seed=7, data_seed=8, logging_steps=10, save_steps=50, save_total_limit=3,
        eval_strategy="steps", eval_steps=25, per_device_eval_batch_size=1, load_best_model_at_end=True,
        report_to=("tensorboard", "wandb"), run_name="first",
    )  # fmt: skip
    assert "note: --bf16 needs no saying: training computes in bf16" in result.err
    assert "fp16" not in result.err and "push" not in result.err


def words(*args: str) -> list[str]:
    return Translation(COMMAND).read(args).words


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--double_quant", "false", "m"), ["--no-double-quant", "m"]),
        (("--double-quant=True",), ["--double-quant"]),
        (("--no_double_quant", "True"), ["--no-double-quant"]),
        (("--no-double-quant", "False"), ["--double-quant"]),
        (("--resume", "False", "m"), ["m"]),
        (("--resume", "m"), ["--resume", "m"]),
        (("--resume_from_checkpoint", "True"), ["--resume"]),
        (("--resume_from_checkpoint", "runs/a"), ["--resume", "--output=runs/a"]),
        (("--resume_from_checkpoint=False",), []),
        (("--text_column", "my_text"), ["--text-column", "my_text"]),
        (("--text_column=my_text",), ["--text-column=my_text"]),
        (("-o", "my_run", "--", "--max_length"), ["-o", "my_run", "--", "--max_length"]),
        (("--neftune_noise_alpha", "None", "m"), ["m"]),
    ],
)
def test_words(args: tuple[str, ...], expected: list[str]) -> None:
    assert words(*args) == expected


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--push_to_hub",), "--push-to-hub: nothing is uploaded"),
        (("--fp16", "True"), "--fp16: training computes in bf16"),
        (("--use_dora",), "--use-dora: DoRA is not built"),
        (("--neftune_noise_alpha", "5"), "--neftune-noise-alpha: noise"),
        (("--bf16", "False"), "--bf16 False is not possible"),
        (("--bnb_4bit_quant_type", "fp4"), "--bnb-4bit-quant-type fp4 is not possible"),
        (("--metric_for_best_model", "bleu"), "--metric-for-best-model bleu is not possible"),
        (("--double-quant=maybe",), "--double-quant is true or false, not maybe"),
        (("--resume_from_checkpoint", "runs/a/checkpoints/checkpoint-5/"), "takes the run folder"),
        (("--model_name_or_path",), "--model-name-or-path needs a value"),
    ],
)
def test_what_is_refused(args: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        words(*args)


@pytest.mark.parametrize(
    ("flag", "hint"),
    [
        ("--lora_rnak", "did you mean --lora-rank"),
        ("--learning_rte", "did you mean --learning-rate?"),
        ("--eval_batch_size", ""),
        ("--gradient_acumulation_steps", "did you mean --gradient-accumulation-steps or --accumulation?"),
    ],
)
def test_an_unknown_flag_is_answered_with_the_nearest(cli: Cli, flag: str, hint: str) -> None:
    result = cli("train", "llama-2-7b", flag, "3")
    assert result.code == 2
    assert result.error.startswith(f"error: train has no flag {flag}") and hint in result.error


def test_the_tables_hold_no_flag_of_ours() -> None:
    """A name of ours would never be looked up there; an alias must lead to a flag, and be written with dashes."""
    ours = {name for param in COMMAND.params for name in param.opts}
    assert set(ALIASES.values()) <= ours
    for table in (ALIASES, GIVEN, REFUSED):
        assert not ours & set(table)
        assert all(name.startswith("--") and "_" not in name for name in table)


@pytest.mark.parametrize(("command", "flag"), ABSENT)
def test_a_flag_that_is_absent_for_a_reason_is_told_it(cli: Cli, command: str, flag: str) -> None:
    reason = ABSENT[command, flag]
    for spelled in (flag, flag.replace("-", "_").replace("__", "--", 1)):
        assert cli(command, spelled, "3").error == f"error: {command} has no flag {spelled} ({reason})"


def test_every_field_of_the_schedule_is_a_flag_with_its_default() -> None:
    params = {param.name: param for param in COMMAND.params}
    context = click.Context(COMMAND)
    for name in Schedule.__dataclass_fields__:
        default = params[name].get_default(context)
        assert params[name].type_cast_value(context, default) == getattr(Schedule(), name), name


@pytest.mark.parametrize(
    ("value", "expected"),
    [("none", ()), ("all", ("all",)), ("wandb, trackio,wandb", ("wandb", "trackio"))],
)
def test_reporters(cli: Cli, rooms: Rooms, data: Path, value: str, expected: Any) -> None:
    assert cli("train", "llama-2-7b", "--data", "d.jsonl", "--report_to", value).code == 0
    assert asked(rooms).schedule.report_to == expected
    result = cli("train", "llama-2-7b", "--data", "d.jsonl", "--report_to", "wand,b")
    assert result.code == 2 and "--report-to must be all, none, or names" in result.error


def test_a_larger_evaluation_batch_is_warned_of(cli: Cli, rooms: Rooms, data: Path) -> None:
    line = ("train", "llama-2-7b", "--data", "d.jsonl", "--per_device_eval_batch_size")
    assert "--per-device-eval-batch-size 8 is over the micro-batch of 1" in cli(*line, "8").err
    assert "over the micro-batch" not in cli(*line, "1").err


# -------------------------------------------------------------------------------------------------------- run files
@pytest.fixture
def run_file(data: Path) -> Path:
    file = data.parent / "run.toml"
    file.write_text(
        'model = "llama-2-7b"\ndata = "d.jsonl"\nlora_r = 4\nmax-length = 512\ndouble_quant = false\n'
        'target_modules = ["q_proj", "v_proj"]\nlr_scheduler_kwargs = {num_cycles = 2}\nwarmup_ratio = 0.1\n'
        'report_to = ["wandb"]\ngpu = ["rtx-4090", "rtx-3090"]\nbf16 = true\n'
    )
    return file


def test_a_run_file_says_what_a_command_line_could(cli: Cli, rooms: Rooms, run_file: Path) -> None:
    result = cli("train", "--config", run_file, "--lora-r", 32, "--warmup_ratio", 0.2)
    assert result.code == 0, result.err
    run = asked(rooms)
    assert (run.model, run.seq_len, run.double_quant, run.lora.r) == ("llama-2-7b", 512, False, 32)
    assert run.lora.targets == ("q_proj", "v_proj")
    assert run.schedule.warmup_ratio == 0.2 and run.schedule.report_to == ("wandb",)
    assert json.loads(run.schedule.lr_scheduler_kwargs or "") == {"num_cycles": 2}


def test_one_run_file_serves_every_command(cli: Cli, rooms: Rooms, run_file: Path) -> None:
    result = cli("estimate", f"--config={run_file}", "--json")
    assert result.code == 0, result.err
    assert [gpu["gpu"] for gpu in json.loads(result.out)["gpus"]] == ["rtx-4090", "rtx-3090"]
    assert rooms.run is not None and rooms.run.lora.r == 4
    assert cli("estimate", "phi-2", "--config", run_file, "--gpu", "rtx-3060-12gb", "--json").code == 0
    assert rooms.run.model == "phi-2" and rooms.chip == "rtx-3060-12gb"  # the command line comes first


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("learning_rte = 1", "there is no flag --learning-rte (did you mean --learning-rate?)"),
        ("lora_r = 1979-05-27", "lora_r has a value that no flag takes"),
        ("lora_r = ", "is not valid TOML"),
        ("lora_r = 0", "--lora-r must be a whole number from 1"),
        ("push_to_hub = true", "--push-to-hub: nothing is uploaded"),
        ("lora_r = true", "--lora-r must be a whole number"),
        ("resume = 3", "--resume is true or false, not 3"),
    ],
)
def test_a_bad_run_file_is_one_sentence(
    cli: Cli,
    rooms: Rooms,
    data: Path,
    text: str,
    sentence: str,
) -> None:
    (data.parent / "bad.toml").write_text(text)
    result = cli("train", "llama-2-7b", "--data", "d.jsonl", "--config", "bad.toml")
    assert result.code == 2 and sentence in result.error
    assert len(result.err.splitlines()) == 1
    assert (
        cli("train", "--config", "nowhere.toml").error == "error: cannot read nowhere.toml: No such file or directory"
    )


def test_a_plan_still_settles_what_a_run_file_says(cli: Cli, rooms: Rooms, run_file: Path) -> None:
    cli("fit", "llama-2-7b", "--effective-batch-size", 16, "--gpu", "rtx-4090", "-o", "plan.json")
    result = cli("train", "plan.json", "--config", run_file)
    assert result.code == 2 and "is settled by plan.json" in result.error
