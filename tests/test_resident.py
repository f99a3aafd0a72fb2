"""Resident bytes against the card, and the arithmetic of the quantisation constants."""

from __future__ import annotations

import pytest
from measured import MIB, case_id, model, rows, step_run
from processes import replays

from vramplan.core import architecture as arch
from vramplan.core import resident
from vramplan.core.ledger import simulate
from vramplan.core.types import Levers, Lora, RunSpec, Unplannable

STEPS = rows("h200-step-memory.jsonl")
FIRST = {row["model"]: row for row in reversed(STEPS)}  # no workspace of an earlier case counted yet


@pytest.mark.parametrize("row", FIRST.values(), ids=FIRST)
def test_resident_bytes_equal_the_card(row):
    found = replays()[case_id(row)].resident
    mib = row["mib"]
    assert found.loaded_bytes / MIB == pytest.approx(mib["loaded"], abs=0.02)
    assert found.prepared_bytes / MIB == pytest.approx(mib["prepared"], abs=0.02)
    assert found.with_lora_bytes / MIB == pytest.approx(mib["with_lora"], abs=0.02)


@pytest.mark.parametrize("row", STEPS, ids=case_id)
def test_trainable_parameters_are_peft_s(row):
    assert arch.trainable_parameters(model(row["model"]), step_run(row).lora) == row["trainable"]


@pytest.mark.parametrize("row", STEPS, ids=case_id)
def test_resident_bytes_of_later_cases(row):
    """From its second case on, a process holds the cuBLAS workspaces (64 to 66 MiB) of the first from the start."""
    found = replays()[case_id(row)].resident
    for name in ("loaded", "prepared", "with_lora"):
        assert getattr(found, f"{name}_bytes") / MIB == pytest.approx(row["mib"][name], rel=1e-3, abs=4.2)


def test_single_quantisation_costs_half_a_bit_and_double_an_eighth():
    n = 4096 * 4096
    assert 8 * resident.constants_bytes(n, False) / n == pytest.approx(0.5, rel=1e-3)
    assert 8 * resident.constants_bytes(n, True) / n == pytest.approx(0.127, rel=1e-2)


def test_both_quantisations_of_one_model_match_the_card():
    single = next(r for r in STEPS if not r["double_quant"])
    double = next(r for r in STEPS if r["model"] == single["model"] and r["double_quant"] and r is not STEPS[0])
    found = {r["double_quant"]: replays()[case_id(r)].resident.loaded_bytes for r in (single, double)}
    # the measured single-quantised case ran with 64 MiB of workspaces already there
    assert (found[False] - found[True]) / MIB == pytest.approx(single["mib"]["loaded"] - 732.17, abs=3)


def test_the_tutorial_s_claims_computed():
    llama65 = simulate(model("llama-65b"), RunSpec(model="llama-65b", seq_len=512)).resident
    assert llama65.loaded_bytes / 2**30 == pytest.approx(32.1, abs=0.05)
    attention = Lora(r=8, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    assert arch.trainable_parameters(model("llama-2-7b"), attention) == 8_388_608
    assert arch.trainable_parameters(model("llama-2-7b"), Lora(r=8, targets=("q_proj", "v_proj"))) == 4_194_304


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "lion_8bit", "lion_32bit", "sgd", "adafactor"])
def test_optimizer_state_per_parameter(name):
    spec, lora = model("llama-2-7b"), Lora(r=16)
    on_card, paged = state_of(spec, name)
    per = on_card / arch.trainable_parameters(spec, lora)
    expected = {"adamw_torch": 8, "adamw_8bit": 2 + 8 / 256, "lion_8bit": 1 + 4 / 256, "lion_32bit": 4, "sgd": 0}
    assert paged == 0
    if name in expected:
        assert per == pytest.approx(expected[name], rel=0.01, abs=0.001)
    else:
        assert 0 < per < 1  # row and column means of a matrix of rank 16


def test_paged_state_is_only_paged_from_100_000_elements():
    spec = model("llama-2-7b")
    on_card, paged = state_of(spec, "paged_adamw_8bit")
    whole, _ = state_of(spec, "adamw_8bit")
    assert on_card + paged == whole
    assert paged == 32 * 3 * 16 * 11008 * 2  # gate and up B, down A; 16 x 4096 = 65,536 stay on the card


def test_the_flat_adapter_of_a_fused_layer_is_paged_as_a_whole():
    spec = model("llama-2-7b")
    on_card, paged = state_of(spec, "paged_adamw_8bit", kernels="fused")
    in_a_layer = arch.trainable_parameters(spec, Lora(r=16)) // 32
    assert paged == 32 * 2 * in_a_layer
    scales = resident.rounded(4 * in_a_layer // 256)  # a float32 for each 256 elements
    assert on_card == 32 * 2 * scales + 2 * 1024


def state_of(spec, optimizer, kernels="stock"):
    levers = Levers(optimizer=optimizer, kernels=kernels)
    return resident.optimizer_bytes(spec, RunSpec(model="x", lora=Lora(r=16), levers=levers))


def test_targets_follow_peft():
    spec = model("llama-2-7b")
    assert [x.short for x in arch.lora_linears(spec, Lora(targets=("q_proj", "self_attn.v_proj")))] == [
        "q_proj",
        "v_proj",
    ]
    assert len(arch.lora_linears(spec, Lora())) == 7
    with pytest.raises(Unplannable, match="query_key_value") as error:
        arch.lora_linears(spec, Lora(targets=("query_key_value",)))
    assert "q_proj" in error.value.hint
    with pytest.raises(Unplannable, match="rank"):
        arch.lora_linears(spec, Lora(r=0))


def test_falcon_stays_unquantised_and_experts_too():
    falcon = model("falcon-7b")
    assert not any(x.quantised for x in arch.layer_linears(falcon))
    assert resident.weights(falcon, True).nf4_bytes == 0
    moe = model("qwen3-30b-a3b")
    w = resident.weights(moe, True)
    assert w.experts_bytes > 20 * w.nf4_bytes
    assert resident.weights(falcon, True).experts_bytes == 0
