"""Seconds per phase of a run. On a GPU by events, so that timing a step does not synchronise it."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

PHASES = ("setup", "synthesis", "sampling", "distillation", "evaluation", "measuring")
NOT_COUNTED = ("evaluation", "measuring")
"""The headline time is the sum of all phases but these: accuracy each epoch, diversity of the images at the end."""


class Clock:
    """Adds up the seconds of named phases. ``settle`` once an epoch reads the GPU's events (one synchronisation)."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._processor: float | None = None if device.type == "cuda" else 0.0
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside towards ``name``. Phases must not be nested."""
        if self._device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(torch.cuda.current_stream(self._device))
            try:
                yield
            finally:
                end.record(torch.cuda.current_stream(self._device))
                self._events.append((name, begin, end))
            return
        start, work = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start
            if name not in NOT_COUNTED and self._processor is not None:
                self._processor += time.process_time() - work

    def settle(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        if self._events:
            torch.cuda.synchronize(self._device)
            for name, begin, end in self._events:
                self._seconds[name] += begin.elapsed_time(end) / 1000
            self._events.clear()
        return dict(self._seconds)

    @property
    def processor(self) -> float | None:
        """Processor time of the phases that count, all threads [s]; None on a GPU.

        A run that has less of it than seconds was kept waiting by something else on the machine.
        """
        return self._processor

    def resume(self, seconds: Mapping[str, float], processor: float | None = None) -> None:
        """Go on from the time already spent before an interruption; None: nobody knows its processor time.

        Set-up, which every process does, counts once: what this one's has taken, settled or not, is forgotten.
        """
        self._events.clear()
        self._seconds.update(seconds)
        self._processor = processor


def total(seconds: Mapping[str, float]) -> float:
    """The headline time: all phases without evaluation and measuring [s]."""
    return sum(value for name, value in seconds.items() if name not in NOT_COUNTED)


def peak_memory(device: torch.device) -> int:
    """Peak memory of this process so far [bytes]: of the GPU's allocator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
