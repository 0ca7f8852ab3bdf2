"""docs/own_teacher.md from the first step to the last: a teacher is compressed whose training data are not there."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_bench import cli
from dfkd_bench.engines import local
from dfkd_bench.job import Job
from dfkd_bench.paths import HOME_VARIABLE
from dfkd_bench.record import Record, read_all
from dfkd_bench.run import Place, run

PAGE = (Path(__file__).parents[1] / "docs" / "own_teacher.md").read_text(encoding="utf-8")
ARCHITECTURE, LOADING = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
(STATED,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
SHORT = {
    "epochs": 2, "warmup_epochs": 1, "student_steps": 2, "batch_size": 8, "synthesis_batch_size": 6,
    "generator_steps": 2, "latent_dim": 8, "generator_width": 4,
}  # fmt: skip


def run_here(jobs: Sequence[Job], place: Place, *_: Any) -> None:
    """Stands for the engine: in this process, which has imported torch already."""
    for job in jobs:
        run(job, replace(place, threads=1))


def call(patch: pytest.MonkeyPatch, *arguments: str) -> str:
    """A command of the page, as the console script runs it; returns what it prints."""
    patch.setattr(sys, "argv", ["dfkd-bench", *arguments, "-d", "folder:mine", "--plugin", "my_teacher.py"])
    before, out = signal.getsignal(signal.SIGTERM), io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as ended:
        cli.main()
    signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 0
    return out.getvalue()


def run_code(code: str, **given: Any) -> dict[str, Any]:
    names = dict(given)
    exec(code, names)
    return names


@dataclass(frozen=True)
class Compressed:
    """What the two commands of the page left and said."""

    folder: Path
    imported: str
    out: str

    @property
    def record(self) -> Record:
        (found,) = read_all(self.folder / "results")
        return found

    @property
    def place(self) -> Path:
        return self.folder / "home" / "runs" / self.record.job_id


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compressed]:
    """Three images of two of the three classes, a teacher with random weights, and a student of a few steps."""
    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for class_name in ("cat", "dog"):
        (folder / "mine" / "test" / class_name).mkdir(parents=True)
        for number in range(3):
            image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            image.save(folder / "mine" / "test" / class_name / f"{number}.png")
    (folder / "mine" / "dataset.json").write_text(STATED)
    (folder / "my_teacher.py").write_text(ARCHITECTURE)
    torch.save(run_code(ARCHITECTURE)["build"](3, 3).state_dict(), folder / "weights.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(folder / "home"))
        patch.chdir(folder)
        patch.setattr(local, "run_jobs", run_here)
        imported = call(patch, "teacher", "import", "weights.pth", "--model", "my_teacher", "--minimum", "0")
        settings = [part for key, value in SHORT.items() for part in ("-s", f"fm.{key}={value}")]
        table = ("-m", "fm", "--pair", "my_teacher:wrn16_1", "--no-controls", "-o", "results", *settings)
        yield Compressed(folder, imported, call(patch, "run", *table, "--device", "cpu", "--precision", "fp32"))


def test_the_import_measures_the_accuracy_on_the_test_images(compressed: Compressed) -> None:
    assert re.search(r"my_teacher-\w+ on folder:\S+/mine: [\d.]+ % test accuracy", compressed.imported)


def test_the_run_is_done_with_the_imported_teacher(compressed: Compressed) -> None:
    record = compressed.record
    assert record.teacher is not None
    assert (record.status, record.teacher.origin) == ("done", "imported from weights.pth")


def test_diversity_is_measured_against_the_few_test_images(compressed: Compressed) -> None:
    assert compressed.record.diversity["real_images"] == 6


def test_the_end_of_the_run_says_where_the_student_is(compressed: Compressed) -> None:
    assert f"student: {compressed.place / 'student.safetensors'}" in compressed.out.replace("\n", "")


def test_the_student_loads_by_the_lines_of_the_page(compressed: Compressed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(compressed.place)
    predict = run_code(LOADING)["predict"]
    with torch.no_grad():
        answers = predict(torch.rand(2, 3, 32, 32))
    assert answers.sum(dim=1).tolist() == pytest.approx([1, 1])


def test_the_loading_lines_have_the_normalisation_of_the_page() -> None:
    stated = json.loads(STATED)
    assert all(f"images.new_tensor({stated[key]})" in LOADING for key in ("mean", "std"))
