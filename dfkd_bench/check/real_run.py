"""The check that plays a run of the real runner, on a fake data set in a home of its own."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dfkd_bench import record, run, teachers
from dfkd_bench.check.bench import CPU, SCHEDULE, Subject, noise
from dfkd_bench.check.broken import Broken
from dfkd_bench.compute import Compute
from dfkd_bench.data import DataSet, Part, RawData
from dfkd_bench.job import Job, Recipe, TeacherSpec
from dfkd_bench.paths import HOME_VARIABLE

FAKE_PLUGIN = "from dfkd_bench.check import FAKE\n\nDATASETS = {FAKE.name: FAKE}\n"


def two_epoch_run(subject: Subject) -> None:
    """A two-epoch run of the real runner on a fake data set ends in a valid record."""
    schedule = SCHEDULE.model_copy(update={"epochs": 2})
    with _temporary_home() as folder:
        plugin = folder / "fake_data.py"
        plugin.write_text(FAKE_PLUGIN)
        recipe = Recipe(epochs=1, batch_size=16, include_validation=False)
        teacher = TeacherSpec(model="convnet8", recipe=recipe)
        teachers.train(FAKE, teacher, Compute(CPU))
        job = Job(
            method=subject.source.name,
            config=subject.tiny().model_dump(mode="json"),
            schedule=schedule,
            dataset=FAKE.name,
            teacher=teacher,
            student="convnet8",
            seed=0,
            protocol="smoke",
        )
        own = subject.source.path if subject.source.kind == "file" else None
        files = (plugin,) if own is None else (plugin, own)
        result = run.run(job, run.Place(output=folder / "output", plugin_files=files, device="cpu"))
        written = record.read(record.record_path(folder / "output", job))
    if result.status == "unsupported":
        return
    if result.status != "done":
        raise Broken(f"the run failed: {result.reason}")
    if result.outcome == "not finite":
        raise Broken("the student's loss became infinite or NaN")
    if written != result:
        raise Broken("the record on disk is another one")
    if result.counters.student_steps != schedule.total_student_steps:
        raise Broken(f"{result.counters.student_steps} student steps, {schedule.total_student_steps} were planned")


@contextmanager
def _temporary_home() -> Iterator[Path]:
    """A home folder of its own; ``run_checks`` puts the old one back, plugins imported from it are forgotten."""
    modules = set(sys.modules)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[HOME_VARIABLE] = folder
        try:
            yield Path(folder)
        finally:
            for name in set(sys.modules) - modules:
                if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
                    del sys.modules[name]


def _read_fake(dataset: DataSet, _root: Path, part: Part) -> RawData:
    images = noise(64, dataset.image_shape, seed=len(part))
    return RawData.of_arrays(images.numpy(), (torch.arange(64) % dataset.num_classes).numpy())


FAKE = DataSet(
    name="conformance",
    title="random images, for the conformance checks",
    num_classes=4,
    names=("zero", "one", "two", "three"),
    image_shape=(1, 8, 8),
    mean=(0.5,),
    std=(0.29,),
    flip_keeps_class=True,
    validation_size=16,
    source="random numbers",
    read=_read_fake,
)

CHECKS = (two_epoch_run,)
