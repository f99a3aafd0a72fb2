"""Loading from a checkpoint, tensor by tensor: against the card, and whether it decides what fits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from measured import MIB, h200, model, rows

from vramplan.core.allocator import Native
from vramplan.core.expandable import allocator
from vramplan.core.ledger import estimate, simulate
from vramplan.core.loading import Loader, warmup_bytes
from vramplan.core.room import judge
from vramplan.core.types import Ledger, Levers, Lora, RunSpec


@pytest.mark.parametrize("row", rows("h200-loading.jsonl"), ids=lambda r: r["device_map"])
def test_loading_a_checkpoint_against_the_card(row):
    memory = Native()
    Loader(memory, model(row["model"]), double_quant=True).load()
    assert memory.allocated / MIB == pytest.approx(row["loaded"], abs=0.01)
    assert memory.peak_allocated / MIB == pytest.approx(row["load_peak"], abs=0.51)
    assert memory.peak_reserved / MIB == pytest.approx(row["load_peak_reserved"], abs=2.01)
    assert memory.reserved == memory.peak_reserved  # from_pretrained empties no cache


@pytest.mark.parametrize("row", rows("h200-load.jsonl"), ids=lambda r: f"{r['model']}-{r['allocator']}")
def test_from_pretrained_prepare_and_lora_against_the_card(row):
    """To the KiB: the process that was measured held two scalars (1 KiB) that are none of the model's."""
    lora = Lora(r=row["lora_r"], targets=tuple(row["lora_targets"]))
    held = Loader(allocator(row["allocator"]), model(row["model"]), row["double_quant"]).prepare("all", lora)
    mib = row["mib"]
    for name in ("loaded", "prepared", "with_lora"):
        assert mib[name] - getattr(held.resident, f"{name}_bytes") / MIB == pytest.approx(1 / 1024, abs=1e-9)
    assert held.load_peak_bytes / MIB == pytest.approx(mib["peak"], abs=0.03)
    assert held.loaded_reserved_bytes / MIB == mib["reserved"]


def tails(ledger: Ledger) -> int:
    return sum(line.bytes for line in ledger.lines if line.key == "overhead.checkpoint_tails")


@pytest.mark.parametrize("name", ["tinyllama-1.1b", "llama-2-7b", "pythia-1.4b"])
def test_an_estimate_is_laid_out_like_a_model_built_by_layer_and_holds_a_checkpoint_s_tails_too(name):
    """Native: the steps of `vramplan measure`; what from_pretrained leaves above that is a line of its own."""
    run = RunSpec(model=name, levers=Levers(upcast="all", loss="full", allocator="native"))
    drawn = replace(run, random_weights=True)
    built, read = simulate(model(name), drawn, h200()), simulate(model(name), run, h200())
    assert built.resident != read.resident
    asked, measured = estimate(model(name), run, h200()), estimate(model(name), drawn, h200())
    assert asked.resident == measured.resident == built.resident
    assert asked.peak.allocated_bytes == measured.peak.allocated_bytes == built.allocated_bytes
    more = read.resident.with_lora_bytes - built.resident.with_lora_bytes
    assert (tails(asked), tails(measured)) == (max(more, 0), 0)
    assert asked.peak.minimum_bytes - measured.peak.minimum_bytes == tails(asked)
    assert {p.name: p.peak_bytes for p in asked.phases}["load"] == read.held.load_peak_bytes
    for ledger in (asked, measured):
        assert sum(line.bytes for line in ledger.lines) == ledger.peak.device_bytes
        assert ledger.peak.reserved_bytes >= ledger.peak.minimum_bytes


def test_expandable_segments_leave_no_tails():
    run = RunSpec(model="tinyllama-1.1b", levers=Levers(upcast="all"))
    spec = model("tinyllama-1.1b")
    asked = estimate(spec, run, h200())
    assert asked.resident == estimate(spec, replace(run, random_weights=True), h200()).resident
    assert tails(asked) == 0


def test_the_warm_up_takes_half_a_byte_a_quantised_weight_and_two_for_the_rest():
    spec = model("llama-3.1-8b")
    linears = spec.num_layers * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = 2 * 128256 * 4096 + (2 * spec.num_layers + 1) * 4096
    assert warmup_bytes(spec) == linears // 2 + 2 * rest
    assert warmup_bytes(spec, 4) == linears // 2 + 4 * rest  # a base in float32


def test_a_tied_head_is_warmed_up_for_once():
    untied = replace(model("qwen2.5-0.5b"), tie_word_embeddings=False)
    both = [warmup_bytes(spec) for spec in (model("qwen2.5-0.5b"), untied)]
    assert both[1] - both[0] == 2 * untied.vocab_size * untied.hidden_size


@pytest.mark.parametrize("drawn", [False, True])
def test_unloading_gives_everything_back(drawn):
    memory = Native()
    loader = Loader(memory, model("qwen2.5-0.5b"), True, drawn)
    loader.prepare("all", Lora())
    assert memory.allocated > 0
    loader.unload()
    memory.empty_cache()
    assert (memory.allocated, memory.reserved) == (0, 0)


@pytest.mark.parametrize("kind", ["native", "expandable"])
def test_a_card_that_cannot_load_the_model_does_not_fit(kind):
    """Experts are stacked while loading, in twice their bytes: with few layers that is the highest point of a run."""
    spec = replace(model("qwen3-30b-a3b"), num_layers=2)
    run = RunSpec(model="two layers", seq_len=64, levers=Levers(allocator=kind))
    ledger = estimate(spec, run, h200())
    loading = next(p.peak_bytes for p in ledger.phases if p.name == "load")
    assert loading > ledger.peak.allocated_bytes
    assert ledger.peak.minimum_bytes >= loading
    assert ledger.peak.reserved_bytes >= ledger.peak.minimum_bytes
    assert sum(line.bytes for line in ledger.lines) == ledger.peak.device_bytes
    assert any("loading, not training" in warning for warning in ledger.warnings)
    trains = replace(h200(), usable_bytes=ledger.peak.allocated_bytes + h200().context_bytes + 100 * MIB)
    assert judge(ledger, trains) == "does_not_fit"


def test_loading_says_nothing_where_training_is_higher():
    ledger = estimate(model("llama-2-7b"), RunSpec(model="llama-2-7b"), h200())
    assert not any("loading" in warning for warning in ledger.warnings)
    assert all(line.key != "overhead.loading" for line in ledger.lines)
