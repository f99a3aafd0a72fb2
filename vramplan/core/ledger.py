"""The ledger: plays a run and says what is on the card at the highest point, row by row."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from . import architecture as arch
from . import resident
from .allocator import Native, units
from .caps import Caps
from .expandable import Expandable, allocator
from .fused import is_fused
from .growth import play_grown
from .loading import Held, Loader
from .parallel import check_parallel, nccl_bytes, shards
from .replay import Played, live_at_peak, play_run, workspaces
from .timeline import play
from .types import (
    OPTIMIZERS,
    GpuProfile,
    Ledger,
    Line,
    Lora,
    ModelSpec,
    Peak,
    PhasePeak,
    Resident,
    RunSpec,
    Unplannable,
)
from .units import MIB, human
from .unroll import Unrolled

# What chip-dependent numbers are for when no card is named: compute capability 8.9 (RTX 40 series, L4, L40S).
NO_CARD = GpuProfile(
    key="generic", name="a card of compute capability 8.9", total_bytes=0, usable_bytes=0, sm_count=128
)

NOTABLE_PAGED_BYTES = 256 * MIB

GROUPS = {
    "weights": "weights",
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
    "weights.gathered": "gathered from the other cards",
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
    held: Held
    workspace_bytes: int
    optimizer_bytes: int
    paged_bytes: int
    played: Played
    pinned_bytes: int  # pages or segments in use at the highest point
    before_step: Native  # the allocator as the first step finds it
    states: tuple[int, ...]  # sizes of the optimizer's tensors

    @property
    def allocated_bytes(self) -> int:
        return max(self.played.allocated.values())

    @property
    def resident(self) -> Resident:
        return self.held.resident

    @property
    def load_peak_bytes(self) -> int:
        return self.held.load_peak_bytes


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
    check_parallel(run)
    if run.levers.resident_layers is not None:
        raise Unplannable("streaming of layers cannot be planned yet", "leave resident_layers out")


@lru_cache(maxsize=16)
def _loaded(
    spec: ModelSpec,
    double_quant: bool,
    lora: Lora,
    upcast: str,
    kind: str,
    random_weights: bool,
    parts: int,
    flat: bool,
) -> tuple[Held, Native]:
    loader = Loader(allocator(kind), spec, double_quant, random_weights, parts)
    return loader.prepare(upcast, lora, flat), loader.memory


def loaded(spec: ModelSpec, run: RunSpec) -> tuple[Held, Native]:
    """A fresh process before its first step. Kept, because a search tries many runs of one model: clone it."""
    upcast, kind = run.levers.upcast, run.levers.allocator
    fused = is_fused(spec, run)
    return _loaded(spec, run.double_quant, run.lora, upcast, kind, run.random_weights, shards(run), fused)


def simulate(
    spec: ModelSpec,
    run: RunSpec,
    gpu: GpuProfile | None = None,
    loader: Loader | None = None,
    warm: bool = False,
    unrolled: Unrolled | None = None,
) -> Simulation:
    """Load, prepare, wrap, then the first optimizer step and a steady one, in a fresh process.

    `loader` continues a process that holds other things already, `warm` with the workspaces of another run among them.
    `unrolled` is the step, where it was played before.
    """
    check_run(spec, run)
    unrolled = unrolled or play(spec, run, gpu or NO_CARD)
    if loader is None:
        held, before = loaded(spec, run)
        memory = before.clone()
    else:
        held, memory = loader.prepare(run.levers.upcast, run.lora, is_fused(spec, run)), loader.memory
        before = memory.clone()
    on_card, paged = resident.optimizer_bytes(spec, run)
    states = resident.state_births(spec, run)
    at_work = workspaces(unrolled)
    if isinstance(memory, Expandable):
        grown = play_grown(unrolled, memory, states, warm)
        played, pinned = grown.played, grown.pinned_bytes
        return Simulation(unrolled, held, sum(at_work), on_card, paged, played, pinned, before, tuple(states))
    others = 0 if warm else sum(at_work)
    memory.watch = units(memory.allocated + sum(states) + others + unrolled.peak_bytes() - MIB)
    played = play_run(unrolled, memory, states, warm=warm)
    return Simulation(unrolled, held, sum(at_work), on_card, paged, played, memory.pinned_bytes, before, tuple(states))


class Laid(NamedTuple):
    """A run on its allocator: the step, how its loading goes, and what it needs at least.

    No checkpoint is at hand. The native allocator leaves tails of blocks that hang on the order in which the tensors
    come: those of a model built layer by layer are what the run is played on; by how much from_pretrained leaves more
    goes into what the card must hold (docs/decisions/0004). Expandable segments leave none.
    """

    sim: Simulation
    loading: Held
    tails_bytes: int
    caps: Caps

    @property
    def reserved_bytes(self) -> int:
        return max(self.sim.played.reserved_bytes, self.loading.reserved_bytes)

    @property
    def loading_bytes(self) -> int:
        return min(int(self.loading.peak_bytes * self.caps.margin), self.reserved_bytes)

    @property
    def bounds(self) -> tuple[int, int]:
        """Between which the allocator's minimum is known to lie."""
        least, most = (max(each + self.tails_bytes, self.loading_bytes) for each in self.caps.bounds)
        return least, most

    def within(self, budget: int) -> bool:
        """Whether the allocator's minimum is at most `budget`."""
        return self.loading_bytes <= budget and self.caps.within(budget - self.tails_bytes)


def lay(model: ModelSpec, run: RunSpec, gpu: GpuProfile | None, unrolled: Unrolled | None = None) -> Laid:
    """`unrolled` is the step of this run on this chip, where a search has played it before. Raises Unplannable."""
    card, kind = gpu or NO_CARD, run.levers.allocator
    if run.random_weights or kind == "expandable":
        sim = simulate(model, run, card, unrolled=unrolled)
        return Laid(sim, sim.held, 0, Caps(sim, kind))
    sim = simulate(model, replace(run, random_weights=True), card, unrolled=unrolled)
    loading, _ = loaded(model, replace(run, random_weights=False))
    tails = max(0, loading.resident.with_lora_bytes - sim.resident.with_lora_bytes)
    return Laid(sim, loading, tails, Caps(sim, kind))


def estimate(model: ModelSpec, run: RunSpec, gpu: GpuProfile | None = None, laid: Laid | None = None) -> Ledger:
    """What every byte of `run` on `model` will be, at the highest point of a steady optimizer step.

    Numbers that depend on the chip are those of `gpu`, or of compute capability 8.9. `laid` is this run on this chip,
    where a search has laid it out before. Raises Unplannable.
    """
    card = gpu or NO_CARD
    laid = laid or lay(model, run, card)
    sim, loading, tails = laid.sim, laid.loading, laid.tails_bytes
    phase, live = live_at_peak(sim.unrolled)
    lines = _lines(model, run, sim, live)
    allocated = sim.allocated_bytes
    rest = allocated - sum(line.bytes for line in lines)
    lines.append(
        Line(key="overhead.rounding", label="tails of blocks too small to split", bytes=rest,
             formula="allocator replay minus the tensors", group="overhead")
    )  # fmt: skip
    steps = laid.caps.minimum_bytes()
    least = max(steps + tails, laid.loading_bytes)
    reserved = int(max(laid.reserved_bytes, least) * card.reserved_factor)
    nccl = nccl_bytes(run, card)
    lines += [
        Line(key="overhead.allocator", label="fragmentation that cannot be avoided", bytes=steps - allocated,
             formula="smallest cap that the replay survives, with a margin", basis="modelled", group="overhead"),
        Line(key="overhead.checkpoint_tails", label="tails left by loading a checkpoint", bytes=tails,
             formula="allocator replay of from_pretrained", basis="modelled", group="overhead"),
        Line(key="overhead.loading", label="loading needs more than training", bytes=least - steps - tails,
             formula="peak of loading and preparing, with a margin", basis="modelled", group="overhead"),
        Line(key="overhead.context", label="CUDA context", bytes=card.context_bytes,
             formula="per process and card", basis=card.context_basis, group="overhead"),
        Line(key="overhead.nccl", label="NCCL", bytes=nccl, formula="three buffers per channel, and 633 MiB",
             basis="modelled", group="overhead"),
    ]  # fmt: skip
    peaks = {"load": loading.load_peak_bytes, **sim.played.allocated}
    return Ledger(
        model=model,
        run=run,
        trainable_parameters=arch.trainable_parameters(model, run.lora),
        total_parameters=arch.total_parameters(model),
        resident=sim.resident,
        peak=Peak(
            allocated_bytes=allocated,
            phase=phase,
            reserved_bytes=reserved,
            minimum_bytes=least,
            device_bytes=least + card.context_bytes + nccl,
        ),
        phases=tuple(PhasePeak(name=name, peak_bytes=size) for name, size in peaks.items()),
        lines=tuple(line for line in lines if line.bytes),
        warnings=_warnings(model, run, sim, loading, gpu),
    )


def _lines(model: ModelSpec, run: RunSpec, sim: Simulation, live: list[tuple[int, int]]) -> list[Line]:
    """Resident rows, then the tensors of the step that are alive at the peak, by key."""
    lines = resident.weight_lines(model, run.double_quant, run.levers.upcast, shards(run))
    r = run.lora.r
    trainable = arch.trainable_parameters(model, run.lora)
    lines.append(
        Line(key="adapter.lora", label=f"LoRA adapter, r={r}", bytes=resident.lora_bytes(model, run),
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
    return lines + step_lines(sim.unrolled, live, LABELS)


def _state_formula(trainable: int, sim: Simulation) -> str:
    paged = f", {sim.paged_bytes:,} more in pageable memory" if sim.paged_bytes else ""
    return f"{trainable:,} parameters, {sim.optimizer_bytes / trainable:.2f} bytes each{paged}"


def step_lines(unrolled: Unrolled, live: list[tuple[int, int]], labels: dict[str, str]) -> list[Line]:
    """The tensors that are alive, (number, how many), as one row for each key."""
    sizes: dict[str, int] = {}
    tensors: dict[str, dict[tuple[str, int, int, str], tuple[int, int]]] = {}
    for ident, count in live:
        key, name, rows, columns, dtype, size = unrolled.row(ident)
        sizes[key] = sizes.get(key, 0) + size * count
        group = tensors.setdefault(key, {})
        n, total = group.get((name, rows, columns, dtype), (0, 0))
        group[name, rows, columns, dtype] = (n + count, total + size * count)
    return [
        Line(key=key, label=labels.get(key, key), bytes=size, formula=_formula(tensors[key]),
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


def _expert_warnings(model: ModelSpec, run: RunSpec) -> list[str]:
    """What surprises with a mixture of experts: its weights, prepare_model_for_kbit_training, PEFT's all-linear."""
    size = resident.weights(model, run.double_quant, parts=shards(run)).experts_bytes
    out = [f"the experts are 3-D parameters that bitsandbytes does not quantise: {human(size)} stay bf16"]
    if run.levers.upcast == "all":
        out = [
            f"prepare_model_for_kbit_training makes the experts float32: {human(2 * size)} instead of {human(size)}"
            " (--upcast norms or none avoids it)"
        ]
    if run.lora.targets == ("all-linear",):
        names = ",".join(x.short for x in arch.layer_linears(model))
        out.append(
            f"all-linear is {names} here; given all-linear, PEFT 0.21 itself adapts experts and router too, which is"
            f" not described: give it the names"
        )
    return out


def _warnings(
    model: ModelSpec, run: RunSpec, sim: Simulation, loading: Held, gpu: GpuProfile | None
) -> tuple[str, ...]:
    out = []
    if not all(x.quantised for x in arch.layer_linears(model)):
        out.append(f"transformers leaves the Linears of {model.model_type} unquantised: the weights stay bf16")
    if model.num_experts:
        out += _expert_warnings(model, run)
    if loading.load_peak_bytes > sim.allocated_bytes:
        out.append("loading, not training, is the highest point of this run")
    elif loading.peak_bytes > sim.allocated_bytes:
        out.append("casting to float32 (upcast), not training, is the highest point of this run")
    if gpu is not None and gpu.compute_capability < (8, 0):
        out.append(f"{gpu.name} has no bf16 tensor cores: this plan assumes bf16")
    if sim.paged_bytes > NOTABLE_PAGED_BYTES:
        out.append(
            f"{sim.paged_bytes / MIB:.0f} MiB of optimizer state are in managed memory, which may also occupy the card"
        )
    return tuple(out)
