"""A pynvml that behaves like a machine with cards, and the machines that tests meet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vramplan.sources import nvml_processes

MIB = 2**20
V2 = 0x02000028
ERRORS = {
    "UNINITIALIZED": 1,
    "INVALID_ARGUMENT": 2,
    "NOT_SUPPORTED": 3,
    "NO_PERMISSION": 4,
    "NOT_FOUND": 6,
    "DRIVER_NOT_LOADED": 9,
    "LIBRARY_NOT_FOUND": 12,
    "FUNCTION_NOT_FOUND": 13,
    "GPU_IS_LOST": 15,
    "RESET_REQUIRED": 16,
    "LIB_RM_VERSION_MISMATCH": 18,
    "GPU_NOT_FOUND": 28,
    "UNKNOWN": 999,
}
NOT_SUPPORTED = object()  # an answer that a card does not give
NEVER = 2**32 - 1  # an unsigned -1
HUGE = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE

Handle = dict[str, Any]


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


class NVMLLibraryMismatchError(Exception):
    """pynvml's own, for a call that the driver's library is too old for; no NVMLError."""


def fail(name: str) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise NVMLError(ERRORS[name])

    return call


def process(pid: int, size: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=size)


def card(**changes: Any) -> Handle:
    """An idle RTX 4090 with a monitor-less slot of its own; sizes in MiB, power in mW, clocks in MHz."""
    idle = {
        "name": "NVIDIA GeForce RTX 4090",
        "total": 24564,
        "used": 0,
        "reserved": 400,
        "compute": (),
        "graphics": (),
        "mps": (),
        "capability": (8, 9),
        "pcie": (4, 16),
        "pcie_now": (1, 16),
        "ecc": [0, 0],
        "display": 0,
        "drawn": 0,
        "power": 23_400,
        "limit": 450_000,
        "clock": 210,
        "max_clock": 3105,
        "reasons": 0x1,
        "busy": 0,
        "parts": None,  # MIG instances by slot
    }
    return {**idle, **changes}


def part(instance: int, profile: str, **changes: Any) -> Handle:
    """A MIG instance of an A100."""
    name = f"NVIDIA A100-SXM4-80GB MIG {profile}"
    uuid = f"MIG-{instance:08x}-1111-5222-8333-444444444444"
    changes = {"total": 9728, "reserved": 20, "capability": (8, 0), "busy": NOT_SUPPORTED, **changes}
    return card(name=name, uuid=uuid, instance=instance, sms=14, **changes)


def split_a100(*parts: Handle, **changes: Any) -> Handle:
    slots = [*parts, *[None] * (7 - len(parts))]
    return card(name="NVIDIA A100-SXM4-80GB", total=81920, capability=(8, 0), parts=slots, **changes)


def _told(handle: Handle, key: str) -> Any:
    answer = handle[key]
    return fail("NOT_SUPPORTED")() if answer is NOT_SUPPORTED else answer


class FakeNvml(ModuleType):
    """A machine with cards; every handle is a dict. Tests replace single calls."""

    NVMLError = NVMLError
    NVMLLibraryMismatchError = NVMLLibraryMismatchError
    nvmlMemory_v2 = V2

    def __init__(self, *cards: Handle) -> None:
        super().__init__("pynvml")
        self.cards = [{**card(), **given, "uuid": f"GPU-{index}a{index}b"} for index, given in enumerate(cards)]
        self.opened = self.closed = 0
        self.driver: Any = "580.95.05"
        self.cuda: Any = 13000
        for name, value in ERRORS.items():
            setattr(self, f"NVML_ERROR_{name}", value)

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.closed += 1

    def nvmlSystemGetDriverVersion(self) -> Any:
        return self.driver

    def nvmlSystemGetCudaDriverVersion_v2(self) -> Any:
        return self.cuda

    def nvmlSystemGetProcessName(self, pid: int) -> Any:
        return f"/usr/bin/program-{pid}"

    # -------------------------------------------------------------------------------------------------- handles
    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Handle:
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Handle:
        parts = [part for whole in self.cards for part in whole["parts"] or () if part]
        found = [handle for handle in (*self.cards, *parts) if handle["uuid"] == uuid]
        return found[0] if found else fail("NOT_FOUND")()

    def nvmlDeviceGetMigMode(self, handle: Handle) -> list[int]:
        if "instance" in handle:
            fail("INVALID_ARGUMENT")()
        return [int(handle["parts"] is not None)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Handle) -> int:
        return len(handle["parts"] or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Handle, slot: int) -> Handle:
        found: Handle = handle["parts"][slot] or fail("NOT_FOUND")()
        return found

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: Handle) -> Handle:
        owners = [whole for whole in self.cards if any(part is handle for part in whole["parts"] or ())]
        return owners[0] if owners else fail("INVALID_ARGUMENT")()

    # ------------------------------------------------------------------------------------------------- questions
    def nvmlDeviceGetUUID(self, handle: Handle) -> str:
        return str(handle["uuid"])

    def nvmlDeviceGetName(self, handle: Handle) -> Any:
        return handle["name"]

    def nvmlDeviceGetGpuInstanceId(self, handle: Handle) -> int:
        return int(handle["instance"]) if "instance" in handle else fail("INVALID_ARGUMENT")()

    def nvmlDeviceGetComputeInstanceId(self, handle: Handle) -> int:
        return 0 if "instance" in handle else fail("INVALID_ARGUMENT")()

    def nvmlDeviceGetAttributes_v2(self, handle: Handle) -> SimpleNamespace:
        return SimpleNamespace(multiprocessorCount=handle["sms"]) if "sms" in handle else fail("NOT_SUPPORTED")()

    def nvmlDeviceGetMemoryInfo(self, handle: Handle, version: int | None = None) -> SimpleNamespace:
        total, used, reserved = (handle[key] * MIB for key in ("total", "used", "reserved"))
        free = total - used - reserved
        if version == V2:
            return SimpleNamespace(total=total, used=used, reserved=reserved, free=free)
        return SimpleNamespace(total=total, used=used + reserved, free=free)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Handle) -> list[Any]:
        return list(_told(handle, "compute"))

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Handle) -> list[Any]:
        return list(_told(handle, "graphics"))

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: Handle) -> list[Any]:
        return list(_told(handle, "mps"))

    def nvmlDeviceGetCudaComputeCapability(self, handle: Handle) -> tuple[int, int]:
        major, minor = handle["capability"]
        return major, minor

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: Handle) -> Any:
        return _told(handle, "pcie")[0]

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: Handle) -> Any:
        return _told(handle, "pcie")[1]

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle: Handle) -> Any:
        return _told(handle, "pcie_now")[0]

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle: Handle) -> Any:
        return _told(handle, "pcie_now")[1]

    def nvmlDeviceGetEccMode(self, handle: Handle) -> Any:
        return _told(handle, "ecc")

    def nvmlDeviceGetDisplayMode(self, handle: Handle) -> Any:
        return _told(handle, "display")

    def nvmlDeviceGetDisplayActive(self, handle: Handle) -> Any:
        return _told(handle, "drawn")

    def nvmlDeviceGetPowerUsage(self, handle: Handle) -> Any:
        return _told(handle, "power")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Handle) -> Any:
        return _told(handle, "limit")

    def nvmlDeviceGetClockInfo(self, handle: Handle, kind: int) -> Any:
        assert kind == 1
        return _told(handle, "clock")

    def nvmlDeviceGetMaxClockInfo(self, handle: Handle, kind: int) -> Any:
        assert kind == 1
        return _told(handle, "max_clock")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Handle) -> Any:
        return _told(handle, "reasons")

    def nvmlDeviceGetUtilizationRates(self, handle: Handle) -> SimpleNamespace:
        return SimpleNamespace(gpu=_told(handle, "busy"), memory=0)


def named(names: dict[int, str]) -> Callable[[int], Any]:
    """`nvmlSystemGetProcessName` of a machine with these programs."""
    return lambda pid: names[pid] if pid in names else fail("NOT_FOUND")()


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml) -> FakeNvml:
    """Make `fake` this machine's NVML; nothing hides cards or process numbers."""
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvml_processes, "PROC", "/no/such/folder")
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


# ------------------------------------------------------------------------------------------------------- machines
def idle_desktop() -> FakeNvml:
    """A card with a monitor: two programs draw, nobody computes."""
    drawing = [process(901, 310 * MIB), process(1044, 122 * MIB)]
    fake = FakeNvml(card(used=440, graphics=drawing, display=1, drawn=1, busy=3))
    fake.nvmlSystemGetProcessName = named({901: "/usr/lib/xorg/Xorg", 1044: "/usr/bin/gnome-shell"})  # type: ignore[method-assign]
    return fake


def busy() -> FakeNvml:
    """A 12 GB card that three programs share; its link runs slow under load."""
    users = [process(4242, 5000 * MIB), process(4711, 2048 * MIB)]
    handle = card(
        name="NVIDIA GeForce RTX 3060", total=12288, reserved=370, used=7900, compute=users, capability=(8, 6),
        graphics=[process(901, 812 * MIB)], display=1, drawn=1, busy=97, pcie_now=(3, 4), power=165_200, limit=170_000,
        clock=1800, max_clock=2100, reasons=0x4,
    )  # fmt: skip
    fake = FakeNvml(handle)
    names = {4242: "/home/me/.venv/bin/python3 -m train", 4711: "/opt/ollama/bin/ollama", 901: "/usr/lib/xorg/Xorg"}
    fake.nvmlSystemGetProcessName = named(names)  # type: ignore[method-assign]
    return fake


def wsl() -> FakeNvml:
    """Windows' driver seen from WSL: sizes and much else are nonsense, each in a way of its own."""
    listed = [process(1, HUGE), process(2, 0), process(3, None), process(4, 24564 * MIB), process(5, -1), process(0, 0)]
    handle = card(
        used=3100, compute=listed, graphics=NOT_SUPPORTED, mps=NOT_SUPPORTED, pcie_now=(0, 0), pcie=(NEVER, NEVER),
        ecc=[NEVER, NEVER], display=NEVER, drawn=NOT_SUPPORTED, power=0, limit=NEVER, clock=0, max_clock=NEVER,
        reasons=HUGE, busy=NEVER,
    )  # fmt: skip
    fake = FakeNvml(handle)
    fake.driver, fake.cuda = "N/A", 0
    fake.nvmlSystemGetProcessName = named({1: "[Not Found]", 2: "", 3: "-"})  # type: ignore[method-assign]
    return fake


def container() -> FakeNvml:
    """The host's processes, by the host's numbers, without names."""
    handle = card(
        name="NVIDIA H100 80GB HBM3", total=81559, reserved=550, used=41100, capability=(9, 0), pcie=(5, 16),
        compute=[process(2954422, 30000 * MIB), process(17, 11000 * MIB)], ecc=[1, 1], busy=88, power=650_000,
        limit=700_000, clock=1755, max_clock=1980, pcie_now=(5, 16),
    )  # fmt: skip
    fake = FakeNvml(handle)
    fake.nvmlSystemGetProcessName = named({17: "/usr/bin/someone-else"})  # type: ignore[method-assign]
    return fake


def mig() -> FakeNvml:
    """An A100 with two instances, in slots 0 and 2; somebody works in the second."""
    second = part(7, "2g.20gb", total=19968, used=6100, compute=[process(77, 6000 * MIB)])
    return FakeNvml(split_a100(part(3, "1g.10gb"), None, second, ecc=[1, 1], busy=NOT_SUPPORTED))


def old_driver() -> FakeNvml:
    """A driver with version 1 of the memory call, and processes in a layout that the library does not know."""
    fake = FakeNvml(card(name="Tesla T4", total=15360, used=1000, reserved=500, capability=(7, 5), ecc=[1, 1]))
    original = fake.nvmlDeviceGetMemoryInfo

    def memory(handle: Handle, version: int | None = None) -> SimpleNamespace:
        return original(handle) if version is None else fail("FUNCTION_NOT_FOUND")()

    def mismatch(*_: Any) -> Any:
        raise NVMLLibraryMismatchError("Unversioned function called")

    calls: dict[str, Callable[..., Any]] = {
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetComputeRunningProcesses": mismatch,
        "nvmlDeviceGetComputeRunningProcesses_v2": lambda handle: [process(7, 600 * MIB)],
        "nvmlDeviceGetGraphicsRunningProcesses": mismatch,
        "nvmlDeviceGetMPSComputeRunningProcesses": mismatch,
        "nvmlSystemGetCudaDriverVersion_v2": fail("FUNCTION_NOT_FOUND"),
        "nvmlSystemGetCudaDriverVersion": lambda: 11040,
        "nvmlDeviceGetCurrentClocksEventReasons": fail("FUNCTION_NOT_FOUND"),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda handle: 0x1,
    }
    for name, call in calls.items():
        setattr(fake, name, call)
    return fake


def lost() -> FakeNvml:
    """Two cards, the second of which has fallen off the bus."""
    fake = FakeNvml(card(), card())
    fake.nvmlDeviceGetHandleByIndex = lambda index: fail("GPU_IS_LOST")() if index else fake.cards[0]  # type: ignore[method-assign]
    return fake


def throttled_laptop() -> FakeNvml:
    """A laptop's card on its power and heat limits; a panel is drawn by it, and power limits cannot be read."""
    handle = card(
        name="NVIDIA GeForce RTX 4060 Laptop GPU", total=8188, reserved=300, used=420, drawn=1,
        graphics=[process(3, 420 * MIB)], power=44_600, limit=NOT_SUPPORTED, clock=1245, max_clock=3105,
        reasons=0x4 | 0x20 | 0x40, pcie=(4, 8), pcie_now=(4, 8), busy=64,
    )  # fmt: skip
    return FakeNvml(handle)


def two_cards() -> FakeNvml:
    """A small card in the first slot, a large one in the second: CUDA counts the other way round."""
    small = card(name="NVIDIA GeForce RTX 3060", total=12288, reserved=370, capability=(8, 6))
    return FakeNvml(small, card())
