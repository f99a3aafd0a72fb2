"""Cards as profile files: what `vramplan gpus --save` writes and `--gpu FILE.toml` reads."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vramplan.core.types import GpuProfile
from vramplan.sources.records import write_text

if TYPE_CHECKING:
    from pathlib import Path

# In the order in which they are written; those with a basis of their own say where it is.
_FIELDS = {
    "compute_capability": "",
    "total_bytes": "",
    "usable_bytes": "usable_basis",
    "context_bytes": "context_basis",
    "sm_count": "",
    "bandwidth_bytes_per_s": "",
    "bf16_flops_per_s": "",
    "fp16_flops_per_s": "",
    "pcie_bytes_per_s": "",
}


def idle(profile: GpuProfile) -> GpuProfile:
    """The card as a file describes it: with nobody on it, and without what is true of one moment.

    Usable is the total without the driver's share; where the driver does not tell its share, what is free and what
    the known processes hold.
    """
    if profile.source == "file":
        return profile
    if profile.reserved_bytes is None:
        usable, where = profile.usable_bytes + profile.used_by_others_bytes, "NVML: free, and what processes hold"
    else:
        usable, where = profile.total_bytes - profile.reserved_bytes, "NVML: total less what the driver reserves"
    sources = {**dict(profile.sources), "usable_bytes": where}
    return replace(
        profile,
        usable_bytes=usable,
        reserved_bytes=profile.total_bytes - usable,
        used_by_others_bytes=0,
        processes=(),
        driver=None,
        state=None,
        source="file",
        sources=tuple((field, sources[field]) for field in _FIELDS if sources.get(field)),
    )


def gpu_toml(profile: GpuProfile) -> str:
    """`idle(profile)` as the text of a profile file, which `load_gpu` reads back with the file's name as key."""
    card = idle(profile)
    sources = dict(card.sources)
    lines = [f"name = {_quote(card.name)}"]
    for field, basis in _FIELDS.items():
        value = getattr(card, field)
        if value is None:
            continue
        shown = _quote("{}.{}".format(*value)) if isinstance(value, tuple) else value
        lines += ["", f"[{field}]", f"value = {shown}"]
        lines += [f"basis = {_quote(getattr(card, basis))}"] if basis else []
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
