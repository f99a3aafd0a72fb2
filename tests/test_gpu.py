"""NVML against a fake pynvml that behaves like several machines, and cards written to files and read back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vramplan.errors import InputError, VramplanError
from vramplan.sources import gpu, profiles

MIB = 2**20
V2 = 0x02000028
ERRORS = {
    "UNINITIALIZED": 1,
    "NOT_SUPPORTED": 3,
    "NO_PERMISSION": 4,
    "NOT_FOUND": 6,
    "DRIVER_NOT_LOADED": 9,
    "LIBRARY_NOT_FOUND": 12,
    "FUNCTION_NOT_FOUND": 13,
    "GPU_IS_LOST": 15,
    "LIB_RM_VERSION_MISMATCH": 18,
    "GPU_NOT_FOUND": 28,
    "UNKNOWN": 999,
}


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"NVML error {value}")
        self.value = value


def fail(name: str) -> Callable[..., Any]:
    def call(*_: Any) -> Any:
        raise NVMLError(ERRORS[name])

    return call


def process(pid: int, size: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=size)


class FakeNvml(ModuleType):
    """A machine with cards; every handle is a dict. Tests replace single calls."""

    NVMLError = NVMLError
    nvmlMemory_v2 = V2

    def __init__(self, *cards: dict[str, Any]) -> None:
        super().__init__("pynvml")
        self.cards = [{**card(), **given, "uuid": f"GPU-{index}a{index}b"} for index, given in enumerate(cards)]
        self.opened = self.closed = 0
        for name, value in ERRORS.items():
            setattr(self, f"NVML_ERROR_{name}", value)

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.closed += 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.cards[index]

    def nvmlDeviceGetUUID(self, handle: dict[str, Any]) -> str:
        return str(handle["uuid"])

    def nvmlDeviceGetName(self, handle: dict[str, Any]) -> str | bytes:
        name: str | bytes = handle["name"]
        return name

    def nvmlDeviceGetMemoryInfo(self, handle: dict[str, Any], version: int | None = None) -> SimpleNamespace:
        total, used, reserved = (handle[key] * MIB for key in ("total", "used", "reserved"))
        free = total - used - reserved
        if version == V2:
            return SimpleNamespace(total=total, used=used, reserved=reserved, free=free)
        return SimpleNamespace(total=total, used=used + reserved, free=free)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: dict[str, Any]) -> list[SimpleNamespace]:
        return list(handle["compute"])

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: dict[str, Any]) -> list[SimpleNamespace]:
        return list(handle["graphics"])

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        return f"/usr/bin/program-{pid}"

    def nvmlDeviceGetCudaComputeCapability(self, handle: dict[str, Any]) -> tuple[int, int]:
        major, minor = handle["capability"]
        return major, minor

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle: dict[str, Any]) -> int:
        return int(handle["pcie"][0])

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle: dict[str, Any]) -> int:
        return int(handle["pcie"][1])

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.95.05"


def card(**changes: Any) -> dict[str, Any]:
    """An idle RTX 4090, sizes in MiB."""
    idle = {
        "name": "NVIDIA GeForce RTX 4090",
        "total": 24564,
        "used": 0,
        "reserved": 400,
        "compute": (),
        "graphics": (),
        "capability": (8, 9),
        "pcie": (4, 16),
    }
    return {**idle, **changes}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeNvml]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def install(*cards: dict[str, Any], **calls: Any) -> FakeNvml:
        fake = FakeNvml(*cards)
        for name, call in calls.items():
            setattr(fake, name, call)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


# ------------------------------------------------------------------------------------------------ a good machine
def test_idle_card(machine: Callable[..., FakeNvml]) -> None:
    fake = machine(card())
    found = gpu.live_gpu(0)
    stored = profiles.load_gpu("rtx-4090")
    assert (found.key, found.name, found.source, found.driver) == (stored.key, stored.name, "nvml", "580.95.05")
    assert (found.total_bytes, found.usable_bytes, found.reserved_bytes) == (24564 * MIB, 24164 * MIB, 400 * MIB)
    assert (found.used_by_others_bytes, found.processes, found.usable_basis) == (0, (), "measured")
    assert (found.sm_count, found.bf16_flops_per_s) == (stored.sm_count, stored.bf16_flops_per_s)
    assert (found.context_bytes, found.context_basis) == (stored.context_bytes, stored.context_basis)
    assert found.pcie_bytes_per_s == pytest.approx(16 * 16e9 * 128 / 130 / 8)
    sources = dict(found.sources)
    assert sources["total_bytes"] == "NVML"
    assert sources["sm_count"] == dict(stored.sources)["sm_count"]
    assert (fake.opened, fake.closed) == (1, 1)


def test_busy_card_counts_what_is_free_not_total_less_used(machine: Callable[..., FakeNvml]) -> None:
    users = {"compute": [process(7, 900 * MIB), process(8, 2000 * MIB)], "graphics": [process(7, 900 * MIB)]}
    machine(card(used=3000, **users))
    found = gpu.live_gpu()
    assert found.usable_bytes == (24564 - 400 - 3000) * MIB
    assert found.used_by_others_bytes == 3000 * MIB
    assert [(p.pid, p.name, p.used_bytes) for p in found.processes] == [
        (8, "program-8", 2000 * MIB),
        (7, "program-7", 900 * MIB),
    ]


def test_own_process_is_not_another_user(machine: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(card(used=500, compute=[process(4242, 500 * MIB), process(5, None)]))
    monkeypatch.setattr(gpu.os, "getpid", lambda: 4242)
    assert [p.pid for p in gpu.live_gpu().processes] == [5]


def test_card_without_a_stored_profile(machine: Callable[..., FakeNvml]) -> None:
    machine(card(name=b"NVIDIA Future 9000", total=65536, capability=(13, 0), pcie=(7, 16)))
    found = gpu.live_gpu()
    assert (found.key, found.name, found.compute_capability) == ("future9000", "NVIDIA Future 9000", (13, 0))
    assert (found.sm_count, found.bf16_flops_per_s, found.pcie_bytes_per_s) == (None, None, None)
    assert (found.context_bytes, found.context_basis) == (758 * MIB, "modelled")


def test_the_variant_is_chosen_by_size(machine: Callable[..., FakeNvml]) -> None:
    machine(card(name="NVIDIA GeForce RTX 4060 Ti", total=8188), card(name="NVIDIA GeForce RTX 4060 Ti", total=16380))
    assert [found.key for found in gpu.live_gpus()] == ["rtx-4060-ti-8gb", "rtx-4060-ti-16gb"]


# ----------------------------------------------------------------------------------------- older, stranger drivers
def only_v1(fake: FakeNvml, how: str) -> None:
    original = fake.nvmlDeviceGetMemoryInfo

    def call(handle: dict[str, Any], version: int | None = None) -> SimpleNamespace:
        if version is not None:
            fail("FUNCTION_NOT_FOUND")()
        return original(handle)

    def without_argument(handle: dict[str, Any]) -> SimpleNamespace:
        return original(handle)

    fake.nvmlDeviceGetMemoryInfo = call if how == "driver" else without_argument  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["driver", "library"])
def test_version_1_of_the_memory_call(machine: Callable[..., FakeNvml], how: str) -> None:
    fake = machine(card(used=1000, compute=[process(7, 600 * MIB)]))
    only_v1(fake, how)
    found = gpu.live_gpu()
    assert (found.usable_bytes, found.reserved_bytes) == ((24564 - 400 - 1000) * MIB, None)
    assert found.used_by_others_bytes == 600 * MIB  # what v1 calls used holds the driver's share
    with gpu.Nvml() as nvml:
        assert nvml.used_bytes(0) is None


def test_wsl_sizes_are_unknown_not_enormous(machine: Callable[..., FakeNvml]) -> None:
    sizes = [process(1, 2**64 - 1), process(2, 0), process(3, None), process(4, 24564 * MIB), process(5, 5 * MIB)]
    machine(card(used=100, compute=sizes), nvmlSystemGetProcessName=fail("NOT_FOUND"))
    found = {p.pid: (p.used_bytes, p.name) for p in gpu.live_gpu().processes}
    assert found == {1: (None, None), 2: (None, None), 3: (None, None), 4: (None, None), 5: (5 * MIB, None)}


@pytest.mark.parametrize(("total", "used"), [(0, 0), (24564, -9000), (24564, 30000), (2**25, 0)])
def test_impossible_memory_sizes(machine: Callable[..., FakeNvml], total: int, used: int) -> None:
    fake = machine(card(total=total, used=used))
    with pytest.raises(VramplanError, match="impossible memory size") as caught:
        gpu.live_gpu()
    assert "--gpu NAME" in caught.value.hint
    assert fake.closed == 1


def test_windows_process_names(machine: Callable[..., FakeNvml]) -> None:
    machine(card(compute=[process(9, MIB)]), nvmlSystemGetProcessName=lambda pid: b"C:\\Games\\game.exe")
    assert gpu.live_gpu().processes[0].name == "game.exe"


def test_calls_a_card_does_not_support_are_not_needed(machine: Callable[..., FakeNvml]) -> None:
    calls = (
        "nvmlDeviceGetCudaComputeCapability",
        "nvmlDeviceGetMaxPcieLinkGeneration",
        "nvmlDeviceGetComputeRunningProcesses",
        "nvmlDeviceGetGraphicsRunningProcesses",
        "nvmlSystemGetDriverVersion",
    )
    machine(card(), **{name: fail("NOT_SUPPORTED") for name in calls})
    found = gpu.live_gpu()
    stored = profiles.load_gpu("rtx-4090")
    assert (found.compute_capability, found.pcie_bytes_per_s) == ((8, 9), stored.pcie_bytes_per_s)
    assert (found.driver, found.processes) == (None, ())
    assert dict(found.sources)["compute_capability"] == dict(stored.sources)["compute_capability"]


def test_unknown_card_without_a_compute_capability(machine: Callable[..., FakeNvml]) -> None:
    machine(card(name="Odd"), nvmlDeviceGetCudaComputeCapability=fail("NOT_SUPPORTED"))
    with pytest.raises(VramplanError, match="compute capability of Odd"):
        gpu.live_gpu()


# ------------------------------------------------------------------------------------------------------- failures
@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        ("LIBRARY_NOT_FOUND", "no NVIDIA driver library", "--gpu NAME"),
        ("DRIVER_NOT_LOADED", "driver is not loaded", "nvidia-smi"),
        ("NO_PERMISSION", "may not read", "--gpus all"),
        ("LIB_RM_VERSION_MISMATCH", "different versions", "restart"),
        ("UNKNOWN", "NVML error 999", "nvidia-smi"),
    ],
)
def test_nvml_that_does_not_start(machine: Callable[..., FakeNvml], error: str, message: str, hint: str) -> None:
    machine(nvmlInit=fail(error))
    with pytest.raises(VramplanError, match=message) as caught:
        gpu.live_gpus()
    assert hint in caught.value.hint
    assert caught.value.exit_code == 1
    assert "\n" not in caught.value.message


def test_no_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(VramplanError, match="pynvml is missing") as caught:
        gpu.live_gpus()
    assert "nvidia-ml-py" in caught.value.hint


def test_no_gpu(machine: Callable[..., FakeNvml]) -> None:
    fake = machine()
    with pytest.raises(VramplanError, match="no NVIDIA GPU") as caught:
        gpu.live_gpus()
    assert "--gpu NAME" in caught.value.hint
    assert (fake.opened, fake.closed) == (1, 1)


@pytest.mark.parametrize("call", ["nvmlDeviceGetName", "nvmlDeviceGetComputeRunningProcesses"])
def test_card_lost_on_the_way(machine: Callable[..., FakeNvml], call: str) -> None:
    fake = machine(card(), **{call: fail("GPU_IS_LOST")})
    with pytest.raises(VramplanError, match="fallen off the bus"):
        gpu.live_gpu()
    assert fake.closed == 1


@pytest.mark.parametrize("index", [-1, 1, 99])
def test_no_such_index(machine: Callable[..., FakeNvml], index: int) -> None:
    machine(card())
    with pytest.raises(VramplanError, match=f"no GPU with index {index}: there is one GPU"):
        gpu.live_gpu(index)


def test_session_closes_after_an_error_inside(machine: Callable[..., FakeNvml]) -> None:
    fake = machine(card())
    with pytest.raises(KeyError), gpu.Nvml():
        raise KeyError
    assert fake.closed == 1


# -------------------------------------------------------------------------------------------------- which cards
@pytest.mark.parametrize(
    ("visible", "sizes"),
    [
        ("2,0", [30, 10]),
        (" 1 ", [20]),
        ("0,7,1", [10]),  # CUDA stops at the first that does not exist
        ("GPU-1a", [20]),
        ("GPU-2a2b,GPU-0", [30, 10]),
    ],
)
def test_visible_devices(
    machine: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch, visible: str, sizes: list[int]
) -> None:
    machine(*(card(total=total * 1024) for total in (10, 20, 30)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [found.total_bytes // 2**30 for found in gpu.live_gpus()] == sizes


@pytest.mark.parametrize("visible", ["", "-1", "9", "GPU-", "GPU-zz", "none"])
def test_visible_devices_that_hide_all(
    machine: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    machine(card(), card())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(VramplanError, match="hides every GPU"):
        gpu.live_gpus()


def test_a_split_card_is_its_instances(machine: Callable[..., FakeNvml]) -> None:
    whole = card(name="NVIDIA A100-SXM4-80GB", total=81920, capability=(8, 0))
    parts = [card(name="NVIDIA A100-SXM4-80GB MIG 1g.10gb", total=9728, reserved=20) for _ in range(2)]

    def part(handle: Any, slot: int) -> Any:
        return parts[slot] if slot < 2 else fail("NOT_FOUND")()

    fake = machine(whole)
    calls: dict[str, Callable[..., Any]] = {
        "nvmlDeviceGetMigMode": lambda handle: (1, 1),
        "nvmlDeviceGetMaxMigDeviceCount": lambda handle: 7,
        "nvmlDeviceGetMigDeviceHandleByIndex": part,
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": lambda handle: fake.cards[0],
    }
    for name, call in calls.items():
        setattr(fake, name, call)
    found = gpu.live_gpus()
    assert [instance.total_bytes for instance in found] == [9728 * MIB] * 2
    assert found[0].compute_capability == (8, 0)  # asked of the card it is part of
    assert found[0].sm_count is None  # the card's number is not the instance's


# ------------------------------------------------------------------------------------------------------- sampling
def test_sampling_while_a_run_goes_on(machine: Callable[..., FakeNvml]) -> None:
    fake = machine(card(used=100))
    with gpu.Nvml() as nvml:
        assert nvml.count() == 1
        assert nvml.used_bytes(0) == 100 * MIB
        assert nvml.process_bytes(0, 7) is None
        fake.cards[0] |= {"used": 5000, "compute": [process(7, 4900 * MIB)]}
        assert nvml.used_bytes(0) == 5000 * MIB
        assert nvml.process_bytes(0, 7) == 4900 * MIB
    assert (fake.opened, fake.closed) == (1, 1)


def test_who_else_is_on_the_card_and_whether_it_computes(
    machine: Callable[..., FakeNvml], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.os, "getpid", lambda: 4242)
    mine = process(4242, 9 * MIB)
    rates = SimpleNamespace(gpu=37, memory=5)
    machine(card(), card(compute=[process(7, 300 * MIB), process(8, None), mine]),
            nvmlDeviceGetUtilizationRates=lambda handle: rates)  # fmt: skip
    with gpu.Nvml() as nvml:
        assert nvml.sizes(1) == {7: 300 * MIB, 8: None}
        assert (nvml.busy_percent(1), nvml.process_name(7), nvml.uuid(1)) == (37, "program-7", "GPU-1a1b")
    machine(card(), nvmlDeviceGetUtilizationRates=fail("NOT_SUPPORTED"))
    with gpu.Nvml() as nvml:
        assert nvml.busy_percent(0) is None


# ------------------------------------------------------------------------------------------------- cards as files
@pytest.mark.parametrize("name", profiles.gpu_names())
def test_every_stored_card_survives_being_saved(tmp_path: Path, name: str) -> None:
    stored = profiles.load_gpu(name)
    gpu.save_gpu(stored, tmp_path / f"{name}.toml")
    assert profiles.load_gpu(str(tmp_path / f"{name}.toml")) == stored


def test_a_live_card_is_saved_as_idle(machine: Callable[..., FakeNvml], tmp_path: Path) -> None:
    machine(card(used=9000, compute=[process(7, 8900 * MIB)]))
    live = gpu.live_gpu()
    gpu.save_gpu(live, tmp_path / "desk.toml")
    back = profiles.load_gpu(str(tmp_path / "desk.toml"))
    assert back.usable_bytes == (24564 - 400) * MIB
    assert dict(back.sources)["usable_bytes"] == "NVML: total less what the driver reserves"
    same = {"name", "total_bytes", "reserved_bytes", "compute_capability", "sm_count", "context_bytes"}
    assert all(getattr(back, field) == getattr(live, field) for field in same)
    assert (back.key, back.source, back.processes, back.used_by_others_bytes) == ("desk", "file", (), 0)


@given(st.text(min_size=1, max_size=50).filter(lambda text: text.strip()))
def test_any_name_survives_being_saved(name: str) -> None:
    import tempfile

    stored = replace(profiles.load_gpu("t4"), name=name, sources=(("total_bytes", name),))
    with tempfile.TemporaryDirectory() as folder:
        gpu.save_gpu(stored, Path(folder) / "t4.toml")
        back = profiles.load_gpu(str(Path(folder) / "t4.toml"))
    assert (back.name, dict(back.sources)["total_bytes"]) == (name, name)


def test_saving_where_one_cannot(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        gpu.save_gpu(profiles.load_gpu("t4"), tmp_path / "none" / "t4.toml")
    with pytest.raises(InputError):
        gpu.save_gpu(profiles.load_gpu("t4"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.cuda
def test_this_machine() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    found = gpu.live_gpu(0)
    assert found.name == torch.cuda.get_device_name(0)
    assert found.compute_capability == torch.cuda.get_device_capability(0)
    assert found.reserved_bytes is not None
    assert found.total_bytes - found.reserved_bytes == torch.cuda.get_device_properties(0).total_memory
