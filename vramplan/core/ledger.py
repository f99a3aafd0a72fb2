"""The ledger: plays a run and says what is on the card at the highest point, row by row."""

from __future__ import annotations

from typing import NamedTuple

from . import architecture as arch
from . import resident
from .allocator import Native, OutOfMemory
from .expandable import allocator
from .loading import Loader
from .replay import Played, live_at_peak, play_step, workspaces
from .timeline import play
from .types import OPTIMIZERS, GpuProfile, Ledger, Line, ModelSpec, Peak, PhasePeak, Resident, RunSpec, Unplannable
from .units import MIB
from .unroll import Unrolled

# What chip-dependent numbers are for when no card is named: compute capability 8.9 (RTX 40 series, L4, L40S).
NO_CARD = GpuProfile(
    key="generic", name="a card of compute capability 8.9", total_bytes=0, usable_bytes=0, sm_count=128
)

# What a run needs at least, found in the replay, and the margin on it: a real card needed up to 0.9 % (expandable) and
# 2.7 % (native) more (docs/measurements). Native: caps tried, as multiples of the allocated peak.
CAP_LADDER = (1.01, 1.03, 1.06, 1.10, 1.15, 1.20)
MARGIN = {"expandable": 0.01, "native": 0.03}

NOTABLE_PAGED_BYTES = 256 * MIB

GROUPS = {
    "adapter": "adapter",
    "activations": "activations",
    "loss": "loss",
    "optimizer": "optimizer",
    "workspace": "workspace",
}
LABELS = {
    "adapter.casts": "bf16 copies of the adapter",
    "adapter.gradients": "adapter gradients",
    "activations.inputs": "batch, embeddings, cos and sin",
    "activations.checkpoints": "checkpointed layer inputs",
    "activations.layers": "saved by the layers",
    "activations.head": "final norm",
    "activations.gradients": "gradients in flight",
    "workspace.dequantised": "weight dequantised to bf16",
    "workspace.cublas": "cuBLAS workspaces",
    "loss.logits": "logits",
    "loss.log_softmax": "log_softmax of the logits",
    "loss.gradients": "gradients of the loss",
    "optimizer.scratch": "optimizer scratch",
}


class Simulation(NamedTuple):
    """One run played through the allocator."""

    unrolled: Unrolled
    resident: Resident
    load_peak_bytes: int
    workspace_bytes: int
    optimizer_bytes: int
    paged_bytes: int
    played: Played
    pinned_bytes: int  # pages in use at the highest point
    before_step: Native  # the allocator as the steady step finds it

    @property
    def allocated_bytes(self) -> int:
        return max(self.played.allocated.values())


def check_run(spec: ModelSpec, run: RunSpec) -> None:
    """Refuse what has no answer. Raises Unplannable."""
    for name, value in (("batch size", run.micro_batch_size), ("sequence length", run.seq_len),
                        ("number of accumulation steps", run.accumulation)):  # fmt: skip
        if value < 1:
            raise Unplannable(f"the {name} must be at least 1, not {value}")
    if run.seq_len > spec.max_position_embeddings:
        raise Unplannable(
            f"a sequence of {run.seq_len} tokens is over the {spec.max_position_embeddings} that {spec.name} can take",
            f"use --seq-len {spec.max_position_embeddings} or less",
        )
    if not 0 <= run.lora.dropout < 1:
        raise Unplannable(f"the LoRA dropout must be at least 0 and below 1, not {run.lora.dropout}")
    if run.levers.optimizer not in OPTIMIZERS:
        raise Unplannable(f"no optimizer is called {run.levers.optimizer!r}", "known: " + ", ".join(OPTIMIZERS))
    if run.levers.resident_layers is not None:
        raise Unplannable("streaming of layers cannot be planned yet", "leave resident_layers out")


def simulate(spec: ModelSpec, run: RunSpec, gpu: GpuProfile | None = None) -> Simulation:
    """Load, prepare, wrap, then one steady step (gradients made, optimizer state and workspaces there)."""
    check_run(spec, run)
    levers = run.levers
    unrolled = play(spec, run, gpu or NO_CARD)
    memory = allocator(levers.allocator)
    loader = Loader(memory, spec, run.double_quant, run.random_weights)
    loader.load()
    loaded, load_peak = memory.allocated, memory.peak_allocated
    loader.upcast(levers.upcast)
    prepared = memory.allocated
    loader.add_lora(run.lora)
    with_lora = memory.allocated
    memory.empty_cache()
    on_card, paged = resident.optimizer_bytes(spec, run.lora, levers)
    _allocate_state(memory, spec, run, on_card)
    held = workspaces(unrolled)
    for size in held:
        memory.malloc(size)
    memory.reset_peaks()
    before = memory.clone()
    memory.watch_bytes = memory.allocated + unrolled.peak_bytes() - MIB
    played = play_step(unrolled, memory)
    return Simulation(
        unrolled,
        Resident(loaded_bytes=loaded, prepared_bytes=prepared, with_lora_bytes=with_lora),
        load_peak,
        sum(held),
        on_card,
        paged,
        played,
        memory.pinned_bytes,
        before,
    )


def _allocate_state(memory: Native, spec: ModelSpec, run: RunSpec, on_card: int) -> None:
    """Two moments per adapter tensor; what is left (scales, code tables, small paged states) in one piece."""
    shapes = resident.lora_tensors(spec, run.lora) * spec.num_layers
    each = [resident.state_tensor_bytes(run.levers.optimizer, a * b) for a, b in shapes]
    for size in each:
        for _ in range(resident.moments(run.levers.optimizer) if size else 0):
            memory.malloc(size)
    rest = on_card - resident.moments(run.levers.optimizer) * sum(each)
    while rest > 0:
        memory.malloc(min(rest, MIB))
        rest -= MIB


def minimum_bytes(sim: Simulation, kind: str) -> int:
    """The smallest allocator cap under which the run survives, with its margin.

    Expandable segments: the pages that hold something at the highest point; all others can be given back. Native, where
    the layout itself changes under pressure: the first of a ladder of caps that the replay survives. Never more than
    what the run reserves when it has room to spare.
    """
    if kind == "expandable":
        return min(int(sim.pinned_bytes * (1 + MARGIN[kind])), sim.played.reserved_bytes)
    for factor in CAP_LADDER:
        cap = int(sim.allocated_bytes * factor)
        if cap >= sim.played.reserved_bytes:
            break
        memory = sim.before_step.clone()
        memory.cap_bytes = cap
        try:
            play_step(sim.unrolled, memory)
        except OutOfMemory:
            continue
        return min(int(cap * (1 + MARGIN[kind])), sim.played.reserved_bytes)
    return sim.played.reserved_bytes


def estimate(model: ModelSpec, run: RunSpec, gpu: GpuProfile | None = None) -> Ledger:
    """What every byte of `run` on `model` will be, at the highest point of a steady optimizer step.

    Numbers that depend on the chip are those of `gpu`, or of compute capability 8.9. Raises Unplannable.
    """
    card = gpu or NO_CARD
    sim = simulate(model, run, card)
    phase, live = live_at_peak(sim.unrolled)
    lines = _lines(model, run, sim, live)
    allocated = sim.allocated_bytes
    rest = allocated - sum(line.bytes for line in lines)
    lines.append(
        Line(key="overhead.rounding", label="tails of blocks too small to split", bytes=rest,
             formula="allocator replay minus the tensors", group="overhead")
    )  # fmt: skip
    least = minimum_bytes(sim, run.levers.allocator)
    lines += [
        Line(key="overhead.allocator", label="fragmentation that cannot be avoided", bytes=least - allocated,
             formula="smallest cap that the replay survives, with a margin", basis="modelled", group="overhead"),
        Line(key="overhead.context", label="CUDA context", bytes=card.context_bytes,
             formula="per process and card", basis=card.context_basis, group="overhead"),
    ]  # fmt: skip
    peaks = {"load": sim.load_peak_bytes, **sim.played.allocated}
    return Ledger(
        model=model,
        run=run,
        trainable_parameters=arch.trainable_parameters(model, run.lora),
        total_parameters=arch.total_parameters(model),
        resident=sim.resident,
        peak=Peak(
            allocated_bytes=allocated,
            phase=phase,
            reserved_bytes=sim.played.reserved_bytes,
            minimum_bytes=least,
            device_bytes=least + card.context_bytes,
        ),
        phases=tuple(PhasePeak(name=name, peak_bytes=size) for name, size in peaks.items()),
        lines=tuple(line for line in lines if line.bytes),
        warnings=_warnings(model, run, sim, gpu),
    )


def _lines(model: ModelSpec, run: RunSpec, sim: Simulation, live: list[tuple[int, int]]) -> list[Line]:
    """Resident rows, then the tensors of the step that are alive at the peak, by key."""
    lines = resident.weight_lines(model, run.double_quant, run.levers.upcast)
    r = run.lora.r
    trainable = arch.trainable_parameters(model, run.lora)
    lines.append(
        Line(key="adapter.lora", label=f"LoRA adapter, r={r}", bytes=resident.lora_bytes(model, run.lora),
             formula=f"{trainable:,} x 4 (float32)", group="adapter")
    )  # fmt: skip
    if sim.optimizer_bytes:
        name = run.levers.optimizer
        lines.append(
            Line(key="optimizer.state", label=f"optimizer state, {name}", bytes=sim.optimizer_bytes,
                 formula=_state_formula(trainable, sim), group="optimizer")
        )  # fmt: skip
    if sim.workspace_bytes:
        lines.append(
            Line(key="workspace.cublas", label=LABELS["workspace.cublas"], bytes=sim.workspace_bytes,
                 formula="one per thread that multiplies", group="workspace")
        )  # fmt: skip
    return lines + _step_lines(sim.unrolled, live)


def _state_formula(trainable: int, sim: Simulation) -> str:
    paged = f", {sim.paged_bytes:,} more in pageable memory" if sim.paged_bytes else ""
    return f"{trainable:,} parameters, {sim.optimizer_bytes / trainable:.2f} bytes each{paged}"


def _step_lines(unrolled: Unrolled, live: list[tuple[int, int]]) -> list[Line]:
    sizes: dict[str, int] = {}
    tensors: dict[str, dict[tuple[str, int, int, str], tuple[int, int]]] = {}
    for ident, count in live:
        key, name, rows, columns, dtype, size = unrolled.info[ident]
        sizes[key] = sizes.get(key, 0) + size * count
        group = tensors.setdefault(key, {})
        n, total = group.get((name, rows, columns, dtype), (0, 0))
        group[name, rows, columns, dtype] = (n + count, total + size * count)
    return [
        Line(key=key, label=LABELS.get(key, key), bytes=size, formula=_formula(tensors[key]),
             group=GROUPS[key.split(".")[0]])
        for key, size in sizes.items()
    ]  # fmt: skip


def _formula(tensors: dict[tuple[str, int, int, str], tuple[int, int]]) -> str:
    """The largest tensors of a row: "32 x layer input kept [2048 x 4096 bfloat16] + 3 more"."""
    ranked = sorted(tensors.items(), key=lambda item: -item[1][1])
    parts = [
        f"{f'{count} x ' if count > 1 else ''}{name} [{rows} x {columns} {dtype}]"
        for (name, rows, columns, dtype), (count, _) in ranked[:2]
    ]
    more = len(ranked) - len(parts)
    return " + ".join(parts) + (f" + {more} more" if more else "")


def _warnings(model: ModelSpec, run: RunSpec, sim: Simulation, gpu: GpuProfile | None) -> tuple[str, ...]:
    out = []
    if not all(x.quantised for x in arch.layer_linears(model)):
        out.append(f"transformers leaves the Linears of {model.model_type} unquantised: the weights stay bf16")
    if model.num_experts:
        out.append("the experts are 3-D parameters that bitsandbytes does not quantise: they stay bf16")
    if sim.load_peak_bytes > sim.allocated_bytes:
        out.append("loading, not training, is the highest point of this run")
    if gpu is not None and gpu.compute_capability < (8, 0):
        out.append(f"{gpu.name} has no bf16 tensor cores: this plan assumes bf16")
    if sim.paged_bytes > NOTABLE_PAGED_BYTES:
        out.append(
            f"{sim.paged_bytes / MIB:.0f} MiB of optimizer state are in managed memory, which may also occupy the card"
        )
    return tuple(out)
