"""Hand-built core values for tests. The sizes are round inventions, chosen to be awkward to print, not predictions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vramplan.core.types import (
    Candidate,
    Choice,
    GpuProfile,
    GpuVerdict,
    Ledger,
    Levers,
    Line,
    MeasuredPhase,
    Measurement,
    ModelSpec,
    Offer,
    Peak,
    PhasePeak,
    Plan,
    Probe,
    Resident,
    RunSpec,
)
from vramplan.core.units import GIB, MIB


def make_model(**changes: Any) -> ModelSpec:
    """The shape of Llama-2-7B."""
    spec = ModelSpec(
        name="llama-2-7b", architecture="LlamaForCausalLM", model_type="llama", hidden_size=4096, num_layers=32,
        num_heads=32, num_kv_heads=32, head_dim=128, intermediate_size=11008, vocab_size=32000,
        max_position_embeddings=4096, source="built-in",
    )  # fmt: skip
    return replace(spec, **changes)


def make_run(**changes: Any) -> RunSpec:
    return replace(RunSpec(model="llama-2-7b"), **changes)


def make_line(key: str, size: int, **changes: Any) -> Line:
    label = key.replace(".", " ").replace("_", " ")
    line = Line(key=key, label=label, bytes=size, formula=f"{size:,} bytes", group=key.partition(".")[0])
    return replace(line, **changes)


LINES = (
    make_line("weights.nf4", 3_238_002_688, label="NF4 weights, packed", formula="6,476,005,376 parameters / 2"),
    make_line("weights.constants", 102_600_000, label="quantisation constants", formula="absmax, nested absmax, codes"),
    make_line("weights.embeddings", 262_144_000, label="embeddings", formula="32000 x 4096 x 2"),
    make_line("weights.lm_head", 262_144_000, label="lm_head", formula="32000 x 4096 x 2"),
    make_line("weights.other", 532_480, label="norms and buffers", formula="65 x 4096 x 2"),
    make_line("adapter.lora", 159_907_840, label="LoRA A and B, float32", formula="39,976,960 x 4"),
    make_line("adapter.gradients", 159_907_840, label="LoRA gradients", formula="39,976,960 x 4"),
    make_line("optimizer.state", 81_200_640, label="paged_adamw_8bit state", formula="39,976,960 x 2.03"),
    make_line("workspace.cublas", 17_039_360, label="cuBLAS workspaces", formula="2 x 8,519,680"),
    make_line("activations.checkpoints", 536_870_912, label="checkpoints", formula="32 layers x 2048 x 4096 x 2"),
    make_line("activations.block", 715_128_832, label="one block, played again", formula="saved tensors of one layer"),
    make_line("activations.gradients", 90_177_536, label="gradients in flight", formula="2048 x (4096 + 11008) x 2"),
    make_line("loss.chunk", 66_000_001, label="fused loss, one chunk", formula="chunk x 32000 x 4"),
    make_line("overhead.allocator", 180_355_072, label="allocator slack", formula="minimum - allocated",
              basis="modelled"),
    make_line("overhead.context", 400 * MIB, label="CUDA context", formula="of the card's profile", basis="modelled"),
)  # fmt: skip


def make_ledger(lines: tuple[Line, ...] = LINES, **changes: Any) -> Ledger:
    """A ledger whose peak is the sum of its lines."""
    allocated = sum(line.bytes for line in lines if not line.key.startswith("overhead."))
    slack = sum(line.bytes for line in lines if line.key == "overhead.allocator")
    device = sum(line.bytes for line in lines)
    ledger = Ledger(
        model=make_model(), run=make_run(), trainable_parameters=39_976_960, total_parameters=6_738_415_616,
        resident=Resident(loaded_bytes=3_866_078_720, prepared_bytes=3_866_610_688, with_lora_bytes=4_026_531_840),
        peak=Peak(allocated_bytes=allocated, phase="backward", reserved_bytes=allocated + 2 * slack,
                  minimum_bytes=allocated + slack, device_bytes=device),
        phases=(PhasePeak(name="forward", peak_bytes=allocated - GIB),
                PhasePeak(name="backward", peak_bytes=allocated)),
        lines=lines,
    )  # fmt: skip
    return replace(ledger, **changes)


def make_gpu(key: str = "rtx-4090", total: int = 24564 * MIB, usable: int = 24081 * MIB, **changes: Any) -> GpuProfile:
    card = GpuProfile(
        key=key, name=f"NVIDIA {key}", total_bytes=total, usable_bytes=usable,
        bandwidth_bytes_per_s=1_008_000_000_000, bf16_flops_per_s=165_000_000_000_000,
    )  # fmt: skip
    return replace(card, **changes)


def make_verdict(gpu: str = "rtx-4090", usable: int = 24081 * MIB, verdict: str = "fits", **changes: Any) -> GpuVerdict:
    value = GpuVerdict(
        gpu=gpu, usable_bytes=usable, verdict=verdict, max_batch_size=11, max_seq_len=24576, tokens_per_s=3120
    )
    return replace(value, **changes)


VERDICTS = (
    make_verdict("rtx-3060-12gb", 11910 * MIB, max_batch_size=4, max_seq_len=8192, tokens_per_s=610),
    make_verdict("rtx-4060", 7806 * MIB, "tight", max_batch_size=1, max_seq_len=2304, tokens_per_s=None),
    make_verdict(),
    make_verdict("gtx-6gb", 5900 * MIB, "does_not_fit", max_batch_size=0, max_seq_len=0, tokens_per_s=None),
)


def make_offer(gpu: str = "rtx-4090", memory_gb: int = 24, usable: int = 24081 * MIB, **changes: Any) -> Offer:
    fastest = Candidate(
        levers=Levers(checkpointing="none"), micro_batch_size=2, accumulation=1, device_bytes=20 * GIB,
        verdict="fits", tokens_per_s=3085,
    )  # fmt: skip
    offer = Offer(
        gpu=gpu, memory_gb=memory_gb, compute_capability=(8, 9), usable_bytes=usable, verdict="fits", levers=Levers(),
        as_asked=True, device_bytes=make_ledger().peak.device_bytes, missing_bytes=0, max_batch_size=23,
        max_seq_len=4096, context_levers=Levers(checkpoint_offload=True), fastest=fastest, tokens_per_s=3085,
        hours_per_million_tokens=1e6 / 3085 / 3600,
    )  # fmt: skip
    return replace(offer, **changes)


UNKNOWN_RATES: dict[str, Any] = {"fastest": None, "tokens_per_s": None, "hours_per_million_tokens": None}
_OFFLOADED = Candidate(
    levers=Levers(checkpoint_offload=True), micro_batch_size=16, accumulation=1, device_bytes=7 * GIB, verdict="fits",
    tokens_per_s=462,
)  # fmt: skip
OFFERS = (
    make_offer("gtx-6gb", 6, 5900 * MIB, verdict="does_not_fit", as_asked=False, missing_bytes=300 * MIB,
               levers=Levers(checkpoint_offload=True), max_batch_size=0, max_seq_len=512, **UNKNOWN_RATES),
    make_offer("rtx-4060", 8, 7806 * MIB, verdict="tight", as_asked=False, levers=Levers(checkpoint_offload=True),
               max_batch_size=2, max_seq_len=3968, fastest=_OFFLOADED, tokens_per_s=462,
               hours_per_million_tokens=1e6 / 462 / 3600),
    make_offer("rtx-3060-12gb", 12, 11910 * MIB, levers=Levers(checkpoint_offload=True, loss="fused", upcast="norms"),
               as_asked=False, max_batch_size=7, max_seq_len=4096, **UNKNOWN_RATES),
    make_offer("v100-32gb", 32, 32491 * MIB, compute_capability=(7, 0), verdict="tight"),
    make_offer(),
    make_offer("rtx-pro-6000-blackwell", 96, 96600 * MIB, max_batch_size=1118, max_seq_len=131072, tokens_per_s=40793,
               hours_per_million_tokens=1e6 / 40793 / 3600),
)  # fmt: skip


def make_priced(offers: tuple[Offer, ...] = OFFERS, price: float = 0.35) -> tuple[Offer, ...]:
    """The same, those whose speed is known with a price; the last is the cheapest."""
    priced = [
        replace(offer, price_per_hour=price, cost_per_million_tokens=price * offer.hours_per_million_tokens)
        if offer.hours_per_million_tokens else offer
        for offer in offers
    ]  # fmt: skip
    return (*priced[:-1], replace(priced[-1], cheapest=True))


def make_choice(**changes: Any) -> Choice:
    choice = Choice(memory_gb=8, as_asked_gb=24, offers=OFFERS[1:2], smaller=OFFERS[0], priced=make_priced()[4:])
    return replace(choice, **changes)


def make_plan(**changes: Any) -> Plan:
    levers = Levers(checkpointing="every-2")
    run = make_run(micro_batch_size=4, accumulation=4, levers=levers)
    ledger = make_ledger(run=run)
    gpu = make_gpu()
    chosen = Candidate(
        levers=levers, micro_batch_size=4, accumulation=4, device_bytes=ledger.peak.device_bytes,
        verdict="fits", tokens_per_s=3400,
    )  # fmt: skip
    other = replace(chosen, levers=Levers(), tokens_per_s=3120, device_bytes=5 * GIB)
    over = replace(
        chosen, levers=Levers(checkpointing="none"), micro_batch_size=8, accumulation=2, verdict="does_not_fit",
        device_bytes=40 * GIB, tokens_per_s=4100,
    )  # fmt: skip
    plan = Plan(
        run=run, ledger=ledger, gpu=gpu, effective_batch_size=16, budget_bytes=gpu.usable_bytes,
        headroom_bytes=gpu.usable_bytes - ledger.peak.device_bytes, verdict="fits",
        reason="fastest of 3 combinations that were priced", candidates=(chosen, other, over),
    )  # fmt: skip
    return replace(plan, **changes)


def make_probe(plan: Plan, **changes: Any) -> Probe:
    """What a card could have said of `plan`: it fits, a little larger and slower than predicted."""
    run, peak = plan.run, plan.ledger.peak
    value = Probe(
        levers=run.levers, micro_batch_size=run.micro_batch_size, accumulation=run.accumulation, ended="finished",
        fits=True, predicted_bytes=peak.allocated_bytes, predicted_process_bytes=peak.device_bytes,
        process_bytes=peak.device_bytes + 90 * MIB, allocated_bytes=peak.allocated_bytes + MIB,
        reserved_bytes=peak.reserved_bytes, predicted_tokens_per_s=3400, tokens_per_s=3290,
    )  # fmt: skip
    return replace(value, **changes)


def make_measurement(**changes: Any) -> Measurement:
    """What a card could have reported for `make_ledger()`: some lines equal, one a little off."""
    measured = tuple(
        replace(line, basis="measured") for line in LINES if line.key.startswith(("weights", "adapter.lora"))
    )
    measured = (*measured[:-1], replace(measured[-1], bytes=measured[-1].bytes + 5 * MIB))
    ledger = make_ledger()
    value = Measurement(
        device="cuda", device_name="NVIDIA rtx-4090", versions=(("torch", "2.13.0"),),
        phases=(
            MeasuredPhase(name="loaded", allocated_bytes=3_866_078_720),
            MeasuredPhase(name="prepared", allocated_bytes=3_866_610_688),
            MeasuredPhase(name="with_lora", allocated_bytes=4_026_531_840),
            MeasuredPhase(name="backward", peak_bytes=ledger.peak.allocated_bytes + 8 * MIB),
            MeasuredPhase(name="step", allocated_bytes=4 * GIB, peak_bytes=ledger.peak.allocated_bytes + 8 * MIB,
                          reserved_bytes=ledger.peak.reserved_bytes, process_bytes=ledger.peak.device_bytes),
        ),
        trainable_parameters=39_976_960, steps=60, tokens=491_520, tokens_per_s=3201.5, ended="finished",
        first_loss=2.31, last_loss=1.12, lines=measured,
    )  # fmt: skip
    return replace(value, **changes)
