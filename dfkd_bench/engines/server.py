"""The server that runs are forked from. Imports no torch itself, so that the server can do it beside the command."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path


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
    multiprocessing.get_context("forkserver").set_forkserver_preload(preloaded(devices))
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    resource_tracker.ensure_running()  # the server's start would do it, and unblock the signal
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def start_early() -> None:
    """Start it before the command itself imports torch, which saves two seconds, where there are only CPUs.

    Elsewhere the devices are known after that import only. Should nothing be left to run, the server ends by itself.
    """
    if sys.platform == "linux" and not _gpu_devices():
        start(["cpu"])


def _gpu_devices() -> list[Path]:
    """The device files of NVIDIA's and AMD's drivers, and of WSL's."""
    return [path for pattern in ("nvidia*", "kfd", "dxg") for path in Path("/dev").glob(pattern)]
