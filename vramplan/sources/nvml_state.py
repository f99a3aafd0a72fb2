"""What a card says of itself beside its memory: link, power, clocks, display, ECC, MIG."""

from __future__ import annotations

import re
from typing import Any

from vramplan.core.types import THROTTLES, GpuState
from vramplan.sources.nvml_calls import Calls, switch, whole, words

_POWER_CAP, _HEAT, _HARDWARE, _POWER_BRAKE = THROTTLES
_REASONS = (  # bits of NVML's clocks event reasons; idle and settings by the user are no throttling
    (0x04, _POWER_CAP),
    (0x20 | 0x40, _HEAT),
    (0x08, _HARDWARE),
    (0x80, _POWER_BRAKE),
)
_WIDTHS = (1, 2, 4, 8, 12, 16, 32)
_SM_CLOCK = 1  # NVML_CLOCK_SM
_MIG_PROFILE = re.compile(r"\bMIG (\d\S*)\Z")


def read_state(calls: Calls, handle: Any, card: Any, name: str, *, certain: bool) -> GpuState:
    """The state of `card`; of `handle`, which differs for a MIG instance, which instance it is."""
    is_instance = handle is not card
    profile = _MIG_PROFILE.search(name)
    return GpuState(
        cuda=_cuda(calls.first(("nvmlSystemGetCudaDriverVersion_v2", "nvmlSystemGetCudaDriverVersion"))),
        order_certain=certain,
        mig_profile=profile[1] if profile and is_instance else None,
        mig_instance=whole(calls.may("nvmlDeviceGetGpuInstanceId", handle), 0, 63) if is_instance else None,
        mig_uuid=words(calls.may("nvmlDeviceGetUUID", handle)) if is_instance else None,
        pcie_generation=whole(calls.may("nvmlDeviceGetCurrPcieLinkGeneration", card), 1, 9),
        pcie_width=_width(calls.may("nvmlDeviceGetCurrPcieLinkWidth", card)),
        pcie_max_generation=whole(calls.may("nvmlDeviceGetMaxPcieLinkGeneration", card), 1, 9),
        pcie_max_width=_width(calls.may("nvmlDeviceGetMaxPcieLinkWidth", card)),
        ecc=switch((calls.may("nvmlDeviceGetEccMode", card) or (None,))[0]),
        display_attached=switch(calls.may("nvmlDeviceGetDisplayMode", card)),
        display_active=switch(calls.may("nvmlDeviceGetDisplayActive", card)),
        power_watts=_watts(calls.may("nvmlDeviceGetPowerUsage", card)),
        power_limit_watts=_watts(
            calls.first(("nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerManagementLimit"), card)
        ),
        clock_mhz=whole(calls.may("nvmlDeviceGetClockInfo", card, _SM_CLOCK), 1, 10_000),
        max_clock_mhz=whole(calls.may("nvmlDeviceGetMaxClockInfo", card, _SM_CLOCK), 1, 10_000),
        throttled_by=_throttled(calls, card),
        busy_percent=None if is_instance else busy(calls, card),
    )


def _cuda(version: Any) -> str | None:
    """13000 -> "13.0"."""
    number = whole(version, 1000, 99_999)
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _width(lanes: Any) -> int | None:
    return lanes if lanes in _WIDTHS else None


def _watts(milliwatts: Any) -> int | None:
    number = whole(milliwatts, 1, 10**7)
    return None if number is None else round(number / 1000)


def _throttled(calls: Calls, card: Any) -> tuple[str, ...] | None:
    names = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    bits = whole(calls.first(names, card), 0, 2**32)  # all ones is no answer
    return None if bits is None else tuple(reason for mask, reason in _REASONS if bits & mask)


def busy(calls: Calls, card: Any) -> int | None:
    """Share of the last moment in which the card computed, in percent."""
    return whole(getattr(calls.may("nvmlDeviceGetUtilizationRates", card), "gpu", None), 0, 100)
