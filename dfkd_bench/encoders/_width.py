"""The number of columns of rows that no model makes."""

from __future__ import annotations

from dfkd_bench.errors import UserError

MAX_WIDTH = 65536


def parse_width(spec: str, width: str) -> int:
    """1 to ``MAX_WIDTH``, or a ``UserError`` that names the encoder as the user wrote it."""
    if not (width.isascii() and width.isdigit() and 1 <= int(width) <= MAX_WIDTH):
        name = spec.partition(":")[0]
        raise UserError(f"text encoder '{spec}': expected a width from 1 to {MAX_WIDTH}, as in '{name}:512'")
    return int(width)
