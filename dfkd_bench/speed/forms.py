"""The forms in which the steps are timed. Each lives in a process of its own and times a repeat when it is its turn."""

from __future__ import annotations

import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dfkd_bench import plugins
from dfkd_bench.checkpoint import seed_everything
from dfkd_bench.clock import peak_memory
from dfkd_bench.compute import hardware, prepare, set_threads
from dfkd_bench.job import Precision
from dfkd_bench.speed import profiling
from dfkd_bench.speed.bench import Bench, Question
from dfkd_bench.speed.plain import Plain, keep_on_device
from dfkd_bench.speed.released_manner import ReleasedManner
from dfkd_bench.speed.timing import Work, middle, repeated, seconds_of, synchronize, work_of
from dfkd_bench.speed.values import Operator

GENERATOR, STUDENT, TEACH = "generator step", "student step", "teacher's answers"
LOADED, EVALUATION = "student step with batch", "evaluation"

Seconds = dict[str, float]
"""Step -> seconds."""

SETTLING = 0.5
"""Seconds in which a loader's processes fill their queues again and come to rest, to disturb no other form."""


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


class Ours(Form):
    """The project's steps, through the runner, in either precision."""

    def __init__(
        self, asked: Question, device: torch.device, precision: Precision, threads: int, found: plugins.Plugins
    ) -> None:
        set_threads(threads)  # what a run sets for its whole process
        self.device = device
        self.bench = Bench(asked, device, precision, threads, found)

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

    def facts(self) -> Facts:
        """The profile comes last: it takes memory and time."""
        bench, batch = self.bench, self.bench.student_images.shape[0]
        peak, works, epoch = self.peak(), self._works(), self._epoch()
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

    def _works(self) -> dict[str, Work]:
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

    def _phases(self, call: Callable[[], object]) -> Seconds:
        before = self.bench.seconds()
        call()
        return {name: seconds - before[name] for name, seconds in self.bench.seconds().items()}


class PlainForm(Form):
    """NAYER's steps in plain PyTorch."""

    def __init__(self, asked: Question, device: torch.device, threads: int, found: plugins.Plugins) -> None:
        torch.set_num_threads(threads)
        self.device, self.steps = device, asked.steps
        bench = _bench_of_ordinary_code(asked, device, threads, found)  # gone at the end: it would count in the memory
        self.plain = Plain(bench.config, bench.schedule, bench.task, *bench.fresh_models())
        self.images, self.held_out = bench.student_images.float().contiguous(), bench.held_out

    def repeat(self) -> Seconds:
        """Images of a student batch are at hand."""
        return {
            GENERATOR: seconds_of(lambda: self.plain.synthesize(keep_on_device), self.device) / self.steps,
            STUDENT: seconds_of(_times(self.steps, lambda: self.plain.student_step(self.images)), self.device)
            / self.steps,
            TEACH: seconds_of(lambda: self.plain.teach(self.images), self.device),
            EVALUATION: seconds_of(lambda: self.plain.evaluate(self.held_out), self.device),
        }

    def facts(self) -> Facts:
        """The work is that of all forms: no fast path hides an operator from the counter here."""
        peak, student = self.peak(), work_of(lambda: self.plain.student_step(self.images))
        works = {
            GENERATOR: work_of(lambda: self.plain.synthesize(keep_on_device)).per(self.steps),
            STUDENT: student,
            LOADED: student,
            TEACH: work_of(lambda: self.plain.teach(self.images)),
            EVALUATION: work_of(lambda: self.plain.evaluate(self.held_out)),
        }
        return Facts(peak, works)


class ReleasedForm(Form):
    """The same in the released codes' manner, with a folder of PNG files and a loader."""

    def __init__(self, asked: Question, device: torch.device, threads: int, found: plugins.Plugins) -> None:
        torch.set_num_threads(threads)
        self.device, self.steps = device, asked.steps
        bench = _bench_of_ordinary_code(asked, device, threads, found)
        plain = Plain(bench.config, bench.schedule, bench.task, *bench.fresh_models())
        self._folder = tempfile.TemporaryDirectory()
        self.released = ReleasedManner(plain, Path(self._folder.name), asked.batch)
        images = self.released.synthesize()
        self.png_seconds = middle(repeated(lambda: self.released.write(images), device, asked.repeat))
        self._share = self.png_seconds / type(bench.config)().generator_steps  # the method's own number of steps

    def repeat(self) -> Seconds:
        """Writing a batch is shared by its generator steps. A step that doesn't count sets the loader going."""
        generator = seconds_of(self.released.synthesize, self.device) / self.steps
        self.released.student_step()
        loaded = seconds_of(_times(self.steps, self.released.student_step), self.device) / self.steps
        time.sleep(SETTLING)
        return {GENERATOR: generator + self._share, LOADED: loaded}

    def facts(self) -> Facts:
        """Ends the loader's processes, too."""
        peak = self.peak()
        self.released.close()
        self._folder.cleanup()
        return Facts(peak, {}, self.png_seconds)


@dataclass(frozen=True)
class Order:
    """What another process is told to make: one of the forms."""

    name: str
    asked: Question
    device: torch.device
    precision: Precision  # of ours
    threads: int
    plugin_files: tuple[Path, ...]

    def make(self) -> Form:
        """Build it and warm it up. Raises ``UserError`` for a method that can't do such a task."""
        prepare(self.device)
        seed_everything(0)
        found = plugins.discover(self.plugin_files)
        form: Form
        if self.name in ("ours", "exact"):
            precision = self.precision if self.name == "ours" else "fp32"
            form = Ours(self.asked, self.device, precision, self.threads, found)
        else:
            kinds = {"plain": PlainForm, "released": ReleasedForm}
            form = kinds[self.name](self.asked, self.device, self.threads, found)
        form.warm_up()
        return form


def _bench_of_ordinary_code(asked: Question, device: torch.device, threads: int, found: plugins.Plugins) -> Bench:
    """For its images and models. The process computes as PyTorch does by itself afterwards, with TF32 on a GPU."""
    bench = Bench(asked, device, "fp32", threads, found)
    torch.backends.cudnn.allow_tf32 = True  # the bench, a run, has turned it off
    return bench


def _times(count: int, call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(count):
            call()

    return calls


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
