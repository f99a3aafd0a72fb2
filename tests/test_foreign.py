"""Other trainers' configuration files: told apart, read as they mean it, and refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vramplan.core.types import Levers, Lora, TrainerConfig
from vramplan.errors import InputError, VramplanError
from vramplan.sources import foreign_axolotl, foreign_hf, foreign_llama_factory
from vramplan.sources.foreign import read_foreign
from vramplan.sources.records import decode, encode
from vramplan.sources.yaml_file import MAX_CONFIG_BYTES

CONFIGS = Path(__file__).parent / "configs"
SLOW_FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)


def written(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, name: str = "c.yaml") -> TrainerConfig:
    return read_foreign(written(folder, text, name))


# ----------------------------------------------------------------------------------------------- whole files
def test_axolotl() -> None:
    config = read_foreign(CONFIGS / "axolotl.yml")
    run = config.run
    assert (config.tool, config.model, config.unplanned) == ("axolotl", "meta-llama/Llama-3.1-8B", "")
    assert run is not None
    assert (run.micro_batch_size, run.accumulation, run.seq_len, run.double_quant, run.padding) == (
        2,
        4,
        8192,
        True,
        True,
    )
    assert run.lora == Lora(r=32, alpha=16, dropout=0.05)
    assert run.levers == Levers(loss="full", attention="eager", optimizer="adamw_torch_fused", kernels="stock")
    assert (config.evaluates, config.eval_batch_size, config.pad_to_max) == (True, 8, True)
    assert (config.quantised, config.compute_dtype, config.quant_storage) == (True, "bfloat16", "bfloat16")
    assert config.trained_whole == ("embed_tokens", "lm_head")
    assert config.not_understood == ("my_own_key",)


def test_llama_factory() -> None:
    config = read_foreign(CONFIGS / "llama_factory.yaml")
    run = config.run
    assert (config.tool, config.unplanned, config.not_understood) == ("llama-factory", "", ())
    assert run is not None
    assert (run.micro_batch_size, run.accumulation, run.seq_len, run.double_quant) == (8, 8, 2048, True)
    assert run.lora == Lora(r=8, alpha=16, targets=("q_proj", "v_proj", "c_attn"))
    assert (run.levers.attention, run.levers.checkpointing, run.levers.upcast) == ("eager", "all", "none")
    assert (config.batch_stated, config.evaluates, config.eval_batch_size) == (False, True, 8)
    assert (config.compute_dtype, config.reentrant, config.input_grads, config.prepared) == (
        "bfloat16",
        True,
        True,
        False,
    )


def test_trl() -> None:
    config = read_foreign(CONFIGS / "trl_sft.yaml")
    run = config.run
    assert (config.tool, config.unplanned, config.not_understood) == ("trl", "", ())
    assert run is not None
    assert (run.micro_batch_size, run.seq_len, run.double_quant) == (4, 4096, False)
    assert run.lora.dropout == 0.05 and len(run.lora.targets) == 7
    assert run.levers.checkpointing == "all" and run.levers.loss == "full" and not config.loss_stated
    assert config.compute_dtype == "float32"  # TRL hands on no dtype, bitsandbytes then takes its own


def test_training_arguments() -> None:
    config = read_foreign(CONFIGS / "training_args.json")
    assert (config.tool, config.model, config.not_understood) == ("transformers", None, ())
    assert config.run is not None and config.run.levers.optimizer == "paged_adamw_8bit"
    assert (config.reentrant, config.input_grads, config.quantised, config.prepared) == (True, None, None, None)
    assert any("quantisation is not in the file" in text for text in config.assumed)
    assert any("no length" in text for text in config.assumed)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.iterdir() if path.suffix != ".toml"))
def test_a_config_is_a_record(name: str) -> None:
    config = read_foreign(CONFIGS / name)
    assert decode(json.loads(json.dumps(encode(config))), TrainerConfig) == config


# ------------------------------------------------------------------------------------------------------- one key
AXOLOTL = "base_model: m\nadapter: qlora\nload_in_4bit: true\nlora_target_linear: true\nlora_r: 8\n"
FACTORY = "model_name_or_path: m\nquantization_bit: 4\nfinetuning_type: lora\n"
TRL = "model_name_or_path: m\nload_in_4bit: true\nlora_target_modules: [q_proj]\n"
HF = "per_device_train_batch_size: 2\n"


def lever_of(config: TrainerConfig, name: str) -> Any:
    assert config.run is not None
    return getattr(config.run.levers, name)


@pytest.mark.parametrize(
    ("text", "lever", "value"),
    [
        (AXOLOTL, "checkpointing", "none"),
        (AXOLOTL + "gradient_checkpointing: true", "checkpointing", "all"),
        (AXOLOTL + "gradient_checkpointing: 'false'", "checkpointing", "none"),
        (AXOLOTL + "gradient_checkpointing: offload", "checkpoint_offload", True),
        (AXOLOTL, "allocator", "expandable"),
        (AXOLOTL + "flash_attention: true", "attention", "flash_attention_2"),
        (AXOLOTL + "attn_implementation: eager", "attention", "eager"),
        (AXOLOTL + "cut_cross_entropy: true", "loss", "fused"),
        (AXOLOTL + "optimizer: adamw_bnb_8bit", "optimizer", "adamw_8bit"),
        (FACTORY, "checkpointing", "all"),
        (FACTORY + "disable_gradient_checkpointing: true", "checkpointing", "none"),
        (FACTORY + "upcast_layernorm: true", "upcast", "norms"),
        (FACTORY + "enable_liger_kernel: true", "loss", "fused"),
        (FACTORY + "flash_attn: fa2", "attention", "flash_attention_2"),
        (FACTORY + "use_unsloth_gc: true", "checkpoint_offload", True),
        (TRL, "checkpointing", "all"),
        (TRL + "gradient_checkpointing: false", "checkpointing", "none"),
        (TRL + "loss_type: chunked_nll", "loss", "fused"),
        (TRL + "use_liger_kernel: true", "loss", "fused"),
        (TRL + "model_init_kwargs: {attn_implementation: eager}", "attention", "eager"),
        (HF, "checkpointing", "none"),
        (HF + "optim: OptimizerNames.PAGED_ADAMW", "optimizer", "paged_adamw_32bit"),
    ],
)
def test_what_turns_a_lever(tmp_path: Path, text: str, lever: str, value: Any) -> None:
    config = read(tmp_path, text)
    assert config.unplanned == "" and lever_of(config, lever) == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (HF + "optim: galore_adamw", "optimizer galore_adamw"),
        (HF + "torch_compile: true", "torch.compile"),
        (TRL + "use_peft: false", "without an adapter"),
        (TRL.replace("4bit", "8bit"), "8-bit"),
        (TRL.replace("true", "false"), "not quantised"),
        (TRL + "attn_implementation: flex_attention", "flex_attention"),
        (TRL.replace("[q_proj]", "'.*q_proj'"), "pattern"),
        (AXOLOTL.replace("qlora", "lora").replace("load_in_4bit: true", "load_in_4bit: false"), "not quantised"),
        ("base_model: m", "without an adapter"),
        (AXOLOTL + "rl: dpo", "by dpo"),
        (AXOLOTL.replace("lora_target_linear: true\n", ""), "no target modules"),
        (FACTORY.replace("lora", "full"), "finetuning_type full"),
        (FACTORY + "stage: dpo", "stage dpo"),
        (FACTORY.replace("4", "8"), "8 bits"),
        (FACTORY + "use_unsloth: true", "Unsloth"),
    ],
)
def test_what_is_not_described_is_said_and_read_all_the_same(tmp_path: Path, text: str, why: str) -> None:
    config = read(tmp_path, text)
    assert why in config.unplanned and config.run is not None


def test_null_and_empty_are_absent_and_numbers_may_be_texts(tmp_path: Path) -> None:
    config = read(tmp_path, AXOLOTL + "micro_batch_size: '4'\nsequence_len:\nlora_dropout: 5e-2\noptimizer: ''\n")
    assert config.run is not None
    assert (config.run.micro_batch_size, config.run.seq_len, config.run.lora.dropout) == (4, 512, 0.05)
    assert config.run.levers.optimizer == "adamw_torch_fused"


def test_no_length_and_no_targets_are_assumed_aloud(tmp_path: Path) -> None:
    assert any("PEFT chooses" in text for text in read(tmp_path, "load_in_4bit: true").assumed)
    assert any("one is assumed" in text for text in read(tmp_path, TRL + "fsdp: full_shard").assumed)
    config = read(tmp_path, TRL.replace("[q_proj]", "[q_proj, lm_head]"))
    assert config.run is not None and config.run.lora.targets == ("q_proj",)
    assert any("lm_head is not counted" in text for text in config.assumed)


def test_what_is_not_stated_has_the_default_of_its_tool(tmp_path: Path) -> None:
    trl = read(tmp_path, TRL).run
    assert trl is not None and (trl.micro_batch_size, trl.seq_len) == (8, 1024)
    axolotl = read(tmp_path, AXOLOTL + "micro_batch_size: 3\nval_set_size: 0.1")
    assert (axolotl.evaluates, axolotl.eval_batch_size) == (True, 3)  # evaluation as training
    assert not read(tmp_path, AXOLOTL).evaluates
    assert not read(tmp_path, FACTORY + "eval_strategy: steps").evaluates  # no rows are held out
    assert not read(tmp_path, FACTORY + "val_size: 0.1").evaluates  # nor asked for
    assert read(tmp_path, FACTORY + "val_size: 0.1\neval_strategy: steps").evaluates
    assert read(tmp_path, HF + "eval_strategy: epoch").eval_batch_size == 8


def test_without_bf16_the_dtype_is_that_of_the_tool(tmp_path: Path) -> None:
    assert read(tmp_path, AXOLOTL).compute_dtype == "bfloat16"
    assert read(tmp_path, AXOLOTL + "bf16: false").compute_dtype == "float32"
    assert read(tmp_path, FACTORY).compute_dtype is None
    assert read(tmp_path, FACTORY + "fp16: true").compute_dtype == "float16"
    assert read(tmp_path, TRL + "dtype: bfloat16").compute_dtype == "bfloat16"
    assert read(tmp_path, TRL + "bnb_4bit_compute_dtype: torch.float16").compute_dtype == "float16"
    assert read(tmp_path, HF).compute_dtype is None


# -------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: m\n\nmicro_batch_size: many", "line 3: micro_batch_size must be a whole number"),
        ("base_model: m\nmicro_batch_size: 0", "line 2: micro_batch_size"),
        ("base_model: m\nload_in_4bit: 7", "line 2: load_in_4bit must be true or false, not 7"),
        ("base_model: [m]", "base_model must be a text, not a list"),
        ("base_model: m\nlora_dropout: 3", "a number from 0 to 0.99"),
        ("base_model: m\nlora_target_modules: {a: 1}", "lora_target_modules must be names"),
        ("base_model: m\nbnb_config_kwargs: 4", "must be a mapping"),
        ("a: [1\nb: 2", "no plain YAML"),
        ("base_model: !!python/object:os.system {}", "no plain YAML"),
        ("base_model: 2020-99-99", "no plain YAML"),
        ("learning_rate: .nan", "not finite"),
        ("base_model: 0x" + "f" * 9000, "a number that is too long"),
        ("base_model: " + "1" * 9000, "no plain YAML"),
        ('base_model: "\\ud800"', "no Unicode"),
        ("", "holds no settings"),
        ("- a\n- b", "holds no settings"),
        ("1: 2", "holds no settings"),
        ("hello: world", "no configuration that is known here"),
        ("a: &a [*a]", "more than a configuration"),
        ("a: " + "[" * 40 + "]" * 40, "more than 32 levels"),
        ("a: &a 1\nb: [" + "*a, " * 11 + "]", "more than 10 aliases"),
        ("a: [" + "1, " * 30_000 + "]", "more than 20,000 values"),
        ("x: " + "a" * MAX_CONFIG_BYTES, "larger than 1 MiB"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert said in caught.value.message and "\n" not in caught.value.message


def test_a_huge_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="more than a configuration"):
        read(tmp_path, json.dumps({"max_steps": [0] * 30_000}), "c.json")


def test_a_bomb_of_merges_is_small(tmp_path: Path) -> None:
    text = "a: &a {x: 1}\nb: &b {<<: [*a, *a, *a]}\nc: &c {<<: [*b, *b, *b]}\nd: {<<: [*c, *c, *c]}\nbase_model: m\n"
    assert read(tmp_path, text).tool == "axolotl"


def test_a_missing_file_and_bad_json(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", written(tmp_path, "{", "c.json"), written(tmp_path, "[" * 99999, "d.json")):
        with pytest.raises(InputError):
            read_foreign(path)


# ---------------------------------------------------------------------------------------------------------- fuzz
KEYS = st.sampled_from(
    sorted({
        *foreign_axolotl.KEYS, *foreign_llama_factory.KEYS, *foreign_hf.TRL_KEYS, *foreign_hf.KEYS, "adapter", "fsdp",
        "rl", "bf16", "fp16", "optim", "optimizer", "flash_attention", "lora_dropout", "lora_modules_to_save",
        "val_size", "val_set_size", "additional_target", "device_map", "deepspeed", "gradient_checkpointing_kwargs",
        "stage", "dtype", "torch_dtype", "bnb_config_kwargs", "attn_implementation", "test_datasets", "eval_dataset",
        "padding", "lora_r", "lora_alpha", "bnb_4bit_compute_dtype", "eval_batch_size", "cut_cross_entropy",
        "quantization_type",
    })
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(
    ["true", "auto", "all", "qlora", "lora", "bfloat16", "eager", "torch.float16", "1e-4", "full_shard"])  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(KEYS | st.text(max_size=4), x, max_size=3),
    max_leaves=6,
)


@SLOW_FILES
@given(st.dictionaries(KEYS | st.text(max_size=5), VALUES, max_size=8))
@example({"base_model": "\ud800"})
@example({"optim": 10**30})
@example({"learning_rate": 1e999})
def test_any_json_is_read_or_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    for name in ("c.json", "c.yaml"):  # JSON is YAML, nearly
        try:
            config = read(tmp_path, json.dumps(values), name)
        except VramplanError as error:
            assert "\n" not in error.message
        else:
            assert decode(json.loads(json.dumps(encode(config))), TrainerConfig) == config


@SLOW_FILES
@given(st.lists(st.tuples(KEYS, st.text(alphabet="ab:{}[]&*!|>-'\"#%@\n ,?<019.~=", max_size=12)), max_size=6))
def test_any_yaml_is_read_or_refused(tmp_path: Path, lines: list[tuple[str, str]]) -> None:
    try:
        read(tmp_path, "".join(f"{key}: {value}\n" for key, value in lines))
    except VramplanError as error:
        assert "\n" not in error.message


@SLOW_FILES
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(data)
    with pytest.raises(VramplanError):
        read_foreign(tmp_path / "c.yaml")
