"""Carrying a plan out: what is trained first and which records are taken away. Nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dfkd_bench import plugins, record
from dfkd_bench.engines import local
from dfkd_bench.job import Job
from dfkd_bench.plan import Plan, carry_out, make_plan
from dfkd_bench.record import MethodFacts, Record
from dfkd_bench.run import Place
from dfkd_bench.suite import make_suite

FOUND = plugins.discover()


class Engine:
    """Stands for the engine: remembers which teachers are trained, and which records are there when runs begin."""

    def __init__(self) -> None:
        self.teachers: list[str] = []
        self.records: list[Path] = []

    def train_teachers(self, tasks: Sequence[local.TeacherTask], *_: Any) -> None:
        self.teachers = [task.spec.model for task in tasks]

    def run_jobs(self, jobs: Sequence[Job], place: Place, *_: Any) -> None:
        self.records = sorted(place.output.glob("records/*/*/*.json"))


@pytest.fixture
def engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    monkeypatch.setattr(local, "train_teachers", engine.train_teachers)
    monkeypatch.setattr(local, "run_jobs", engine.run_jobs)
    return engine


def made(job: Job, source_sha256: str, **changes: Any) -> Record:
    facts = MethodFacts(origin="built-in", distribution="", version="", source_sha256=source_sha256)
    return Record(job_id=job.id, job=job, status="done", method=facts, knowledge="none").model_copy(update=changes)


def planned(output: Path) -> Plan:
    suite = make_suite("test", "test", "digits", ["dafl"], pairs=["convnet8:convnet8"], controls=())
    return make_plan(suite, FOUND, output, device="cpu")


def test_the_teacher_of_a_stale_run_is_trained_before_it_is_done_again(engine: Engine, tmp_path: Path) -> None:
    (item,) = planned(tmp_path).planned
    record.write(tmp_path, made(item.job, "other code"))
    carry_out(planned(tmp_path), FOUND, Place(tmp_path), ["cpu"], ("stale",))
    assert engine.teachers == ["convnet8"]


def test_a_record_that_is_made_anew_is_taken_away_first(engine: Engine, tmp_path: Path) -> None:
    (item,) = planned(tmp_path).planned
    record.write(tmp_path, made(item.job, "other code"))
    carry_out(planned(tmp_path), FOUND, Place(tmp_path), ["cpu"], ("stale",))
    assert engine.records == []


@pytest.mark.parametrize("before", [None, "failed"])
def test_a_record_that_another_command_has_made_meanwhile_stays(
    before: str | None, engine: Engine, tmp_path: Path
) -> None:
    (item,) = planned(tmp_path).planned
    if before is not None:
        record.write(tmp_path, made(item.job, "", status=before))
    looked_at = planned(tmp_path)
    path = record.write(tmp_path, made(item.job, FOUND.source("dafl").source_sha256()))
    carry_out(looked_at, FOUND, Place(tmp_path), ["cpu"], ("failed", "stale"))
    assert engine.records == [path]


def test_no_teacher_is_missing_for_runs_that_are_not_done_again(engine: Engine, tmp_path: Path) -> None:
    (item,) = planned(tmp_path).planned
    record.write(tmp_path, made(item.job, "", status="failed"))
    assert planned(tmp_path).missing_teachers == ()
