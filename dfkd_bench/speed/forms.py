"""What a form of the steps is, which lives in a process of its own and times a repeat when it is its turn; and ours."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dfkd_bench import plugins
from dfkd_bench.clock import peak_memory
from dfkd_bench.compute import hardware, set_threads
from dfkd_bench.job import Precision
from dfkd_bench.speed import profiling
from dfkd_bench.speed.bench import Bench, Question
from dfkd_bench.speed.timing import Work, seconds_of, synchronize, work_of
from dfkd_bench.speed.values import Operator

GENERATOR, STUDENT, TEACH = "generator step", "student step", "teacher's answers"
LOADED, EVALUATION = "student step with batch", "evaluation"

Seconds = dict[str, float]
"""Step -> seconds."""


@dataclass(frozen=True)
class Facts:
    """What a form knows beside its times. ``memory`` is None where the system can't begin a new peak."""

    memory: int | None
    works: dict[str, Work]
    png_seconds: float | None = None
    config: dict[str, Any] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)  # step -> images that pass in it
    epoch: Seconds = field(default_factory=dict)
    profiles: dict[str, tuple[Operator, ...]] = field(default_factory=dict)
    hardware: dict[str, str | int] = field(default_factory=dict)


class Form(ABC):
    """The steps in one form, with weights, images and a device of their own."""

    device: torch.device
    _new_peak = False

    def warm_up(self) -> None:
        """Repeats that don't count: one on a CPU, three on a GPU, whose kernels are chosen there."""
        self._new_peak = _forget_peak(self.device)
        for _ in range(3 if self.device.type == "cuda" else 1):
            self.repeat()

    @abstractmethod
    def repeat(self) -> Seconds:
        """Time each step once: seconds of one step."""

    @abstractmethod
    def facts(self) -> Facts:
        """All else, when the last repeat is over."""

    def peak(self) -> int | None:
        """Peak memory since the warm-up began [bytes]."""
        if not self._new_peak:
            return None
        return _resident_peak() if self.device.type == "cpu" else peak_memory(self.device)


class Own(Form):
    """The method's own steps, through the runner."""

    def __init__(self, bench: Bench) -> None:
        self.device = bench.device
        self.bench = bench

    def repeat(self) -> Seconds:
        """The runner's clock tells the drawing of a batch from the step itself."""
        bench, steps = self.bench, self.bench.asked.steps
        found = {}
        if bench.generated:
            found[GENERATOR] = seconds_of(bench.synthesis, self.device) / bench.generator_steps
        phases = self._phases(bench.distillation)
        found[STUDENT] = phases["distillation"] / steps
        found[LOADED] = (phases["distillation"] + phases["sampling"]) / steps
        found[TEACH] = seconds_of(bench.teach, self.device)
        found[EVALUATION] = seconds_of(bench.evaluation, self.device)
        return found

    def works(self) -> dict[str, Work]:
        """Work of one of each step."""
        bench, steps = self.bench, self.bench.asked.steps
        loaded = work_of(bench.distillation).per(steps)
        return {
            GENERATOR: work_of(bench.synthesis).per(bench.generator_steps) if bench.generated else Work(0, 0),
            # Some methods generate a student batch when it is asked for.
            STUDENT: loaded.without(work_of(bench.sampling)),
            LOADED: loaded,
            TEACH: work_of(bench.teach),
            EVALUATION: work_of(bench.evaluation),
        }

    def _phases(self, call: Callable[[], object]) -> Seconds:
        before = self.bench.seconds()
        call()
        return {name: seconds - before[name] for name, seconds in self.bench.seconds().items()}


class Ours(Own):
    """As a run has them, in either precision."""

    def __init__(
        self, asked: Question, device: torch.device, precision: Precision, threads: int, found: plugins.Plugins
    ) -> None:
        set_threads(threads)  # what a run sets for its whole process
        super().__init__(Bench(asked, device, precision, threads, found))

    def facts(self) -> Facts:
        """The profile comes last: it takes memory and time."""
        bench, batch = self.bench, self.bench.student_images.shape[0]
        peak, works, epoch = self.peak(), self.works(), self._epoch()
        return Facts(
            memory=peak,
            works=works,
            config=bench.config.model_dump(mode="json"),
            images={
                GENERATOR: bench.asked.synthesis_batch,
                STUDENT: batch,
                LOADED: batch,
                TEACH: batch,
                EVALUATION: bench.held_out.shape[0],
            },
            epoch=epoch,
            profiles=self._profiles(),
            hardware=hardware(self.device, 1),
        )

    def _profiles(self) -> dict[str, tuple[Operator, ...]]:
        bench = self.bench
        student = {STUDENT: profiling.operators(bench.distillation, self.device, bench.asked.steps)}
        if not bench.generated:
            return student
        return {GENERATOR: profiling.operators(bench.synthesis, self.device, bench.generator_steps)} | student

    def _epoch(self) -> Seconds:
        """One epoch as the runner does it, of one batch and ``steps`` student steps, with evaluation and checkpoint."""
        bench = self.bench
        phases = dict.fromkeys(("synthesis", "sampling", "distillation", "evaluation"), 0.0)

        def epoch() -> None:
            bench.synthesis()
            bench.distillation()
            bench.evaluation()

        whole = seconds_of(lambda: phases.update(self._phases(epoch)), self.device)
        kept = {name: seconds for name, seconds in phases.items() if seconds > 0}
        return kept | {
            "other": max(0.0, whole - sum(kept.values())),
            "checkpoint": seconds_of(bench.checkpoint, self.device),
        }


def _forget_peak(device: torch.device) -> bool:
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # man 5 proc: the peak of resident memory becomes the present one
    except OSError:
        return False
    return True


def _resident_peak() -> int:
    """Of this process, from where ``clear_refs`` began it anew: what getrusage tells is never below the parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
