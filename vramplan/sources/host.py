"""The computer's memory: what checkpoints can wait in."""

from __future__ import annotations

import os
from pathlib import Path

# A container's limit (control groups, version 2 and 1), where it runs in one; "max" or a huge number is none.
LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
PINNED_SHARE = 0.7  # of the memory: the rest is for the system, Python and the loading of data


def memory_bytes() -> int | None:
    """What this process may use at most; None where the system does not say."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    limits = [limit for path in LIMIT_FILES if (limit := _limit(Path(path))) is not None]
    return min([total, *limits]) if total > 0 else None


def checkpoint_limit_bytes() -> int | None:
    """What of it may be pinned for checkpoints; None where it is not known."""
    size = memory_bytes()
    return None if size is None else int(PINNED_SHARE * size)


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isdigit() else None
