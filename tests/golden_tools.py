"""What people see, kept in golden/. After a wanted change: VRAMPLAN_UPDATE_GOLDEN=1, then read the difference."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


def check_golden(name: str, show: Callable[..., None], *args: object) -> None:
    """What `show` draws at 80 and at 120 columns is what the files say; no line is wider or ends in blanks."""
    for width in (80, 120):
        stream = io.StringIO()
        show(stream, *args, width=width)
        file = GOLDEN / f"{name}_{width}.txt"
        if os.environ.get("VRAMPLAN_UPDATE_GOLDEN"):
            file.write_text(stream.getvalue(), encoding="utf-8")
        assert stream.getvalue() == file.read_text(encoding="utf-8")
        assert all(len(line) <= width and line == line.rstrip() for line in stream.getvalue().splitlines())
