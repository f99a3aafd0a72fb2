"""Bytes to text and back. Sizes are read in GB and GiB alike by their own meaning, and printed in GiB."""

from __future__ import annotations

import re

KIB, MIB, GIB = 2**10, 2**20, 2**30

_UNITS = {"": 1, "B": 1, "BYTES": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter + "B"] = 1000**_power
    _UNITS[_letter + "IB"] = _UNITS[_letter] = 1024**_power  # "24G" means GiB, as in Slurm and Docker

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z")


def parse_size(text: str) -> int:
    """ "24GiB", "24 GB", "512M", "8589934592" -> bytes. ValueError if it is none of these."""
    match = _SIZE.match(text)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size: write 24GiB, 24GB or a number of bytes")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def human(size: int) -> str:
    """Bytes in the unit that reads best: "512 B", "8.1 MiB", "6.38 GiB"."""
    if abs(size) < KIB:
        return f"{size} B"
    if abs(size) < MIB:
        return f"{size / KIB:.1f} KiB"
    if abs(size) < GIB:
        return f"{size / MIB:.1f} MiB"
    return f"{size / GIB:.2f} GiB"


def round_up(size: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `size`."""
    return -(-size // step) * step
