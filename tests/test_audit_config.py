"""What a configuration costs: each rule sees its cause and nothing else, prices are estimates, the table is golden.

The files golden/config_*.txt are what people see. After a wanted change: VRAMPLAN_UPDATE_GOLDEN=1 pytest this file.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_cli
from test_cli import Cli
from test_report import draw

from vramplan.core.audit_config import audit, of_model
from vramplan.core.audit_subject import AFTERWARDS
from vramplan.core.ledger import estimate
from vramplan.core.types import ConfigAudit, ConfigFinding, Levers, Lora, ModelSpec, RunSpec, TrainerConfig
from vramplan.core.units import MIB
from vramplan.report.audit_config import headline, show_config_audit
from vramplan.sources.foreign import read_foreign
from vramplan.sources.hf_config import load_model
from vramplan.sources.profiles import load_gpu
from vramplan.sources.records import decode

cli = test_cli.cli  # fixture
CONFIGS, GOLDEN = Path(__file__).parent / "configs", Path(__file__).parent / "golden"
LLAMA = load_model("llama-3.1-8b")
LEAN = Levers(kernels="stock")
CLEAN = TrainerConfig(
    tool="transformers", source="c.yaml", run=RunSpec(model="llama-3.1-8b", recipe="peft", levers=LEAN),
    quantised=True, compute_dtype="bfloat16", base_dtype="bfloat16", prepared=False, evaluates=True, eval_batch_size=1,
)  # fmt: skip


def changed(config: TrainerConfig = CLEAN, *, run: dict[str, Any] | None = None, **facts: Any) -> TrainerConfig:
    """`config` with other facts; `run` changes levers where it names some, else the run."""
    assert config.run is not None
    levers = {k: v for k, v in (run or {}).items() if k in Levers.__dataclass_fields__}
    rest = {k: v for k, v in (run or {}).items() if k not in levers}
    return replace(config, run=replace(config.run, levers=replace(config.run.levers, **levers), **rest), **facts)


def found(config: TrainerConfig, model: ModelSpec | None = LLAMA) -> dict[str, ConfigFinding]:
    return {finding.key: finding for finding in audit(config, model).findings}


def test_a_clean_file_has_no_findings() -> None:
    clean = audit(CLEAN, LLAMA)
    assert clean.findings == () and clean.fixed_bytes is None
    assert CLEAN.run is not None and clean.device_bytes == estimate(LLAMA, CLEAN.run).peak.device_bytes
    assert headline(clean).startswith("Nothing that costs memory without need: needs ")


# cause -> what brings it about, its number, whether the file alone says so
CAUSES: dict[str, tuple[TrainerConfig, int | None, bool]] = {
    "logits": (changed(run={"loss": "full"}), 1, True),
    "checkpointing": (changed(run={"checkpointing": "none"}), 2, True),
    "upcast": (changed(run={"upcast": "all"}, prepared=True), 3, True),
    "evaluation": (changed(eval_batch_size=8, run={"loss": "full", "seq_len": 1024}), 4, True),
    "fragmentation": (changed(run={"allocator": "native", "micro_batch_size": 4}), 7, False),
    "float32_compute": (changed(compute_dtype="float32"), 10, True),
    "base_float32": (changed(base_dtype="float32"), 11, True),
    "eager_attention": (changed(run={"attention": "eager", "seq_len": 8192}), 12, True),
    "trained_embeddings": (changed(trained_whole=("embed_tokens",)), 13, True),
    "device_map": (changed(device_map="auto"), 14, False),
    "quant_storage": (changed(sharded=True, quant_storage="uint8"), 15, True),
    "optimizer": (changed(run={"optimizer": "adamw_torch_fused", "lora": Lora(r=64)}), 16, True),
    "batch": (changed(batch_stated=False, run={"micro_batch_size": 8}), None, True),
    "padding": (changed(pad_to_max=True), None, False),
    "targets": (changed(run={"lora": Lora(targets=("q_proj", "c_attn"))}), None, True),
    "not_4bit": (changed(quantised=False), None, True),
}
UNPRICED = {"device_map", "targets"}
TOGETHER = {"evaluation": {"evaluation", "logits"}}


@pytest.mark.parametrize("key", CAUSES)
def test_each_cause_is_seen_by_itself(key: str) -> None:
    config, number, certain = CAUSES[key]
    seen = found(config)
    assert set(seen) == TOGETHER.get(key, {key})
    finding = seen[key]
    assert (finding.cause, finding.certain) == (number, certain)
    assert finding.message and finding.fix
    assert (finding.bytes is None) == (key in UNPRICED)
    assert finding.bytes is None or finding.bytes > 16 * MIB


@pytest.mark.parametrize("key", CAUSES)
def test_without_a_model_causes_have_no_bytes(key: str) -> None:
    seen = found(CAUSES[key][0], None)
    assert all(finding.bytes is None for finding in seen.values())
    needs_a_model = ("targets", "optimizer", "fragmentation", "upcast")  # nothing to say without its sizes
    assert (key in seen) == (key not in needs_a_model)


@pytest.mark.parametrize(
    ("key", "levers"),
    [("logits", {"loss": "fused"}), ("checkpointing", {"checkpointing": "all"}), ("upcast", {"upcast": "none"}),
     ("eager_attention", {"attention": "sdpa"}), ("optimizer", {"optimizer": "paged_adamw_8bit"}),
     ("fragmentation", {"allocator": "expandable"})],
)  # fmt: skip
def test_a_price_is_the_difference_of_two_estimates(key: str, levers: dict[str, Any]) -> None:
    config = CAUSES[key][0]
    assert config.run is not None
    result = audit(config, LLAMA)
    without = estimate(LLAMA, replace(config.run, levers=replace(config.run.levers, **levers))).peak.device_bytes
    assert result.device_bytes == estimate(LLAMA, config.run).peak.device_bytes
    assert result.findings[0].bytes == result.device_bytes - without
    assert result.fixed_bytes == (without if result.findings[0].certain else None)


def test_prices_by_shape() -> None:
    vocabulary = 128256 * 4096
    assert found(CAUSES["float32_compute"][0])["float32_compute"].bytes == 2 * 4096 * 14336
    base = found(CAUSES["base_float32"][0])["base_float32"].bytes
    assert base is not None and 0 <= base - 2 * 2 * vocabulary < MIB  # and norms
    assert found(CAUSES["trained_embeddings"][0])["trained_embeddings"].bytes == 4 * vocabulary  # its state is paged
    adamw = changed(CAUSES["trained_embeddings"][0], run={"optimizer": "adamw_torch"})
    assert found(adamw)["trained_embeddings"].bytes == (4 + 8) * vocabulary
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    saved = found(CAUSES["not_4bit"][0])["not_4bit"].bytes
    assert saved is not None and saved == pytest.approx(linears * (2 - 0.5 - 1 / 64 - 4 / 16384), rel=1e-3)


def test_causes_that_hide_each_other_are_both_priced() -> None:
    config = changed(run={"attention": "eager", "loss": "full", "seq_len": 8192})
    seen = found(config)
    assert set(seen) == {"eager_attention", "logits"}
    assert seen["logits"].message.endswith(AFTERWARDS) and AFTERWARDS not in seen["eager_attention"].message
    assert config.run is not None
    lean = replace(config.run, levers=replace(config.run.levers, attention="sdpa", loss="fused"))
    whole = replace(lean, levers=replace(lean.levers, loss="full"))
    need, without = (estimate(LLAMA, run).peak.device_bytes for run in (whole, lean))
    assert seen["logits"].bytes == need - without
    assert audit(config, LLAMA).fixed_bytes == without


def test_evaluation_counts_only_what_is_above_training() -> None:
    one_row = 10 * 1024 * LLAMA.vocab_size
    config = changed(eval_batch_size=8, run={"loss": "full", "seq_len": 1024})
    assert config.run is not None
    ledger = estimate(LLAMA, config.run)
    training = max(ledger.peak.allocated_bytes, ledger.resident.with_lora_bytes + one_row)
    assert found(config)["evaluation"].bytes == ledger.resident.with_lora_bytes + 8 * one_row - training
    assert "evaluation" not in found(replace(config, evaluates=False))
    assert "evaluation" not in found(replace(config, eval_batch_size=1))
    assert found(changed(eval_batch_size=8))["evaluation"].bytes is None  # a loss in chunks


def test_what_a_script_decides_is_not_certain() -> None:
    config = changed(prepared=None, reentrant=True, input_grads=None)
    seen = found(config)
    assert set(seen) == {"upcast", "checkpointing"} and not any(finding.certain for finding in seen.values())
    assert config.run is not None
    for key, levers in (("upcast", {"upcast": "all"}), ("checkpointing", {"checkpointing": "none"})):
        more = estimate(LLAMA, replace(config.run, levers=replace(config.run.levers, **levers)))
        assert seen[key].bytes == more.peak.device_bytes - estimate(LLAMA, config.run).peak.device_bytes
    assert audit(config, LLAMA).fixed_bytes is None
    assert found(replace(config, input_grads=True, prepared=False)) == {}
    assert not found(changed(run={"loss": "full"}, loss_stated=False))["logits"].certain
    assert not found(changed(sharded=True))["quant_storage"].certain
    assert found(changed(sharded=True, quant_storage="bfloat16")) == {}


def test_targets_that_match_nothing_are_left_out_of_the_run() -> None:
    some = audit(changed(run={"lora": Lora(targets=("q_proj", "c_attn"))}), LLAMA)
    assert CLEAN.run is not None
    kept = estimate(LLAMA, replace(CLEAN.run, lora=Lora(targets=("q_proj",))))
    assert some.device_bytes == kept.peak.device_bytes and "passes over them" in some.findings[0].message
    none = audit(changed(run={"lora": Lora(targets=("c_attn",))}), LLAMA)
    assert none.device_bytes is None and "c_attn" in none.config.unplanned
    assert "refuses to start" in none.findings[0].message and "down_proj" in none.findings[0].fix


def test_soft_capping_is_no_choice() -> None:
    gemma = load_model("gemma-2-2b")
    config = changed(run={"attention": "eager"})
    assert "eager_attention" not in found(config, gemma)


def test_what_cannot_be_estimated_has_no_bytes() -> None:
    for config in (changed(run={"seq_len": 10**6}), changed(unplanned="8-bit weights are not described here")):
        result = audit(config, LLAMA)
        assert result.device_bytes is None and result.config.unplanned
        assert "no bytes of the run: " in draw(show_config_audit, result, width=80)


# --------------------------------------------------------------------------------------------------- a model alone
def test_a_model_alone() -> None:
    seen = found(of_model(LLAMA))
    assert {"logits", "upcast", "vocabulary"} <= set(seen) and "two tensors" in seen["vocabulary"].message
    gemma = load_model("gemma-2-2b")
    tied = found(of_model(gemma), gemma)
    assert "tied_head" in tied and "one tensor of 256,000 x 2,304" in tied["tied_head"].message
    falcon = load_model("falcon-7b")
    plain = found(of_model(falcon), falcon)
    assert "not_quantised" in plain and "falcon" in plain["not_quantised"].message
    mixtral = load_model("mixtral-8x7b")
    experts = found(of_model(mixtral), mixtral)
    count = 32 * 8 * 3 * 4096 * 14336
    saved = experts["experts"].bytes
    assert experts["experts"].cause == 9 and saved is not None
    assert saved == pytest.approx(count * (2 - 0.5 - 1 / 64 - 4 / 16384), rel=1e-3)
    assert not {"not_quantised", "experts", "tied_head"} & set(seen)


# --------------------------------------------------------------------------------------------------- the command line
def test_the_command(cli: Cli) -> None:
    result = cli("audit", CONFIGS / "axolotl.yml", "--json")
    assert (result.code, result.err) == (0, "")
    audited = decode(json.loads(result.out), ConfigAudit)
    assert audited.config.tool == "axolotl" and audited.judged is None
    sizes = [finding.bytes for finding in audited.findings if finding.bytes is not None]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 5
    assert audited == audit(read_foreign(CONFIGS / "axolotl.yml"), LLAMA)


def test_a_card_that_is_too_small_is_exit_3(cli: Cli) -> None:
    result = cli("audit", CONFIGS / "axolotl.yml", "--gpu", "rtx-4090")
    assert result.code == 3
    assert result.out.startswith("Does not fit rtx-4090 (23.52 GiB usable): needs ")
    result = cli("audit", CONFIGS / "axolotl.yml", "--gpu", "h200", "--json")
    assert result.code == 0 and json.loads(result.out)["judged"]["verdict"] == "fits"


def test_a_model_on_the_command_line_comes_first(cli: Cli) -> None:
    none = cli("audit", CONFIGS / "training_args.json")
    assert none.code == 0 and "--model NAME adds the bytes" in none.err and "GiB" not in none.out
    some = cli("audit", CONFIGS / "training_args.json", "--model", "llama-2-7b")
    assert some.err == "" and "GiB" in some.out
    other = json.loads(cli("audit", CONFIGS / "axolotl.yml", "--model", "llama-2-7b", "--json").out)
    assert "over the 4096" in other["config"]["unplanned"]
    assert cli("audit", CONFIGS / "axolotl.yml", "--model", "llama-9").code == 2


def test_a_model_that_cannot_be_read_is_a_note(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("base_model: ./nowhere\nadapter: qlora\nload_in_4bit: true\nlora_target_linear: true\nlora_r: 8\n")
    result = cli("audit", file)
    assert result.code == 0 and "audited without bytes" in result.err


def test_a_run_file_is_read_as_train_reads_it(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.loads(cli("audit", CONFIGS / "run.toml", "--json").out)
    assert data["config"]["tool"] == "vramplan" and data["config"]["run"]["levers"]["attention"] == "eager"
    want = cli("estimate", "llama-2-7b", "--recipe", "peft", "--batch-size", 4, "--seq-len", 4096, "--attn", "eager",
               "--json")  # fmt: skip
    assert data["device_bytes"] == json.loads(want.out)["peak"]["device_bytes"]
    file = tmp_path / "r.toml"
    file.write_text("batch_size = 2\n")
    assert cli("audit", file).code == 2
    lean = cli("audit", file, "--model", "llama-2-7b")
    assert lean.code == 0 and lean.out.startswith("Nothing that costs memory without need: needs ")


def test_a_model_or_its_config_may_stand_for_a_file(cli: Cli, tmp_path: Path) -> None:
    assert "falcon-7b" in cli("audit", "falcon-7b").out
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
              "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 320,
              "max_position_embeddings": 64}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path / "config.json", tmp_path):
        assert cli("audit", path).code == 0
    result = cli("audit", "falcon-7b", "--model", "llama-2-7b")
    assert result.code == 2 and "is a model" in result.error


@pytest.mark.parametrize("name", ["none.yaml", "none.yml", "none.toml", "none.json", "llama-9"])
def test_what_is_not_there_is_one_line(cli: Cli, name: str) -> None:
    result = cli("audit", name)
    assert (
        (result.code, result.out) == (2, "") and result.err.startswith("error: ") and len(result.err.splitlines()) == 1
    )


def test_without_pyyaml_there_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)  # type: ignore[arg-type]
    result = cli("audit", CONFIGS / "axolotl.yml")
    assert result.code == 1 and "pip install pyyaml" in result.error
    assert cli("audit", CONFIGS / "training_args.json").code == 0


# ------------------------------------------------------------------------------------------------------------ golden
def golden_audit(name: str) -> ConfigAudit:
    if name == "training_args":
        config = replace(read_foreign(CONFIGS / "training_args.json"), source="training_args.json")
        return audit(config, LLAMA, load_gpu("rtx-4090"))
    config = replace(read_foreign(CONFIGS / "axolotl.yml"), source="axolotl.yml")
    return audit(config, LLAMA)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", ["axolotl", "training_args"])
def test_golden(name: str, width: int) -> None:
    text = draw(show_config_audit, golden_audit(name), width=width)
    file = GOLDEN / f"config_{name}_{width}.txt"
    if os.environ.get("VRAMPLAN_UPDATE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_keeps_to_the_screen_and_to_one_line_each(width: int) -> None:
    nasty = replace(CLEAN, source="a\nb\x1b[31m.yaml", not_understood=("x\n\x1b[2J", *"abcdefgh"), assumed=("p\tq",))
    finding = ConfigFinding(cause=1, key="k", bytes=5, message="m\n\x1b]0;", fix="f" * 300, certain=False)
    text = draw(show_config_audit, ConfigAudit(config=nasty, findings=(finding,)), width=width)
    assert "\x1b" not in text and "a b" in text
    assert "9 keys were not understood" in text and "3 more" in text
    assert all(len(line) <= width and line == line.rstrip() for line in text.splitlines())


def test_the_page_shows_what_is_printed() -> None:
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    shown = page.partition("\n## audit\n")[2].split("```")[1].strip("\n")
    assert shown == "$ vramplan audit axolotl.yml\n" + draw(show_config_audit, golden_audit("axolotl"), width=80).strip(
        "\n"
    )
