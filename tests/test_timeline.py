"""The played step against the card, and its laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
from measured import MIB, TRAINED, case_id, h200, model, rows, trained
from processes import replays
from traced import traced_model

from vramplan.core.blocks import PLAYED
from vramplan.core.ledger import NO_CARD, estimate, simulate
from vramplan.core.masks import pattern_period
from vramplan.core.timeline import Step, checkpointed, play
from vramplan.core.types import Levers, Lora, RunSpec, Unplannable
from vramplan.core.unroll import Unrolled

STEPS = rows("h200-step-memory.jsonl")


@pytest.fixture(scope="module")
def errors():
    """Relative error of the allocated peak, per row."""
    return {}


@pytest.mark.parametrize("row", STEPS, ids=case_id)
def test_peak_against_the_card(row, errors):
    sim = replays()[case_id(row)]
    measured = row["mib"]
    error = sim.allocated_bytes / MIB / measured["peak"] - 1
    errors[case_id(row)] = error
    assert -0.005 < error < 0.0025
    for phase, key in (("forward", "fwd_peak"), ("backward", "bwd_peak"), ("optimizer", "opt_peak")):
        if measured[key] is not None:
            assert sim.played.allocated[phase] / MIB == pytest.approx(measured[key], rel=0.01)


def test_mean_error_of_the_peak(errors):
    if len(errors) < len(STEPS):
        pytest.skip("needs every row of test_peak_against_the_card")
    assert sum(abs(e) for e in errors.values()) / len(errors) < 0.001


@pytest.mark.parametrize("row", TRAINED, ids=lambda row: row["name"])
def test_peaks_of_our_own_trainer_against_the_card(row):
    run, phases = trained(row)
    sim = simulate(model(run.model), run, h200())
    assert sim.resident.loaded_bytes == pytest.approx(phases["loaded"]["allocated_bytes"], rel=0.0002)
    assert sim.resident.with_lora_bytes == pytest.approx(phases["with_lora"]["allocated_bytes"], rel=0.0002)
    assert -0.006 < sim.allocated_bytes / phases["step"]["peak_bytes"] - 1 < 0.0005
    assert sim.played.reserved_bytes == pytest.approx(phases["step"]["reserved_bytes"], rel=0.03)
    for name in ("forward", "optimizer"):
        assert sim.played.allocated[name] == pytest.approx(phases[name]["peak_bytes"], rel=0.002)


TRAINERS = [r for r in rows("h200-trainers.jsonl") if r["mode"] in ("stock", "lean")]


@pytest.mark.parametrize("row", TRAINERS, ids=lambda r: f"{r['mode']}-{r['batch']}x{r['seq']}")
def test_peak_of_trainers_against_the_card(row):
    upcast = "all" if row["mode"] == "stock" else "none"
    run = RunSpec(
        model=row["model"],
        micro_batch_size=row["batch"],
        seq_len=row["seq"],
        driver="loop",
        random_weights=True,
        levers=Levers(upcast=upcast, loss="full", optimizer="adamw_8bit", allocator="native", kernels="stock"),
    )
    sim = simulate(model(row["model"]), run, h200())
    assert sim.allocated_bytes / MIB == pytest.approx(row["peak"], rel=0.0005)
    assert sim.played.reserved_bytes / MIB == pytest.approx(row["reserved"], rel=0.05)


@pytest.mark.parametrize(
    "row", rows("h200-smallest-cap.jsonl"), ids=lambda r: f"{r['batch']}x{r['seq']}{r['conf'][:4]}"
)
def test_smallest_cap_is_never_under_the_measured_one(row):
    kind = "expandable" if row["conf"] else "native"
    run = RunSpec(
        model="llama-2-7b",
        micro_batch_size=row["batch"],
        seq_len=row["seq"],
        driver="loop",
        random_weights=True,
        lora=Lora(targets=("q_proj", "k_proj", "v_proj", "o_proj"), dropout=0.05),
        levers=Levers(upcast="all", loss="full", optimizer="adamw_torch", allocator=kind),
    )
    found = estimate(model("llama-2-7b"), run, h200()).peak.minimum_bytes / MIB
    assert row["mincap"] <= found <= 1.03 * row["mincap"]


# ------------------------------------------------------------------------------------------------------ unrolling
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "all", "every-2", "every-3"])
@pytest.mark.parametrize("name", ["llama-2-7b", "gemma-2-9b", "pythia-1.4b"])
def test_unrolling_is_the_same_as_playing_every_layer(checkpointing, offload, name):
    depth = 20 if checkpointing == "every-3" else 11
    spec = replace(model(name), num_layers=depth)
    levers = Levers(checkpointing=checkpointing, checkpoint_offload=offload, loss="full")
    run = RunSpec(model=name, seq_len=640, accumulation=2, levers=levers)
    short = play(spec, run, NO_CARD)
    assert short.played < depth
    step = Step(spec, run, NO_CARD)
    step.play()
    whole = Unrolled(step.rec, depth, depth, 1)
    assert sizes(short) == sizes(whole)


@pytest.mark.parametrize(
    ("name", "seq", "period"),
    [("gemma-3-12b", 1024, 6), ("gemma-3-12b", 512, 6), ("smollm3-3b", 512, 4), ("phi-3-mini-4k", 2048, 1)],
)
def test_kinds_of_layers_repeat(name, seq, period):
    spec, run = model(name), RunSpec(model=name, seq_len=seq, levers=Levers(checkpointing="every-2", loss="full"))
    assert pattern_period(spec, run) == period
    short = play(spec, run, NO_CARD)
    step = Step(spec, run, NO_CARD)
    step.play()
    whole = Unrolled(step.rec, spec.num_layers, spec.num_layers, 1)
    assert short.played < spec.num_layers
    assert sizes(short) == sizes(whole)


def test_a_window_shorter_than_the_sequence_needs_a_mask():
    def masks(name: str, seq: int) -> int:
        run = RunSpec(model=name, seq_len=seq, levers=Levers(checkpointing="none"))
        unrolled = play(model(name), run, NO_CARD)
        names = [row[1] for row in unrolled.info]
        born = [event for _, _, changes in unrolled.steps() for event, _, _ in changes if event > 0]
        return sum(names[event] == "mask in bf16" for event in born)

    assert masks("phi-3-mini-4k", 2046) == 0
    assert masks("phi-3-mini-4k", 2048) == 32
    assert masks("gemma-3-1b", 512) == 4 * 5 + 2  # 26 layers are 4 times five local and one global, and two local


@pytest.mark.parametrize("depth", range(1, 30))
@pytest.mark.parametrize(
    "levers", [Levers(), Levers(checkpointing="every-4", checkpoint_offload=True), Levers(kernels="stock")]
)
def test_any_depth_is_unrolled(levers, depth):
    """Gemma 3 has the longest period, and its last layers may be of any kind."""
    base = replace(model("gemma-3-1b"), hidden_size=64, vocab_size=256)
    spec = replace(base, num_layers=depth, layer_types=(base.layer_types * 2)[:depth])
    run = RunSpec(model="x", seq_len=1024, levers=levers)
    step = Step(spec, run, NO_CARD)
    step.play()
    assert sizes(play(spec, run, NO_CARD)) == sizes(Unrolled(step.rec, depth, depth, 1))


def sizes(unrolled: Unrolled) -> list[list[int]]:
    """Births (+) and deaths (-) per section; outside the layers, where many layers' tensors die at once, unordered."""
    out, bytes_of = [], unrolled.sizes
    for _, layer, changes in unrolled.steps():
        sized = [bytes_of[abs(e)] * (1 if e > 0 else -1) for e, _, _ in changes]
        out.append(sized if layer >= 0 else sorted(sized))
    return out


def of_family(family: str):
    """A built-in model of this family; the first Gemma is Gemma 2 with fewer norms and no caps."""
    if family == "gemma":
        plain = {"norm_placement": "pre", "attn_logit_softcapping": None, "final_logit_softcapping": None}
        return replace(model("gemma-2-2b"), model_type="gemma", **plain)
    if family == "olmoe":
        return replace(model("qwen3-30b-a3b"), model_type="olmoe", qk_norm="full")
    name = next((n for n in NAMES if model(n).model_type == family), "")
    return model(name) if name else traced_model(family)


@pytest.mark.parametrize("family", sorted(PLAYED))
def test_every_tensor_of_a_step_dies_once_except_workspaces(family):
    unrolled = play(replace(of_family(family), num_layers=6), RunSpec(model=family, seq_len=64), NO_CARD)
    alive = set()
    for _, layer, changes in unrolled.steps():
        for event, key, relative in changes:
            key += (layer << 20) if relative else 0
            if event > 0:
                assert key not in alive
                alive.add(key)
            else:
                alive.remove(key)
            row = unrolled.info[abs(event)]
            if row[0] == "workspace.cublas":
                alive.discard(key)
    assert not alive


NAMES = ("llama-2-7b", "mistral-7b-v0.3", "qwen2.5-0.5b", "qwen3-0.6b", "gemma-2-2b", "gemma-3-1b", "phi-4",
         "olmo-2-7b", "smollm3-3b", "granite-3.1-2b", "starcoder2-3b", "pythia-1.4b", "llama-3.2-1b",
         "mixtral-8x7b", "qwen3-30b-a3b")  # fmt: skip


def test_checkpointed_layers_are_transformers_every_n():
    assert [i for i in range(9) if checkpointed("every-4", i)] == [0, 4, 8]
    assert all(checkpointed("all", i) for i in range(9))
    assert not any(checkpointed("none", i) for i in range(9))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch_size": 0}, "batch size must be at least 1"),
        ({"seq_len": 0}, "sequence length"),
        ({"seq_len": 4097}, "over the 4096"),
        ({"accumulation": 0}, "accumulation"),
        ({"lora": Lora(r=0)}, "rank must be at least 1"),
        ({"lora": Lora(dropout=1.0)}, "dropout"),
        ({"lora": Lora(targets=("nope",))}, "matches no Linear"),
        ({"levers": Levers(optimizer="adamw")}, "no optimizer is called 'adamw'"),
    ],
)
def test_what_has_no_answer_is_refused(change, message):
    with pytest.raises(Unplannable, match=message):
        estimate(model("llama-2-7b"), replace(RunSpec(model="llama-2-7b"), **change))


def test_a_block_that_is_not_described_is_refused():
    with pytest.raises(Unplannable, match="gpt2"):
        estimate(replace(model("llama-2-7b"), model_type="gpt2"), RunSpec(model="gpt2"))
