"""Reads what `torch.cuda.memory._dump_snapshot` wrote, as a pickle or as the same in JSON: file -> Snapshot.

The file is untrusted. A pickle runs nothing (see pickle_guard), every value is looked at before it is used, a list that
is referred to twice is read once, and no text reaches the screen with control characters.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn, Protocol

from vramplan.core import snapshot as core
from vramplan.core.snapshot import Block, Frames, Segment, Snapshot, TraceEvent
from vramplan.errors import InputError
from vramplan.sources import pickle_guard
from vramplan.sources.unpacked import read_up_to, unpacked

MAX_NUMBER = 2**63 - 1
MAX_SETTINGS, MAX_TEXT, MAX_DEPTH, MAX_SAME = 64, 200, 512, 20_000
STATES = ("active_allocated", "active_awaiting_free", "active_pending_free", "inactive")
ACTIONS = {
    "alloc": core.ALLOC,
    "free_completed": core.FREE,
    "segment_alloc": core.SEGMENT_ALLOC,
    "segment_map": core.SEGMENT_ALLOC,  # expandable segments grow and shrink in pages
    "segment_free": core.SEGMENT_FREE,
    "segment_unmap": core.SEGMENT_FREE,
    "oom": core.OOM,
}
# Of C++ frames only these are kept: everything else repeats what the Python frames say.
TELLING = ("autograd::Engine", "AccumulateGrad", "getNewWorkspace", "getCUDABlasLtWorkspace", "CUDABlasHandle")
NOISE = ("_call_impl", "_wrapped_call_impl")


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def read_snapshot(path: Path | str, stream: Readable | None = None) -> Snapshot:
    """The card of a snapshot that ran out of memory, else the one that holds most. InputError if it is none.

    With a `stream` that is read, and `path` is what errors call it.
    """
    try:
        with Path(path).open("rb") if stream is None else nullcontext(stream) as file:
            data = read_up_to(file, pickle_guard.MAX_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > pickle_guard.MAX_BYTES:
        raise InputError(f"{path} is larger than {pickle_guard.MAX_BYTES // 2**30} GiB",
                         "record fewer events: max_entries of torch.cuda.memory._record_memory_history")  # fmt: skip
    return parse(data, str(path))


def parse(data: bytes, name: str) -> Snapshot:
    """The snapshot in these bytes; `name` is what errors call them."""
    where = f"{name} is no memory snapshot of PyTorch"
    try:
        data = unpacked(data, pickle_guard.MAX_BYTES)
    except InputError as error:
        raise InputError(f"{where}: {error.message}", error.hint) from None
    with pickle_guard.uncollected():
        value = pickle_guard.load(data, where) if data[:1] == b"\x80" else _json(data, where)
        return _Reader(where).snapshot(value)


def _json(data: bytes, where: str) -> Any:
    from vramplan.sources.records import parse_json

    if data.count(b"{") + data.count(b"[") > pickle_guard.MAX_CONTAINERS:
        raise InputError(f"{where}: too many objects and lists")
    try:
        return parse_json(data.decode("utf-8-sig"), where)
    except UnicodeDecodeError:
        raise InputError(f"{where}: neither a pickle nor JSON") from None
    except InputError as error:
        raise InputError(error.message.replace(f"{where} is ", f"{where}: "), error.hint) from None


class _Reader:
    """Turns plain values into a Snapshot; `where` starts every refusal."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.frame_texts: dict[int, str] = {}  # by identity: the values live as long as this reader reads
        self.stacks: dict[int, Frames] = {}
        self.same: dict[tuple[int, ...], Frames] = {}
        self.equal: dict[Frames, Frames] = {}
        self.seen: set[int] = set()

    def wrong(self, what: str) -> NoReturn:
        raise InputError(f"{self.where}: {what}")

    def snapshot(self, value: Any) -> Snapshot:
        if isinstance(value, list):  # torch.cuda.memory_snapshot() gives the segments alone
            value = {"segments": value}
        if not isinstance(value, dict) or not ("segments" in value or "device_traces" in value):
            self.wrong("it has no segments")
        segments = self.list_of(value.get("segments", []), "segments")
        traces = self.list_of(value.get("device_traces", []), "device_traces")
        for trace in traces:
            self.list_of(trace, "device_traces")
        by_device: dict[int, list[Any]] = {}
        for segment in segments:
            by_device.setdefault(self.number(self.dict_of(segment, "a segment"), "device", 0), []).append(segment)
        device = self.device(by_device, traces)
        trace = traces[device] if device < len(traces) else []
        found = tuple(sorted((self.segment(s) for s in by_device.get(device, [])), key=lambda s: s.address))
        return Snapshot(device, found, self.events(trace), self.settings(value.get("allocator_settings")))

    def device(self, by_device: dict[int, list[Any]], traces: list[Any]) -> int:
        """The card to look at: where memory ran out last, else where most is allocated."""
        if len(traces) < 2 and by_device.keys() <= {0}:
            return 0
        failed = [
            (event["time_us"] if type(event.get("time_us")) is int else 0, index)
            for index, trace in enumerate(traces)
            for event in trace
            if isinstance(event, dict) and event.get("action") == "oom"
        ]
        if failed:
            return max(failed)[1]
        held = {d: sum(self.number(s, "allocated_size", 0) for s in listed) for d, listed in by_device.items()}
        if held:
            return max(held, key=lambda device: (held[device], -device))
        return max(range(len(traces)), key=lambda index: (len(traces[index]), -index), default=0)

    # ------------------------------------------------------------------------------------------ segments and blocks
    def segment(self, value: dict[Any, Any]) -> Segment:
        address, size = self.number(value, "address"), self.number(value, "total_size")
        pool = value.get("segment_pool_id")
        private = isinstance(pool, (tuple, list)) and len(pool) == 2 and (pool[0] != 0 or pool[1] != 0)
        blocks = []
        at = address
        for item in self.list_of(value.get("blocks"), "the blocks of a segment"):
            block = self.block(self.dict_of(item, "a block"), at)
            at = block.address + block.size_bytes
            blocks.append(block)
        return Segment(address, size, private, tuple(blocks))

    def block(self, value: dict[Any, Any], at: int) -> Block:
        state = value.get("state")
        if state not in STATES:
            self.wrong("a block has no state that is known")
        size = self.number(value, "size")
        frames, asked = value.get("frames"), self.number(value, "requested_size", size)
        history = value.get("history")
        if frames is None and isinstance(history, list) and history:  # torch before 2.1
            last = self.dict_of(history[0], "the history of a block")
            frames, asked = last.get("frames"), self.number(last, "real_size", size)
        active = state != "inactive"
        return Block(self.number(value, "address", at), size, asked, active, self.stack(frames) if active else ())

    # --------------------------------------------------------------------------------------------------- the trace
    def events(self, trace: list[Any]) -> tuple[TraceEvent, ...]:
        actions = dict(ACTIONS)
        if not any(isinstance(event, dict) and event.get("action") == "free_completed" for event in trace):
            actions["free_requested"] = core.FREE  # the others were not recorded (skip_actions)
        out: list[TraceEvent] = []
        # Hundreds of thousands: written out, without a call for each value, and without NamedTuple's own __new__
        add, new, alloc, oom, nothing = out.append, tuple.__new__, core.ALLOC, core.OOM, ()
        stacks, same, number = self.stacks, self.same, MAX_NUMBER
        for value in trace:
            try:
                name = value["action"]
                action = actions.get(name) if type(name) is str else self.wrong("an event has no action")
                if action is None:
                    continue
                size = value["size"]
                address = value["addr"] if action is not oom else value.get("addr", 0)
            except (KeyError, TypeError, IndexError, AttributeError):
                self.wrong_event(value)
            if type(size) is not int or type(address) is not int or not 0 <= size <= number or address < 0:
                self.wrong("an event has no size or no address")
            if action is alloc:
                listed = value.get("frames")
                frames = stacks.get(id(listed))
                if frames is None and type(listed) is list:
                    frames = same.get(tuple(map(id, listed))) if len(listed) <= MAX_DEPTH else None
                    if frames is not None:
                        stacks[id(listed)] = frames
                add(new(TraceEvent, (action, address, size, self.stack(listed) if frames is None else frames, None)))
            elif action is oom:
                free = self.number(value, "device_free", -1)
                add(TraceEvent(action, 0, size, self.stack(value.get("frames")), None if free < 0 else free))
            else:
                add(new(TraceEvent, (action, address, size, nothing, None)))
        return tuple(out)

    def wrong_event(self, value: Any) -> NoReturn:
        known = isinstance(value, dict) and isinstance(value.get("action"), str)
        self.wrong("an event has no size or no address" if known else "an event has no action")

    # ------------------------------------------------------------------------------------------------------ frames
    def stack(self, value: Any) -> Frames:
        """The telling frames, innermost last (PyTorch writes them innermost first)."""
        known = self.stacks.get(id(value))
        if known is not None:
            return known
        if value is None:
            return ()
        if not isinstance(value, list):
            self.wrong("the frames are no list")
        listed = value
        if len(value) > MAX_DEPTH:  # the two ends say what was going on
            listed = value[: MAX_DEPTH // 2] + value[-MAX_DEPTH // 2 :]
        ids = tuple(map(id, listed))  # every event has a list of its own, of the same frames as in the step before
        frames = self.same.get(ids)
        if frames is None:
            texts = self.frame_texts
            found = [texts[id(f)] if id(f) in texts else self.frame(f) for f in reversed(listed)]
            frames = tuple(filter(None, found))
            frames = self.equal.setdefault(frames, frames)
            if len(self.same) < MAX_SAME:
                self.same[ids] = frames
        self.stacks[id(value)] = frames
        return frames

    def frame(self, value: Any) -> str:
        """ "llama/modeling_llama.py:403 forward", or nothing for a frame that says nothing."""
        frame = self.dict_of(value, "a frame")
        name, file = frame.get("name"), frame.get("filename")
        if not isinstance(name, str) or not isinstance(file, str):
            self.wrong("a frame has no name or no file")
        line = self.number(frame, "line", 0)
        name, file = name[: 10 * MAX_TEXT], file[-10 * MAX_TEXT :]
        if file.endswith(".py") or file[:1] == "<":
            where = "/".join(re.split(r"[\\/]", file)[-3:])[-MAX_TEXT // 2 :]
            text = "" if name in NOISE else f"{where}:{line} {name}"[:MAX_TEXT]
        else:
            word = next((word for word in TELLING if word in name), None)
            text = f"c++:0 {word}" if word else ""
        self.frame_texts[id(value)] = text = _UNPRINTABLE.sub("?", text)
        return text

    # ------------------------------------------------------------------------------------------------ plain values
    def settings(self, value: Any) -> dict[str, bool | int | float | str]:
        if not isinstance(value, dict):
            return {}
        return {
            key: item
            for key, item in list(value.items())[:MAX_SETTINGS]
            if isinstance(key, str) and isinstance(item, (bool, int, float, str)) and len(key) <= MAX_TEXT
        }

    def number(self, value: dict[Any, Any], key: str, default: int | None = None) -> int:
        number = value.get(key, default)
        if type(number) is not int or not (0 <= number <= MAX_NUMBER or number == default):
            self.wrong(f"{key} is no number of bytes" if "size" in key else f"{key} is missing or no whole number")
        return number

    def list_of(self, value: Any, what: str) -> list[Any]:
        if not isinstance(value, list):
            self.wrong(f"{what}: not a list")
        if id(value) in self.seen and value:
            self.wrong(f"{what}: the same list twice")
        self.seen.add(id(value))
        return value

    def dict_of(self, value: Any, what: str) -> dict[Any, Any]:
        if not isinstance(value, dict):
            self.wrong(f"{what} is no dict")
        return value
