"""The rules of a diagnosis for reports that are neither of the card's memory nor of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .causes import Finding
from .units import human

if TYPE_CHECKING:
    from .case import Case


def shared_memory(case: Case) -> Iterator[Finding]:
    """/dev/shm, through which data workers hand over their batches: in a container 64 MiB unless told otherwise."""
    if case.evidence.kind == "shm":
        yield Finding(
            "shared_memory",
            100,
            "Shared memory (/dev/shm) ran out, not the card's: data workers hand their batches over in it, and a "
            "container has 64 MiB. Start it with --ipc=host or --shm-size=8g (Kubernetes: an emptyDir of medium Memory "
            'on /dev/shm), or set num_workers to 0; torch.multiprocessing.set_sharing_strategy("file_descriptor").',
        )


def kv_cache(case: Case) -> Iterator[Finding]:
    if case.evidence.kind == "vllm":
        asked, free = case.evidence.requested_bytes, case.evidence.free_bytes
        needs = f" ({human(asked)} for one request, {human(free)} there)" if asked and free else ""
        yield Finding(
            "kv_cache",
            95,
            f"vLLM found no room for its cache{needs}: its share of the card, gpu_memory_utilization, is used up by "
            "weights and by whatever else was on the card when it started, as a trainer in the same process. A larger "
            "share, a smaller max_model_len, quantised weights, or start it before the trainer.",
        )


OTHER_RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (shared_memory, kv_cache)
