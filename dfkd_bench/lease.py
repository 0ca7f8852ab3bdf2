"""A lease: a file that says which process has a folder right now, with a sign of life every few seconds."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

HEARTBEAT = 5.0  # seconds between a holder's signs of life
STALE = 60.0  # a lease without one for so long is taken over
WAIT = 1.0  # seconds between two looks at a lease that is waited for


class Busy(Exception):
    """Another process has the lease right now."""


class Lease:
    """One that is held. A holder that stalls (a suspended node, a network folder that hangs) may lose it unawares."""

    def __init__(self, path: Path, text: str, what: str) -> None:
        self._path, self._text, self._what = path, text, what
        self._lost = False

    def is_mine(self) -> bool:
        """Give a sign of life; False if another process has taken the lease, which is then not touched."""
        with contextlib.suppress(OSError):  # the network's folder is away for a moment
            if not self._lost:
                self._lost = self._read() != self._text
            if not self._lost:
                os.utime(self._path)
        return not self._lost

    def _read(self) -> str:
        """What the file says; "" if it is gone for more than the moment for which ``_remove`` moves it aside."""
        for pause in (0.2, 0.0):
            with contextlib.suppress(FileNotFoundError):
                return self._path.read_text()
            time.sleep(pause)
        return ""

    def check(self) -> None:
        """To be called before what another holder has, too, is written: raises ``Busy`` if the lease is lost."""
        if not self.is_mine():
            raise Busy(f"{self._what} was taken over by another process, since this one gave no sign of life")


@contextlib.contextmanager
def held(path: Path, what: str, wait: bool = False) -> Iterator[Lease]:
    """Hold the lease ``path`` on ``what``. While another living process has it: raises ``Busy``, or waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    process = psutil.Process()
    owner = {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time(), **_where()}
    token = uuid.uuid4().hex
    mine = json.dumps({**owner, "token": token})
    draft = path.with_name(f"{path.name}.{token}")
    stop = threading.Event()
    lease = Lease(path, mine, what)

    def beat() -> None:
        while not stop.wait(HEARTBEAT):
            if not lease.is_mine():  # a sign of life would be the new owner's, who may be dead
                return

    thread = threading.Thread(target=beat, daemon=True)
    try:  # from here on, since a signal may come at any moment
        draft.write_text(mine)
        _take(path, draft, what, wait)
        draft.unlink()  # now, too: a run may end by SIGKILL
        thread.start()
        yield lease
    finally:
        stop.set()
        with contextlib.suppress(RuntimeError):  # it had not started yet
            thread.join()
        draft.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            if path.read_text() == mine:  # else another has taken it over
                path.unlink()


def is_stale(path: Path) -> bool:
    """Whether nobody alive has the lease: its process is gone (where its number means the same as here: same host,
    boot and namespace of processes), or its heartbeat stopped (elsewhere)."""
    try:
        age = time.time() - path.stat().st_mtime
        owner = json.loads(path.read_text() or "{}")
    except OSError:
        return not path.exists()
    except ValueError:  # cut off by a crash
        return age > STALE
    if not owner:  # just being written
        return age > HEARTBEAT
    if _is_here(owner):
        started = _started(owner["pid"])
        if started is None:
            return True
        if abs(started - owner.get("started", 0.0)) < 5:  # it may be stopped (Ctrl-Z), but it is there
            return False
    return age > STALE


def _take(path: Path, draft: Path, what: str, wait: bool) -> None:
    while True:
        try:
            _create(path, draft)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # given back since
                found = path.read_text()
                if is_stale(path):
                    _remove(path, found)
                elif wait:
                    time.sleep(WAIT)
                else:
                    raise Busy(f"{what} is being worked on by another process") from None
        else:
            return


def _create(path: Path, draft: Path) -> None:
    """Make the lease at one stroke: a signal between its creation and its text would leave one that nobody owns."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        with path.open("x") as file:
            file.write(draft.read_text())


def _remove(path: Path, stale: str) -> None:
    """Remove the lease that says ``stale``: of several processes that found it so, only one removes that very file."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    os.rename(path, aside)
    if aside.read_text() == stale:
        aside.unlink()
    else:  # another was quicker, and this is its new one; it has lost it if a third one has come meanwhile
        with contextlib.suppress(FileExistsError):
            _create(path, aside)
        aside.unlink()


def _where() -> dict[str, str]:
    """What a process's number hangs on beside the host's name: containers, and other machines, may share that."""
    found = {}
    with contextlib.suppress(OSError):
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        found["pids"] = os.readlink("/proc/self/ns/pid")
    return found


def _is_here(owner: Mapping[str, Any]) -> bool:
    """Whether this process can look for the owner's by its number. Leases of earlier versions name the host alone."""
    return owner.get("host") == socket.gethostname() and all(
        owner.get(name, value) == value for name, value in _where().items()
    )


def _started(pid: int) -> float | None:
    """When the process with this number began; None: there is none, or it has ended and nobody has asked how."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.NoSuchProcess:
        return None
