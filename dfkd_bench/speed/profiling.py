"""Which operators a step spends its time in."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from dfkd_bench.speed.timing import synchronize
from dfkd_bench.speed.values import Operator

TOP = 12


def operators(call: Callable[[], object], device: torch.device, steps: float, top: int = TOP) -> tuple[Operator, ...]:
    """The ``top`` operators of ``call`` by time in themselves, for one of its ``steps``; on a GPU, its kernels."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with _quiet_stderr(), profile(activities=activities) as profiled:
        call()
        synchronize(device)
    wanted = "CUDA" if on_gpu else "CPU"
    found = [event for event in profiled.key_averages() if event.device_type.name == wanted]
    if on_gpu:  # ranges such as an optimizer's step come back as events of the device, beside the kernels in them
        found = [event for event in found if not event.is_user_annotation]
    times = [event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in found]  # microseconds
    total = sum(times) or 1.0
    order = sorted(range(len(found)), key=lambda index: -times[index])[:top]
    return tuple(
        Operator(
            name=found[index].key,
            seconds=times[index] / 1e6 / steps,
            share=times[index] / total,
            calls=found[index].count / steps,
        )
        for index in order
    )


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ part reports starting and stopping on file descriptor 2; what comes there is dropped."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
