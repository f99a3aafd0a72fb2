"""A card's memory as segments that add up to its total, and what else is to be said of a live card."""

from __future__ import annotations

from .types import GpuProcess, GpuProfile, GpuState, Ledger, Segment
from .units import MIB, human

NOTABLE_BYTES = 256 * MIB  # what drivers hold here and there without naming anyone is less
BUSY_PERCENT = 10  # below, a link may be asleep
# Inline ECC takes a sixteenth of GDDR6 (NVIDIA's data sheets); HBM has bits of its own for it.
_GDDR6 = ((7, 5), (8, 6), (8, 9))
_ECC_PARTS = 15  # of what is left


# ------------------------------------------------------------------------------------------------------ segments
def held_by_others_bytes(card: GpuProfile) -> int:
    """What is in use and not the driver's own; of a driver that does not tell its own, what its processes hold."""
    in_use = card.total_bytes - card.usable_bytes
    return min(card.used_by_others_bytes, in_use) if card.reserved_bytes is None else in_use - card.reserved_bytes


def segments(card: GpuProfile, ledger: Ledger | None = None) -> tuple[Segment, ...]:
    """The card from its first byte to its last; with a ledger, the run in what is free.

    A run that does not fit has no headroom: the segments are then more than the card.
    """
    others = held_by_others_bytes(card)
    driver = card.total_bytes - card.usable_bytes - others
    told = card.reserved_bytes is not None
    found = [
        Segment(key="driver", label="driver" if told else "driver and unknown", bytes=driver),
        Segment(key="others", label="other processes", bytes=others),
    ]
    if ledger is None:
        return (*found, Segment(key="free", label="free", bytes=card.usable_bytes))
    peak = ledger.peak
    state = sum(line.bytes for line in ledger.lines if line.key == "optimizer.state")
    resident = min(ledger.resident.with_lora_bytes + state, peak.minimum_bytes)
    outside = peak.device_bytes - peak.minimum_bytes
    return (
        *found,
        Segment(key="context", label="CUDA context", bytes=outside, basis=card.context_basis),
        Segment(key="resident", label="resident", bytes=resident),
        Segment(key="activations", label="activations", bytes=peak.minimum_bytes - resident, basis="modelled"),
        Segment(
            key="headroom",
            label="headroom",
            bytes=max(card.usable_bytes - peak.device_bytes, 0),
            basis="modelled",
        ),
    )


def shares(card: GpuProfile) -> list[tuple[GpuProcess | None, int | None]]:
    """Who the others are: each process with its bytes (None: unknown), then None with what is nobody's.

    The bytes add up to `held_by_others_bytes`.
    """
    found: list[tuple[GpuProcess | None, int | None]] = [(process, process.used_bytes) for process in card.processes]
    rest = held_by_others_bytes(card) - sum(size or 0 for _, size in found)
    return [*found, (None, rest)] if rest else found


# --------------------------------------------------------------------------------------------------------- notes
def notes(card: GpuProfile) -> tuple[str, ...]:
    """What the reader of this card's numbers should know, most important first."""
    state = card.state or GpuState()
    found = (_which(state), _unseen(card), _unnamed(card), _display(card, state), _clocks(state), _link(state),
             _ecc(card, state), _old_driver(card))  # fmt: skip
    return tuple(note for note in found if note)


def _which(state: GpuState) -> str:
    if state.mig_uuid and not state.order_certain:
        return f"CUDA shows a process one MIG instance, the first: CUDA_VISIBLE_DEVICES={state.mig_uuid} picks this one"
    if not state.order_certain:
        return (
            "this machine's cards differ, and CUDA may count them in another order than here: "
            "with CUDA_DEVICE_ORDER=PCI_BUS_ID both are the same"
        )
    return ""


def _unseen(card: GpuProfile) -> str:
    count = sum(process.pid is None for process in card.processes)
    if not count:
        return ""
    what = "1 process is" if count == 1 else f"{count} processes are"
    return f"{what} not seen from here, as in a container: numbers and names stay unknown"


def _unnamed(card: GpuProfile) -> str:
    """Memory that cannot be traced to a process."""
    rest = sum(size or 0 for process, size in shares(card) if process is None)
    hidden = [process for process in card.processes if process.used_bytes is None]
    if rest < NOTABLE_BYTES:
        return ""
    who = f"{len(hidden)} processes" if len(hidden) > 1 else "a process" if hidden else "processes"
    why = "whose sizes the driver does not tell" if hidden else "that are not shown here"
    return f"{human(rest)} are held by {who} {why}, as under WSL and in containers"


def _display(card: GpuProfile, state: GpuState) -> str:
    drawn = state.display_attached if state.display_active is None else state.display_active
    if not drawn:  # a card of a data centre calls itself attached, and draws nothing
        return ""
    what = "a display is attached" if state.display_attached else "a screen is drawn on this card"
    drawing = [process for process in card.processes if process.graphics and process.used_bytes]
    if drawing:
        taken = human(sum(process.used_bytes or 0 for process in drawing))
        names = ", ".join(dict.fromkeys(process.name or "unknown" for process in drawing))
        return f"{what}: drawing takes {taken} ({names})"
    held = held_by_others_bytes(card)
    return f"{what}: what drawing takes is part of the {human(held)} of others" if held else f"{what}"


def _clocks(state: GpuState) -> str:
    if not state.throttled_by:
        return ""
    watts = f" ({power(state)})" if power(state) else ""
    clocks = f", at {state.clock_mhz:,} of {state.max_clock_mhz:,} MHz" if (
        state.clock_mhz and state.max_clock_mhz) else ""  # fmt: skip
    why = " and ".join(f"{reason}{watts if reason.startswith('power') else ''}" for reason in state.throttled_by)
    return f"the clocks are held down by {why}{clocks}: expect fewer tokens/s than modelled"


def _link(state: GpuState) -> str:
    """A link below what card and slot agree on, where the card has work and is not just asleep."""
    if state.busy_percent is None or state.busy_percent < BUSY_PERCENT:
        return ""
    now, most = link(state.pcie_generation, state.pcie_width), link(state.pcie_max_generation, state.pcie_max_width)
    if not now or not most or now == most:
        return ""
    return f"the PCIe link runs at {now} under load, card and slot could do {most}: offloading is slower than modelled"


def link(generation: int | None, width: int | None) -> str:
    """ "4.0 x16", or "" where it is not known."""
    return f"{generation}.0 x{width}" if generation and width else ""


def power(state: GpuState) -> str:
    """ "165 of 170 W", "165 W", or "" where it is not known."""
    now, limit = state.power_watts, state.power_limit_watts
    if now and limit:
        return f"{now} of {limit} W"
    return f"{now} W" if now else f"at most {limit} W" if limit else ""


def _ecc(card: GpuProfile, state: GpuState) -> str:
    if not state.ecc or state.mig_uuid or card.compute_capability not in _GDDR6:
        return ""
    size = human(card.total_bytes // _ECC_PARTS)
    return f"ECC is on and takes about a sixteenth, {size}: `nvidia-smi -e 0` and a restart give it back"


def _old_driver(card: GpuProfile) -> str:
    if card.reserved_bytes is not None or card.source != "nvml":
        return ""
    return "the driver is too old to tell its own share from that of others"
