"""What a script does beside the run as described: each sign, its near miss, and the first fix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from factories import make_gpu

from vramplan.core.architecture import total_parameters
from vramplan.core.diagnose import diagnose
from vramplan.core.fixes import lever
from vramplan.core.ledger import estimate
from vramplan.core.loading import warmup_bytes
from vramplan.core.recipes import RECIPES
from vramplan.core.room import Quick
from vramplan.core.types import Diagnosis, Levers, OomEvidence, RunSpec, Unplannable
from vramplan.core.units import GIB, MIB
from vramplan.sources.hf_config import load_model

MODEL = load_model("mistral-7b-v0.1")
RUN = RunSpec(model="mistral-7b-v0.1", micro_batch_size=1, seq_len=512, recipe="peft", levers=RECIPES["peft"],
              random_weights=True)  # fmt: skip
HEAD = MODEL.vocab_size * MODEL.hidden_size
LAYER = "transformers/modeling_layers.py:109 __call__"
LOSS, STEP, BACK = "loss/loss_utils.py:37 fixed_cross_entropy", "torch/optim/adamw.py:1 _init_group", "a.py:1 backward"
LOAD = "transformers/modeling_utils.py:5064 caching_allocator_warmup"


def told(asked: float, *frames: str, run: RunSpec = RUN, cap: int = 12 * GIB, **fields: Any) -> Diagnosis:
    """Of a card on which PyTorch may have `cap`, and the run as described fits."""
    values = {"allocated_bytes": cap - int(asked) // 2, "reserved_unallocated_bytes": 30 * MIB} | fields
    evidence = OomEvidence(message="CUDA out of memory.", requested_bytes=round(asked), allowed_bytes=cap,
                           total_bytes=80 * GIB, free_bytes=79 * GIB - cap, frames=frames, **values)  # fmt: skip
    return diagnose(evidence, MODEL, run, make_gpu(usable=79 * GIB))


def test_the_run_fits_the_larger_cap_alone() -> None:
    assert 4.5 * GIB < estimate(MODEL, RUN, make_gpu()).peak.minimum_bytes < 11 * GIB


def test_the_length_of_a_long_row_is_told_by_its_logits() -> None:
    found = told(4 * 8192 * MODEL.vocab_size, LOSS)
    assert found.cause_keys[0] == "long_sample" and "1 x about 8,192 tokens" in found.causes[0]
    assert found.fixes[0].title == "rows cut to 512 tokens" and found.fixes[0].run == RUN
    assert told(4 * 512 * MODEL.vocab_size, LOSS).cause_keys[0] != "long_sample"
    assert told(4 * 8192 * MODEL.vocab_size, LOSS, cap=4 * GIB).cause_keys[0] != "long_sample"  # nor does the run fit


def test_what_gives_way_in_a_run_that_should_fit_is_a_symptom() -> None:
    found = told(2 * GIB, "torch/nn/functional.py:1 log_softmax")
    assert found.cause_keys.index("logits") > found.cause_keys.index("not_as_described")
    eager = "llama/modeling_llama.py:190 eager_attention_forward"
    assert told(GIB, eager).cause_keys[0] == "eager_attention"  # described with sdpa: this is what is not as described
    same = replace(RUN, levers=replace(RUN.levers, attention="eager"))
    assert told(GIB, eager, run=same).cause_keys[0] == "not_as_described"


@pytest.mark.parametrize("wrapped", ["torch/utils/checkpoint.py:522 checkpoint", "fast/checkpoint.py:51 checkpoint"])
def test_a_layer_outside_a_checkpoint(wrapped: str) -> None:
    found = told(256 * MIB, LAYER, "torch/nn/modules/module.py:1 _call_impl", "peft/lora/bnb.py:1 forward")
    assert found.cause_keys[0] == "checkpointing" and "inactive" in found.causes[0]
    assert found.fixes[0].title == "checkpointing that is active" and found.fixes[0].run == RUN
    assert "inactive" not in " ".join(told(256 * MIB, LAYER, wrapped).causes[:1])
    none = replace(RUN, levers=replace(RUN.levers, checkpointing="none"))
    assert "inactive in" not in " ".join(told(256 * MIB, LAYER, run=none).causes)


def test_weights_that_come_whole() -> None:
    whole = total_parameters(MODEL)
    for width, words in ((2, "16 bits"), (4, "float32")):
        found = told(width * whole, LOAD, allocated_bytes=0)
        assert found.cause_keys[0] == "unquantised" and words in found.causes[0]
        assert found.fixes[0].title == "the base loaded in 4 bits"
    assert told(3 * whole, LOAD, allocated_bytes=0).cause_keys[0] == "loading"
    assert "unquantised" not in told(2 * whole, BACK).cause_keys


def test_a_base_in_float32() -> None:
    for asked in (warmup_bytes(MODEL, 4), 4 * HEAD):
        found = told(asked, LOAD, allocated_bytes=0)
        assert found.cause_keys[0] == "float32_base" and found.fixes[0].title == "the base loaded in bf16"
    assert "float32_base" not in told(2 * HEAD, LOAD, allocated_bytes=0).cause_keys


def test_a_card_that_this_process_was_using_when_it_began_to_load() -> None:
    found = told(warmup_bytes(MODEL), LOAD, allocated_bytes=9 * GIB)
    assert found.cause_keys[0] == "loading" and "held 9.00 GiB already" in found.causes[0]
    assert "already:" not in told(warmup_bytes(MODEL), LOAD, allocated_bytes=0).causes[0]


@pytest.mark.parametrize(
    ("width", "frames", "trained"),
    [(4, (STEP,), True), (4, (BACK,), True), (2, (BACK,), True), (2, (STEP,), False), (4, (LOSS,), False),
     (4, ("peft/utils/other.py:300 update", "python3.12/copy.py:150 deepcopy"), True),
     (4, ("python3.12/copy.py:150 deepcopy",), False)],
)  # fmt: skip
def test_a_trainable_head(width: int, frames: tuple[str, ...], trained: bool) -> None:
    found = told(width * HEAD, *frames)
    assert (found.cause_keys[0] == "trainable_head") == trained
    assert not trained or found.fixes[0].title == "embeddings and head left frozen"


def test_float32_within_bitsandbytes() -> None:
    frame, widest = "bitsandbytes/autograd/_functions.py:300 forward", 4 * 4096 * 14336
    found = told(widest, frame)
    assert found.cause_keys[0] == "float32_compute" and "_proj [14,336 x 4,096]" in found.causes[0]
    assert "float32_compute" not in told(widest, "a.py:1 forward").cause_keys
    assert "float32_compute" not in told(widest // 2, frame).cause_keys


# --------------------------------------------------------------------------------------- what is left where all is lean
def test_the_cap_is_the_card_of_a_run_that_needs_more() -> None:
    lean = RunSpec(model=MODEL.name, micro_batch_size=24, seq_len=2048, random_weights=True)
    found = told(300 * MIB, "a.py:1 backward", run=lean, cap=8 * GIB)
    assert found.cause_keys[0] == "batch" and found.cause_keys[-1] == "cap"


def test_one_row_that_is_too_long() -> None:
    lean = RunSpec(model=MODEL.name, seq_len=32768, levers=Levers(checkpoint_offload=True), random_weights=True)
    found = told(300 * MIB, "a.py:1 backward", run=lean, cap=7 * GIB)
    assert "sequence" in found.cause_keys[:2] and found.fixes[0].fits
    assert found.fixes[0].title.startswith("sequences of")
    assert "sequence" not in told(300 * MIB, run=replace(lean, micro_batch_size=2), cap=7 * GIB).cause_keys


def test_a_fix_that_fits_is_never_behind_one_that_does_not() -> None:
    lean = RunSpec(model=MODEL.name, seq_len=16384, random_weights=True)
    need = estimate(MODEL, lean, make_gpu(usable=79 * GIB)).peak.minimum_bytes
    for cap in (need * 6 // 10, need * 7 // 10, need * 8 // 10, need * 9 // 10):
        fits = [bool(fix.fits) for fix in told(300 * MIB, run=lean, cap=cap).fixes]
        assert fits == sorted(fits, reverse=True)


def test_a_run_beyond_all_addresses_is_refused() -> None:
    spec = load_model("llama-3.2-1b")
    levers = Levers(attention="eager", kernels="stock", checkpointing="none")
    with pytest.raises(Unplannable, match="4 TiB"):
        estimate(spec, RunSpec(model=spec.name, micro_batch_size=8, seq_len=65536, levers=levers), make_gpu())


def test_logits_of_the_batch_described_and_all_that_layers_save_are_inactive_checkpointing() -> None:
    logits = 4 * 512 * MODEL.vocab_size
    quick = Quick(MODEL)
    with_all = quick.tensor_bytes(RUN, make_gpu())
    without = quick.tensor_bytes(lever(checkpointing="none")(RUN), make_gpu())
    assert without > 1.1 * with_all
    held = {"allocated_bytes": without - logits, "cap": 40 * GIB}
    found = told(logits, LOSS, **held)
    assert found.cause_keys[0] == "checkpointing" and "512 tokens described" in found.causes[0]
    assert found.fixes[0].title == "checkpointing that is active"
    assert told(logits, LOSS, allocated_bytes=with_all - logits, cap=40 * GIB).cause_keys[0] != "checkpointing"
    assert told(2 * logits, LOSS, **held).cause_keys[0] == "long_sample"


def test_a_head_that_autocast_copies_is_float32() -> None:
    copied = 2 * MODEL.vocab_size * MODEL.hidden_size
    bare = lever(upcast="none")(RUN)
    forward = ("a.py:1 compute_loss", "torch/nn/modules/linear.py:134 forward")
    assert told(copied, *forward, run=bare).cause_keys[0] == "float32_base"
    assert "float32_base" not in told(copied, *forward, run=lever(upcast="all")(RUN)).cause_keys


def test_a_request_larger_than_any_tensor_described_is_no_fragmentation() -> None:
    idle = {"reserved_unallocated_bytes": 3 * GIB, "allocated_bytes": 8 * GIB}
    found = told(2.5 * GIB, "a.py:1 forward", **idle)
    assert found.cause_keys[:2] == ("not_as_described", "fragmentation")
    assert told(28 * MIB, "a.py:1 forward", **idle).cause_keys[0] == "fragmentation"
