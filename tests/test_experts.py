"""Mixture-of-experts models: what their weights cost. Their steps: test_trace_agrees.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from measured import MIB, model

from vramplan.core import architecture as arch
from vramplan.core.ledger import NO_CARD, estimate, simulate
from vramplan.core.timeline import play
from vramplan.core.types import GpuProfile, Levers, Lora, ModelSpec, RunSpec, Unplannable
from vramplan.core.unroll import Unrolled

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SMALL = {
    "qwen3_moe": {"num_experts": 16, "vocab_size": 4096},
    "mixtral": {"intermediate_size": 3584, "moe_intermediate_size": 3584, "vocab_size": 4096},
    "olmoe": {"model_type": "olmoe", "qk_norm": "full", "num_experts": 16, "vocab_size": 4096, "num_heads": 16,
              "num_kv_heads": 16, "moe_intermediate_size": 1024, "norm_topk_prob": False},
}  # fmt: skip


def spec_of(family: str, layers: int = 4) -> ModelSpec:
    base = model("mixtral-8x7b" if family == "mixtral" else "qwen3-30b-a3b")
    return replace(base, **SMALL[family], num_layers=layers)


def run_of(change: dict[str, Any]) -> RunSpec:
    return RunSpec(
        model="x",
        micro_batch_size=change.get("batch", 2),
        seq_len=change.get("seq", 1024),
        accumulation=change.get("accum", 1),
        lora=Lora(targets=tuple(change.get("targets", ATTENTION)), dropout=change.get("dropout", 0.0)),
        double_quant=change.get("dq", True),
        driver=change.get("mode", "loop"),
        random_weights=True,
        levers=Levers(
            upcast="all" if change.get("prepare") else "none",
            loss="full",
            checkpointing="all" if change.get("gc", True) else "none",
            optimizer=change.get("optim", "adamw_torch_fused"),
            attention=change.get("attn", "sdpa"),
            allocator="native",
        ),
    )


def test_twelve_layers_load_to_what_the_card_measured() -> None:
    spec = replace(model("qwen3-30b-a3b"), num_layers=12)
    assert len([x for x in arch.layer_linears(spec) if x.quantised]) * 12 == 48
    found = simulate(spec, RunSpec(model="x", seq_len=64, random_weights=True, levers=Levers(allocator="native")))
    assert round(found.resident.loaded_bytes / MIB) == 15_130


def test_loading_holds_the_experts_of_one_layer_twice() -> None:
    """Drawn at random, or stacked from a checkpoint's single experts."""
    spec = replace(model("mixtral-8x7b"), num_layers=2)
    gate_up = 2 * 8 * 2 * 14336 * 4096
    for drawn in (True, False):
        sim = simulate(spec, RunSpec(model="x", seq_len=64, random_weights=drawn))
        down_and_outer = gate_up // 2 + 2 * (2 * 32000 * 4096)
        assert sim.load_peak_bytes >= sim.resident.loaded_bytes + gate_up - down_and_outer
        assert sim.load_peak_bytes > sim.resident.loaded_bytes


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b"])
def test_kbit_preparation_doubles_the_experts_and_says_so(name: str) -> None:
    spec = replace(model(name), num_layers=2)
    ledgers = {}
    for upcast in ("none", "all"):
        run = RunSpec(model=name, seq_len=128, lora=Lora(targets=ATTENTION), levers=Levers(upcast=upcast))
        ledgers[upcast] = estimate(spec, run)
    sizes = {k: next(x.bytes for x in ledger.lines if x.key == "weights.experts") for k, ledger in ledgers.items()}
    inner = spec.moe_intermediate_size
    assert sizes["none"] == 2 * 3 * spec.num_experts * inner * spec.hidden_size * 2
    assert sizes["all"] == 2 * sizes["none"]
    assert any("stay bf16" in w for w in ledgers["none"].warnings)
    warning = next(w for w in ledgers["all"].warnings if "prepare_model_for_kbit_training" in w)
    assert f"{sizes['all'] / 2**30:.2f} GiB instead of {sizes['none'] / 2**30:.2f} GiB" in warning


def test_all_linear_is_attention_alone_and_warned_of() -> None:
    spec = replace(model("mixtral-8x7b"), num_layers=2)
    assert {x.short for x in arch.lora_linears(spec, Lora())} == set(ATTENTION)
    assert any("PEFT 0.21 itself" in w for w in estimate(spec, RunSpec(model="x", seq_len=64)).warnings)
    named = RunSpec(model="x", seq_len=64, lora=Lora(targets=ATTENTION))
    assert not any("PEFT 0.21 itself" in w for w in estimate(spec, named).warnings)
    for target in ("gate", "w1", "gate_up_proj", "down_proj"):
        with pytest.raises(Unplannable, match="matches no Linear"):
            estimate(spec, replace(named, lora=Lora(targets=(target,))))


def born(unrolled: Unrolled, name: str) -> int:
    """Bytes of the tensors of this name, over the played step."""
    return sum(row[5] for row in unrolled.info if row[1] == name)


def on(capability: tuple[int, int], upcast: str = "none") -> Unrolled:
    card: GpuProfile = replace(NO_CARD, compute_capability=capability)
    run = RunSpec(model="x", seq_len=256, lora=Lora(targets=ATTENTION), levers=Levers(upcast=upcast))
    return play(spec_of("mixtral", 2), run, card)


def test_only_the_operator_for_old_cards_makes_gradients_of_the_frozen_experts() -> None:
    """transformers `_grouped_mm_fallback_backward`, below compute capability 8.0: zeros_like(weight)."""
    weights = 2 * 8 * 2 * 3584 * 4096
    assert born(on((7, 5)), "gradient of expert gate_up weights") == 2 * weights  # two layers
    for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
        assert born(on(capability), "gradient of expert gate_up weights") == 0


def test_rows_of_the_experts_are_tokens_times_k_whatever_the_number_of_experts() -> None:
    run = run_of({"gc": False})
    few, many = (play(replace(spec_of("qwen3_moe"), num_experts=n), run, NO_CARD) for n in (16, 128))
    rows = {row[2] for row in few.info if row[1] == "expert output weighted"}
    assert rows == {2 * 1024 * 8}
    for name in ("tokens by expert", "expert gate_up", "expert down", "expert output by token"):
        assert born(few, name) == born(many, name) > 0
    assert born(many, "router softmax") == 8 * born(few, "router softmax")


def test_the_trainer_keeps_peft_from_adapting_the_experts() -> None:
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from vramplan.train.lora import add_lora

    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    wrapped = add_lora(transformers.MixtralForCausalLM(config), Lora(r=4, dropout=0.1))
    trained = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained == set(ATTENTION)
