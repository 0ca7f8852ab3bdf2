"""A temporary folder for whoever prepares a part, and the lock that spares the others the same work."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dfkd_bench.data._reason import reason
from dfkd_bench.errors import UserError
from dfkd_bench.paths import HOME_VARIABLE

if TYPE_CHECKING:
    from dfkd_bench.data._arrays import Part


@contextmanager
def own_folder(folder: Path, part: Part) -> Iterator[Path]:
    """A temporary folder inside ``folder``, with the lock on preparing ``part`` held if the platform has locks.

    The lock saves double work. It isn't needed for safety: files are moved into place whole, and all makers make the
    same ones.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{part}.lock").open("ab")
    except OSError as error:
        raise UserError(
            f"can't write into {folder} ({reason(error)}): name another folder by ${HOME_VARIABLE}"
        ) from None
    with lock:
        if _locked(lock.fileno()):
            for left in folder.glob(f".{part}-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{part}-") as temporary:
            yield Path(temporary)


def _locked(descriptor: int) -> bool:
    """Wait for an exclusive lock, which ends with the process. False where there are none."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return False
    return True
