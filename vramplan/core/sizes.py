"""What variants of one run take of many cards, exactly: all cards of one chip share one replay of the allocator.

A step depends on the chip, not on the card. So each variant is played once for each chip, and replayed through the
allocator only where the sum of its tensors does not settle the matter already.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from math import isqrt
from typing import NamedTuple

from .caps import MARGIN
from .chip import traits
from .ledger import NO_CARD, Laid, check_run, estimate, lay
from .parallel import outside_bytes
from .room import Quick, judge
from .types import GpuProfile, Ledger, ModelSpec, RunSpec

GUESSES = 6  # plays in search of a size, before a replay is worth its time
PATIENCE = 8  # replays that follow a guess, before halves are taken
FAR = 1.5  # times a size, or what is aimed at: no longer a line
BEYOND_BYTES = 2**40  # more than any card has: not worth a replay


class Family(NamedTuple):
    """One run in many sizes: `at(n)`, n from 1 to `last`, has the n-th of `sizes`, which grow, as its `field`."""

    run: RunSpec
    field: str  # micro_batch_size | seq_len
    sizes: range | tuple[int, ...]

    @property
    def last(self) -> int:
        return len(self.sizes)

    def size(self, n: int) -> int:
        return self.sizes[n - 1] if n else 0

    def at(self, n: int) -> RunSpec:
        size = self.size(n)
        return replace(self.run, seq_len=size) if self.field == "seq_len" else replace(self.run, micro_batch_size=size)


class Sizes:
    """Exact verdicts on variants of one model's runs, each priced once for all cards of one chip."""

    def __init__(self, model: ModelSpec) -> None:
        self.model = model
        self.quick = Quick(model)
        self._laid: dict[tuple[object, ...], Laid] = {}
        self._ledgers: dict[tuple[object, ...], Ledger] = {}
        self._points: dict[tuple[Family, object], dict[int, int]] = {}  # least bytes by size, of a family on a chip
        self._replayed: dict[tuple[Family, object], tuple[int, Laid]] = {}  # of the last replay: those, what it took

    def estimate(self, run: RunSpec, gpu: GpuProfile | None = None) -> Ledger:
        """As `ledger.estimate` has it; cards of that chip need not replay the run again. Raises Unplannable."""
        check_run(self.model, run)
        return estimate(self.model, run, gpu, self._lay(run, gpu or NO_CARD))

    def device_bytes(self, run: RunSpec, gpu: GpuProfile) -> int:
        """What the card must hold, as `ledger.estimate` has it; where no card is large enough, the tensors alone.

        Raises Unplannable.
        """
        least = outside_bytes(run, gpu) + self._least(run, gpu)
        return least if least > BEYOND_BYTES else self._ledger(run, gpu).peak.device_bytes

    def may_fit(self, run: RunSpec, gpu: GpuProfile) -> bool:
        """False where the tensors alone are more than the card holds. Raises Unplannable."""
        return outside_bytes(run, gpu) + self._least(run, gpu) <= gpu.usable_bytes

    def verdict(self, run: RunSpec, gpu: GpuProfile) -> str:
        """As `room.judge` has it. Raises Unplannable."""
        return judge(self._ledger(run, gpu), gpu) if self.may_fit(run, gpu) else "does_not_fit"

    def fits(self, run: RunSpec, gpu: GpuProfile) -> bool:
        """Whether the verdict is not "does_not_fit". Raises Unplannable."""
        return self.may_fit(run, gpu) and self._lay(run, gpu).within(gpu.usable_bytes - outside_bytes(run, gpu))

    def largest(self, family: Family, gpu: GpuProfile) -> int:
        """The n that fits while n + 1 does not: 0 where 1 does not fit, at most `family.last`."""
        low, high = 0, family.last + 1
        tried = 0
        while high - low > 1:
            n = self.about(family, gpu, low, high) if tried < PATIENCE else (low + high) // 2
            low, high = (n, high) if self._fits_at(family, n, gpu) else (low, n)
            tried += 1
        return low

    def about(self, family: Family, gpu: GpuProfile, low: int, high: int) -> int:
        """The n between `low` and `high` that should just fit, from few plays: bytes are nearly linear in the size.

        It is the guess that the exact need leads to: caps are tried until both of its bounds lead there by the same
        points, and so all between them. A rough one would do if more never fitted where less does not; natively it
        may, and a search that goes another way may end elsewhere.
        """
        key = self._key(family, gpu)
        points = self._points.setdefault(key, {})
        for n in (1, 2):
            if len(points) < 2 and n <= family.last:
                points[family.size(n)] = self._least(family.at(n), gpu)
        budget = gpu.usable_bytes - outside_bytes(family.run, gpu)
        while True:
            guesses = [self._guess(family, gpu, target, low, high, points) for target in self._targets(key, budget)]
            if guesses[0] == guesses[-1]:
                n, self._points[key] = guesses[0]
                return n
            self._replayed[key][1].caps.climb()

    def _guess(
        self, family: Family, gpu: GpuProfile, target: int, low: int, high: int, known: dict[int, int]
    ) -> tuple[int, dict[int, int]]:
        """(the n whose tensors should come next to `target`, the points known then)"""
        n, points = low, known.copy()
        for _ in range(GUESSES):
            n = min(max(bisect_right(family.sizes, _crossing(points, target)), low + 1), high - 1)
            if family.size(n) in points:
                break
            points[family.size(n)] = self._least(family.at(n), gpu)
        return n, points

    # -------------------------------------------------------------------------------------------------- one size
    def _fits_at(self, family: Family, n: int, gpu: GpuProfile) -> bool:
        run = family.at(n)
        fits = self.fits(run, gpu)
        key = self.quick.key(run, gpu)
        if key in self._laid:
            self._replayed[self._key(family, gpu)] = self._least(run, gpu), self._laid[key]
        return fits

    def _targets(self, key: tuple[Family, object], budget: int) -> tuple[int, ...]:
        """Tensors that should take `budget` when they are replayed: pages that are not full are a few whatever the
        size, while what breaks up in the native allocator grows with it. Two, where that is between them."""
        if key not in self._replayed:
            return (budget,)
        least, laid = self._replayed[key]
        needs = dict.fromkeys(laid.bounds)
        if key[0].run.levers.allocator == "expandable":
            return tuple(budget - (need - least) for need in needs)
        return tuple(budget * least // need for need in needs)

    def _key(self, family: Family, gpu: GpuProfile) -> tuple[Family, object]:
        return family, traits(self.model, family.at(family.last), gpu)

    def _least(self, run: RunSpec, gpu: GpuProfile) -> int:
        """A bound from below on what the allocator must have: the tensors, with the margin that is never missing."""
        margin = 1 + MARGIN["expandable"] if run.levers.allocator == "expandable" else 1
        return int(self.quick.tensor_bytes(run, gpu) * margin)

    def _lay(self, run: RunSpec, gpu: GpuProfile) -> Laid:
        key = self.quick.key(run, gpu)
        if key not in self._laid:
            self._laid[key] = lay(self.model, run, gpu, self.quick.unrolled(run, gpu))
        return self._laid[key]

    def _ledger(self, run: RunSpec, gpu: GpuProfile) -> Ledger:
        """The run's ledger, with the peak of this card: others of its chip differ in the CUDA context, and in what a
        calibration says of it."""
        key = (*self.quick.key(run, gpu), gpu.reserved_factor)
        if key not in self._ledgers:
            self._ledgers[key] = estimate(self.model, run, gpu, self._lay(run, gpu))
        ledger = self._ledgers[key]
        need = ledger.peak.minimum_bytes + outside_bytes(run, gpu)
        return replace(ledger, peak=replace(ledger.peak, device_bytes=need))


def _crossing(points: dict[int, int], target: int) -> int:
    """The size where `points`, bytes by size, should cross `target`: on the line through the two points nearest to it.

    Bytes that grow like the square of the size (attention without a fused kernel) lie far off that line: between
    points that are far apart, their geometric mean comes nearer.
    """
    below = max((size for size, need in points.items() if need <= target), default=None)
    above = min((size for size, need in points.items() if need > target), default=None)
    if below is None:
        return 0
    if above is None:
        before = max((size for size in points if size < below), default=None)
        if before is None:
            return 2 * below
        first, second = before, below
    elif above > FAR * below and points[above] > FAR * target:
        return isqrt(below * above)
    else:
        first, second = below, above
    slope = (points[second] - points[first]) / (second - first)
    return first + int((target - points[first]) / slope) if slope > 0 else 2 * below
