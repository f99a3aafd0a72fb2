"""A shallow trace at full depth: the same unrolling as for a played step, and the replay through the allocator."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

from torch import nn

from vramplan.core.allocator import Native, OutOfMemory
from vramplan.core.expandable import allocator
from vramplan.core.timeline import checkpoint_period
from vramplan.core.types import GpuProfile, ModelSpec, RunSpec
from vramplan.core.unroll import LAYER_SHIFT, Change, Section, Unrolled
from vramplan.trace import model as models
from vramplan.trace.model import PER_LAYER
from vramplan.trace.step import layers_of, trace

STEP = ("forward", "backward", "optimizer")


@dataclass
class Traced:
    """One traced run through the allocator. Bytes by phase: `peak` is the highest point, `after` what was left.

    `live` are (number, how many) of the tensors at the highest point of the steady step.
    """

    unrolled: Unrolled
    memory: Native
    kernels: dict[str, int]
    peak: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    live: list[tuple[int, int]] = field(default_factory=list)
    reserved_bytes: int = 0  # over the steps
    loading_reserved_bytes: int = 0
    pinned_bytes: int = 0  # pages or segments that hold something at the highest point
    parameters: int = 0  # of the whole model
    plain_bytes: int = 0  # weights of the layers' Linears and experts that could not be quantised
    adapter: list[tuple[int, int]] = field(default_factory=list)  # (played layer, elements) of every adapter weight

    @property
    def allocated_bytes(self) -> int:
        """The peak of the steady step."""
        return max(self.peak[phase] for phase in STEP)

    @property
    def phase(self) -> str:
        return max(STEP, key=lambda phase: self.peak[phase])


def period(model: Any, config: Any, run: RunSpec) -> int | None:
    """After how many layers their kinds repeat; None where they do not (some dense layers before the experts)."""
    kinds = [_kind(layer, config, i) for i, layer in enumerate(layers_of(model, config.num_hidden_layers))]
    for length in range(1, len(kinds) // 2 + 1):
        if kinds[length:] == kinds[:-length]:
            return lcm(length, checkpoint_period(run.levers.checkpointing))
    return None


def _kind(layer: nn.Module, config: Any, index: int) -> tuple[Any, ...]:
    """What tells one layer from another: its modules, shapes and settings, its number apart."""
    seen: list[Any] = [values[index] for values in (getattr(config, name, None) for name in PER_LAYER) if values]
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, type(None)))}
        seen.append((name, type(module), tuple(sorted((k, v) for k, v in plain.items() if "idx" not in k))))
    seen += [(name, parameter.shape) for name, parameter in layer.named_parameters()]
    return tuple(seen)


def traced(
    config: dict[str, Any], run: RunSpec, gpu: GpuProfile, *, spec: ModelSpec | None = None, full_depth: bool = False
) -> Traced:
    """Trace `run` and replay it: two steps, of which the second is the steady one. Raises Unplannable."""
    whole = models.configuration(config, None)
    model = models.skeleton(whole, run)
    depth = whole.num_hidden_layers
    every = None if full_depth else period(model, whole, run)
    played = depth if every is None else min(depth, 4 * every + depth % every)
    tracker = trace(config, run, gpu, played, spec)
    unrolled = Unrolled(tracker.rec, played, depth, every or 1)
    result = Traced(unrolled, allocator(run.levers.allocator), tracker.kernels, adapter=tracker.adapter)
    result.parameters = sum(p.numel() for p in model.parameters())
    result.plain_bytes = sum(size * len(unrolled.real_layers(layer)) for layer, size in tracker.plain)
    try:
        _Replay(result).run()
    except KeyError:  # a tensor of a layer died that others of its kind do not have: they are not alike after all
        if every is None:
            raise
        return traced(config, run, gpu, spec=spec, full_depth=True)
    return result


def survives(result: Traced, memory: Native) -> bool:
    """Whether the run gets through with this allocator, whose cap may be too small."""
    try:
        _Replay(replace(result, memory=memory, peak={}, after={}, live=[])).run()
    except OutOfMemory:
        return False
    return True


class _Replay:
    """The record through the allocator: loading, the first step, and the steady one."""

    def __init__(self, result: Traced) -> None:
        self.result, self.memory = result, result.memory
        self.blocks: dict[int, Any] = {}
        self.alive: dict[int, int] = {}  # key -> index into info
        self.lasting: set[int] = set()
        self.high = self.high_at = self.count = self.pin_at = 0

    def run(self) -> None:
        steps = list(self.result.unrolled.steps())
        of_step = [s for s in steps if s[0].phase in (*STEP, "zero_grad")]
        self.pass_through([s for s in steps if s[0].phase in ("load", "prepare", "lora", "ready")])
        self.result.loading_reserved_bytes, self.result.reserved_bytes = self.result.reserved_bytes, 0
        resident = set(self.alive)
        self.pass_through(of_step)
        # born in a run's first step and there in all others: workspaces, the optimizer's state, biases cast for good
        self.lasting = set(self.alive) - resident
        before = dict(self.alive)
        self.high = self.count = 0
        self.pass_through(of_step, steady=True)
        self.result.live = self.live_at_peak(before, of_step)
        self.count, self.pin_at = 0, self.high_at  # a third step is like the second: look at its highest point
        self.pass_through(of_step, steady=True, quiet=True)

    def pass_through(
        self, steps: list[tuple[Section, int, list[Change]]], steady: bool = False, quiet: bool = False
    ) -> None:
        phase = ""
        for section, layer, changes in steps:
            if section.phase != phase and not quiet:
                self.close(phase)
                phase = section.phase
            self.play(changes, layer << LAYER_SHIFT, steady)
        self.close(phase)

    def play(self, changes: list[Change], shift: int, steady: bool) -> None:
        memory, sizes = self.memory, self.result.unrolled.sizes
        for event, key, relative in changes:
            at = key + shift if relative else key
            if event < 0:
                if not steady or at in self.blocks:  # what a first step alone lets go is gone by now
                    memory.free(self.blocks.pop(at))
                    del self.alive[at]
                continue
            if steady and at in self.lasting:
                continue
            self.blocks[at] = memory.malloc(sizes[event])
            self.alive[at] = event
            self.count += 1
            if self.count == self.pin_at:
                self.result.pinned_bytes = memory.pinned_now()
            if memory.allocated > self.high:
                self.high, self.high_at = memory.allocated, self.count

    def live_at_peak(
        self, alive: dict[int, int], steps: list[tuple[Section, int, list[Change]]]
    ) -> list[tuple[int, int]]:
        """What is alive after the birth that made the steady step's highest point."""
        count = 0
        for _, layer, changes in steps:
            shift = layer << LAYER_SHIFT
            for event, key, relative in changes:
                at = key + shift if relative else key
                if event < 0:
                    alive.pop(at, None)
                elif at not in self.lasting:
                    alive[at] = event
                    count += 1
                    if count == self.high_at:
                        return list(Counter(alive.values()).items())
        return []

    def close(self, phase: str) -> None:
        result, memory = self.result, self.memory
        if phase:
            result.peak[phase] = memory.peak_allocated
            result.after[phase] = memory.allocated
            result.reserved_bytes = max(result.reserved_bytes, memory.peak_reserved)
            if phase in ("load", "lora"):
                memory.empty_cache()
        memory.reset_peaks()
