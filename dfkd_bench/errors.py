"""Wrong input: one clear line and exit code 2, never a traceback."""

from __future__ import annotations

import difflib
import errno
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """Something the user can put right. The message is one line: what was wrong, what was expected, what to do."""


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> UserError:
    """The error for a misspelt name, with the nearest known one.

    >>> str(unknown("method", "nayr", ["fm", "nayer"]))
    "unknown method 'nayr': did you mean 'nayer'? Known: fm, nayer"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    guess = f" did you mean '{close[0]}'?" if close else ""
    listed = ", ".join(names) if names else "none"
    return UserError(f"unknown {kind} '{name}':{guess} Known: {listed}{'. ' + hint if hint else ''}")


def validation_line(error: ValidationError) -> str:
    """The first problem of a pydantic error as one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    given = "" if first["type"] in ("missing", "value_error", "json_invalid") else f" (given: {first['input']!r})"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}{given}" if where else message


def place_in(error: BaseException, file: Path | None) -> str:
    """`` (layer.py:89)``: the last line of ``file`` that an error went through; "" if it came from elsewhere."""
    if file is None:
        return ""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == file.resolve()]
    return f" ({file.name}:{lines[-1]})" if lines else ""


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


def disk_error(error: OSError) -> UserError | None:
    """The line for a full disk or a missing permission; None if the error is of another kind.

    Such a run has not failed: once there is room, the same command goes on from its checkpoint.
    """
    if error.errno not in _DISK:
        return None
    where = f" {error.filename}" if error.filename else ""
    done = "open" if error.errno in (errno.EACCES, errno.EPERM) else "write"  # a permission may be one to read
    return UserError(f"can't {done}{where}: {error.strerror}. Put that right and run the same command again")
