"""Who holds what in a snapshot: the live tensors when memory ran out, at the peak, and what grows from step to step.

The allocator's present state is exact. The past is played back from it: what was allocated since was not there, what
was freed since was. A trace may begin late: a tensor whose birth it does not have is "before".
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from itertools import pairwise
from typing import NamedTuple

from .holders import BEFORE, GROUPS, HOLDERS, UNKNOWN, Holder, Holders
from .snapshot import ALLOC, FREE, OOM, SEGMENT_ALLOC, SEGMENT_FREE, Frames, Snapshot
from .types import Growth, Held, Holdings, OomEvidence
from .units import MIB, human

STEP_BYTES = 512  # the allocator rounds every request up to it
MIN_STEPS, GROWN_BYTES, WOBBLE_BYTES = 4, 16 * MIB, MIB
ONCE_A_STEP = ("activations.inputs", "activations.head", "loss.logits", "loss.log_softmax")
MAX_FRAMES = 40  # of an out-of-memory event


class Piece(NamedTuple):
    """A live tensor. `born` is the index of its event, -1 if the trace does not have it."""

    size_bytes: int
    frames: Frames
    born: int


class Moment(NamedTuple):
    """What lived before event number `at`."""

    at: int
    live: dict[int, Piece]

    @property
    def allocated_bytes(self) -> int:
        return sum(piece.size_bytes for piece in self.live.values())


class Replay:
    """The trace, played back from the state in which the snapshot found the allocator."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.now = {block.address: block for segment in snapshot.segments for block in segment.blocks if block.active}
        self.before = self._totals()  # bytes allocated before event i, and at the end

    def _totals(self) -> list[int]:
        sizes = {address: block.size_bytes for address, block in self.now.items()}
        total = sum(sizes.values())
        totals = [total]
        for action, address, size, _, _ in reversed(self.snapshot.events):
            if action == ALLOC:
                total -= sizes.pop(address, 0)
            elif action == FREE:
                sizes[address] = rounded = (
                    -(-size // STEP_BYTES) * STEP_BYTES
                )  # `round_up`, without half a million calls
                total += rounded
            totals.append(total)
        return totals[::-1]

    def moment(self, at: int) -> Moment:
        """What lived before event `at`, with the stack of each tensor's birth."""
        events = self.snapshot.events
        sizes = {address: block.size_bytes for address, block in self.now.items()}
        stacks = {address: block.frames for address, block in self.now.items() if block.frames}
        for action, address, size, _, _ in reversed(events[at:]):
            if action == ALLOC:
                sizes.pop(address, None)
                stacks.pop(address, None)
            elif action == FREE:
                sizes[address] = -(-size // STEP_BYTES) * STEP_BYTES
                stacks.pop(address, None)
        live: dict[int, Piece] = {}
        for index in range(at - 1, -1, -1):
            action, address, _, born_at, _ = events[index]
            if action == ALLOC and address in sizes and address not in live:
                live[address] = Piece(sizes[address], stacks.get(address) or born_at, index)
                if len(live) == len(sizes):
                    break
        for address, size in sizes.items():
            if address not in live:
                live[address] = Piece(size, stacks.get(address, ()), -1)
        return Moment(at, live)

    def reserved(self, at: int) -> dict[int, int]:
        """The segments, address -> size, before event `at`. Parts of an expandable segment stand alone."""
        segments = {segment.address: segment.size_bytes for segment in self.snapshot.segments}
        for event in reversed(self.snapshot.events[at:]):
            if event.action == SEGMENT_FREE:
                segments[event.address] = event.size_bytes
            elif event.action == SEGMENT_ALLOC:
                segments.pop(event.address, None)
        return segments


def holdings(snapshot: Snapshot) -> Holdings:
    """Who holds what when memory ran out last, else now; the peak of the trace; what grows."""
    replay = Replay(snapshot)
    events = snapshot.events
    stacks = {id(frames): frames for _, _, _, frames, _ in events}
    stacks |= {id(block.frames): block.frames for block in replay.now.values()}
    holders = Holders(stacks.values())
    failed = next((index for index in range(len(events) - 1, -1, -1) if events[index].action == OOM), None)
    at = len(events) if failed is None else failed
    moment = replay.moment(at)
    peak = replay.before.index(max(replay.before)) if events else None
    peaked = moment if peak is None or peak == at else replay.moment(peak)
    segments = replay.reserved(at)
    return Holdings(
        moment="now" if failed is None else "oom",
        device=snapshot.device,
        allocated_bytes=moment.allocated_bytes,
        reserved_bytes=max(sum(segments.values()), moment.allocated_bytes),
        largest_free_bytes=largest_free(segments, moment.live),
        private_pools_bytes=_private(snapshot, moment.live),
        holders=tuple(_held(moment, peaked if events else None, holders)),
        layer_bytes=tuple(_layers(snapshot, moment, holders)),
        events=len(events),
        peak_bytes=None if peak is None else replay.before[peak],
        peak_where="" if not peak or not events[peak - 1].frames else events[peak - 1].frames[-1],
        growth=_growth(replay, holders),
    )


def evidence_of(snapshot: Snapshot, held: Holdings) -> OomEvidence | None:
    """The last out-of-memory event as a report; None if memory never ran out in the trace."""
    event = next((event for event in reversed(snapshot.events) if event.action == OOM), None)
    if event is None:
        return None
    free = event.free_bytes
    text = f"Memory ran out in the trace of the snapshot: {human(event.size_bytes)} asked for"
    if free is not None:
        text += f", the driver had {human(free)} left"
        if free >= event.size_bytes + 64 * MIB:
            text += ": a cap (per_process_memory_fraction) was reached, not the card's end"
    return OomEvidence(
        message=text + ".",
        requested_bytes=event.size_bytes or None,
        gpu_index=snapshot.device,
        free_bytes=free,
        allocated_bytes=held.allocated_bytes,
        reserved_unallocated_bytes=held.reserved_bytes - held.allocated_bytes,
        private_pools_bytes=held.private_pools_bytes or None,
        frames=event.frames[-MAX_FRAMES:],
    )


# ------------------------------------------------------------------------------------------------------ the holders
def _holder(piece: Piece, holders: Holders) -> Holder:
    return Holder(BEFORE) if piece.born < 0 and not piece.frames else holders.of(piece.frames)


def _held(moment: Moment, peaked: Moment | None, holders: Holders) -> list[Held]:
    """The largest first; those that held something at the peak alone come with it."""
    now, places, counts = _by_key(moment, holders)
    peak, peak_places, _ = _by_key(peaked, holders) if peaked is not None else (Counter[str](), places, counts)
    order = {key: index for index, key in enumerate(HOLDERS)}
    keys = sorted({*now, *peak}, key=lambda key: (-now[key], -peak[key], order[key]))
    return [
        Held(
            key=key, label=HOLDERS[key], group=GROUPS[key], bytes=now[key], peak_bytes=peak[key], tensors=counts[key],
            where=_first(places[key] or peak_places[key]),
        )
        for key in keys
    ]  # fmt: skip


def _by_key(moment: Moment, holders: Holders) -> tuple[Counter[str], dict[str, Counter[str]], Counter[str]]:
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    places: dict[str, Counter[str]] = defaultdict(Counter)
    for piece in moment.live.values():
        key = _holder(piece, holders).key
        sizes[key] += piece.size_bytes
        counts[key] += 1
        if piece.frames:
            places[key][piece.frames[-1]] += piece.size_bytes
    return sizes, places, counts


def _first(places: Counter[str]) -> str:
    return min(places, key=lambda place: (-places[place], place), default="")


def _layers(snapshot: Snapshot, moment: Moment, holders: Holders) -> list[int]:
    """What each layer has saved, in the forward that was under way. A layer's own code runs from its first line to its
    last: where the line goes back, the next layer has begun; the model's own code before the layers begins anew."""
    events, first = snapshot.events, 0
    for index in range(moment.at - 1, -1, -1):
        event = events[index]
        if event.action == ALLOC and holders.of(event.frames).key == "activations.inputs":
            first = index
            break
    number, line = -1, 0
    saved: dict[int, int] = {}
    for index in range(first, moment.at):
        event = events[index]
        layer = holders.of(event.frames).layer if event.action == ALLOC else ""
        if not layer:
            continue
        here = int(layer.rpartition(":")[2].split()[0])
        if here < line or number < 0:
            number += 1
        line = here
        piece = moment.live.get(event.address)
        if piece is not None and piece.born == index:
            saved[number] = saved.get(number, 0) + piece.size_bytes
    return [saved.get(index, 0) for index in range(max(saved) + 1)] if saved else []


def _private(snapshot: Snapshot, live: dict[int, Piece]) -> int:
    """Live bytes in pools of their own, by the segments that are there now."""
    starts = [segment.address for segment in snapshot.segments if segment.private]
    ends = [segment.address + segment.size_bytes for segment in snapshot.segments if segment.private]
    if not starts:
        return 0
    total = 0
    for address, piece in live.items():
        place = bisect_left(starts, address + 1) - 1
        if place >= 0 and address < ends[place]:
            total += piece.size_bytes
    return total


def largest_free(segments: dict[int, int], live: dict[int, Piece]) -> int:
    """The largest gap between live tensors in a segment."""
    addresses = sorted(live)
    largest = index = at = 0
    for start, size in sorted(segments.items()):
        at, end = max(at, start), start + size  # no two overlap, unless somebody wrote the file by hand
        index = max(index, bisect_left(addresses, start))
        while index < len(addresses) and addresses[index] < end:
            largest = max(largest, addresses[index] - at)
            at = max(at, addresses[index] + live[addresses[index]].size_bytes)
            index += 1
        largest = max(largest, end - at)
    return largest


# ----------------------------------------------------------------------------------------------------------- growth
def _growth(replay: Replay, holders: Holders) -> Growth | None:
    """More at every start of a step than at the one before, without ever going back."""
    starts = _step_starts(replay.snapshot, holders)
    starts = starts[1:] if len(starts) > MIN_STEPS else starts  # the optimizer's state appears in the first
    if len(starts) < MIN_STEPS:
        return None
    sizes = [replay.before[index] for index in starts]
    gains = [later - earlier for earlier, later in pairwise(sizes)]
    grown = sizes[-1] - sizes[0]
    rising = sum(gain > WOBBLE_BYTES for gain in gains)
    if min(gains) < -WOBBLE_BYTES or 4 * rising < 3 * len(gains) or grown < GROWN_BYTES:
        return None
    stayed = replay.moment(starts[-1]).live
    places: Counter[tuple[str, str]] = Counter()
    for piece in stayed.values():
        if piece.born >= starts[0]:
            places[_holder(piece, holders).key, piece.frames[-1] if piece.frames else ""] += piece.size_bytes
    key, where = max(places, key=lambda place: (places[place], place), default=(UNKNOWN, ""))
    return Growth(steps=len(gains), bytes=grown // len(gains), key=key, where=where)


def _step_starts(snapshot: Snapshot, holders: Holders) -> list[int]:
    """The events that look up the embeddings, which every micro-step does once; else those of the largest tensor that
    is made outside of the layers."""
    births: dict[Frames, list[int]] = defaultdict(list)
    largest: dict[Frames, int] = {}
    once: dict[int, bool] = {}  # by the identity of the frames, which the snapshot keeps
    for index, (action, _, size, frames, _) in enumerate(snapshot.events):
        if action != ALLOC:
            continue
        wanted = once.get(id(frames))
        if wanted is None:
            wanted = once[id(frames)] = holders.of(frames).key in ONCE_A_STEP
        if wanted:
            births[frames].append(index)
            largest[frames] = max(size, largest.get(frames, 0))
    often = [frames for frames, found in births.items() if len(found) >= MIN_STEPS]
    looked_up = [frames for frames in often if frames[-1].endswith(" embedding")]
    chosen = looked_up or often
    return births[max(chosen, key=lambda frames: largest[frames])] if chosen else []
