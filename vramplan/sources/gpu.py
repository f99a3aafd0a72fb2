"""This machine's cards, read from NVML, and cards written to files. The only module that touches pynvml.

Each failure (no library, no driver, no card, no permission, a lost card, a driver and library of different versions)
becomes one `VramplanError` with a hint. What NVML cannot say of a card, its rates and its number of SMs, comes from the
stored profile of the same name; what neither knows stays None.

A card's index is the one that the process sees: `CUDA_VISIBLE_DEVICES` (indices, UUIDs, MIG UUIDs) is applied to NVML's
PCI order. CUDA's own order equals it with one kind of card, or with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from vramplan.core.types import GpuProcess, GpuProfile
from vramplan.errors import VramplanError
from vramplan.sources.profiles import find_gpu, normalise
from vramplan.sources.records import write_text

UNKNOWN_CONTEXT_BYTES = 758 * 2**20  # an H200's, the largest reading there is, for a card without a stored profile
_LANE_BYTES_PER_S = {1: 250 * 10**6, 2: 500 * 10**6, 3: 984_615_384, 4: 1_969_230_769, 5: 3_938_461_538}
_ELSEWHERE = "--gpu NAME plans for a card that is not in this machine"
_FAILURES = {  # pynvml's constant -> what to say, what to do
    "NVML_ERROR_LIBRARY_NOT_FOUND": ("no NVIDIA driver library (NVML) on this machine", _ELSEWHERE),
    "NVML_ERROR_DRIVER_NOT_LOADED": ("the NVIDIA driver is not loaded", f"does `nvidia-smi` work? {_ELSEWHERE}"),
    "NVML_ERROR_NO_PERMISSION": ("NVML may not read the card", "in a container, start it with --gpus all"),
    "NVML_ERROR_GPU_IS_LOST": ("the GPU has fallen off the bus", "restart the machine and look at dmesg for Xid 79"),
    "NVML_ERROR_GPU_NOT_FOUND": ("NVML finds no such GPU", _ELSEWHERE),
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": (
        "the NVIDIA driver and its library have different versions",
        "the driver was updated while loaded: restart the machine",
    ),
}


def live_gpus() -> tuple[GpuProfile, ...]:
    """The cards this process can see, in its order. VramplanError if NVML or a card is missing."""
    with Nvml() as nvml:
        return tuple(nvml.gpu(index) for index in range(nvml.count()))


def live_gpu(index: int = 0) -> GpuProfile:
    """The card with this index. VramplanError if there is none."""
    with Nvml() as nvml:
        return nvml.gpu(index)


class Nvml:
    """An open NVML session: `with Nvml() as nvml`. Cheap to ask again and again while a run goes on."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []

    def __enter__(self) -> Nvml:
        try:
            import pynvml
        except ImportError:
            raise VramplanError("NVML cannot be read: pynvml is missing", "pip install nvidia-ml-py") from None
        self._nvml = pynvml
        self._must(pynvml.nvmlInit)
        try:
            self._handles = self._visible()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    # ------------------------------------------------------------------------------------------------- questions
    def count(self) -> int:
        """How many cards this process can see; at least 1."""
        return len(self._handles)

    def used_bytes(self, index: int = 0) -> int | None:
        """Bytes in use on the card by all processes, without what the driver holds back; None if NVML cannot say."""
        total, free, reserved = self._memory(self._handle(index))
        return None if reserved is None else total - free - reserved

    def process_bytes(self, index: int, pid: int) -> int | None:
        """Bytes of one process on the card, its CUDA context included; None if NVML cannot say."""
        handle = self._handle(index)
        return self._sizes(handle, self._memory(handle)[0]).get(pid)

    def sizes(self, index: int = 0) -> dict[int, int | None]:
        """Bytes of every other process on the card by its pid; None where NVML does not say how many."""
        handle = self._handle(index)
        return {pid: n for pid, n in self._sizes(handle, self._memory(handle)[0]).items() if pid != os.getpid()}

    def process_name(self, pid: int) -> str | None:
        return self._process_name(pid)

    def busy_percent(self, index: int = 0) -> int | None:
        """Share of the last moment (up to a second) in which the card computed; None if NVML cannot say (MIG)."""
        rates = self._may(self._nvml.nvmlDeviceGetUtilizationRates, self._handle(index))
        return None if rates is None else int(rates.gpu)

    def uuid(self, index: int = 0) -> str:
        """What CUDA_VISIBLE_DEVICES takes for this card or MIG instance."""
        return _text(self._must(self._nvml.nvmlDeviceGetUUID, self._handle(index)))

    def gpu(self, index: int = 0) -> GpuProfile:
        """The card as it is now: `usable_bytes` is what is free, whoever holds the rest."""
        nvml, handle = self._nvml, self._handle(index)
        total, free, reserved = self._memory(handle)
        processes = self._processes(handle, total)
        name = _text(self._must(nvml.nvmlDeviceGetName, handle))
        stored = find_gpu(name, total)
        physical = self._physical(handle)
        told = self._may(nvml.nvmlDeviceGetCudaComputeCapability, physical)
        capability = told or (stored.compute_capability if stored else None)
        if capability is None:
            raise VramplanError(f"NVML does not tell the compute capability of {name}", _ELSEWHERE)
        pcie = self._pcie(physical)
        driver = self._may(nvml.nvmlSystemGetDriverVersion)
        known = sum(process.used_bytes or 0 for process in processes)
        return GpuProfile(
            key=stored.key if stored else normalise(name) or "gpu",
            name=name,
            total_bytes=total,
            usable_bytes=free,
            usable_basis="measured",
            reserved_bytes=reserved,
            used_by_others_bytes=known if reserved is None else total - free - reserved,
            processes=processes,
            compute_capability=(int(capability[0]), int(capability[1])),
            sm_count=stored.sm_count if stored else None,
            context_bytes=stored.context_bytes if stored else UNKNOWN_CONTEXT_BYTES,
            context_basis=stored.context_basis if stored else "modelled",
            bandwidth_bytes_per_s=stored.bandwidth_bytes_per_s if stored else None,
            bf16_flops_per_s=stored.bf16_flops_per_s if stored else None,
            fp16_flops_per_s=stored.fp16_flops_per_s if stored else None,
            pcie_bytes_per_s=pcie or (stored.pcie_bytes_per_s if stored else None),
            driver=_text(driver) if driver else None,
            source="nvml",
            sources=_live_sources(stored, told is not None, pcie is not None),
        )

    # --------------------------------------------------------------------------------------------------- pieces
    def _handle(self, index: int) -> Any:
        if not 0 <= index < len(self._handles):
            visible = "there is one GPU" if len(self._handles) == 1 else f"there are {len(self._handles)} GPUs"
            raise VramplanError(f"no GPU with index {index}: {visible}, counted from 0")
        return self._handles[index]

    def _memory(self, handle: Any) -> tuple[int, int, int | None]:
        """Total, free and driver-reserved bytes; reserved is None where only version 1 of the call exists."""
        nvml = self._nvml
        version = getattr(nvml, "nvmlMemory_v2", None)
        memory = self._may(nvml.nvmlDeviceGetMemoryInfo, handle, version) if version is not None else None
        reserved = None if memory is None else int(memory.reserved)
        if memory is None:
            memory = self._must(nvml.nvmlDeviceGetMemoryInfo, handle)
        total, free = int(memory.total), int(memory.free)
        if not 0 < total < 2**44 or not 0 <= free <= total:
            raise VramplanError(f"NVML reports an impossible memory size ({free} of {total} bytes free)", _ELSEWHERE)
        return total, free, reserved if reserved is not None and 0 <= reserved <= total - free else None

    def _sizes(self, handle: Any, total: int) -> dict[int, int | None]:
        """Bytes by process. A size of 0, or of more than the card, is no size (WSL, containers)."""
        nvml = self._nvml
        sizes: dict[int, int | None] = {}
        for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
            for process in self._may(ask, handle) or ():
                size = process.usedGpuMemory
                sizes[int(process.pid)] = int(size) if size is not None and 0 < size < total else None
        return sizes

    def _processes(self, handle: Any, total: int) -> tuple[GpuProcess, ...]:
        """Other processes on the card, largest first."""
        found = [
            GpuProcess(pid=pid, name=self._process_name(pid), used_bytes=size)
            for pid, size in self._sizes(handle, total).items()
            if pid != os.getpid()
        ]
        return tuple(sorted(found, key=lambda process: (-(process.used_bytes or 0), process.pid)))

    def _process_name(self, pid: int) -> str | None:
        name = self._may(self._nvml.nvmlSystemGetProcessName, pid)  # not found in a container: another pid namespace
        return PurePosixPath(_text(name).replace("\\", "/")).name or None if name else None

    def _pcie(self, handle: Any) -> int | None:
        """The fastest link that card and slot agree on; the present one is slower while the card sleeps."""
        generation = self._may(self._nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle)
        width = self._may(self._nvml.nvmlDeviceGetMaxPcieLinkWidth, handle)
        lane = _LANE_BYTES_PER_S.get(generation) if isinstance(generation, int) else None
        return lane * width if lane and isinstance(width, int) and 0 < width <= 32 else None

    # ------------------------------------------------------------------------------------------- which cards, MIG
    def _visible(self) -> list[Any]:
        nvml = self._nvml
        physical = range(self._must(nvml.nvmlDeviceGetCount))
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            handles = [self._must(nvml.nvmlDeviceGetHandleByIndex, index) for index in physical]
        else:
            handles = self._chosen([part.strip() for part in wanted.split(",")], len(physical))
        if not handles and wanted is not None and len(physical):
            raise VramplanError(f"CUDA_VISIBLE_DEVICES={wanted!r} hides every GPU", "unset it")
        if not handles:
            raise VramplanError("this machine has no NVIDIA GPU", _ELSEWHERE)
        return [instance for handle in handles for instance in self._instances(handle)]

    def _chosen(self, parts: list[str], count: int) -> list[Any]:
        """CUDA's rule: the list counts up to its first entry that names no card."""
        handles = []
        for part in parts:
            handle = None
            if part.isascii() and part.isdigit():
                if int(part) < count:
                    handle = self._must(self._nvml.nvmlDeviceGetHandleByIndex, int(part))
            elif part.startswith("MIG-"):
                handle = self._may(self._nvml.nvmlDeviceGetHandleByUUID, part)
            elif part.startswith("GPU-"):
                handle = self._by_uuid(part, count)
            if handle is None:
                break
            handles.append(handle)
        return handles

    def _by_uuid(self, start: str, count: int) -> Any:
        """The one card whose UUID begins so (CUDA takes abbreviations), or None."""
        handles = [self._must(self._nvml.nvmlDeviceGetHandleByIndex, index) for index in range(count)]
        found = [h for h in handles if _text(self._must(self._nvml.nvmlDeviceGetUUID, h)).startswith(start)]
        return found[0] if len(found) == 1 else None

    def _instances(self, handle: Any) -> list[Any]:
        """The MIG instances of a card that is split, else the card: a split card's own memory is nobody's."""
        nvml = self._nvml
        mode = self._may(nvml.nvmlDeviceGetMigMode, handle) if hasattr(nvml, "nvmlDeviceGetMigMode") else None
        if not mode or mode[0] != 1:
            return [handle]
        slots = self._may(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
        parts = [self._may(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, slot) for slot in range(slots)]
        return [part for part in parts if part is not None]

    def _physical(self, handle: Any) -> Any:
        """The card that a MIG instance is part of; a card itself otherwise."""
        parent = getattr(self._nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", None)
        return (self._may(parent, handle) if parent else None) or handle

    # --------------------------------------------------------------------------------------------------- calling
    def _must(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except self._nvml.NVMLError as error:
            raise self._failure(error) from None

    def _may(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """None where the card, the driver or the library does not answer this; a lost card is an error still."""
        try:
            return call(*arguments)
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) == getattr(self._nvml, "NVML_ERROR_GPU_IS_LOST", 15):
                raise self._failure(error) from None
        except (TypeError, AttributeError):  # an older pynvml: no such argument
            pass
        return None

    def _failure(self, error: Exception) -> VramplanError:
        for constant, (message, hint) in _FAILURES.items():
            if getattr(error, "value", None) == getattr(self._nvml, constant, constant):
                return VramplanError(message, hint)
        return VramplanError(f"NVML does not answer: {error}", f"does `nvidia-smi` work? {_ELSEWHERE}")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _live_sources(stored: GpuProfile | None, capability: bool, pcie: bool) -> tuple[tuple[str, str], ...]:
    """Where each field of a live card was read: NVML first, the stored profile for the rest."""
    read = {"total_bytes": "NVML", "usable_bytes": "NVML: free at this moment"}
    read |= {"compute_capability": "NVML"} if capability else {}
    read |= {"pcie_bytes_per_s": "NVML: link generation and width"} if pcie else {}
    if stored is None:
        read["context_bytes"] = "modelled: no stored profile for this card, so the largest reading, an H200's"
        return tuple(read.items())
    return tuple({**dict(stored.sources), **read}.items())


# ------------------------------------------------------------------------------------------------- cards as files
def gpu_toml(profile: GpuProfile) -> str:
    """A card as the text of a profile file, which `--gpu FILE` reads back.

    A file describes an idle card: where the driver's share is known, `usable_bytes` is the total without it.
    """
    usable = profile.usable_bytes if profile.reserved_bytes is None else profile.total_bytes - profile.reserved_bytes
    sources = dict(profile.sources)
    if usable != profile.usable_bytes:
        sources["usable_bytes"] = "NVML: total less what the driver reserves"
    tables: dict[str, tuple[object, str]] = {
        "compute_capability": ("{}.{}".format(*profile.compute_capability), ""),
        "total_bytes": (profile.total_bytes, ""),
        "usable_bytes": (usable, profile.usable_basis),
        "context_bytes": (profile.context_bytes, profile.context_basis),
    }
    for field in ("sm_count", "bandwidth_bytes_per_s", "bf16_flops_per_s", "fp16_flops_per_s", "pcie_bytes_per_s"):
        if getattr(profile, field) is not None:
            tables[field] = (getattr(profile, field), "")
    lines = [f"name = {_quote(profile.name)}"]
    for field, (value, basis) in tables.items():
        lines += ["", f"[{field}]", f"value = {_quote(value) if isinstance(value, str) else value}"]
        lines += [f"basis = {_quote(basis)}"] if basis else []
        lines += [f"source = {_quote(sources[field])}"] if sources.get(field) else []
    return "\n".join(lines) + "\n"


def save_gpu(profile: GpuProfile, path: Path | str) -> None:
    """Write `gpu_toml` to a file, whole or not at all. InputError if it cannot be created there."""
    write_text(path, gpu_toml(profile))


def _quote(text: str) -> str:
    """A TOML basic string."""
    return '"' + "".join(_escape(letter) for letter in text) + '"'


def _escape(letter: str) -> str:
    if letter in '"\\':
        return "\\" + letter
    if letter < " " or letter == "\x7f":
        return f"\\u{ord(letter):04x}"
    return "\ufffd" if "\ud800" <= letter <= "\udfff" else letter
