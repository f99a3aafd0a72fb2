"""This machine's cards, read from NVML. The only module that opens pynvml; `nvml_*.py` beside it ask it the questions.

Each failure (no library, no driver, no card, no permission, a lost card, a driver and library of different versions)
becomes one `VramplanError` with a hint. What NVML cannot say of a card, its rates and its number of SMs, comes from the
stored profile of the same name; what neither knows stays None.

A card's index is the one that the process sees: `nvml_visible.py` applies CUDA_VISIBLE_DEVICES.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from types import TracebackType
from typing import Any

from vramplan.core.types import GpuProfile, GpuState
from vramplan.errors import InputError, VramplanError
from vramplan.sources.nvml_calls import ELSEWHERE, Calls, whole, words
from vramplan.sources.nvml_processes import Listed, listed, name_of, others
from vramplan.sources.nvml_state import busy, read_state
from vramplan.sources.nvml_visible import Visible, visible
from vramplan.sources.profiles import find_gpu

UNKNOWN_CONTEXT_BYTES = 758 * 2**20  # an H200's, the largest reading there is, for a card without a stored profile
_LANE_BYTES_PER_S = {1: 250 * 10**6, 2: 500 * 10**6, 3: 984_615_384, 4: 1_969_230_769, 5: 3_938_461_538,
                     6: 7_562_500_000}  # fmt: skip
_LOOKS = 3  # at memory and processes together, until they agree


def live_gpus() -> tuple[GpuProfile, ...]:
    """The cards this process can see, in its order. VramplanError if NVML or a card is missing."""
    with Nvml() as nvml:
        return tuple(nvml.gpu(index) for index in range(nvml.count()))


def live_gpu(index: int = 0) -> GpuProfile:
    """The card with this index. InputError if there is none, VramplanError if it cannot be read."""
    with Nvml() as nvml:
        return nvml.gpu(index)


class Nvml:
    """An open NVML session: `with Nvml() as nvml`. Cheap to ask again and again while a run goes on."""

    def __init__(self) -> None:
        self._calls: Any = None
        self._cards: list[Visible] = []

    def __enter__(self) -> Nvml:
        try:
            import pynvml
        except ImportError:
            raise VramplanError("NVML cannot be read: pynvml is missing", "pip install nvidia-ml-py") from None
        self._calls = Calls(pynvml)
        self._calls.must("nvmlInit")
        try:
            self._cards = visible(self._calls, os.environ)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        with suppress(*self._calls.errors):
            self._calls.nvml.nvmlShutdown()

    # ------------------------------------------------------------------------------------------------- questions
    def count(self) -> int:
        """How many cards this process can see; at least 1."""
        return len(self._cards)

    def used_bytes(self, index: int = 0) -> int | None:
        """Bytes in use on the card by all processes, without what the driver holds back; None if NVML cannot say."""
        total, free, reserved = self._memory(self._card(index).handle)
        return None if reserved is None else total - free - reserved

    def process_bytes(self, index: int, pid: int) -> int | None:
        """Bytes of one process on the card, its CUDA context included; None if NVML cannot say."""
        return next((process.used_bytes for process in self._listed(index) if process.pid == pid), None)

    def sizes(self, index: int = 0) -> dict[int, int | None]:
        """Bytes of every other process on the card by the number that NVML has for it; None where it has no size."""
        return {p.pid: p.used_bytes for p in self._listed(index) if p.pid is not None and p.pid != os.getpid()}

    def process_name(self, pid: int) -> str | None:
        """What runs under a number of `sizes`; None where that is not one of here."""
        return name_of(self._calls, pid)

    def busy_percent(self, index: int = 0) -> int | None:
        """Share of the last moment (up to a second) in which the card computed; None if NVML cannot say (MIG)."""
        return busy(self._calls, self._card(index).handle)

    def uuid(self, index: int = 0) -> str:
        """What CUDA_VISIBLE_DEVICES takes for this card or MIG instance."""
        return str(words(self._calls.must("nvmlDeviceGetUUID", self._card(index).handle)))

    def gpu(self, index: int = 0) -> GpuProfile:
        """The card as it is now: `usable_bytes` is what is free, whoever holds the rest."""
        calls, card = self._calls, self._card(index)
        physical = calls.may("nvmlDeviceGetDeviceHandleFromMigDeviceHandle", card.handle) or card.handle
        name = words(calls.must("nvmlDeviceGetName", card.handle)) or "NVIDIA GPU"
        (total, free, reserved), found = self._load(card.handle)
        processes = others(calls, found, total - free - (reserved or 0))
        stored = find_gpu(name, total)
        told = _capability(calls.may("nvmlDeviceGetCudaComputeCapability", physical))
        capability = told or (stored.compute_capability if stored else None)
        if capability is None:
            raise VramplanError(f"NVML does not tell the compute capability of {name}", ELSEWHERE)
        state = read_state(calls, card.handle, physical, name, certain=card.certain)
        pcie = _pcie(state)
        known = sum(process.used_bytes or 0 for process in processes)
        return GpuProfile(
            key=stored.key if stored else _key(name),
            name=name,
            total_bytes=total,
            usable_bytes=free,
            usable_basis="measured",
            reserved_bytes=reserved,
            used_by_others_bytes=known if reserved is None else total - free - reserved,
            processes=processes,
            compute_capability=capability,
            sm_count=stored.sm_count if stored else self._instance_sms(card.handle, physical),
            context_bytes=stored.context_bytes if stored else UNKNOWN_CONTEXT_BYTES,
            context_basis=stored.context_basis if stored else "modelled",
            bandwidth_bytes_per_s=stored.bandwidth_bytes_per_s if stored else None,
            bf16_flops_per_s=stored.bf16_flops_per_s if stored else None,
            fp16_flops_per_s=stored.fp16_flops_per_s if stored else None,
            pcie_bytes_per_s=pcie or (stored.pcie_bytes_per_s if stored else None),
            driver=words(calls.may("nvmlSystemGetDriverVersion")),
            state=state,
            source="nvml",
            sources=_live_sources(stored, told is not None, pcie is not None),
        )

    # --------------------------------------------------------------------------------------------------- pieces
    def _card(self, index: int) -> Visible:
        if not 0 <= index < len(self._cards):
            there = "there is one GPU" if len(self._cards) == 1 else f"there are {len(self._cards)} GPUs"
            raise InputError(f"no GPU with index {index}: {there}, counted from 0")
        card = self._cards[index]
        if card.error is not None:
            raise card.error
        return card

    def _listed(self, index: int) -> list[Listed]:
        handle = self._card(index).handle
        return listed(self._calls, handle, self._memory(handle)[0])

    def _memory(self, handle: Any) -> tuple[int, int, int | None]:
        """Total, free and driver-reserved bytes; reserved is None where only version 1 of the call exists."""
        calls = self._calls
        version = getattr(calls.nvml, "nvmlMemory_v2", None)
        memory = calls.may("nvmlDeviceGetMemoryInfo", handle, version) if version is not None else None
        reserved = None if memory is None else int(memory.reserved)
        if memory is None:
            memory = calls.must("nvmlDeviceGetMemoryInfo", handle)
        total, free = int(memory.total), int(memory.free)
        if not 0 < total < 2**44 or not 0 <= free <= total:
            raise VramplanError(f"NVML reports an impossible memory size ({free} of {total} bytes free)", ELSEWHERE)
        return total, free, reserved if reserved is not None and 0 <= reserved <= total - free else None

    def _load(self, handle: Any) -> tuple[tuple[int, int, int | None], list[Listed]]:
        """Memory and processes of one moment: a process may have ended between the two questions."""
        for _ in range(_LOOKS):
            total, free, reserved = memory = self._memory(handle)
            found = listed(self._calls, handle, total)
            if sum(process.used_bytes or 0 for process in found) <= total - free - (reserved or 0):
                break
        return memory, found

    def _instance_sms(self, handle: Any, physical: Any) -> int | None:
        """SMs of a MIG instance, which is no stored card."""
        if handle is physical:
            return None
        attributes = self._calls.may("nvmlDeviceGetAttributes_v2", handle)
        return whole(getattr(attributes, "multiprocessorCount", None), 1, 4096)


def _key(name: str) -> str:
    """A short name for a card that is not stored: "NVIDIA A100-PCIE-40GB MIG 1g.5gb" -> "a100-pcie-40gb-mig-1g.5gb"."""
    found = re.findall(r"[a-z0-9.]+", name.lower())
    return "-".join(word for word in found if word not in ("nvidia", "geforce", "tesla")) or "gpu"


def _capability(told: Any) -> tuple[int, int] | None:
    major, minor = (whole(told[0], 1, 99), whole(told[1], 0, 99)) if told else (None, None)
    return None if major is None or minor is None else (major, minor)


def _pcie(state: GpuState) -> int | None:
    """The fastest link that card and slot agree on; the present one is slower while the card sleeps."""
    lane = _LANE_BYTES_PER_S.get(state.pcie_max_generation or 0)
    return lane * state.pcie_max_width if lane and state.pcie_max_width else None


def _live_sources(stored: GpuProfile | None, capability: bool, pcie: bool) -> tuple[tuple[str, str], ...]:
    """Where each field of a live card was read: NVML first, the stored profile for the rest."""
    read = {"total_bytes": "NVML", "usable_bytes": "NVML: free at this moment"}
    read |= {"compute_capability": "NVML"} if capability else {}
    read |= {"pcie_bytes_per_s": "NVML: link generation and width"} if pcie else {}
    if stored is None:
        read["context_bytes"] = "modelled: no stored profile for this card, so the largest reading, an H200's"
        return tuple(read.items())
    return tuple({**dict(stored.sources), **read}.items())
