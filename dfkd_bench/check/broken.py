"""What a check raises, and errors as one line."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from dfkd_bench.errors import place_in


class Broken(Exception):
    """A check does not hold; the message is one line."""


def one_line(text: str) -> str:
    """The text with every run of blanks and line breaks as one blank."""
    return " ".join(text.split())


def named(error: BaseException, file: Path | None = None) -> str:
    """``Type: message`` on one line, with its place in ``file``; of pydantic's long messages the first problem."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{error.title}.{'.'.join(map(str, first['loc']))}: {first['msg']}"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}{place_in(error, file)}"
