"""Holds runs against a card: verdicts, and the quick sums that searches go by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import resident
from .caps import MARGIN
from .chip import traits
from .fused import graphed
from .ledger import estimate
from .lengths import real_share, usual_width
from .parallel import outside_bytes, shards
from .replay import workspaces
from .sized import Sized, kind
from .speed import graphs_fit, tokens_per_s
from .types import GpuProfile, Ledger, Lengths, ModelSpec, RunSpec
from .unroll import Unrolled

MAX_BATCH = 4096


# ------------------------------------------------------------------------------------------------------- verdicts
def judge(ledger: Ledger, gpu: GpuProfile) -> str:
    """ "fits" with room for what the allocator caches, "tight" if it must return cached memory on the way, else
    "does_not_fit"."""
    if ledger.peak.device_bytes > gpu.usable_bytes:
        return "does_not_fit"
    cached = max(ledger.peak.reserved_bytes, ledger.peak.minimum_bytes)
    return "fits" if cached + outside_bytes(ledger.run, gpu) <= gpu.usable_bytes else "tight"


class Quick:
    """Device bytes of variants of one run, without replaying the allocator: the sum of the live tensors at the
    highest point, the stated margin and the context."""

    def __init__(self, model: ModelSpec, lengths: Lengths | None = None) -> None:
        """lengths: of the data, which then decide the speed."""
        self.model, self.lengths = model, lengths
        self.known: dict[tuple[object, ...], tuple[int, Unrolled]] = {}
        self.sized: dict[tuple[object, ...], list[Sized]] = {}  # steps that were played, by their kind

    def bytes(self, run: RunSpec, gpu: GpuProfile) -> int:
        return int(self._played(run, gpu)[0] * (1.01 + MARGIN[run.levers.allocator])) + outside_bytes(run, gpu)

    def speed(self, run: RunSpec, gpu: GpuProfile) -> int | None:
        """Modelled tokens per second; padding is none of them."""
        graphs = not self.lacks_graphs(run, gpu)
        if self.lengths is None or run.packing:
            return tokens_per_s(self.model, run, gpu, self._played(run, gpu)[1], graphs)
        usual = replace(run, seq_len=usual_width(run, self.lengths))
        speed = tokens_per_s(self.model, usual, gpu, self._played(usual, gpu)[1], graphs)
        return None if speed is None else round(speed * real_share(run, self.lengths))

    def lacks_graphs(self, run: RunSpec, gpu: GpuProfile) -> bool:
        """Whether the run would have CUDA graphs if the card had room for them."""
        return graphed(self.model, run) and not graphs_fit(self.bytes(run, gpu), gpu)

    def tensor_bytes(self, run: RunSpec, gpu: GpuProfile) -> int:
        """All tensors at the highest point: no card holds the run in less."""
        return self._played(run, gpu)[0]

    def unrolled(self, run: RunSpec, gpu: GpuProfile) -> Unrolled:
        return self._played(run, gpu)[1]

    def key(self, run: RunSpec, gpu: GpuProfile) -> tuple[object, ...]:
        """All of a run and a chip that costs memory."""
        shape = (run.micro_batch_size, run.seq_len, min(run.accumulation, 2), run.padding, run.packing,
                 run.driver)  # fmt: skip
        chip = traits(self.model, run, gpu)
        return (shape, run.levers, run.lora, run.double_quant, chip, run.gpus, run.parallel)

    def _played(self, run: RunSpec, gpu: GpuProfile) -> tuple[int, Unrolled]:
        key = self.key(run, gpu)
        if key not in self.known:
            unrolled = self._unrolled(run, gpu)
            self.known[key] = (self._resident(run, unrolled) + unrolled.peak_bytes(), unrolled)
        return self.known[key]

    def _unrolled(self, run: RunSpec, gpu: GpuProfile) -> Unrolled:
        """In sizes of a step that was played already, if that is alike but for them."""
        played = self.sized.setdefault(kind(self.model, run, gpu), [])
        for sized in played:
            if found := sized.at(run, gpu):
                return found
        played.append(Sized(self.model, run, gpu))
        return played[-1].played

    def _resident(self, run: RunSpec, unrolled: Unrolled) -> int:
        weights = resident.weights(self.model, run.double_quant, run.levers.upcast, shards(run)).total_bytes
        state, _ = resident.optimizer_bytes(self.model, run)
        return weights + resident.lora_bytes(self.model, run) + state + sum(workspaces(unrolled))


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in 0..most with fits(n), for a property that never comes back once lost."""
    if most < 1 or not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_that_survives(quick: Quick, gpu: GpuProfile, variant: Callable[[int], RunSpec], most: int) -> int:
    """By the sum of live tensors first, then down until the replay of the allocator agrees."""
    n = largest(lambda n: quick.bytes(variant(n), gpu) <= gpu.usable_bytes, most)
    while n and judge(estimate(quick.model, variant(n), gpu), gpu) == "does_not_fit":
        n -= max(1, n // 50)
    return n


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
