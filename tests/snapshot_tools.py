"""Makes memory snapshots with the structure that torch 2.13 writes, and remembers what was true at every event."""

from __future__ import annotations

from typing import Any

from vramplan.core.units import GIB, MIB, round_up

BASE = 0x7F0000000000
SITE = "/opt/venv/lib/python3.11/site-packages"
MODEL = f"{SITE}/transformers/models/llama/modeling_llama.py"
OUTER = (
    ("/home/me/train.py", 17, "<module>"),
    (f"{SITE}/peft/peft_model.py", 2120, "forward"),
    (MODEL, 467, "forward"),
)
CALL = (f"{SITE}/torch/nn/modules/module.py", 1790, "_call_impl")
LAYER = (
    *OUTER,
    CALL,
    (MODEL, 403, "forward"),
    CALL,
    (f"{SITE}/transformers/modeling_layers.py", 109, "__call__"),
    CALL,
)
EMBEDDING = (*OUTER, (MODEL, 381, "forward"), (f"{SITE}/torch/nn/functional.py", 2567, "embedding"))
NORM = (*LAYER, (MODEL, 306, "forward"), (MODEL, 67, "forward"))
ATTENTION = (*LAYER, (MODEL, 308, "forward"), (MODEL, 268, "forward"),
             (f"{SITE}/transformers/integrations/sdpa_attention.py", 158, "sdpa_attention_forward"))  # fmt: skip
LORA = (*LAYER, (MODEL, 308, "forward"), (MODEL, 254, "forward"), (f"{SITE}/peft/tuners/lora/bnb.py", 549, "forward"))
MLP = (*LAYER, (MODEL, 322, "forward"), (MODEL, 175, "forward"), (f"{SITE}/bitsandbytes/nn/modules.py", 637, "forward"))
RESIDUAL = (*LAYER, (MODEL, 323, "forward"))
LOSS = (*OUTER, (f"{SITE}/transformers/loss/loss_utils.py", 37, "fixed_cross_entropy"),
        (f"{SITE}/torch/nn/functional.py", 3500, "cross_entropy"))  # fmt: skip
LOAD = (("/home/me/train.py", 5, "<module>"), (f"{SITE}/transformers/modeling_utils.py", 4100, "from_pretrained"))

Stack = tuple[tuple[str, int, str], ...]  # (file, line, function), outermost first


class Recorder:
    """One segment, from which memory is taken upwards and never taken again. Frames are shared, as torch does."""

    def __init__(self, size: int = 16 * GIB, *, recording: bool = True) -> None:
        self.size, self.at, self.recording = size, BASE, recording
        self.live: dict[int, tuple[int, int, Stack]] = {}  # address -> (size, asked for, stack)
        self.blocks: dict[int, int] = {}
        self.events: list[dict[str, Any]] = []
        self.totals: list[int] = [0]  # allocated before event i
        self.frames: dict[tuple[str, int, str], dict[str, Any]] = {}
        self.stacks: dict[Stack, list[dict[str, Any]]] = {}

    def stack(self, stack: Stack) -> list[dict[str, Any]]:
        """Innermost first, as torch writes them."""
        if stack not in self.stacks:
            self.stacks[stack] = [
                self.frames.setdefault(f, {"name": f[2], "filename": f[0], "line": f[1]}) for f in reversed(stack)
            ]
        return self.stacks[stack]

    def alloc(self, asked: int, stack: Stack = ()) -> int:
        size = round_up(max(asked, 1), 512)
        address, self.at = self.at, self.at + size
        self.blocks[address] = size
        self.live[address] = (size, asked, stack if self.recording else ())
        self._event("alloc", addr=address, size=asked, frames=self.stack(stack))
        return address

    def free(self, address: int) -> None:
        _, asked, _ = self.live[address]
        self._event("free_requested", addr=address, size=asked, frames=[])
        del self.live[address]
        self._event("free_completed", addr=address, size=asked, frames=[])

    def oom(self, asked: int, free: int = 10 * MIB, stack: Stack = ()) -> None:
        self._event("oom", size=asked, device_free=free, frames=self.stack(stack))

    def _event(self, action: str, **fields: Any) -> None:
        if self.recording:
            common = {"stream": 0, "time_us": 1_790_000_000_000_000 + len(self.events), "user_metadata": ""}
            self.events.append({"action": action, **fields, **common, "compile_context": "N/A"})
            if action != "free_requested":
                self.totals.append(sum(size for size, _, _ in self.live.values()))
        else:
            self.totals = [sum(size for size, _, _ in self.live.values())]

    def snapshot(self, last: int | None = None) -> dict[str, Any]:
        """`torch.cuda.memory._snapshot()`; `last`: the ring of the trace held so many events."""
        blocks = [
            {"address": address, "size": size, "requested_size": self.live[address][1], "state": "active_allocated",
             "frames": self.stack(self.live[address][2])}
            if address in self.live else
            {"address": address, "size": size, "requested_size": 0, "state": "inactive", "frames": []}
            for address, size in self.blocks.items()
        ]  # fmt: skip
        rest = BASE + self.size - self.at
        blocks.append({"address": self.at, "size": rest, "requested_size": 0, "state": "inactive", "frames": []})
        used = sum(size for size, _, _ in self.live.values())
        segment = {
            "device": 0, "address": BASE, "total_size": self.size, "allocated_size": used, "active_size": used,
            "requested_size": used, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0),
            "is_expandable": False, "frames": [], "blocks": blocks,
        }  # fmt: skip
        trace = self.events if last is None else self.events[len(self.events) - last :]
        settings = {"PYTORCH_CUDA_ALLOC_CONF": "", "expandable_segments": False, "garbage_collection_threshold": 0.0,
                    "roundup_power2_divisions": {"1": 0}}  # fmt: skip
        return {"segments": [segment], "device_traces": [list(trace)], "allocator_settings": settings,
                "external_annotations": []}  # fmt: skip


def forward(recorder: Recorder, layers: int, mib: int = 1) -> list[int]:
    """One forward without checkpointing; the addresses of what it keeps."""
    kept = [recorder.alloc(32 * mib * MIB, EMBEDDING)]
    for _ in range(layers):
        recorder.free(recorder.alloc(64 * mib * MIB, NORM))
        kept += [recorder.alloc(size * mib * MIB, stack)
                 for size, stack in ((96, LORA), (24, ATTENTION), (176, MLP), (32, RESIDUAL))]  # fmt: skip
    return kept


def out_of_memory() -> Recorder:
    """Weights from before the recording, adapter, three layers of a forward, and no room for the fourth."""
    recorder = Recorder(size=2 * GIB, recording=False)
    recorder.alloc(700 * MIB)
    recorder.recording = True
    recorder.alloc(50 * MIB, LOAD)
    kept = forward(recorder, 3)
    recorder.oom(352 * MIB, 100 * MIB, MLP)
    for address in kept:  # what the exception lets go
        recorder.free(address)
    return recorder


def training(steps: int, leak: int = 0) -> Recorder:
    """Whole steps; `leak` bytes of each stay."""
    recorder = Recorder()
    recorder.alloc(500 * MIB, LOAD)
    for _ in range(steps):
        kept = forward(recorder, 2)
        kept.append(recorder.alloc(256 * MIB, LOSS))
        if leak:
            recorder.alloc(leak, LOSS)
        for address in reversed(kept):
            recorder.free(address)
    return recorder
