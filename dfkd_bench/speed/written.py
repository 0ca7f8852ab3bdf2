"""The lead method's steps as written anew, in plain PyTorch and in the released manner, as forms."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from dfkd_bench import plugins
from dfkd_bench.speed.bench import Bench, Question
from dfkd_bench.speed.forms import EVALUATION, GENERATOR, LOADED, STUDENT, TEACH, Facts, Form, Seconds
from dfkd_bench.speed.plain import Plain, keep_on_device
from dfkd_bench.speed.released_manner import ReleasedManner, settle, write
from dfkd_bench.speed.timing import middle, repeated, seconds_of, work_of


class PlainForm(Form):
    """NAYER's steps in plain PyTorch."""

    def __init__(self, asked: Question, device: torch.device, threads: int, found: plugins.Plugins) -> None:
        torch.set_num_threads(threads)
        self.device, self.steps = device, asked.steps
        bench = Bench(asked, device, "fp32", threads, found)  # gone at the end: it would count in the memory
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
        bench = Bench(asked, device, "fp32", threads, found)
        plain = Plain(bench.config, bench.schedule, bench.task, *bench.fresh_models())
        self._folder = tempfile.TemporaryDirectory()
        self.released = ReleasedManner(plain, Path(self._folder.name), asked.batch)
        images = self.released.synthesize()
        self.png_seconds = middle(repeated(lambda: write(images, Path(self._folder.name)), device, asked.repeat))
        self._share = self.png_seconds / type(bench.config)().generator_steps  # the method's own number of steps

    def repeat(self) -> Seconds:
        """Writing a batch is shared by its generator steps. A step that doesn't count sets the loader going."""
        generator = seconds_of(self.released.synthesize, self.device) / self.steps
        self.released.student_step()
        loaded = seconds_of(_times(self.steps, self.released.student_step), self.device) / self.steps
        settle()
        return {GENERATOR: generator + self._share, LOADED: loaded}

    def facts(self) -> Facts:
        """Ends the loader's processes, too."""
        peak = self.peak()
        self.released.close()
        self._folder.cleanup()
        return Facts(peak, {}, self.png_seconds)


def _times(count: int, call: Callable[[], object]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(count):
            call()

    return calls
