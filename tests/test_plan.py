"""Carrying a plan out: what is trained first and which records are taken away. Nothing is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_bench import data, plugins, record, teachers
from dfkd_bench.engines import local
from dfkd_bench.errors import UserError
from dfkd_bench.job import Job
from dfkd_bench.models import build_model
from dfkd_bench.plan import Plan, carry_out, get_ready, make_plan
from dfkd_bench.plugins import Source
from dfkd_bench.record import MethodFacts, Record, TeacherFacts
from dfkd_bench.run import Place
from dfkd_bench.suite import make_suite

FOUND = plugins.discover()


class Engine:
    """Stands for the engine: remembers which teachers are trained, and which records are there when runs begin.

    The teachers that it "trains" have random weights.
    """

    def __init__(self) -> None:
        self.datasets: dict[str, data.DataSet] = {}
        self.teachers: list[str] = []
        self.records: list[Path] = []
        self.place: Place | None = None

    def train_teachers(self, tasks: Sequence[local.TeacherTask], *_: Any) -> None:
        self.teachers = [task.spec.model for task in tasks]
        for task in tasks:
            dataset = data.dataset(task.dataset, extra=self.datasets)
            card = teachers.TeacherCard(
                dataset=task.dataset,
                model=task.spec.model,
                classes=dataset.num_classes,
                channels=1,
                origin="trained here",
                spec=task.spec,
                sha256="",
                accuracy={"test": 10.0},
            )
            model = build_model(task.spec.model, dataset.num_classes, 1)
            teachers._keep(teachers.folder(dataset, task.spec), model, card)

    def run_jobs(self, jobs: Sequence[Job], place: Place, *_: Any) -> None:
        self.place = place
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


def test_a_record_of_earlier_code_with_the_same_results_is_no_other(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (item,) = planned(tmp_path).planned
    today = FOUND.source("dafl").source_sha256()
    record.write(tmp_path, made(item.job, "earlier code"))
    monkeypatch.setattr(Source, "earlier_sources", lambda _: frozenset({"earlier code"}))
    (found,) = planned(tmp_path).planned
    assert found.state == "done"
    assert found.record is not None
    assert found.record.method.source_sha256 == today
    (carried,) = carry_out(planned(tmp_path), FOUND, Place(tmp_path), ["cpu"])
    assert carried.method.source_sha256 == today


def cited_otherwise(job: Job) -> Job:
    return job.model_copy(update={"origin": "third-party", "source": "another citation"})


def test_a_record_shows_origin_and_source_of_todays_job(engine: Engine, tmp_path: Path) -> None:
    """They are no part of its id: the same settings were given by -s then, and are the method's own now."""
    (item,) = planned(tmp_path).planned
    record.write(tmp_path, made(cited_otherwise(item.job), FOUND.source("dafl").source_sha256()))
    (found,) = planned(tmp_path).planned
    assert found.record is not None
    assert found.record.job == item.job
    (carried,) = carry_out(planned(tmp_path), FOUND, Place(tmp_path), ["cpu"])
    assert carried.job == item.job


def test_a_stale_record_of_another_citation_is_taken_away_first(engine: Engine, tmp_path: Path) -> None:
    (item,) = planned(tmp_path).planned
    record.write(tmp_path, made(cited_otherwise(item.job), "other code"))
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


@pytest.mark.parametrize("rerun", [(), ("failed",)])
def test_a_failure_of_another_task_is_not_repeated(rerun: tuple[str, ...], engine: Engine, tmp_path: Path) -> None:
    looked_at = planned(tmp_path)
    path = record.write(tmp_path, made(looked_at.planned[0].job, "", status="failed"))
    carry_out(looked_at, FOUND, Place(tmp_path), ["cpu"], rerun)
    assert engine.records == [path]
    assert engine.place is not None
    assert engine.place.keep_failed


def test_no_teacher_is_missing_for_runs_that_are_not_done_again(engine: Engine, tmp_path: Path) -> None:
    (item,) = planned(tmp_path).planned
    record.write(tmp_path, made(item.job, FOUND.source("dafl").source_sha256(), status="failed"))
    assert planned(tmp_path).missing_teachers == ()


def test_a_run_that_failed_with_other_code_is_new(engine: Engine, tmp_path: Path) -> None:
    """Whoever has mended a method and gives the same command again wants to see it run."""
    (item,) = planned(tmp_path).planned
    path = record.write(tmp_path, made(item.job, "other code", status="failed"))
    looked_at = planned(tmp_path)
    assert [(one.state, one.record is None) for one in looked_at.planned] == [("new", False)]  # a table still shows it
    carry_out(looked_at, FOUND, Place(tmp_path), ["cpu"])
    assert engine.place is not None  # runs began, and not with the old record
    assert (engine.records, path.exists()) == ([], False)


def test_the_teacher_lies_beside_the_records(engine: Engine, tmp_path: Path) -> None:
    carry_out(planned(tmp_path), FOUND, Place(tmp_path), ["cpu"])
    spec, digits = planned(tmp_path).planned[0].job.teacher, data.dataset("digits")
    kept, home = teachers.folder(digits, spec, tmp_path), teachers.folder(digits, spec)
    for name in ("teacher.json", "weights.safetensors"):
        assert (kept / name).read_bytes() == (home / name).read_bytes()


def test_a_teacher_beside_the_records_is_not_trained_again(engine: Engine, tmp_path: Path) -> None:
    carry_out(planned(tmp_path), FOUND, Place(tmp_path), ["cpu"])
    spec, digits = planned(tmp_path).planned[0].job.teacher, data.dataset("digits")
    (teachers.folder(digits, spec) / "teacher.json").unlink()  # as in the home of another machine
    carry_out(planned(tmp_path), FOUND, Place(tmp_path), ["cpu"])
    assert engine.teachers == []


def with_another_teacher(output: Path, seeds: tuple[int, ...]) -> Plan:
    """A plan of two seeds; for ``seeds`` there are records of another teacher."""
    suite = make_suite("test", "test", "digits", ["dafl"], pairs=["convnet8:convnet8"], controls=(), seeds=range(2))
    plan = make_plan(suite, FOUND, output, device="cpu")
    facts = TeacherFacts(model="convnet8", accuracy=10.0, sha256="0123456789abcdef", origin="trained here")
    for item in plan.planned:
        if item.job.seed in seeds:
            source = FOUND.source("dafl").source_sha256()
            record.write(output, made(item.job, source, teacher=facts))
    return make_plan(suite, FOUND, output, device="cpu")


def test_runs_with_another_teacher_than_the_records_are_refused_before_they_begin(
    engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"1 of this table's records in .* another convnet8 \(sha256 0123456789ab\)"):
        carry_out(with_another_teacher(tmp_path, (0,)), FOUND, Place(tmp_path), ["cpu"])
    assert engine.records == []


def test_a_refused_teacher_is_not_put_beside_the_records(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        carry_out(with_another_teacher(tmp_path, (0,)), FOUND, Place(tmp_path), ["cpu"])
    assert not (tmp_path / "teachers").exists()


def test_records_that_are_made_anew_may_get_another_teacher(engine: Engine, tmp_path: Path) -> None:
    plan = with_another_teacher(tmp_path, (0,))
    stale = tuple(replace(item, state="stale") if item.state == "done" else item for item in plan.planned)
    carry_out(replace(plan, planned=stale), FOUND, Place(tmp_path), ["cpu"], ("stale",))
    assert engine.teachers == ["convnet8"]


TWO_FILES = replace(data.dataset("digits"), name="two_files", one_file=False)


def prepared(method: str, output: Path) -> list[str]:
    """Which splits are there after a run of ``method`` on a data set of two files."""
    found = replace(FOUND, datasets={"two_files": TWO_FILES})
    pairs = ["convnet8:convnet8"]
    suite = make_suite("test", "test", "two_files", [method], pairs=pairs, controls=(), protocol="paper")
    carry_out(make_plan(suite, found, output, device="cpu"), found, Place(output), ["cpu"])
    return [split for split in data.SPLITS if TWO_FILES.prepared_files(split)[-1].is_file()]


@pytest.fixture
def imported(home: Path, tmp_path: Path) -> None:
    torch.save(build_model("convnet8", 10, 1).state_dict(), tmp_path / "own.pth")
    teachers.import_checkpoint(tmp_path / "own.pth", TWO_FILES, "convnet8", minimum=0)


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize(("method", "splits"), [("dafl", ["test"]), ("real_kd", [*data.SPLITS])])
def test_for_an_imported_teacher_only_what_the_jobs_open_is_prepared(
    method: str, splits: list[str], engine: Engine, tmp_path: Path
) -> None:
    assert prepared(method, tmp_path) == splits


def test_for_a_teacher_that_is_trained_every_split_is_prepared(engine: Engine, tmp_path: Path) -> None:
    engine.datasets = {"two_files": TWO_FILES}
    assert prepared("dafl", tmp_path) == [*data.SPLITS]


def test_a_teacher_is_missing_where_it_can_be_neither_trained_nor_found(home: Path, tmp_path: Path) -> None:
    found = replace(FOUND, datasets={"tested": replace(data.dataset("digits"), name="tested", test_only=True)})
    suite = make_suite("test", "test", "tested", ["dafl"], pairs=["convnet8:convnet8"], controls=(), protocol="smoke")
    with pytest.raises(
        UserError, match=r"no teacher convnet8 for 'tested'.* `dfkd-bench teacher import FILE -d tested"
    ):
        make_plan(suite, found, tmp_path, device="cpu")


def test_controls_on_real_images_are_refused_without_training_images(home: Path, tmp_path: Path) -> None:
    found = replace(FOUND, datasets={"tested": replace(data.dataset("digits"), name="tested", test_only=True)})
    suite = make_suite("test", "test", "tested", ["dafl"], pairs=["convnet8:convnet8"])
    with pytest.raises(UserError, match=r"test part only, and scratch, real_kd would learn .* --no-controls"):
        make_plan(suite, found, tmp_path, device="cpu")


def test_a_folder_of_images_is_decoded_before_the_runs(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    folder.mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "0.png")
    settings = {"ood_kd.pool": f"folder:{folder}"}
    suite = make_suite("t", "t", "digits", ["ood_kd"], "smoke", ["convnet8:convnet8"], (), settings=settings)
    get_ready(make_plan(suite, FOUND, tmp_path, device="cpu"), FOUND)
    assert len(list((tmp_path / "home" / "data").glob("images_of_pool/*/images.npy"))) == 1
    (folder / "1.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"ood_kd: .*1\.png can't be read as an image"):
        get_ready(make_plan(suite, FOUND, tmp_path, device="cpu"), FOUND)
