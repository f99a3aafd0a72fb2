"""A shallow trace at full depth: the same unrolling as for a played step, and the replay through the allocator."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import lcm
from typing import Any

from vramplan.core.allocator import Native
from vramplan.core.expandable import allocator
from vramplan.core.timeline import checkpoint_period
from vramplan.core.types import GpuProfile, RunSpec
from vramplan.core.unroll import LAYER_SHIFT, Unrolled
from vramplan.trace import model as models
from vramplan.trace.step import trace


@dataclass
class Traced:
    """One traced run through the allocator. Bytes by phase: `peak` is the highest point, `after` what was left."""

    unrolled: Unrolled
    memory: Native
    peak: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)
    kernels: dict[str, int] = field(default_factory=dict)
    reserved_bytes: int = 0

    @property
    def allocated_bytes(self) -> int:
        """The peak of the steady step."""
        return max(self.peak[phase] for phase in ("forward", "backward", "optimizer"))


def period(config: Any, run: RunSpec) -> int:
    """After how many layers their kinds repeat."""
    kinds: list[tuple[Any, ...]] = []
    for layer in range(config.num_hidden_layers):
        lists = [getattr(config, name, None) for name in ("layer_types", "no_rope_layers", "mlp_layer_types")]
        kinds.append(tuple(values[layer] for values in lists if values))
    repeats = next(p for p in range(1, len(kinds) + 1) if kinds[p:] == kinds[:-p] or p == len(kinds))
    return lcm(repeats, checkpoint_period(run.levers.checkpointing))


def traced(config: dict[str, Any], run: RunSpec, gpu: GpuProfile, *, full_depth: bool = False) -> Traced:
    """Trace `run` and replay it: two steps, of which the second is the steady one. Raises Unplannable."""
    depth = models.configuration(config, None).num_hidden_layers
    every = period(models.configuration(config, None), run)
    played = depth if full_depth else min(depth, 4 * every + depth % every)
    tracker = trace(config, run, gpu, played)
    unrolled = Unrolled(tracker.rec, played, depth, every)
    result = Traced(unrolled, allocator(run.levers.allocator), kernels=tracker.kernels)
    _replay(result)
    return result


def _replay(result: Traced) -> None:
    memory, phase = result.memory, ""
    blocks: dict[int, Any] = {}
    info = result.unrolled.info

    def close() -> None:
        result.peak[phase] = max(result.peak.get(phase, 0), memory.peak_allocated)
        result.after[phase] = memory.allocated
        result.reserved_bytes = max(result.reserved_bytes, memory.peak_reserved)
        if phase in ("load", "lora"):
            memory.empty_cache()
        memory.reset_peaks()

    for section, layer, changes in result.unrolled.steps():
        if section.phase != phase:
            if phase:
                close()
            phase = section.phase
            if phase == "first_forward":
                result.reserved_bytes = 0
        shift = layer << LAYER_SHIFT
        for event, key, relative in changes:
            at = key + shift if relative else key
            if event > 0:
                blocks[at] = memory.malloc(info[event][5])
            else:
                memory.free(blocks.pop(at))
    close()
