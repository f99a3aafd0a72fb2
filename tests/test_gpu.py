"""NVML against a fake pynvml that behaves like several machines, and cards written to files and read back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_nvml
import pytest
from fake_nvml import MIB, FakeNvml, card, fail, process, split_a100
from hypothesis import given
from hypothesis import strategies as st

from vramplan.core.types import GpuState
from vramplan.errors import InputError, VramplanError
from vramplan.sources import gpu, gpu_file, nvml_processes, profiles, records

Machine = Callable[..., FakeNvml]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Installs a machine with these cards; calls may be replaced by name."""

    def make(*cards: fake_nvml.Handle, **calls: Any) -> FakeNvml:
        fake = fake_nvml.install(monkeypatch, FakeNvml(*cards))
        for name, call in calls.items():
            setattr(fake, name, call)
        return fake

    return make


# ------------------------------------------------------------------------------------------------ a good machine
def test_idle_card(machine: Machine) -> None:
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


def test_busy_card_counts_what_is_free_not_total_less_used(machine: Machine) -> None:
    users = {"compute": [process(7, 900 * MIB), process(8, 2000 * MIB)], "graphics": [process(7, 900 * MIB)]}
    machine(card(used=3000, **users))
    found = gpu.live_gpu()
    assert found.usable_bytes == (24564 - 400 - 3000) * MIB
    assert found.used_by_others_bytes == 3000 * MIB
    assert [(p.pid, p.name, p.used_bytes) for p in found.processes] == [
        (8, "program-8", 2000 * MIB),
        (7, "program-7", 900 * MIB),
    ]


def test_own_process_is_not_another_user(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(card(used=500, compute=[process(4242, 500 * MIB), process(5, None)]))
    monkeypatch.setattr(os, "getpid", lambda: 4242)
    assert [p.pid for p in gpu.live_gpu().processes] == [5]


def test_card_without_a_stored_profile(machine: Machine) -> None:
    machine(card(name=b"NVIDIA Future 9000", total=65536, capability=(13, 0), pcie=(7, 16)))
    found = gpu.live_gpu()
    assert (found.key, found.name, found.compute_capability) == ("future-9000", "NVIDIA Future 9000", (13, 0))
    assert (found.sm_count, found.bf16_flops_per_s, found.pcie_bytes_per_s) == (None, None, None)
    assert (found.context_bytes, found.context_basis) == (758 * MIB, "modelled")


def test_the_variant_is_chosen_by_size(machine: Machine) -> None:
    machine(card(name="NVIDIA GeForce RTX 4060 Ti", total=8188), card(name="NVIDIA GeForce RTX 4060 Ti", total=16380))
    assert [found.key for found in gpu.live_gpus()] == ["rtx-4060-ti-8gb", "rtx-4060-ti-16gb"]


# ----------------------------------------------------------------------------------------- older, stranger drivers
@pytest.mark.parametrize("how", ["driver", "library"])
def test_version_1_of_the_memory_call(machine: Machine, how: str) -> None:
    fake = machine(card(used=1000, compute=[process(7, 600 * MIB)]))
    original = fake.nvmlDeviceGetMemoryInfo
    old: dict[str, Callable[..., Any]] = {  # no such function in the driver, no such argument in the library
        "driver": lambda handle, version=None: original(handle) if version is None else fail("FUNCTION_NOT_FOUND")(),
        "library": lambda handle: original(handle),
    }
    fake.nvmlDeviceGetMemoryInfo = old[how]  # type: ignore[method-assign]
    found = gpu.live_gpu()
    assert (found.usable_bytes, found.reserved_bytes) == ((24564 - 400 - 1000) * MIB, None)
    assert found.used_by_others_bytes == 600 * MIB  # what v1 calls used holds the driver's share
    with gpu.Nvml() as nvml:
        assert nvml.used_bytes(0) is None


def test_an_old_driver_is_asked_by_its_older_names(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.old_driver())
    found = gpu.live_gpu()
    assert (found.reserved_bytes, found.used_by_others_bytes) == (None, 600 * MIB)
    assert [(process.pid, process.used_bytes) for process in found.processes] == [(7, 600 * MIB)]
    assert found.state is not None
    assert (found.state.cuda, found.state.throttled_by, found.state.ecc) == ("11.4", (), True)


# --------------------------------------------------------------------------------------------------------- state
def test_the_state_of_an_idle_card(machine: Machine) -> None:
    machine(card())
    assert gpu.live_gpu().state == GpuState(
        cuda="13.0", pcie_generation=1, pcie_width=16, pcie_max_generation=4, pcie_max_width=16, ecc=False,
        display_attached=False, display_active=False, power_watts=23, power_limit_watts=450, clock_mhz=210,
        max_clock_mhz=3105, throttled_by=(), busy_percent=0,
    )  # fmt: skip


def test_a_throttled_laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.throttled_laptop())
    state = gpu.live_gpu().state
    assert state is not None
    assert state.throttled_by == ("power cap", "heat")
    assert (state.power_watts, state.power_limit_watts) == (45, None)
    assert (state.display_attached, state.display_active) == (False, True)
    assert gpu.live_gpu().processes[0].graphics


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [(0, ()), (0x1, ()), (0x2 | 0x10 | 0x100, ()), (0x8, ("hardware slowdown",)), (0x40, ("heat",)),
     (0x80 | 0x4, ("power cap", "power brake"))],
)  # fmt: skip
def test_what_counts_as_throttling(machine: Machine, bits: int, reasons: tuple[str, ...]) -> None:
    machine(card(reasons=bits))
    state = gpu.live_gpu().state
    assert state is not None and state.throttled_by == reasons


def test_nonsense_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.wsl())
    found = gpu.live_gpu()
    assert found.driver is None
    assert found.state == GpuState()
    assert found.pcie_bytes_per_s == profiles.load_gpu("rtx-4090").pcie_bytes_per_s
    assert [(process.pid, process.name, process.used_bytes) for process in found.processes] == [
        (pid, None, None) for pid in (1, 2, 3, 4, 5)
    ]
    assert found.used_by_others_bytes == 3100 * MIB  # that much is known all the same


def test_sizes_that_are_more_than_all_that_is_used_are_unknown(machine: Machine) -> None:
    machine(card(used=1000, compute=[process(7, 900 * MIB), process(8, 800 * MIB)]))
    assert [process.used_bytes for process in gpu.live_gpu().processes] == [None, None]


def test_a_process_that_ends_between_two_questions_does_no_harm(machine: Machine) -> None:
    fake = machine(card(used=0, compute=[process(7, 900 * MIB)]))
    original = fake.nvmlDeviceGetMemoryInfo

    def memory(handle: Any, version: int | None = None) -> Any:
        info = original(handle, version)
        handle["used"] = 900
        return info

    fake.nvmlDeviceGetMemoryInfo = memory  # type: ignore[method-assign]
    found = gpu.live_gpu()
    assert (found.used_by_others_bytes, found.processes[0].used_bytes) == (900 * MIB, 900 * MIB)


def test_processes_without_a_number_are_kept_where_they_have_a_size(machine: Machine) -> None:
    machine(card(used=900, compute=[process(0, 500 * MIB), process(0, 300 * MIB), process(0, None)]))
    assert [(found.pid, found.used_bytes) for found in gpu.live_gpu().processes] == [
        (None, 500 * MIB),
        (None, 300 * MIB),
    ]


def test_clients_of_mps_are_processes(machine: Machine) -> None:
    machine(card(used=900, mps=[process(31, 500 * MIB)]))
    assert [found.pid for found in gpu.live_gpu().processes] == [31]


def make_proc(folder: Path, namespace: int, maps: dict[int, str]) -> str:
    (folder / "self" / "ns").mkdir(parents=True)
    (folder / "self" / "ns" / "pid").symlink_to(f"pid:[{namespace}]")
    for pid, text in maps.items():
        (folder / str(pid)).mkdir()
        (folder / str(pid) / "maps").write_text(text)
    return str(folder)


def test_the_hosts_numbers_mean_nothing_in_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.container())
    proc = make_proc(tmp_path / "c", 4026532999, {17: "7f00 r-xp /usr/bin/bash\n"})  # another 17, and not on the card
    monkeypatch.setattr(nvml_processes, "PROC", proc)
    found = [(process.pid, process.name, process.used_bytes) for process in gpu.live_gpu().processes]
    assert found == [(None, None, 30000 * MIB), (None, None, 11000 * MIB)]


def test_processes_of_ones_own_namespace_keep_their_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.container())
    inside = make_proc(tmp_path / "c", 4026532999, {17: "7f00 r-xp /usr/lib/libcuda.so.580.95.05\n"})
    monkeypatch.setattr(nvml_processes, "PROC", inside)
    assert [(p.pid, p.name) for p in gpu.live_gpu().processes] == [(None, None), (17, "someone-else")]
    monkeypatch.setattr(nvml_processes, "PROC", make_proc(tmp_path / "h", 4026531836, {}))
    assert [p.pid for p in gpu.live_gpu().processes] == [2954422, 17]


def test_wsl_sizes_are_unknown_not_enormous(machine: Machine) -> None:
    sizes = [process(1, 2**64 - 1), process(2, 0), process(3, None), process(4, 24564 * MIB), process(5, 5 * MIB)]
    machine(card(used=100, compute=sizes), nvmlSystemGetProcessName=fail("NOT_FOUND"))
    found = {p.pid: (p.used_bytes, p.name) for p in gpu.live_gpu().processes}
    assert found == {1: (None, None), 2: (None, None), 3: (None, None), 4: (None, None), 5: (5 * MIB, None)}


@pytest.mark.parametrize(("total", "used"), [(0, 0), (24564, -9000), (24564, 30000), (2**25, 0)])
def test_impossible_memory_sizes(machine: Machine, total: int, used: int) -> None:
    fake = machine(card(total=total, used=used))
    with pytest.raises(VramplanError, match="impossible memory size") as caught:
        gpu.live_gpu()
    assert "--gpu NAME" in caught.value.hint
    assert fake.closed == 1


@pytest.mark.parametrize(
    ("told", "name"),
    [
        (b"C:\\Program Files\\Game\\game.exe", "game.exe"),
        ("/opt/google/chrome/chrome --type=gpu-process --path=/a/b", "chrome"),
        ("python", "python"),
        ("/usr/bin/ev\x1b[31mil\n", "ev?[31mil?"),
        ("[Not Found]", None),
        ("N/A", None),
        (None, None),
    ],
)
def test_process_names(machine: Machine, told: Any, name: str | None) -> None:
    machine(card(used=5, compute=[process(9, MIB)]), nvmlSystemGetProcessName=lambda pid: told)
    assert gpu.live_gpu().processes[0].name == name


def test_calls_a_card_does_not_support_are_not_needed(machine: Machine) -> None:
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


def test_unknown_card_without_a_compute_capability(machine: Machine) -> None:
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
def test_nvml_that_does_not_start(machine: Machine, error: str, message: str, hint: str) -> None:
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


def test_no_gpu(machine: Machine) -> None:
    fake = machine()
    with pytest.raises(VramplanError, match="no NVIDIA GPU") as caught:
        gpu.live_gpus()
    assert "--gpu NAME" in caught.value.hint
    assert (fake.opened, fake.closed) == (1, 1)


@pytest.mark.parametrize("call", ["nvmlDeviceGetName", "nvmlDeviceGetComputeRunningProcesses"])
def test_card_lost_on_the_way(machine: Machine, call: str) -> None:
    fake = machine(card(), **{call: fail("GPU_IS_LOST")})
    with pytest.raises(VramplanError, match="fallen off the bus"):
        gpu.live_gpu()
    assert fake.closed == 1


def test_a_lost_card_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.lost())
    assert gpu.live_gpu(0).name == "NVIDIA GeForce RTX 4090"
    for ask in (lambda: gpu.live_gpu(1), gpu.live_gpus):
        with pytest.raises(VramplanError, match="fallen off the bus"):
            ask()


def test_cards_that_one_may_not_open_are_not_counted(machine: Machine) -> None:
    fake = machine(card(total=10240), card(total=20480))
    fake.nvmlDeviceGetHandleByIndex = lambda index: fake.cards[1] if index else fail("NO_PERMISSION")()
    assert [found.total_bytes // MIB for found in gpu.live_gpus()] == [20480]
    fake.nvmlDeviceGetHandleByIndex = fail("NO_PERMISSION")
    with pytest.raises(VramplanError, match="may not read") as caught:
        gpu.live_gpus()
    assert "--gpus all" in caught.value.hint


@pytest.mark.parametrize("index", [-1, 1, 99])
def test_no_such_index(machine: Machine, index: int) -> None:
    machine(card())
    with pytest.raises(InputError, match=f"no GPU with index {index}: there is one GPU"):
        gpu.live_gpu(index)


def test_session_closes_after_an_error_inside(machine: Machine) -> None:
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
def test_visible_devices(machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str, sizes: list[int]) -> None:
    machine(*(card(total=total * 1024) for total in (10, 20, 30)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [found.total_bytes // 2**30 for found in gpu.live_gpus()] == sizes


@pytest.mark.parametrize("visible", ["", "-1", "9", "GPU-", "GPU-zz", "none"])
def test_visible_devices_that_hide_all(machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    machine(card(), card())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(VramplanError, match="hides every GPU"):
        gpu.live_gpus()


@pytest.mark.parametrize("visible", ["0,0", "GPU-0a,GPU-0a0b", "0,1,0"])
def test_a_card_named_twice_hides_all(machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    machine(card(), card())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(VramplanError, match="hides every GPU"):
        gpu.live_gpus()


@pytest.mark.parametrize(("visible", "count"), [("1abc", 1), ("+1", 1), ("0,GPU-1a", 1), ("GPU-1a,0", 1)])
def test_entries_as_cuda_reads_them(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, visible: str, count: int
) -> None:
    machine(card(), card())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert len(gpu.live_gpus()) == count


ORDERS = [  # environment -> names, and whether CUDA's index is surely the same
    ({}, ["3060", "4090"], [False, False]),
    ({"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}, ["3060", "4090"], [False, False]),
    ({"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, ["3060", "4090"], [True, True]),
    ({"CUDA_VISIBLE_DEVICES": "1"}, ["4090"], [False]),
    ({"CUDA_VISIBLE_DEVICES": "1,0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, ["4090", "3060"], [True, True]),
    ({"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-0a"}, ["4090", "3060"], [True, True]),
]


@pytest.mark.parametrize(("environment", "names", "certain"), ORDERS)
def test_two_different_cards(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], names: list[str], certain: list[bool]
) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.two_cards())
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = gpu.live_gpus()
    assert [card.name[-4:] for card in found] == names
    assert [card.state and card.state.order_certain for card in found] == certain


def test_cards_of_one_kind_have_one_order(machine: Machine) -> None:
    machine(card(), card())
    assert [found.state and found.state.order_certain for found in gpu.live_gpus()] == [True, True]


# ----------------------------------------------------------------------------------------------------------- MIG
def test_a_split_card_is_its_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.mig())
    first, second = gpu.live_gpus()
    assert (first.total_bytes, second.total_bytes) == (9728 * MIB, 19968 * MIB)
    assert first.compute_capability == (8, 0)  # asked of the card it is part of
    assert (first.sm_count, first.bf16_flops_per_s) == (14, None)  # the instance's own; the card's rates are not its
    assert [process.pid for process in second.processes] == [77]
    states = [found.state for found in (first, second)]
    assert [(s.mig_profile, s.mig_instance, s.order_certain) for s in states if s] == [
        ("1g.10gb", 3, True), ("2g.20gb", 7, False)]  # fmt: skip
    assert [(s.ecc, s.busy_percent, s.mig_uuid and s.mig_uuid[:12]) for s in states if s] == [
        (True, None, "MIG-00000003"), (True, None, "MIG-00000007")]  # fmt: skip


@pytest.mark.parametrize(
    "visible", ["MIG-00000007-1111-5222-8333-444444444444", "MIG-GPU-0a0b/7/0", "MIG-GPU-0a/7/0,MIG-none"]
)
def test_an_instance_can_be_chosen(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    fake_nvml.install(monkeypatch, fake_nvml.mig())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (found,) = gpu.live_gpus()
    assert found.total_bytes == 19968 * MIB
    assert found.state is not None and (found.state.mig_instance, found.state.order_certain) == (7, True)


def test_a_card_in_mig_mode_without_instances(machine: Machine) -> None:
    machine(split_a100())
    with pytest.raises(VramplanError, match="has no instance") as caught:
        gpu.live_gpus()
    assert "nvidia-smi mig" in caught.value.hint


# ------------------------------------------------------------------------------------------------------- sampling
def test_sampling_while_a_run_goes_on(machine: Machine) -> None:
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
    gpu_file.save_gpu(stored, tmp_path / f"{name}.toml")
    assert profiles.load_gpu(str(tmp_path / f"{name}.toml")) == stored


@pytest.mark.parametrize("make", [fake_nvml.idle_desktop, fake_nvml.busy, fake_nvml.wsl, fake_nvml.container,
                                  fake_nvml.mig, fake_nvml.old_driver, fake_nvml.throttled_laptop])  # fmt: skip
def test_a_live_card_is_saved_as_idle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make: Callable[[], FakeNvml]
) -> None:
    fake_nvml.install(monkeypatch, make())
    live = gpu.live_gpu()
    gpu_file.save_gpu(live, tmp_path / "desk.toml")
    back = profiles.load_gpu(str(tmp_path / "desk.toml"))
    assert back == replace(gpu_file.idle(live), key="desk")
    moment = {"key", "usable_bytes", "reserved_bytes", "used_by_others_bytes", "processes", "driver", "state", "source"}
    for field in type(live).__dataclass_fields__.keys() - moment - {"sources"}:
        assert getattr(back, field) == getattr(live, field), field
    assert (back.source, back.processes, back.used_by_others_bytes, back.state) == ("file", (), 0, None)


def test_saved_usable_is_what_an_idle_card_has(machine: Machine) -> None:
    machine(card(used=9000, compute=[process(7, 8900 * MIB)]))
    saved = gpu_file.idle(gpu.live_gpu())
    assert saved.usable_bytes == (24564 - 400) * MIB
    assert dict(saved.sources)["usable_bytes"] == "NVML: total less what the driver reserves"
    unknown = gpu_file.idle(replace(gpu.live_gpu(), reserved_bytes=None, used_by_others_bytes=8900 * MIB))
    assert unknown.usable_bytes == (24564 - 400 - 9000 + 8900) * MIB


@pytest.mark.parametrize("make", [fake_nvml.busy, fake_nvml.mig, fake_nvml.wsl])
def test_a_live_card_survives_json(monkeypatch: pytest.MonkeyPatch, make: Callable[[], FakeNvml]) -> None:
    fake_nvml.install(monkeypatch, make())
    live = gpu.live_gpu()
    assert records.decode(records.encode(live), type(live)) == live
    old = records.encode(live)
    del old["state"]
    for record in old["processes"]:
        del record["graphics"]
    assert records.decode(old, type(live)).state is None  # as files were before there was a state


@given(st.text(min_size=1, max_size=50).filter(lambda text: text.strip()))
def test_any_name_survives_being_saved(name: str) -> None:
    import tempfile

    stored = replace(profiles.load_gpu("t4"), name=name, sources=(("total_bytes", name),))
    with tempfile.TemporaryDirectory() as folder:
        gpu_file.save_gpu(stored, Path(folder) / "t4.toml")
        back = profiles.load_gpu(str(Path(folder) / "t4.toml"))
    assert (back.name, dict(back.sources)["total_bytes"]) == (name, name)


def test_saving_where_one_cannot(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        gpu_file.save_gpu(profiles.load_gpu("t4"), tmp_path / "none" / "t4.toml")
    with pytest.raises(InputError):
        gpu_file.save_gpu(profiles.load_gpu("t4"), tmp_path)
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


@pytest.mark.cuda
def test_this_machines_state_and_our_own_process() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    held = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    found = gpu.live_gpu(0)
    state = found.state
    assert state is not None
    assert found.driver is not None and found.driver.partition(".")[0].isdigit()
    assert state.cuda is not None and float(state.cuda) >= 11.8
    assert state.throttled_by is not None
    for value, low, high in (
        (state.power_watts, 5, 3000), (state.power_limit_watts, 20, 3000), (state.clock_mhz, 100, 5000),
        (state.max_clock_mhz, 500, 5000), (state.pcie_max_generation, 2, 8), (state.pcie_max_width, 1, 16),
    ):  # fmt: skip
        assert value is None or low <= value <= high
    assert None in (state.power_watts, state.power_limit_watts) or state.power_watts <= 1.5 * state.power_limit_watts
    others = found.total_bytes - found.usable_bytes - (found.reserved_bytes or 0)
    assert others >= held.numel()
    # ours: by this process's number, or in a container by one that means nothing here and is not shown
    with gpu.Nvml() as nvml:
        own = nvml.process_bytes(0, os.getpid())
        raw = nvml_processes.listed(nvml._calls, nvml._card(0).handle, found.total_bytes)
    assert all(process.pid != os.getpid() for process in found.processes)
    if own is not None:
        assert held.numel() < own <= found.total_bytes - found.usable_bytes
    elif raw:
        hidden = [process for process in found.processes if process.pid is None or process.used_bytes is None]
        assert hidden or any((process.used_bytes or 0) > held.numel() for process in found.processes)
    del held
