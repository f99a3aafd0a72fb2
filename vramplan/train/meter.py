"""What the run really used: phases, peaks, resident tensors one by one, speed. Ends as one `Measurement`."""

from __future__ import annotations

import itertools
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vramplan.core.types import Line, MeasuredPhase, Measurement
from vramplan.core.units import round_up
from vramplan.sources import records
from vramplan.train.outcome import outcome_of

GRANULARITY = 512  # the CUDA caching allocator rounds every tensor up to this
STEP_PHASES = ("forward", "backward", "optimizer")
LABELS = {
    "weights.nf4": "packed 4-bit weights",
    "weights.constants": "quantisation constants",
    "weights.embeddings": "input embedding",
    "weights.lm_head": "output layer",
    "weights.plain": "Linears, not quantised",
    "weights.experts": "experts, not quantised",
    "weights.other": "norms, biases, buffers",
    "adapter.lora": "LoRA A and B",
    "adapter.gradients": "LoRA gradients",
    "optimizer.state": "optimizer state",
    "optimizer.paged": "optimizer state in managed memory, outside torch's allocator",
}


class Meter:
    """Collects one run's numbers. On a CPU every byte of a phase is None: there is no device allocator to ask.

    The step that is reported is the one with the highest point, or with `last_step` the last: where all batches are
    alike, that is a steady one.
    """

    def __init__(self, device: torch.device, *, last_step: bool = False) -> None:
        self.device = device
        self.last_step = last_step
        self.cuda = device.type == "cuda"
        self.phases: list[MeasuredPhase] = []
        self.lines: tuple[Line, ...] = ()
        self.trainable_parameters = 0
        self.steps = self.tokens = 0
        self.busy_s, self.busy_tokens = 0.0, 0  # of the steps after the first, which warms up
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.eval_loss_before: float | None = None
        self.eval_loss_after: float | None = None
        self.oom_events = self.skipped_steps = 0
        self.micro_batch_size: int | None = None  # None: as asked, nothing happened
        self.ranks: list[Measurement] = []  # what every rank has measured, this one among them
        self._open: dict[str, int] = {}  # phase -> peak of the step in progress
        self._step: dict[str, int] = {}  # phase -> peak of the last whole step
        self._highest: dict[str, int] = {}  # of the step with the highest point: the longest batch, if lengths differ
        self._reserved = 0  # the most at a step's end, without what CUDA graphs keep for themselves
        self.graph_bytes = 0
        self.temporary_bytes = 0  # what clipping and the last optimizer's step took and gave back
        self._process: int | None = None  # what the driver counted when `look` was called

    # ------------------------------------------------------------------------------------------------ phases
    def phase(self, name: str) -> None:
        """The state now, at the end of a phase; its peak is the highest point since the phase before."""
        if not self.cuda:
            self.phases.append(MeasuredPhase(name=name))
            return
        self.phases.append(
            MeasuredPhase(
                name=name,
                allocated_bytes=torch.cuda.memory_allocated(self.device),
                peak_bytes=torch.cuda.max_memory_allocated(self.device),
                reserved_bytes=torch.cuda.memory_reserved(self.device),
                process_bytes=self.process_bytes(),
            )
        )
        torch.cuda.reset_peak_memory_stats(self.device)

    def open(self) -> None:
        """A micro-step begins."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def close(self, phase: str) -> None:
        """A phase of the step ends: keep its peak, the highest over the micro-steps."""
        if self.cuda:
            peak = torch.cuda.max_memory_allocated(self.device)
            self._open[phase] = max(self._open.get(phase, 0), peak)
            if phase == "optimizer" and "backward" in self._open:  # else the peak is since an earlier step's end
                self.temporary_bytes = peak - torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def end_step(self) -> None:
        if "backward" not in self._open:  # all were CUDA graphs, inside of which the allocator sees nothing
            self._open = {}
        self._step, self._open = self._open or self._step, {}
        if max(self._step.values(), default=0) > max(self._highest.values(), default=0):
            self._highest = self._step
        self._reserved = max(self._reserved, (self.reserved_bytes() or 0) - self.graph_bytes)

    def loss(self, loss: float) -> None:
        """The loss of a step, or the mean of several. One that is no number is left out: a record holds none."""
        if isfinite(loss):
            self.first_loss = loss if self.first_loss is None else self.first_loss
            self.last_loss = loss

    def rehearsed(self) -> int | None:
        """The rehearsal is over: its peak becomes a phase of its own, and no step's."""
        peak = max(self._open.values(), default=0)
        self._open = {}
        self.phase("rehearsal")
        if not self.cuda:
            return None
        last = self.phases.pop()
        self.phases.append(replace(last, peak_bytes=max(peak, last.peak_bytes or 0)))
        return self.phases[-1].peak_bytes

    def look(self) -> None:
        """Ask the driver now, while the step's memory is still reserved. Not at every step: it takes milliseconds."""
        self._process = self.process_bytes()

    def peak_bytes(self) -> int | None:
        """The highest point of the last whole step."""
        return max(self._step.values(), default=None) if self.cuda else None

    def reserved_bytes(self) -> int | None:
        return torch.cuda.memory_reserved(self.device) if self.cuda else None

    def process_bytes(self) -> int | None:
        """What the driver counts for this process; None where it does not say (no NVML, containers, WSL)."""
        try:
            text = torch.cuda.list_gpu_processes(self.device)
        except Exception:  # NVML fails in as many ways as there are drivers
            return None
        match = re.search(rf"process\s+{os.getpid()} uses\s+([\d.]+) MB", text)
        return round(float(match[1]) * 2**20) if match else None

    # ------------------------------------------------------------------------------------------------- result
    def tokens_per_s(self) -> float:
        return self.busy_tokens / self.busy_s if self.busy_s else 0.0

    def measurement(self, ended: str, message: str = "") -> Measurement:
        """Everything so far. Also after an error: then the peaks of the step that failed are in it."""
        retries = torch.cuda.memory_stats(self.device).get("num_alloc_retries") if self.cuda else None
        own = Measurement(
            device=self.device.type,
            device_name=torch.cuda.get_device_name(self.device) if self.cuda else platform.processor() or "cpu",
            versions=versions(),
            phases=(*self.phases, *self._step_phases()),
            trainable_parameters=self.trainable_parameters,
            steps=self.steps,
            tokens=self.tokens,
            tokens_per_s=self.tokens_per_s(),
            ended=ended,
            alloc_retries=retries,
            first_loss=self.first_loss,
            last_loss=self.last_loss,
            eval_loss_before=self.eval_loss_before,
            eval_loss_after=self.eval_loss_after,
            lines=self.lines,
            message=message,
            oom_events=self.oom_events,
            micro_batch_size=self.micro_batch_size,
            skipped_steps=self.skipped_steps,
        )
        return over_ranks(own, self.ranks) if len(self.ranks) > 1 else own

    def _step_phases(self) -> Iterator[MeasuredPhase]:
        if not self.cuda:
            return
        peaks = dict((self._step if self.last_step else self._highest) or self._open)
        for name in STEP_PHASES:
            if name in peaks:
                yield MeasuredPhase(name=name, peak_bytes=peaks[name])
        now = max(torch.cuda.max_memory_allocated(self.device), *self._open.values(), 0)
        yield MeasuredPhase(
            name="step",
            allocated_bytes=torch.cuda.memory_allocated(self.device),
            peak_bytes=max(peaks.values(), default=now),
            reserved_bytes=self._reserved or torch.cuda.memory_reserved(self.device),
            process_bytes=self._process or self.process_bytes(),
        )


def over_ranks(own: Measurement, ranks: Sequence[Measurement]) -> Measurement:
    """The most that any rank had, phase by phase, and the peaks of all; what any of them survived."""

    def most(name: str, phases: Sequence[MeasuredPhase]) -> int | None:
        return max((size for phase in phases if (size := getattr(phase, name)) is not None), default=None)

    sizes = [name for name in MeasuredPhase.__dataclass_fields__ if name != "name"]
    together = [
        MeasuredPhase(name=phases[0].name, **{name: most(name, phases) for name in sizes})
        for phases in zip(*(measurement.phases for measurement in ranks), strict=False)
    ]
    peaks = [most("peak_bytes", [p for p in m.phases if p.name == "step"]) for m in ranks]
    sizes_now = [m.micro_batch_size for m in ranks if m.micro_batch_size is not None]
    return replace(
        own,
        phases=tuple(together),
        gpus=len(ranks),
        oom_events=sum(m.oom_events for m in ranks),
        micro_batch_size=min(sizes_now, default=None),
        rank_peak_bytes=tuple(peak for peak in peaks if peak is not None),
    )


def recorded(meter: Meter, path: Path, work: Callable[[], str]) -> str:
    """Does `work`, returns its message; however it ends, the file gets a line, a Measurement. Failures raise."""
    try:
        message = work()
    except BaseException as error:
        outcome = outcome_of(error)
        with suppress(Exception):  # the disk is full, say: what ended the run is the error to raise
            records.append_jsonl(path, meter.measurement(outcome.ended, outcome.message))
        raise
    records.append_jsonl(path, meter.measurement("finished", message))
    return message


# --------------------------------------------------------------------------------------- tensors, one by one
def count_lines(model: Any, optimizer: Any, device: torch.device) -> tuple[Line, ...]:
    """The resident tensors on `device`, counted one by one, each rounded up to 512 bytes, shared storage once.

    Gradients count as large as their parameters: after a step they are already freed again.
    """
    totals: dict[str, tuple[int, int]] = {}
    trained = [p for p in model.parameters() if p.requires_grad]
    paged, plain = _state_tensors(optimizer)
    states = [*(("optimizer.state", t) for t in plain), *(("optimizer.paged", t) for t in paged)]
    for key, _, counted in distinct(itertools.chain(model_tensors(model), states), device):
        size, count = totals.get(key, (0, 0))
        totals[key] = size + counted, count + 1
    gradients = sum(round_up(p.numel() * p.element_size(), GRANULARITY) for p in trained)
    totals["adapter.gradients"] = gradients, len(trained)
    return tuple(_line(key, *totals[key]) for key in LABELS if key in totals)


def distinct(tensors: Iterable[tuple[str, Tensor]], device: torch.device) -> Iterator[tuple[str, Tensor, int]]:
    """(key, tensor, bytes as the allocator counts them) of what is on `device`, shared storage under its first key."""
    seen: set[int] = set()
    for key, tensor in tensors:
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        storage = tensor.untyped_storage()
        if tensor.device.type == device.type and storage.data_ptr() not in seen and storage.nbytes():
            seen.add(storage.data_ptr())
            yield key, tensor, round_up(storage.nbytes(), GRANULARITY)


def model_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """(ledger key, tensor) of everything a model holds; some more than once, the telling key first."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None) or getattr(module, "quant_state", None)
        if state is not None:  # FSDP2 puts a DTensor in the place of the 4-bit weight
            yield "weights.nf4", module.weight
            yield from (("weights.constants", t) for t in _constants(state) if t is not None)
    yield from (("weights.embeddings", p) for p in _parameters(model.get_input_embeddings()))
    yield from (("weights.lm_head", p) for p in _parameters(model.get_output_embeddings()))
    yield from (("adapter.lora", p) for p in model.parameters() if p.requires_grad)
    yield from (("weights.experts", p) for n, p in model.named_parameters() if ".mlp.experts." in n)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield "weights.plain", module.weight
    yield from (("weights.other", t) for t in (*model.parameters(), *model.buffers()))


def _line(key: str, size: int, count: int) -> Line:
    return Line(
        key=key,
        label=LABELS[key],
        bytes=size,
        formula=f"{count} tensors",
        basis="measured",
        group=key.partition(".")[0],
    )


def _parameters(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else list(module.parameters())


def _constants(state: Any) -> list[Tensor | None]:
    nested = state.state2
    tensors = [state.absmax, state.code, state.offset]
    return tensors if nested is None else [*tensors, nested.absmax, nested.code]


def _state_tensors(optimizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The optimizer's tensors: (in managed memory, ordinary). Step counters on the host are no state."""
    paged: list[Tensor] = []
    plain: list[Tensor] = []
    for state in optimizer.state.values():
        for value in state.values():
            if not isinstance(value, Tensor) or (value.dim() == 0 and value.device.type == "cpu"):
                continue
            (paged if getattr(value, "is_paged", False) else plain).append(value)
    return paged, plain


# ------------------------------------------------------------------------------------------------------ versions
def versions() -> tuple[tuple[str, str], ...]:
    """(name, version) of everything that decides the bytes."""
    found = [("python", platform.python_version())]
    for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate"):
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:  # built from source, on the path only
            found.append((name, "unknown"))
    if torch.version.cuda:
        found.append(("cuda", torch.version.cuda))
    driver = Path("/sys/module/nvidia/version")
    if driver.is_file():
        found.append(("driver", driver.read_text().strip()))
    return tuple(found)
