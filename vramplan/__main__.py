"""`python -m vramplan` and the `vramplan` script."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's own) and return its exit code."""
    from vramplan.cli import run

    return run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
