"""The content of the user's own files as one number: it tells them from other files of the same names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dfkd_bench.data._image_files import images_below
from dfkd_bench.files import write_text
from dfkd_bench.once import once
from dfkd_bench.paths import home


def digest_of(folder: Path, paths: Sequence[Path]) -> str:
    """SHA-256 of names below ``folder`` and of bytes; of a folder among ``paths`` the name alone counts.

    It is kept: files are read again only after a change of any name, size or time of change.
    """
    found = kept_digest(folder, paths)
    if found is not None:
        return found
    digest = hashlib.sha256()
    for path in paths:
        digest.update(_name(path, folder) + b"\0")
        if not path.is_dir():
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    with contextlib.suppress(OSError):  # a home that can't be written costs time only
        write_text(_kept(folder, paths), digest.hexdigest())
    return digest.hexdigest()


def kept_digest(folder: Path, paths: Sequence[Path]) -> str | None:
    """``digest_of`` where it was kept; None: the files would have to be read."""
    try:
        text = _kept(folder, paths).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else None


@dataclass(frozen=True)
class FolderFacts:
    """What tells a folder of images from others: how many there are below it, and their digest."""

    files: int
    digest: str


def folder_facts(folder: Path) -> FolderFacts | None:
    """Number and ``digest_of`` all images below a folder; None: there are none."""
    return once(("images below", folder.resolve(), home()), lambda: _folder_facts(folder))


def _folder_facts(folder: Path) -> FolderFacts | None:
    files = images_below(folder) if folder.is_dir() else []
    return FolderFacts(len(files), digest_of(folder, files)) if files else None


def _kept(folder: Path, paths: Sequence[Path]) -> Path:
    key = hashlib.sha256(os.fsencode(folder.resolve()))
    for path in paths:
        facts = path.stat()
        key.update(_name(path, folder) + f"\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return home() / "digests" / key.hexdigest()[:32]


def _name(path: Path, folder: Path) -> bytes:
    """As the disk has it: a name need not be UTF-8."""
    return os.fsencode(path.relative_to(folder).as_posix())
