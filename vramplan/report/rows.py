"""A ledger as rows whose printed numbers add up: `core/rows.py`, under the name that the tables use."""

from vramplan.core.groups import OVERHEAD, group_of
from vramplan.core.rows import GROUP, LINE, SUBTOTAL, TOTAL, Row, Scale, apportion, ledger_rows, scale_for

__all__ = [
    "GROUP",
    "LINE",
    "OVERHEAD",
    "SUBTOTAL",
    "TOTAL",
    "Row",
    "Scale",
    "apportion",
    "group_of",
    "ledger_rows",
    "scale_for",
]
