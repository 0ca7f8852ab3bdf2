"""The wheel: built from the checkout, it holds every module, table and matrix, and the command."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", "77", reason="the wheel is built with setuptools >= 77 of this environment")

ROOT = Path(__file__).parents[1]
FOLDERS = {"dfkd_bench": "dfkd_bench", "methods": "dfkd_bench/methods", "benchmarks": "dfkd_bench/benchmarks"}
SOURCES = [
    (folder, path.relative_to(ROOT / folder).as_posix())
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".toml", ".csv", ".safetensors", ".typed"}
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: nothing is written into the checkout."""
    copy, target = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    script = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)], cwd=copy, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def text_of(wheel: zipfile.ZipFile, ending: str) -> str:
    (name,) = [name for name in wheel.namelist() if name.endswith(ending)]
    return wheel.read(name).decode()


def test_every_source_and_data_file_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    wanted = {f"{FOLDERS[folder]}/{name}" for folder, name in SOURCES}
    assert wanted - set(wheel.namelist()) == set()


@pytest.mark.parametrize(
    "name",
    [
        "dfkd_bench/py.typed",
        "dfkd_bench/methods/nayer.py",
        "dfkd_bench/benchmarks/defaults.toml",
        "dfkd_bench/benchmarks/published.csv",
        "dfkd_bench/embeddings/digits.safetensors",
    ],
)
def test_the_wheel_holds(name: str, wheel: zipfile.ZipFile) -> None:
    assert wheel.getinfo(name).file_size > 0 or name.endswith("py.typed")


def test_the_wheel_holds_one_package_and_no_tests(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"dfkd_bench", *[top for top in tops if top.endswith(".dist-info")]}


def test_the_wheel_brings_the_command(wheel: zipfile.ZipFile) -> None:
    assert "dfkd-bench = dfkd_bench.cli:main" in text_of(wheel, ".dist-info/entry_points.txt")


def test_the_wheel_names_licence_and_oldest_python(wheel: zipfile.ZipFile) -> None:
    metadata = text_of(wheel, ".dist-info/METADATA")
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "Apache License" in text_of(wheel, "/LICENSE")
    assert "WordNet" in text_of(wheel, "/licenses/dfkd_bench/embeddings/WORDNET-LICENSE.txt")


def test_the_wheel_runs_where_the_checkout_is_not(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.meta_path[:] = [finder for finder in sys.meta_path"
        " if 'editable' not in type(finder).__module__ + getattr(finder, '__name__', '').lower()]\n"
        "import dfkd_bench; assert dfkd_bench.__file__.startswith(sys.argv[1]), dfkd_bench.__file__\n"
        "from dfkd_bench import cli; sys.argv = ['dfkd-bench', 'list', sys.argv[2]]; cli.main()"
    )
    for kind, name in (("methods", "nayer"), ("suites", "smoke_digits"), ("models", "wrn40_2")):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path), kind], cwd=tmp_path, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert name in done.stdout
