from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dfkd_bench import record as record_module
from dfkd_bench.errors import UserError
from dfkd_bench.files import safe_name
from dfkd_bench.job import Job, Recipe, TeacherSpec, digest
from dfkd_bench.method import Schedule
from dfkd_bench.record import (
    Counters,
    DataFile,
    MethodFacts,
    Point,
    Record,
    Score,
    TeacherFacts,
    read,
    read_all,
    record_path,
    write,
    write_bytes,
)

JOB = Job(
    method="nayer",
    config={"encoder": "sbert", "generator_steps": 20},
    schedule=Schedule(epochs=30, warmup_epochs=5, student_steps=40, batch_size=128, lr=0.1, lr_min=2e-4),
    dataset="digits",
    teacher=TeacherSpec(model="convnet32", recipe=Recipe(epochs=30), seed=0),
    student="convnet8",
    seed=0,
    protocol="smoke",
)


def changed(**fields: Any) -> Job:
    return JOB.model_copy(update=fields)


# -- Jobs -----------------------------------------------------------------------------------------------------------


def test_the_id_of_a_job_stays_the_same_for_ever() -> None:
    # If this changes, every record made before belongs to no job any more: raise PROTOCOL_VERSION on purpose instead.
    assert JOB.id == "3fb27d24a3af"


def test_so_does_the_id_of_a_job_in_bf16() -> None:
    # As above, but it is ARITHMETIC that is raised on purpose where bf16 alone computes something else.
    assert changed(precision="bf16").id == "a39e785f78c8"


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 1},
        {"config": {"encoder": "sbert", "generator_steps": 21}},
        {"config": {}},
        {"method": "fm"},
        {"schedule": JOB.schedule.model_copy(update={"lr": 0.2})},
        {"teacher": JOB.teacher.model_copy(update={"seed": 1})},
        {"teacher": JOB.teacher.model_copy(update={"recipe": Recipe(epochs=31)})},
        {"student": "convnet16"},
        {"dataset": "mnist"},
        {"protocol": "paper"},
        {"protocol_version": 2},
        {"evaluate_on": "validation"},
        {"precision": "bf16"},
        {"inputs": {"pool": "ab" * 32}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_whatever_changes_the_result_changes_the_id(fields: dict[str, Any]) -> None:
    assert changed(**fields).id != JOB.id


@pytest.mark.parametrize("fields", [{"origin": "paper"}, {"source": "a better citation"}])
def test_where_the_settings_come_from_does_not_change_the_id(fields: dict[str, Any]) -> None:
    assert changed(**fields).id == JOB.id


def test_the_order_of_the_settings_does_not_change_the_id() -> None:
    assert changed(config={"generator_steps": 20, "encoder": "sbert"}).id == JOB.id


def test_the_id_survives_json() -> None:
    assert Job.model_validate_json(JOB.model_dump_json()).id == JOB.id


def test_the_pair_is_teacher_and_student() -> None:
    assert JOB.pair == "convnet32:convnet8"


@pytest.mark.parametrize("fields", [{"seed": -1}, {"protocol": "mine"}, {"device": "cuda:1"}])
def test_wrong_jobs_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Job.model_validate(JOB.model_dump() | fields)


def test_a_job_can_not_be_changed() -> None:
    with pytest.raises(ValidationError):
        JOB.seed = 3  # type: ignore[misc]


def test_digest_is_sha256_of_the_canonical_form() -> None:
    assert digest({"b": [1, 0.5], "a": "ä"}) == hashlib.sha256(b'{"a":"\\u00e4","b":[1,0.5]}').hexdigest()


def test_values_without_a_canonical_form_have_no_digest() -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest({"a": float("nan")})


# -- Records --------------------------------------------------------------------------------------------------------


def make_record(job: Job = JOB) -> Record:
    return Record(
        job_id=job.id,
        job=job,
        status="done",
        outcome="ok",
        method=MethodFacts(origin="built-in", distribution="dfkd-bench", version="0.1.0", source_sha256="ab" * 32),
        knowledge="none",
        teacher=TeacherFacts(model="convnet32", accuracy=98.5, sha256="cd" * 32, origin="trained here"),
        curve=(
            Point(epoch=5, accuracy=50.1, loss=1.25, seconds=3.0625),
            Point(epoch=6, accuracy=1 / 3, loss=None, seconds=4),
        ),
        last=Score(accuracy=1 / 3, agreement=90.0, calibration=None, epoch=6),
        best=Score(accuracy=50.1, epoch=5),
        seconds={"synthesis": 2.0, "distillation": 3.0, "sampling": 0.5, "setup": 0.25, "evaluation": 7.0},
        counters=Counters(images_made=500, student_steps=40),
        scalars={"synthesis_loss": None},
        files=(DataFile(path="$DFKD_BENCH_DATA/x.npy", phase="runner"),),
        hardware={"device": "cpu", "cores": 2},
        git={"commit": "0" * 40, "dirty": True},
    )


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = make_record()
    assert read(write(tmp_path, written)) == written


def test_a_record_lies_where_its_job_says(tmp_path: Path) -> None:
    path = write(tmp_path, make_record())
    assert path == record_path(tmp_path, JOB) == tmp_path / "records" / "digits" / "nayer" / f"{JOB.id}.json"


def test_the_headline_time_leaves_out_evaluation() -> None:
    assert make_record().total_seconds == 5.75


def test_all_records_are_found_in_the_order_of_their_paths(tmp_path: Path) -> None:
    jobs = [changed(seed=seed, method=method) for method in ("nayer", "fm") for seed in (1, 0)]
    for job in jobs:
        write(tmp_path, make_record(job))
    assert [found.job for found in read_all(tmp_path)] == sorted(jobs, key=lambda job: str(record_path(tmp_path, job)))


def test_without_records_there_are_none(tmp_path: Path) -> None:
    assert list(read_all(tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "safe"),
    [("digits", "digits"), ("folder:/a/b", "folder__a_b"), ("../x", ".._x"), ("my-set_1.0", "my-set_1.0")],
)
def test_names_become_folder_names(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_long_names_are_cut_and_stay_apart() -> None:
    names = [safe_name(f"folder:/{'ä' * 150}/{last}") for last in "ab"]
    assert names[0] != names[1]
    assert max(len(name.encode()) for name in names) <= 120


def _truncated(text: str) -> str:
    return text[: len(text) // 2]


def _without_job(text: str) -> str:
    return json.dumps({name: value for name, value in json.loads(text).items() if name != "job"})


def _with_unknown_key(text: str) -> str:
    return json.dumps(json.loads(text) | {"surprise": 1})


def _of_the_future(text: str) -> str:
    return json.dumps(json.loads(text) | {"schema_version": 99, "energy": 3})


@pytest.mark.parametrize("damage", [_truncated, _without_job, _with_unknown_key, _of_the_future])
def test_a_damaged_or_foreign_record_is_one_line_that_names_it(damage: Callable[[str], str], tmp_path: Path) -> None:
    path = write(tmp_path, make_record())
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match="schema version") as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("delete" in str(caught.value)) == (damage is not _of_the_future)  # that one is a good run


def test_a_missing_record_is_one_line_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        read(tmp_path / "none.json")


# -- Writing --------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bytes(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "file", []
    write_bytes(path, b"old")
    replace = os.replace

    def look_then_replace(source: str, target: Path) -> None:
        seen.append((path.read_bytes(), Path(source).read_bytes(), Path(source).parent == path.parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look_then_replace)
    write_bytes(path, b"new")
    assert seen == [(b"old", b"new", True)]
    assert path.read_bytes() == b"new"


def test_others_may_read_a_written_file(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_bytes(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


# -- Provenance -----------------------------------------------------------------------------------------------------


def test_software_names_what_a_result_depends_on() -> None:
    assert {"dfkd-bench", "python", "torch", "torchvision", "numpy"} <= record_module.software().keys()


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    record_module.git_state.cache_clear()
    try:
        assert record_module.git_state() == {}
    finally:
        record_module.git_state.cache_clear()
