"""One run on random images, built and stepped by the runner's own functions, so that what is timed is what users get.

The only file of ``speed`` that knows the runner from inside: the phases of its loop are not public. Nothing of the
user's is read or written, for the home folder is a temporary one meanwhile. The teacher has random weights; a few
batches of random images have moved its BatchNorm statistics.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dfkd_bench import run, teachers
from dfkd_bench.augment import to_unit
from dfkd_bench.compute import Compute
from dfkd_bench.data import DataSet, Part, RawData
from dfkd_bench.errors import UserError, validation_line
from dfkd_bench.evaluate import logits_of
from dfkd_bench.job import Job, Precision, Recipe, TeacherSpec
from dfkd_bench.method import Method, Progress, Schedule, Task
from dfkd_bench.models import build_model
from dfkd_bench.paths import HOME_VARIABLE
from dfkd_bench.plugins import Plugins
from dfkd_bench.runfolder import RunFolder
from dfkd_bench.suite import parse_pair

DATASET = "random"
EMBEDDINGS = "random:384"
"""Label text of SBERT's width, without a text model."""

TEACHER_BATCH, TEACHER_BATCHES = 32, 4
EVALUATED = {"cpu": 1000, "cuda": 10_000}
"""Images of an evaluation, up to 32x32; of larger ones as many as have as many pixels, but at least ``FEWEST``."""

FEWEST = 20

AT = Progress(epoch=1, round=0, epochs=1000, warmup_epochs=0)
"""Where in a run the steps are taken: after the warm-up, and not in an epoch in which methods start anew."""


@dataclass(frozen=True)
class Question:
    """What is to be measured."""

    method: str
    pair: str = "wrn40_2:wrn16_1"
    batch: int = 128
    synthesis_batch: int = 128
    side: int = 32
    classes: int = 10
    channels: int = 3
    steps: int = 5  # generator steps of a synthesised batch, and student steps of a phase
    repeat: int = 5

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H, W."""
        return self.channels, self.side, self.side


class Bench:
    """Phases of the runner's loop, to be called as often as one likes."""

    def __init__(self, asked: Question, device: torch.device, precision: Precision, threads: int, found: Plugins):
        self.asked, self.device, self.precision = asked, device, precision
        teacher, student = parse_pair(asked.pair, found)
        method_class = found.method(asked.method)
        self.config = configure(method_class, asked)
        self.schedule = Schedule(epochs=AT.epochs, student_steps=asked.steps, batch_size=asked.batch, lr=0.01)
        self.dataset = _random_images(asked, evaluated(asked, device))
        found = replace(found, datasets={**found.datasets, DATASET: self.dataset})
        recipe = Recipe(epochs=1, batch_size=TEACHER_BATCH, lr=1e-6, augment=False)
        self.teacher_spec = TeacherSpec(model=teacher, recipe=recipe)
        teachers.train(self.dataset, self.teacher_spec, Compute(device), models=found.models)
        job = Job(
            method=asked.method,
            config=self.config.model_dump(mode="json"),
            schedule=self.schedule,
            dataset=DATASET,
            teacher=self.teacher_spec,
            student=student,
            seed=0,
            protocol="equal",  # all student batches are full ones
            precision=precision,
        )
        folder = RunFolder(job)
        folder.create()
        self._run = run._Run(job, run.Place(Path(), device=str(device), threads=threads), found, folder)
        streams = {name: torch.Generator(device).manual_seed(0) for name in ("pool", "augment", "method")}
        self.task: Task = self._run._task(method_class, self.config, streams)
        reason = self._run._unsupported(method_class, self.config, self.task)
        if reason is not None:
            raise UserError(f"method {asked.method} can't be measured so: {reason}")
        self._bench = self._run._set_up(method_class, self.config, self.task, streams)
        with self._run.compute.autocast():
            held_out = self._run.held_out.images
            self._teacher_classes = logits_of(self._run.teacher.model, held_out, self.task.normalize).argmax(dim=1)
        once = self.schedule.model_copy(update={"epochs": 1})
        self.generated = method_class.generation_cost(self.config, once, asked.classes)
        self.synthesis()
        self._batch = self.sampling()

    @property
    def generator_steps(self) -> float:
        """Of one call of ``synthesize``: batches that pass through the teacher with gradient; 0: there are none."""
        return self.generated / self.asked.synthesis_batch

    @property
    def method(self) -> Method:
        """The method that is measured."""
        return self._bench.method

    @property
    def pool(self) -> Any:
        """Where the runner puts images, and a method gets them."""
        return self._bench.pool

    @pool.setter
    def pool(self, pool: Any) -> None:
        self._bench.pool = pool

    @property
    def pooled(self) -> Tensor | None:
        """A synthesised batch of the pool, [B, C, H, W] in [0, 1]; None: the method keeps none there."""
        return to_unit(self.pool.images[: self.asked.synthesis_batch]) if len(self.pool) else None

    @property
    def student_images(self) -> Tensor:
        """A student batch, normalised [b, C, H, W]."""
        return self._batch

    @property
    def held_out(self) -> Tensor:
        """The images of an evaluation, uint8 [n, C, H, W]."""
        images = self._run.held_out.images
        return images if isinstance(images, Tensor) else images[torch.arange(len(images))]  # as the plain forms do

    def synthesis(self) -> None:
        """The runner's synthesis phase: one call of ``synthesize``, its images put into the pool."""
        self._run._synthesis_phase(self._bench, AT)

    def distillation(self) -> None:
        """The runner's student phase: ``steps`` student steps."""
        self._run._student_phase(self._bench, AT)

    def teach(self) -> Tensor:
        """The teacher's answers to one student batch, as a method asks for them."""
        return self.task.teach(self._batch)

    def evaluation(self) -> None:
        """The runner's evaluation after an epoch."""
        self._run._evaluate(self._bench, AT.epoch, 0.0, 0.0, self._teacher_classes)

    def checkpoint(self) -> None:
        """What the runner writes after an epoch."""
        self._run._checkpoint(self._bench, AT.epoch)

    def seconds(self) -> dict[str, float]:
        """The runner's clock: seconds of each phase so far."""
        return self._run.clock.settle()

    def fresh_models(self) -> tuple[nn.Module, nn.Module]:
        """Another teacher with the same weights and another student, fp32, as they were built."""
        models = self._run.found.models
        teacher = teachers.load(self.dataset, self.teacher_spec, self.device, models).model
        student = build_model(self._run.job.student, self.asked.classes, self.asked.channels, models)
        return teacher, student.to(self.device)

    def sampling(self) -> Tensor:
        """The images of the next student batch, normalised [b, C, H, W]."""
        with self._run.compute.autocast():
            return self._bench.method.student_batch(self._bench.pool, self.asked.batch, AT).images


def evaluated(asked: Question, device: torch.device) -> int:
    """Images of an evaluation."""
    whole = EVALUATED[device.type]
    return whole if asked.side <= 32 else max(FEWEST, round(whole * (32 / asked.side) ** 2))


@contextmanager
def temporary_home() -> Iterator[Path]:
    """An empty home folder, which is gone afterwards."""
    before = os.environ.get(HOME_VARIABLE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[HOME_VARIABLE] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ[HOME_VARIABLE]
            else:
                os.environ[HOME_VARIABLE] = before


def configure(method_class: type[Method], asked: Question) -> Any:
    """The method's defaults, but one batch of ``synthesis_batch`` images in ``steps`` steps a call.

    The settings are found by the names that methods share; a method without one of them keeps its own way.
    """
    wanted: dict[str, Any] = {"synthesis_batch_size": asked.synthesis_batch, "loops": 1, "warmup_loops": 1}
    wanted |= {"encoder": EMBEDDINGS}
    if method_class.absorbs:
        wanted[method_class.absorbs] = asked.steps
    fields = method_class.Config.model_fields
    try:
        return method_class.Config(**{name: value for name, value in wanted.items() if name in fields})
    except ValidationError as error:
        raise UserError(f"method {asked.method} can't be measured so: {validation_line(error)}") from None


def _random_images(asked: Question, evaluated: int) -> DataSet:
    count = {"train": TEACHER_BATCH * TEACHER_BATCHES, "test": evaluated}

    def read(_dataset: DataSet, _root: Path, part: Part) -> RawData:
        stream = np.random.default_rng(len(part))
        images = stream.integers(0, 256, (count[part], *asked.image_shape), dtype=np.uint8)
        return RawData.of_arrays(images, np.arange(count[part], dtype=np.int64) % asked.classes)

    return DataSet(
        name=DATASET,
        title="random images",
        num_classes=asked.classes,
        names=tuple(f"class {index}" for index in range(asked.classes)),
        image_shape=asked.image_shape,
        mean=(0.5,) * asked.channels,
        std=(0.25,) * asked.channels,
        flip_keeps_class=True,
        validation_size=TEACHER_BATCH,
        source="random numbers",
        read=read,
    )
