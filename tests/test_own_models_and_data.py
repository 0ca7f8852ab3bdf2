"""Models and data sets of plugins: the examples of docs/own_models_and_data.md work, and each fault is one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dfkd_bench import data, plugins
from dfkd_bench.data import DataSet, Part, RawData
from dfkd_bench.errors import UserError
from dfkd_bench.models import build_model, check_model
from dfkd_bench.plan import make_plan
from dfkd_bench.plugins import discover
from dfkd_bench.suite import make_suite

PAGE = (Path(__file__).parents[1] / "docs" / "own_models_and_data.md").read_text(encoding="utf-8")
MODEL, DATA = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
SHAPE = (1, 8, 8)


def defined(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


Tiny: Any = defined(MODEL)["Tiny"]
BARS: DataSet = defined(DATA)["BARS"]

# --- The examples -----------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> plugins.Plugins:
    """What a plugin of both examples brings."""
    (tmp_path / "both.py").write_text("from __future__ import annotations\n" + MODEL + DATA)
    return discover([tmp_path / "both.py"])


@pytest.mark.usefixtures("home")
def test_the_model_of_the_page_holds_what_is_asked(page: plugins.Plugins) -> None:
    check_model("tiny", 5, SHAPE, page.models)


@pytest.mark.usefixtures("home")
def test_the_data_set_of_the_page_is_read(page: plugins.Plugins, tmp_path: Path) -> None:
    (tmp_path / "bars").mkdir()
    for part, count in (("train", 40), ("test", 6)):
        images, labels = np.zeros((count, *SHAPE), np.uint8), np.arange(count) % 2
        np.savez(tmp_path / "bars" / f"{part}.npz", images=images, labels=labels)
    found = data.dataset("bars", tmp_path, page.datasets)
    assert [len(found.split(split).labels) for split in data.SPLITS] == [30, 10, 6]


# --- Faults of models -------------------------------------------------------------------------------------------------


class Twice(Tiny):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__(classes, channels)
        self.last = self.classifier


class Layer(Tiny):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__(classes, channels)
        self.features = nn.Identity()


class Views(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        self.conv1(images).view(len(images), -1)
        return super().forward(images)


class Probabilities(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).softmax(dim=1)


class TwoWhenTrained(Tiny):
    def forward(self, images: Tensor) -> Any:
        return (super().forward(images),) * 2 if self.training else super().forward(images)


class Beside(Tiny):
    def features(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        logits, pooled, stages = super().features(images)
        return logits, pooled * 2, stages


class Functional(Tiny):
    def features(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        stages = [nn.functional.relu(self.conv1(images))]
        pooled = stages[0].mean((2, 3)).repeat(1, 2)
        return nn.functional.linear(pooled, self.classifier.weight, self.classifier.bias), pooled, stages


class Pair(Tiny):
    def features(self, images: Tensor) -> Any:
        return super().features(images)[:2]

    def forward(self, images: Tensor) -> Tensor:
        return Tiny.features(self, images)[0]


class NoStages(Pair):
    def features(self, images: Tensor) -> Any:
        return (*Tiny.features(self, images)[:2], [])


def no_linear(classes: int, channels: int) -> nn.Module:
    model = Tiny(classes, channels)
    model.classifier = nn.Sequential(model.classifier)
    return model


def fails(classes: int, channels: int) -> nn.Module:
    raise ZeroDivisionError("no luck")


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        (fails, r"can't be built: builder\(classes=5, channels=1\) raises ZeroDivisionError: no luck"),
        (lambda classes, channels: 5, "is of type int once it is built: expected an nn.Module"),
        (lambda classes, channels: nn.Flatten(), r"has no method features\(images\)"),
        (Layer, "has a layer `features`: give the layer another name"),
        (no_linear, "has as `classifier` Sequential.*: expected its last layer, an nn.Linear to 5 classes"),
        (lambda classes, channels: Tiny(4, channels), r"has as `classifier` Linear\(.*out_features=4.* to 5 classes"),
        (Twice, "has one tensor twice in its state dict, as 'classifier.weight' and 'last.weight'"),
        (
            lambda classes, channels: Tiny(classes, 3),
            r"fails in forward\(\) .* images \[2, 1, 8, 8\] with RuntimeError",
        ),
        (Views, r"fails in forward\(\) in training mode on channels-last images .*view"),
        (
            TwoWhenTrained,
            r"returns \(a tensor .* as logits of forward\(\) in training mode: expected a tensor \[2, 5\]",
        ),
        (Probabilities, r"gives other logits in features\(\) than in forward\(\)"),
        (Beside, r"has penultimate features a tensor \[2, 16\]: expected what goes into its `classifier`"),
        (Functional, r"does not call its `classifier` in forward\(\)"),
        (Pair, r"of features\(\): expected \(logits, penultimate features, \[stages\]\)"),
        (NoStages, r"has stages \(\): expected at least one tensor"),
    ],
)
def test_a_model_that_lacks_something_is_one_line(builder: Callable[[int, int], nn.Module], words: str) -> None:
    with pytest.raises(UserError, match=f"the plugin's model 'mine' .*{words}") as caught:
        check_model("mine", 5, SHAPE, {"mine": builder})
    assert "\n" not in str(caught.value)


def test_a_check_leaves_the_random_state_as_it_is() -> None:
    before = torch.get_rng_state()
    check_model("tiny", 5, SHAPE, {"tiny": Tiny})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_its_parts_is_not_built() -> None:
    with pytest.raises(UserError, match="has no method features"):
        build_model("mine", 5, 1, {"mine": lambda classes, channels: nn.Linear(channels, classes)})


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("pair", ["mine:convnet8", "convnet8:mine"])
def test_a_plan_looks_at_the_models_of_its_jobs(pair: str, tmp_path: Path) -> None:
    found = replace(discover(), models={"mine": Pair})
    suite = make_suite("test", "test", "digits", ["dafl"], pairs=[pair], controls=())
    with pytest.raises(UserError, match="the plugin's model 'mine' returns"):
        make_plan(suite, found, tmp_path, device="cpu")


# --- Faults that a plugin's file shows at once ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MODELS = {'mine': 5}", r"MODELS\['mine'\] is of type int: expected a function of \(classes, channels\)"),
        ("MODELS = {'mine:2': print}", r"MODELS\['mine:2'\] has a name that no --pair can have"),
        ("DATASETS = {'mine': 5}", r"DATASETS\['mine'\] is of type int: expected a dfkd_bench.data.DataSet"),
    ],
)
def test_a_plugin_of_the_wrong_type_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(UserError, match=words):
        discover([tmp_path / "wrong.py"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "rods"}, "calls itself 'rods'"),
        ({"image_shape": (2, 8, 8)}, "has image_shape"),
        ({"mean": (0.5, 0.5, 0.5)}, "has mean .* expected a number a channel"),
        ({"std": (0.0,)}, "std above 0"),
        ({"names": ("one",)}, "has 1 names of classes and num_classes 2"),
        ({"validation_size": 0}, "or test_only=True"),
        ({"read": None}, "`read` that can't be called"),
    ],
)
def test_a_wrong_field_of_a_data_set_is_named(change: dict[str, Any], words: str) -> None:
    assert re.search(words, data.fault("bars", replace(BARS, **change)) or "")


def test_a_right_data_set_has_no_fault() -> None:
    assert data.fault("bars", BARS) is None


# --- Faults of what is read -------------------------------------------------------------------------------------------


def reading(images: Any, labels: Any) -> Callable[[DataSet, Path, Part], RawData]:
    return lambda found, root, part: RawData.of_arrays(images, labels)


IMAGES, LABELS = np.zeros((20, *SHAPE), np.uint8), np.arange(20) % 2


def broken(found: DataSet, root: Path, part: Part) -> RawData:
    raise KeyError("images")


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(
    ("read", "words"),
    [
        (broken, "the train part of 'bars' can't be read: KeyError: 'images'"),
        (lambda found, root, part: (IMAGES, LABELS), "returns a tuple: expected a dfkd_bench.data.RawData"),
        (reading(IMAGES, LABELS.tolist()), "labels that are no whole numbers"),
        (reading(IMAGES, LABELS + 1), "wrong labels: 1 to 2 instead of 0 to 1"),
        (reading(IMAGES / 255, LABELS), "is not what it says it is: read float64 .* instead of uint8"),
        (reading(IMAGES[:, :, 1:], LABELS), r"is not what it says it is: read uint8 \(1, 7, 8\)"),
        (reading(IMAGES[:8], LABELS[:8]), "is not what it says it is: can't cut 10 of 8 images"),
    ],
)
def test_what_a_reader_may_do_wrong_is_one_line(read: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        replace(BARS, read=read).split("train")
