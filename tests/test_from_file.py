"""`--from FILE`: another trainer's file as the run, and a plan back in its words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from factories import make_plan
from golden_tools import check_golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vramplan.core.dialects import AXOLOTL_ATTENTIONS, Rewrite, Rewritten, rewrite
from vramplan.core.types import OPTIMIZERS, Plan, RunSpec, TrainerConfig
from vramplan.report.fit import show_fit
from vramplan.sources.foreign import read_foreign
from vramplan.sources.foreign_write import write_like
from vramplan.sources.records import read_json, write_json
from vramplan.sources.yaml_file import read_mapping

CONFIGS = Path(__file__).parent / "configs"
TOOLS = {"axolotl": "axolotl.yml", "llama-factory": "llama_factory.yaml", "trl": "trl_sft.yaml",
         "transformers": "training_args.json"}  # fmt: skip
MODEL = {"transformers": ["llama-2-7b"]}
SLOW = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)

Call = Callable[..., tuple[int, str, str]]


def held(name: str) -> TrainerConfig:
    return read_foreign(CONFIGS / TOOLS[name])


# ----------------------------------------------------------------------------------------- a plan in its words
def changed(draw: st.DrawFn, tool: str, before: RunSpec) -> RunSpec:
    """A run that the file could mean instead: everything that its trainer has words for."""
    script = tool == "transformers"
    levers = replace(
        before.levers,
        checkpointing=draw(st.sampled_from(("none", "all"))),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        loss=draw(st.sampled_from(("full", "fused"))),
        attention=before.levers.attention if script else draw(st.sampled_from(("sdpa", "eager", "flash_attention_2"))),
        upcast=draw(st.sampled_from(("none", "norms"))) if tool == "llama-factory" else before.levers.upcast,
    )
    if tool in ("axolotl", "llama-factory") and levers.checkpointing == "all":
        levers = replace(levers, checkpoint_offload=draw(st.booleans()))
    run = replace(
        before, levers=levers, micro_batch_size=draw(st.integers(1, 64)), accumulation=draw(st.integers(1, 64))
    )
    if script:
        return run
    names = st.sampled_from((("all-linear",), ("q_proj",), ("q_proj", "o_proj"), before.lora.targets))
    lora = replace(before.lora, r=draw(st.integers(1, 256)), alpha=draw(st.integers(1, 512)), targets=draw(names),
                   dropout=draw(st.sampled_from((0.0, 0.05, 0.25))))  # fmt: skip
    return replace(run, lora=lora, seq_len=draw(st.integers(1, 65536)), double_quant=draw(st.booleans()))


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_written_is_read_as_it_was_meant(tool: str, tmp_path: Path) -> None:
    config, source = held(tool), CONFIGS / TOOLS[tool]
    before, target = config.run, tmp_path / source.name
    assert before is not None

    @SLOW
    @given(st.data())
    def law(data: st.DataObject) -> None:
        after = data.draw(st.composite(changed)(tool, before))
        keys, unsaid = rewrite(tool, read_mapping(source).values, before, after)
        assert unsaid == ()
        assert write_like(source, target, keys) is False
        again = read_foreign(target)
        assert (again.run, again.unplanned) == (after, "")
        assert {k: v for k, v in read_mapping(target).values.items() if k not in keys} == {
            k: v for k, v in read_mapping(source).values.items() if k not in keys
        }
        for line in source.read_text().splitlines():
            assert not line.startswith("#") or line in target.read_text()
        if after == before:
            assert target.read_text() == source.read_text() or source.suffix == ".json"

    law()


@pytest.mark.parametrize("tool", TOOLS)
def test_what_a_file_cannot_say_is_said(tool: str) -> None:
    before = held(tool).run
    assert before is not None
    levers = replace(before.levers, checkpointing="every-2", upcast="all", kernels="fused",
                     allocator="native" if before.levers.allocator == "expandable" else "expandable")  # fmt: skip
    keys, unsaid = rewrite(tool, {}, before, replace(before, levers=levers, packing=True))
    assert keys == {}
    flags = ("--checkpointing every-2", "--upcast all", "--kernels fused", "--allocator", "--packing")
    assert [any(text.startswith(flag) for text in unsaid) for flag in flags] == [True] * 5


@pytest.mark.parametrize("old", ["flash_attention", "sdp_attention", "eager_attention", "xformers_attention"])
@pytest.mark.parametrize("wanted", ["flash_attention_2", "sdpa", "eager"])
def test_of_axolotls_switches_one_is_on(old: str, wanted: str) -> None:
    before = held("axolotl").run
    assert before is not None
    other = "eager" if wanted == "sdpa" else "sdpa"
    before = replace(before, levers=replace(before.levers, attention=other))
    values = {old: True}
    keys = rewrite("axolotl", values, before, replace(before, levers=replace(before.levers, attention=wanted))).keys
    assert [key for key, value in {**values, **keys}.items() if value] == [AXOLOTL_ATTENTIONS[wanted]]


def test_an_alpha_that_follows_the_rank_is_written_out(tmp_path: Path) -> None:
    before = held("llama-factory").run
    assert before is not None
    after = replace(before, lora=replace(before.lora, r=64))
    write_like(CONFIGS / TOOLS["llama-factory"], tmp_path / "c.yaml", rewrite("llama-factory", {}, before, after).keys)
    assert read_foreign(tmp_path / "c.yaml").run == after


def test_a_script_has_the_adapter_and_the_attention() -> None:
    before = held("transformers").run
    assert before is not None
    after = replace(before, seq_len=512, lora=replace(before.lora, r=64, targets=("q_proj",)),
                    double_quant=not before.double_quant, levers=replace(before.levers, attention="eager"))  # fmt: skip
    keys, unsaid = rewrite("transformers", {}, before, after)
    assert keys == {} and len(unsaid) == 5


@pytest.mark.parametrize(
    ("text", "keys", "wanted"),
    [
        ("a: 1 # one\nb:\n- x\n- y # last\n# next\nc:\n", {"b": ["z"], "c": True},
         "a: 1 # one\nb: [z] # last\n# next\nc: true\n"),
        ("'a b': \"x\"  # why\nlast: 3", {"a b": "a: b", "new": None}, "'a b': 'a: b'  # why\nlast: 3\nnew: null\n"),
        ("a:\n  k: 1\n  l: [1,\n    2]\n# end\n", {"a": {"k": 2}}, "a: {k: 2}\n# end\n"),
        ("a: |\n  long\n  text\nb: 2\n", {"b": 3}, "a: |\n  long\n  text\nb: 3\n"),
        ("", {"a": 1}, "a: 1\n"),
    ],
)  # fmt: skip
def test_values_change_in_their_place(text: str, keys: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    source, target = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source.write_text(text or "x: 1\n")
    assert write_like(source, target, keys) is False
    assert target.read_text() == wanted if text else target.read_text() == "x: 1\n" + wanted


@pytest.mark.parametrize("text", ["a: &one 1 # why\nb: *one\n", "{a: 1, b: 2} # why\n", "# why\nb: 2\n...\n"])
def test_what_cannot_be_edited_is_written_anew_and_said(text: str, tmp_path: Path) -> None:
    """An anchor stands for two keys, braces have an end, a document may too."""
    source, target = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source.write_text(text)
    assert write_like(source, target, {"a": 5, "c": 6}) is True
    assert yaml.safe_load(target.read_text()) == {**yaml.safe_load(text), "a": 5, "c": 6}


# ------------------------------------------------------------------------------------------ the file as the run
@pytest.mark.parametrize("tool", TOOLS)
def test_the_estimate_is_that_of_the_audit(tool: str, cli: Call) -> None:
    """Which reads the same file on another way."""
    path, model = CONFIGS / TOOLS[tool], MODEL.get(tool, [])
    code, out, err = cli("estimate", *model, "--from", path, "--json")
    assert code == 0, err
    audit = json.loads(cli("audit", path, "--json", *(["--model", *model] if model else []))[1])
    assert json.loads(out)["peak"]["device_bytes"] == audit["device_bytes"]
    assert 1 <= sum(str(path) in line for line in err.splitlines() if line.startswith("note: ")) <= 2


def test_notes_say_what_is_assumed_and_what_is_not_counted(cli: Call) -> None:
    err = cli("estimate", "--from", CONFIGS / "axolotl.yml")[2]
    assert "embed_tokens, lm_head trained whole" in err and "evaluation, 8 rows" in err and "(my_own_key)" in err
    err = cli("estimate", "llama-2-7b", "--from", CONFIGS / "training_args.json")[2]
    assert "NF4 by bitsandbytes is assumed" in err and "2,048 tokens" in err


def test_flags_win(cli: Call) -> None:
    words = ("--from", CONFIGS / "axolotl.yml", "--json")
    found = json.loads(cli("estimate", "qwen2.5-7b", *words, "--batch-size", 3, "--attn", "sdpa",
                           "--no-gradient-checkpointing", "--lora-r", 4)[1])["run"]  # fmt: skip
    assert (found["model"], found["micro_batch_size"], found["accumulation"]) == ("qwen2.5-7b", 3, 4)
    assert (found["levers"]["attention"], found["levers"]["checkpointing"]) == ("sdpa", "none")
    assert (found["lora"]["r"], found["lora"]["alpha"], found["levers"]["kernels"]) == (4, 16, "stock")
    lean = json.loads(cli("estimate", *words, "--recipe", "lean")[1])["run"]
    assert lean["recipe"] == "lean" and lean["levers"]["kernels"] == "fused" and lean["seq_len"] == 8192


def test_a_run_file_between_flags_and_file(cli: Call, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("seq_len = 1024\nlora_r = 8\n")
    words = ("--config", tmp_path / "run.toml", "--from", CONFIGS / "axolotl.yml", "--lora-r", 2, "--json")
    found = json.loads(cli("estimate", *words)[1])["run"]
    assert (found["seq_len"], found["lora"]["r"], found["micro_batch_size"]) == (1024, 2, 2)
    assert (
        json.loads(cli("estimate", "llama-2-7b", "--from", tmp_path / "run.toml", "--json")[1])["run"]["seq_len"]
        == 1024
    )


def test_a_plan_of_ours_comes_to_its_own_ledger(cli: Call, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    fit = ("fit", "llama-2-7b", "--effective-batch-size", 6, "--lora-targets", "q_proj,v_proj", "--gpu", "rtx-4090")
    assert cli(*fit, "-o", file)[0] == 0
    plan = read_json(file, Plan)
    code, out, err = cli("estimate", "--from", file, "--gpu", "rtx-4090", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["peak"]["device_bytes"] == plan.ledger.peak.device_bytes
    run = replace(plan.run, lora=replace(plan.run.lora, dtype="bfloat16"), driver="loop")
    write_json(tmp_path / "run.json", run)
    again = json.loads(cli("estimate", "--from", tmp_path, "--json")[1])["run"]
    assert (again["lora"]["dtype"], again["driver"]) == ("bfloat16", "loop")
    second = cli("fit", "--from", file, "--gpu", "rtx-4090", "-o", tmp_path / "again.json")
    assert second[0] == 0 and read_json(tmp_path / "again.json", Plan).run == plan.run


def test_fit_writes_the_plan_into_a_copy(cli: Call, tmp_path: Path) -> None:
    target = tmp_path / "out.yml"
    words = ("fit", "--from", CONFIGS / "axolotl.yml", "--attn", "sdpa", "--loss", "fused", "--gpu", "rtx-4090")
    code, out, _ = cli(*words, "-o", target)
    again = read_foreign(target).run
    assert code == 0 and again is not None
    assert again.micro_batch_size * again.accumulation == 8
    assert f"batch {again.micro_batch_size} x {again.accumulation} = 8" in out
    assert "axolotl train" in out and "eager_attention" in out
    estimate = cli("estimate", "--from", target, "--gpu", "rtx-4090", "--json")
    plan = json.loads(cli(*words, "--json")[1])
    assert json.loads(estimate[1])["peak"]["device_bytes"] == plan["ledger"]["peak"]["device_bytes"]
    assert {c["levers"]["checkpointing"] for c in plan["candidates"]} == {"none", "all"}  # every-2 has no word
    assert cli(*words, "-o", tmp_path / "plan.json")[0] == 0
    assert read_json(tmp_path / "plan.json", Plan).run.model == "meta-llama/Llama-3.1-8B"


def test_fit_does_not_offload_where_the_trainer_cannot(cli: Call) -> None:
    plan = json.loads(cli("fit", "--from", CONFIGS / "trl_sft.yaml", "--gpu", "a100-80gb", "--json")[1])
    assert {c["levers"]["checkpoint_offload"] for c in plan["candidates"]} == {False}
    assert plan["effective_batch_size"] == 16


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("c.yml", "base_model: m\nadapter: lora\nload_in_8bit: true\n", "8-bit and GPTQ weights are not described"),
        ("c.yml", "hello: world\n", "no configuration that is known"),
        ("c.json", '{"architectures": ["X"]}', "it is a model, not a run"),
        ("c.json", '{"schema_version": 1, "type": "Ledger"}', "it is a Ledger (a run.json or a plan.json has a run)"),
        ("c.json", "[", "is not valid JSON"),
        ("c.json", '{"per_device_train_batch_size": 2}', "names no model (give it as MODEL)"),
    ],
)
def test_what_is_no_run_is_one_sentence(name: str, text: str, wanted: str, cli: Call, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    code, out, err = cli("estimate", "--from", tmp_path / name)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("error: ") and wanted in last


def test_a_file_without_a_model_is_not_passed_over(cli: Call) -> None:
    """Where MODEL may be left out too, as `check` has it."""
    for command in ("check", "lock", "estimate"):
        code, out, err = cli(command, "--from", CONFIGS / "training_args.json")
        assert (code, out) == (2, "") and "names no model (give it as MODEL)" in err


def test_the_next_command_goes_on_from_the_file(cli: Call) -> None:
    path = CONFIGS / "llama_factory.yaml"
    assert f"vramplan estimate --from {path} --gpu all" in cli("estimate", "--from", path)[1]
    assert f"vramplan fit --from {path} --gpu h100-80gb" in cli("estimate", "--from", path, "--gpu", "h100-80gb")[1]


def test_several_cards_are_for_estimate(cli: Call, tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", RunSpec(model="llama-2-7b", gpus=2, parallel="fsdp"))
    assert cli("estimate", "--from", tmp_path)[0] == 0
    code, _, err = cli("fit", "--from", tmp_path, "--gpu", "rtx-4090")
    assert code == 2 and "2 GPUs" in err


def test_json_is_not_written_as_yaml(cli: Call, tmp_path: Path) -> None:
    words = ("fit", "llama-2-7b", "--from", CONFIGS / "training_args.json", "--gpu", "rtx-4090", "-o")
    code, _, err = cli(*words, tmp_path / "x.yml")
    assert code == 2 and "is JSON" in err
    assert cli(*words, tmp_path / "x.json")[0] == 0
    assert json.loads((tmp_path / "x.json").read_text())["output_dir"] == "out"


def test_golden() -> None:
    change = Rewrite({"micro_batch_size": 4, "gradient_checkpointing": "offload", "plugins": ["one", "two"]},
                     ("--kernels fused: the layers are the trainer's own",))  # fmt: skip
    was = {"micro_batch_size": 2, "gradient_checkpointing": True, "plugins": None}
    words = Rewritten("axolotl", "qlora.yml", change, was, "fitted.yml", comments_lost=True)
    check_golden("fit_words", lambda stream, width: show_fit(stream, make_plan(), words=words, width=width))
