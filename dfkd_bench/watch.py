"""A guard against accident, not malice: which data files were opened while a method ran.

Python reports every ``open`` to audit hooks. A hook can't be removed, so there is one for the process, which looks at
the watch that is on at the moment, if any.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What data come in. Source, libraries, fonts and the like are opened all the time by lazy imports.
_DATA = re.compile(
    r"(\.(npy|npz|gz|png|jpe?g|bmp|webp|gif|tiff?|mat|parquet|csv|pkl|pickle|pt|pth|safetensors|bin|tar|tgz|zip|h5|hdf5"
    r"|l?mdb|arrow)|ubyte|/(data|test)_batch\w*)$",
    re.IGNORECASE,
)
_IGNORED_ROOTS = ("/proc/", "/sys/", "/dev/")


class FileWatch:
    """Collects data files opened for reading, by phase: inside ``method()`` or outside of it."""

    def __init__(self, roots: Sequence[Path], ignored: Sequence[Path] = ()) -> None:
        """``roots``: folders in which every file counts as data, and such files. ``ignored``: the run's own folders."""
        self._roots = _prefixes(roots)
        self._ignored = _prefixes(ignored)
        self._phase = "runner"
        self._seen: dict[tuple[str, str], None] = {}
        self._lent: list[tuple[str, str]] = []  # prefix of paths and what stands for them, of folders being lent

    @property
    def files(self) -> list[tuple[str, str]]:
        """(path, phase) in the order of the first opening."""
        return list(self._seen)

    def recall(self, files: Sequence[tuple[str, str]]) -> None:
        """What was seen before an interruption was seen by this run."""
        self._seen = dict.fromkeys([*files, *self._seen])

    @contextmanager
    def method(self) -> Iterator[None]:
        """What is opened inside was opened by the method."""
        with self._as("method"):
            yield

    @contextmanager
    def runner(self) -> Iterator[None]:
        """What is opened inside was opened by the runner, even if a method asked for it."""
        with self._as("runner"):
            yield

    @contextmanager
    def lending(self, folder: Path) -> Iterator[None]:
        """What the runner opens below ``folder`` inside is listed as that folder, once: it may hold a million images.

        What a method opens there is listed file by file, as everywhere.
        """
        name = str(folder.resolve())
        self._seen[(name, "runner")] = None  # even if a prepared copy is all that is opened
        before, self._lent = self._lent, [*self._lent, *((prefix, name) for prefix in _prefixes([folder]))]
        try:
            yield
        finally:
            self._lent = before

    @contextmanager
    def _as(self, phase: str) -> Iterator[None]:
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch inside this ``with``."""
        global _active
        _install()
        _active = self
        try:
            yield
        finally:
            _active = None

    def opened(self, path: str, flags: int) -> None:
        """Called by the audit hook."""
        if flags & (os.O_WRONLY | os.O_CREAT) or path.startswith(_IGNORED_ROOTS):
            return
        path = os.path.abspath(path)
        if any(path.startswith(folder) for folder in self._ignored):
            return
        if _DATA.search(path) or any((path + os.sep).startswith(root) for root in self._roots):
            if self._phase == "runner":
                path = next((name for prefix, name in self._lent if path.startswith(prefix)), path)
            self._seen[(path, self._phase)] = None


def _prefixes(folders: Sequence[Path]) -> list[str]:
    """How paths below ``folders`` begin, as named and with symbolic links followed."""
    return [str(path) + os.sep for folder in folders for path in (folder.absolute(), folder.resolve())]


_active: FileWatch | None = None
_installed = False


def _install() -> None:
    global _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or _active is None:
        return
    path, _mode, flags = arguments
    if isinstance(path, (str, bytes, os.PathLike)):  # integers are descriptors that were opened before
        _active.opened(os.fsdecode(path), flags or 0)
