"""The step in closed form against the real libraries, run on fake tensors by `vramplan.trace`."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from traced import CONFIGS, EXPERTS, STEP, births, draw, highest, lean, played_peaks, spec_of, traced_peaks

from vramplan.core.architecture import layer_linears
from vramplan.core.timeline import play
from vramplan.core.types import GpuProfile, Lora, RunSpec, Unplannable
from vramplan.core.unroll import Unrolled
from vramplan.sources.profiles import load_gpu

for library in ("torch", "transformers", "peft", "accelerate", "bitsandbytes"):
    pytest.importorskip(library)

from vramplan.trace.step import trace  # noqa: E402

COMMON = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "granite", "gpt_neox", "falcon-40b",
          "stablelm", "cohere", "phi", "olmo2", "glm", "qwen3_moe")  # fmt: skip
SETTINGS, FEWER = 12, 2
PACKABLE = tuple(f for f in CONFIGS if not f.startswith(("falcon", "stablelm", "gemma2")))


def traced(family: str, run: RunSpec, gpu: GpuProfile) -> Unrolled:
    layers = CONFIGS[family]["num_hidden_layers"]
    return Unrolled(trace(dict(CONFIGS[family]), run, gpu, layers, spec_of(family)).rec, layers, layers, 1)


def agree(family: str, run: RunSpec, gpu: GpuProfile) -> None:
    """Every phase has the same peak, played and traced."""
    spec = spec_of(family)
    real = traced(family, run, gpu)
    wanted, found = traced_peaks(real), played_peaks(spec, run, gpu)
    step_wanted, step_found = highest(real, 0), highest(play(spec, run, gpu), 0)
    for phase in STEP:
        assert found[phase] == pytest.approx(wanted[phase], rel=0.002), (phase, run, gpu.key)
        # The step alone: what is resident differs by a few scalars. In a run's first step, which is the one that is
        # traced, bitsandbytes casts biases that were made float32 back to bf16, for good.
        if run.levers.upcast != "all" or not any(x.bias for x in layer_linears(spec)):
            near = pytest.approx(step_wanted[phase], abs=0.0001 * wanted[phase])
            assert step_found[phase] == near, (phase, run, gpu.key)


@pytest.mark.parametrize("family", CONFIGS)
def test_peaks_of_runs_drawn_at_random(family: str) -> None:
    """All that changes a step is drawn: recipe, levers, optimizer, attention, adapter, padding, batch, card."""
    rng = random.Random(f"2024 {family}")
    for _ in range(SETTINGS if family in COMMON else FEWER):
        agree(family, *draw(rng, family))


def packed(run: RunSpec) -> RunSpec:
    return replace(run, packing=True, padding=False, levers=replace(run.levers, attention="sdpa"))


@pytest.mark.parametrize("family", PACKABLE)
def test_peaks_of_packed_runs_drawn_at_random(family: str) -> None:
    rng = random.Random(f"packed {family}")
    for _ in range(FEWER):
        run, gpu = draw(rng, family)
        agree(family, packed(run), gpu)


@pytest.mark.parametrize("family", [f for f in PACKABLE if f not in EXPERTS])
def test_every_tensor_of_a_packed_step_is_born_in_order(family: str) -> None:
    run, gpu = packed(lean(family)), load_gpu("rtx-4090")
    assert births(play(spec_of(family), run, gpu)) == births(traced(family, run, gpu))


def test_what_cannot_be_packed_is_refused() -> None:
    for family, words in {"falcon-7b": "cannot be told", "stablelm": "cannot be told", "gemma2": "soft-caps"}.items():
        with pytest.raises(Unplannable, match=words):
            play(spec_of(family), packed(lean(family)), load_gpu("h200"))
    with pytest.raises(Unplannable, match="eager does not"):
        play(spec_of("llama"), replace(lean("llama", attention="eager"), packing=True), load_gpu("h200"))
    with pytest.raises(Unplannable, match=r"8\.0 or newer, not 7\.5"):
        play(spec_of("llama"), packed(lean("llama")), load_gpu("t4"))


@pytest.mark.parametrize("kernels", ["stock", "fused"])
@pytest.mark.parametrize("checkpointing", ["all", "none"])
@pytest.mark.parametrize("family", [f for f in CONFIGS if f not in (*EXPERTS, "falcon-7b")])
def test_every_tensor_is_born_in_the_order_of_the_libraries(family: str, checkpointing: str, kernels: str) -> None:
    run, gpu = lean(family, checkpointing=checkpointing, kernels=kernels), load_gpu("h200")
    assert births(play(spec_of(family), run, gpu)) == births(traced(family, run, gpu))


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "down_proj")])
def test_every_tensor_is_born_in_order_where_some_fused_linears_have_no_adapter(targets: tuple[str, ...]) -> None:
    run, gpu = replace(lean("llama"), lora=Lora(targets=targets)), load_gpu("h200")
    assert births(play(spec_of("llama"), run, gpu)) == births(traced("llama", run, gpu))


def test_a_different_step_is_told_apart() -> None:
    """What the comparison above would say of a block that keeps one tensor too many."""
    run, gpu = lean("llama"), load_gpu("h200")
    real = traced("llama", run, gpu)
    other = play(spec_of("granite"), run, gpu)  # two multiplications more
    assert births(other) != births(real)
    assert highest(play(spec_of("llama"), run, gpu), 0)["backward"] == highest(real, 0)["backward"]
