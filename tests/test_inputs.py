"""Files of the user's own have a part in a job's identity, by their content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dfkd_bench import data, plugins, teachers
from dfkd_bench.job import Job, TeacherSpec
from dfkd_bench.suite import expand, make_suite

FOUND = plugins.discover()


@pytest.fixture(autouse=True)
def _own_home(home: Path) -> None:
    """Digests are kept there."""


def save(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), shade, np.uint8)).save(path)


def job(method: str = "real_kd", dataset: str = "digits", **settings: Any) -> Job:
    suite = make_suite("t", "t", dataset, [method], "smoke", controls=(), settings=settings)
    return expand(suite, FOUND, data.dataset(dataset), "cpu", "fp32")[0]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A data set of gray images."""
    for number in range(10):
        save(tmp_path / "own" / "train" / "ab"[number % 2] / f"{number}.png", number)
    save(tmp_path / "own" / "test" / "a" / "0.png")
    return tmp_path / "own"


def test_a_job_on_built_in_data_has_no_inputs() -> None:
    assert job("nayer").inputs == {}


def test_new_images_of_a_data_set_make_another_job(own: Path) -> None:
    before = job(dataset=f"folder:{own}").id
    save(own / "train" / "a" / "new.png")
    assert job(dataset=f"folder:{own}").id != before


def test_new_images_of_a_data_set_make_another_teacher(own: Path) -> None:
    spec = TeacherSpec(model="convnet8")
    before = teachers.folder(data.dataset(f"folder:{own}"), spec)
    save(own / "train" / "a" / "new.png")
    assert teachers.folder(data.dataset(f"folder:{own}"), spec) != before


def test_two_data_sets_whose_names_look_alike_as_folders_have_two_teachers(own: Path) -> None:
    spec = TeacherSpec(model="convnet8")
    other = own.parent / "own_2"
    own.rename(other)
    first = teachers.folder(data.dataset(f"folder:{other}"), spec)
    save(other / "train" / "a" / "new.png")
    (own.parent / "own").mkdir()
    other.rename(own / "2")
    second = teachers.folder(data.dataset(f"folder:{own / '2'}"), spec)
    assert first.parent == second.parent
    assert first != second


def test_a_relative_folder_is_another_data_set_in_another_working_directory(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own.parent)
    before = job(dataset="folder:own").id
    (own.parent / "elsewhere").mkdir()
    own.rename(own.parent / "elsewhere" / "own")
    save(own.parent / "elsewhere" / "own" / "train" / "a" / "new.png")
    monkeypatch.chdir(own.parent / "elsewhere")
    assert job(dataset="folder:own").id != before


def test_another_pool_of_the_same_name_makes_another_job(tmp_path: Path) -> None:
    save(tmp_path / "pool" / "sub" / "0.png", 1)
    before = job("ood_kd", **{"ood_kd.pool": f"folder:{tmp_path}/pool"}).id
    save(tmp_path / "pool" / "sub" / "0.png", 2)
    assert job("ood_kd", **{"ood_kd.pool": f"folder:{tmp_path}/pool"}).id != before


def test_other_first_images_of_the_same_name_make_another_job(tmp_path: Path) -> None:
    save(tmp_path / "0.png", 1)
    before = job("cmi", **{"cmi.initial_images": str(tmp_path)}).id
    save(tmp_path / "0.png", 2)
    assert job("cmi", **{"cmi.initial_images": str(tmp_path)}).id != before


def test_other_embeddings_of_the_same_name_make_another_job(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((10, 4), np.float32))
    before = job("nayer", **{"nayer.encoder": f"file:{tmp_path}/rows.npy"}).id
    np.save(tmp_path / "rows.npy", np.ones((10, 4), np.float32))
    assert job("nayer", **{"nayer.encoder": f"file:{tmp_path}/rows.npy"}).id != before


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("ood_kd", "pool", "folder:/gone"),
        ("ood_kd", "pool", "gone"),
        ("cmi", "initial_images", "/gone"),
        ("nayer", "encoder", "file:/gone.npy"),
        ("nayer", "encoder", "clip:ViT-B-32//gone.pt"),
    ],
)
def test_a_file_that_is_not_there_is_told_before_the_runs_and_not_here(method: str, setting: str, value: str) -> None:
    assert job(method, **{f"{method}.{setting}": value}).inputs == {}
