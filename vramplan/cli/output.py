"""JSON on stdout. Kept apart from the tables, so that --json never imports rich."""

from __future__ import annotations

from typing import Any

import click


def print_json(payload: dict[str, Any]) -> None:
    """The payload, alone on stdout, as strict JSON."""
    import json

    click.echo(json.dumps(payload, indent=2, allow_nan=False))
