"""The server that runs are forked from. Imports no torch itself, so that the server can do it beside the command."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

_imports: list[str] = []
"""What the server that was started last was told to import; for runs on CPUs more than for runs on GPUs."""


def preloaded(devices: Sequence[str]) -> list[str]:
    """What the fork server imports once for all runs on ``devices``.

    The first optimizer of a process imports torch._dynamo, which takes longer than all else before a run's first step.
    Its import counts the GPUs, which must not happen before a fork, so runs on GPUs import it themselves.
    """
    return ["dfkd_bench.run", *(["torch._dynamo"] if set(devices) == {"cpu"} else [])]


def start(devices: Sequence[str]) -> None:
    """Start the server for runs on ``devices``, unless one runs already.

    It is started as ``python -c``, which puts the current folder first on the path: in a checkout it would import the
    sources there instead of the installed package, and not find ``dfkd_bench.methods``. PYTHONSAFEPATH prevents that.
    It ignores Ctrl-C once it has imported all; until then the signal is blocked, or Python would print a traceback.
    """
    wanted = preloaded(devices)
    if not set(_imports) <= set(wanted):
        stop()
    multiprocessing.get_context("forkserver").set_forkserver_preload(wanted)
    _imports[:] = wanted
    resource_tracker.ensure_running()  # the server's start would do it, and unblock the signal
    before = os.environ.get("PYTHONSAFEPATH")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        os.environ["PYTHONSAFEPATH"] = "1"
        forkserver.ensure_running()
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)
        else:
            os.environ["PYTHONSAFEPATH"] = before
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_early() -> None:
    """Start it before the command itself imports torch, which saves two seconds, where there are only CPUs.

    Elsewhere the devices are known after that import only.
    """
    if sys.platform != "linux" or _gpu_devices():
        return
    with contextlib.suppress(OSError):  # no place for its socket, say: whoever needs the server will be told
        start(["cpu"])


@atexit.register
def stop() -> None:
    """End the server, if there is one. What was forked from it goes on.

    Done when the command ends, too: the server has its output open, and whoever reads that through a pipe would wait.
    """
    _imports.clear()
    server: Any = forkserver._forkserver  # the module has no public way
    pid = getattr(server, "_forkserver_pid", None)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        server._stop()


def _gpu_devices() -> list[Path]:
    """The device files of NVIDIA's and AMD's drivers, and of WSL's."""
    return [path for pattern in ("nvidia*", "nvhost*", "kfd", "dxg") for path in Path("/dev").glob(pattern)]
