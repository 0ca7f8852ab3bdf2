"""Writing files whole: whoever looks sees the old file or the new one, whatever happens in between."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

LONGEST = 120
"""Bytes that a file's name has of a name of the user's; file systems take 255, with what stands around it."""


def safe_name(name: str) -> str:
    """A data set's or method's name as a folder's (``folder:/a/b`` has signs that a folder can't have).

    A long one is cut, and ends in its hash.
    """
    safe = "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in name).strip("_")
    if len(safe.encode()) <= LONGEST:
        return safe
    begin = safe.encode()[: LONGEST - 13].decode(errors="ignore")
    return f"{begin}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def write_text(path: Path, text: str) -> None:
    """``write_bytes`` for text, as UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write beside ``path`` and move into place; its folder is made. If that fails, nothing new is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # opened plainly, so that the umask decides
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
