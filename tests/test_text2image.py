"""Text2image: the method on a folder of images, and the command that fills one, with a model that only pretends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import nn

from dfkd_bench import data, lend
from dfkd_bench.benchmarks import text_to_image
from dfkd_bench.errors import UserError
from dfkd_bench.method import Progress, Task
from dfkd_bench.methods.text2image import Config, Text2Image

POOL: Any = None  # the method keeps none
CPU = torch.device("cpu")
At = Callable[..., Progress]
Calls = list[dict[str, Any]]

# -- The method -----------------------------------------------------------------------------------------------------


def test_student_batches_are_the_folders_images(make_task: Callable[..., Task], student: nn.Module, at: At) -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 8, 8).contiguous() * 40
    task = make_task(augment=lambda images: images, unlabelled=images)
    method = Text2Image(Config(pool="folder:/images"), task)
    assert method.synthesize(student, at(0)).images is None
    seen = torch.cat([method.student_batch(POOL, 3, at(0)).images for _ in range(2)])
    values = task.normalize.inverse(seen).mean(dim=(1, 2, 3)) * 255
    assert sorted(values.round().tolist()) == [0, 40, 80, 120, 160, 200]


def test_student_batches_are_augmented(make_task: Callable[..., Task], at: At) -> None:
    task = make_task(augment=torch.zeros_like, unlabelled=torch.full((4, 1, 8, 8), 200, dtype=torch.uint8))
    batch = Text2Image(Config(pool="folder:/images"), task).student_batch(POOL, 4, at(0))
    assert not task.normalize.inverse(batch.images).any()


@pytest.mark.parametrize("pool", ["cifar10", "folder:", "", "/images"])
def test_only_folders_are_taken(pool: str) -> None:
    with pytest.raises(ValidationError, match="expected folder:PATH"):
        Config(pool=pool)


def test_without_a_folder_one_line_says_what_to_give() -> None:
    with pytest.raises(UserError, match=r"-s text2image\.pool=folder:FOLDER$"):
        lend.pool(Config().pool, data.dataset("digits"), None, CPU)


def test_the_record_names_model_and_folder() -> None:
    said = Text2Image.outside_knowledge(Config(pool="folder:/images"))
    assert said == "the class names and a text-to-image model (folder:/images)"


def test_a_table_of_all_methods_leaves_it_out() -> None:
    """It has no settings of its own: a suite of all methods must not fail for want of images."""
    assert not Text2Image.published
    assert not Text2Image.smoke


# -- The command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A `diffusers` whose pipeline notes how it is called and paints each image in a gray that its seed decides."""
    made: Calls = []

    class Pipeline:
        @classmethod
        def from_pretrained(cls, model: str, torch_dtype: torch.dtype) -> Pipeline:
            if model == "gone":
                raise OSError("gone is no folder\nand no name")
            made.append({"model": model, "dtype": torch_dtype})
            return cls()

        def to(self, device: torch.device) -> Pipeline:
            made[-1]["device"] = device
            return self

        def set_progress_bar_config(self, disable: bool) -> None:
            assert disable

        def __call__(self, prompt: list[str], generator: list[torch.Generator], **options: Any) -> SimpleNamespace:
            seeds = [one.initial_seed() for one in generator]
            made.append({"prompt": prompt, "seeds": seeds, "options": options})
            size = (32, 64, 3)
            return SimpleNamespace(images=[Image.fromarray(np.full(size, seed % 251, np.uint8)) for seed in seeds])

    module = ModuleType("diffusers")
    module.AutoPipelineForText2Image = Pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "diffusers", module)
    return made


def call(output: Path, *more: str, model: str = "painter", count: int = 3, dataset: str = "digits") -> None:
    wanted = ["--dataset", dataset, "--model", model, "--output", str(output), "--per-class", str(count)]
    text_to_image.main([*wanted, "--device", "cpu", *more])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, **fields: Any) -> str:
    with pytest.raises(SystemExit) as ended:
        call(*arguments, **fields)
    assert ended.value.code == 2
    written = capsys.readouterr().err
    assert written.startswith("error: ")
    assert written.count("\n") == 1
    return written


def test_every_class_gets_its_images_in_the_data_sets_size(calls: Calls, tmp_path: Path) -> None:
    call(tmp_path)
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders[:2] == ["0000_zero", "0001_one"]
    assert len(folders) == 10
    files = sorted(path.name for path in (tmp_path / "0001_one").iterdir())
    assert files == ["000000.png", "000001.png", "000002.png"]
    with Image.open(tmp_path / "0001_one" / files[0]) as image:
        assert image.size == (8, 8)


def test_the_model_is_told_the_class_names(calls: Calls, tmp_path: Path) -> None:
    call(tmp_path, "--batch-size", "2")
    assert calls[0] == {"model": "painter", "dtype": torch.float32, "device": CPU}
    assert [one["prompt"] for one in calls[1:3]] == [["a photo of a zero"] * 2, ["a photo of a zero"]]
    assert calls[-1]["prompt"] == ["a photo of a nine"]


def test_what_is_not_given_is_the_models_own(calls: Calls, tmp_path: Path) -> None:
    call(tmp_path / "default")
    call(tmp_path / "chosen", "--steps", "4", "--guidance", "3", "--prompt", "a drawing of {name}")
    assert calls[1]["options"] == {}
    assert calls[-1]["options"] == {"num_inference_steps": 4, "guidance_scale": 3.0}
    assert calls[-1]["prompt"][0] == "a drawing of nine"


def test_images_do_not_depend_on_the_batches(calls: Calls, tmp_path: Path) -> None:
    call(tmp_path / "one", "--batch-size", "1")
    call(tmp_path / "five", "--batch-size", "5")
    for path in (tmp_path / "one").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "five" / path.relative_to(tmp_path / "one")).read_bytes()


def test_every_image_has_a_seed_of_its_own(calls: Calls, tmp_path: Path) -> None:
    call(tmp_path / "a")
    call(tmp_path / "b", "--seed", "1")
    seeds = [seed for one in calls for seed in one.get("seeds", [])]
    assert len(set(seeds)) == len(seeds) == 60


def test_the_same_command_makes_only_what_is_missing(calls: Calls, tmp_path: Path) -> None:
    call(tmp_path)
    lost = tmp_path / "0004_four" / "000001.png"
    before = lost.read_bytes()
    lost.unlink()
    calls.clear()
    call(tmp_path)
    assert [one["prompt"] for one in calls[1:]] == [["a photo of a four"]]
    assert lost.read_bytes() == before


def test_the_method_takes_the_folder(calls: Calls, tmp_path: Path) -> None:
    call(tmp_path)
    images = lend.pool(Config(pool=f"folder:{tmp_path}").pool, data.dataset("digits"), None, CPU)
    assert images.shape == (30, 1, 8, 8)


def test_a_folder_says_how_it_was_filled(calls: Calls, tmp_path: Path) -> None:
    call(tmp_path, "--steps", "4")
    said = json.loads((tmp_path / "made.json").read_text())
    assert said.pop("prompt") == "a photo of a {name}"
    assert said == {"dataset": "digits", "model": "painter", "steps": 4, "guidance": None, "seed": 0}


def test_images_of_another_kind_are_not_mixed_in(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(tmp_path)
    assert "holds images made with seed 0: name another --output" in refused(capsys, tmp_path, "--seed", "1")


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_note_is_one_line(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "made.json").write_text(content)
    assert "made.json is damaged" in refused(capsys, tmp_path)


def test_without_the_library_one_line_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "python -m pip install diffusers transformers accelerate" in refused(capsys, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_that_is_not_there_is_one_line(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, tmp_path / "new", model="gone")
    assert "the text-to-image model 'gone' can't be had: gone is no folder" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--prompt", "a photo"), "has no field"),
        (("--device", "gpu"), "expected auto, cpu, cuda or cuda:N"),
        (("--dataset", "digit"), "did you mean 'digits'?"),
    ],
)
def test_wrong_input_is_one_line(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    assert words in refused(capsys, tmp_path, *more)
    assert calls == []
