"""The blocks against the real libraries, played without a card.

`traced_blocks.jsonl` holds the bytes of one steady step of small models (4 layers, 512 words), traced with transformers
5.17, peft 0.21, bitsandbytes 0.50.2 and torch 2.13 under FakeTensorMode, with the kernels and autocast rules of an H200
or an A100. torch never adds gradients in place for tensor subclasses, and fake tensors are one; so nothing is added in
place here either.
"""

from __future__ import annotations

from typing import Any

import pytest
from measured import traced_rows

from vramplan.core import resident, tape
from vramplan.core.replay import workspaces
from vramplan.core.timeline import play
from vramplan.core.types import GpuProfile, Levers, Lora, ModelSpec, RunSpec, Unplannable
from vramplan.sources.hf_config import parse_config
from vramplan.sources.profiles import load_gpu

ROWS = traced_rows()
CARDS = {"h200": "h200", "a100": "a100-40gb"}


def row_id(row: dict[str, Any]) -> str:
    case = row["case"]
    parts = [row["family"], case.get("gpu", "h200"), case.get("attn", "sdpa"), f"{case['batch']}x{case['seq']}"]
    parts += [name for name, default in (("gc", True), ("prepare", True)) if case.get(name, default) is not default]
    return "-".join([*parts, *(["padded"] if case.get("padded") else [])])


def run_of(case: dict[str, Any]) -> RunSpec:
    return RunSpec(
        model="x",
        micro_batch_size=case["batch"],
        seq_len=case["seq"],
        lora=Lora(r=16, dropout=case.get("dropout", 0.05)),
        driver=case.get("mode", "loop"),
        padding=case.get("padded", False),
        levers=Levers(
            upcast="all" if case.get("prepare", True) else "none",
            loss="full",
            checkpointing="all" if case.get("gc", True) else "none",
            optimizer="adamw_torch",
            attention=case.get("attn", "sdpa"),
            allocator="native",
        ),
    )


def peaks(spec: ModelSpec, run: RunSpec, gpu: GpuProfile) -> dict[str, int]:
    """Bytes of all tensors together at the highest point of each phase; the allocator's tails are left out."""
    unrolled = play(spec, run, gpu)
    weights = resident.weights(spec, run.double_quant, run.levers.upcast).total_bytes
    state = resident.optimizer_bytes(spec, run.lora, run.levers)[0]
    now = weights + resident.lora_bytes(spec, run.lora) + state + sum(workspaces(unrolled))
    out: dict[str, int] = {}
    for section, _, changes in unrolled.steps():
        for event, _, _ in changes:
            now += unrolled.info[event][5] if event > 0 else -unrolled.info[-event][5]
            out[section.phase] = max(out.get(section.phase, 0), now)
    return out


@pytest.fixture
def no_sums_in_place(monkeypatch):
    def accumulate(tape_, buffers, node, output, grad):
        slots = buffers.setdefault(node, [None] * node.outputs)
        held = slots[output]
        slots[output] = grad if held is None else tape_.new("gradient sum", held.rows, held.columns, held.dtype)

    monkeypatch.setattr(tape, "_accumulate", accumulate)


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_the_step_is_that_of_the_real_libraries(row, no_sums_in_place):
    spec = parse_config({**row["config"], "architectures": ["x"]}, name=row["family"], source="traced")
    run = run_of(row["case"])
    before = resident.weights(spec, True).total_bytes
    assert before == pytest.approx(row["loaded_bytes"], abs=4096)  # a few scalars
    with_lora = resident.weights(spec, True, run.levers.upcast).total_bytes + resident.lora_bytes(spec, run.lora)
    assert with_lora == pytest.approx(row["with_lora_bytes"], abs=4096)
    found = peaks(spec, run, load_gpu(CARDS[row["case"].get("gpu", "h200")]))
    wanted = {name: row[f"{name}_bytes"] for name in ("forward", "backward", "optimizer")}
    assert max(found.values()) == pytest.approx(max(wanted.values()), rel=0.002)
    for name, size in wanted.items():
        assert found[name] == pytest.approx(size, rel=0.005)


def test_every_family_that_was_traced_is_here():
    families = {row["config"]["model_type"] for row in ROWS}
    assert families >= {"falcon", "cohere", "cohere2", "stablelm", "phi", "olmo", "olmo3", "glm", "glm4", "exaone4",
                        "seed_oss", "ministral"}  # fmt: skip


def test_an_activation_that_is_not_described_is_refused():
    row = next(row for row in ROWS if row["family"] == "phi")
    config = {**row["config"], "hidden_act": "relu2", "architectures": ["x"]}
    spec = parse_config(config, name="x", source="x")
    with pytest.raises(Unplannable, match="activation 'relu2'"):
        play(spec, run_of(row["case"]), load_gpu("h200"))


def test_one_key_head_without_grouped_attention_is_played_in_float32():
    """Falcon-7B: no fused kernel takes 71 heads on one, so the scores are whole tensors, 71 x S x S in float32."""
    spec = next(parse_config({**row["config"], "architectures": ["x"]}, name="x", source="x") for row in ROWS
                if row["family"] == "falcon7")  # fmt: skip
    step = play(spec, RunSpec(model="x", seq_len=128), load_gpu("h200"))
    assert any(row[1:] == ("attention softmax", 16 * 128, 128, "float32", 16 * 128 * 128 * 4) for row in step.info)
