"""Shared by all tests: a home of their own, and a task so small that a call of a method takes milliseconds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.augment import Normalize, random_crop_flip
from dfkd_bench.method import Progress, Task
from dfkd_bench.models import build_model
from dfkd_bench.paths import HOME_VARIABLE

CPU = torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _nothing_in_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty ``$DFKD_BENCH_HOME`` for this test alone."""
    folder = tmp_path / "home"
    monkeypatch.setenv(HOME_VARIABLE, str(folder))
    return folder


@pytest.fixture
def tests_in_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts find what its file defines: last on the path, behind the package under test."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1])])


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """``install(module, text, entry points)``: a package as pip would leave it, for this test alone."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def make(module: str, text: str, entry_points: str) -> None:
        monkeypatch.delitem(sys.modules, module, raising=False)
        (site / f"{module}.py").write_text(text)
        facts = site / f"{module}-1.2.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.2\n")
        (facts / "entry_points.txt").write_text(entry_points)

    return make


def _random_classifier(classes: int, channels: int, seed: int) -> nn.Module:
    """A convnet8 with random weights and BatchNorm statistics of random images, so that its layers are not trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model("convnet8", classes, channels)
        model.train()
        with torch.no_grad():
            for _ in range(20):
                model(torch.randn(32, channels, 8, 8))
    return model.eval().requires_grad_(False)


@pytest.fixture
def make_student() -> Callable[..., nn.Module]:
    """``make_student(classes=5, channels=1, seed=1)``: as ``synthesize`` gets it, in eval mode, parameters frozen."""

    def make(classes: int = 5, channels: int = 1, seed: int = 1) -> nn.Module:
        return _random_classifier(classes, channels, seed)

    return make


@pytest.fixture
def make_task() -> Callable[..., Task]:
    """``make_task(image_shape=(1, 8, 8), classes=5, seed=0, **other fields)``: a task on the CPU.

    The teacher is a convnet8 with random weights; label-text embeddings are 16 random numbers a class.
    """

    def make(image_shape: tuple[int, int, int] = (1, 8, 8), classes: int = 5, seed: int = 0, **fields: Any) -> Task:
        channels = image_shape[0]
        teacher = _random_classifier(classes, channels, seed)
        padding = image_shape[1] // 8
        rng = torch.Generator().manual_seed(seed)
        augment_rng = torch.Generator().manual_seed(seed + 1)
        embeddings = torch.randn(classes, 16, generator=torch.Generator().manual_seed(seed + 2))
        values: dict[str, Any] = {
            "teacher": teacher,
            "teach": torch.no_grad()(teacher),
            "num_classes": classes,
            "class_names": tuple(f"class {index}" for index in range(classes)),
            "image_shape": image_shape,
            "device": CPU,
            "normalize": Normalize([0.5] * channels, [0.25] * channels),
            "augment": lambda images: random_crop_flip(images, padding, True, augment_rng),
            "flip_keeps_class": True,
            "crop_padding": padding,
            "rng": rng,
            "label_embeddings": lambda encoder, prompt: embeddings.clone(),
        }
        return Task(**(values | fields))

    return make


@pytest.fixture
def task(make_task: Callable[..., Task]) -> Task:
    """The tiny task with its defaults."""
    return make_task()


@pytest.fixture
def student(make_student: Callable[..., nn.Module]) -> nn.Module:
    """The tiny student with its defaults."""
    return make_student()


@pytest.fixture
def at() -> Callable[..., Progress]:
    """``at(epoch, warmup=0)``: round 0 of that epoch."""

    def progress(epoch: int, warmup: int = 0, round_: int = 0) -> Progress:
        return Progress(epoch, round_, 1000, warmup)

    return progress


@pytest.fixture
def record_modes() -> Callable[[nn.Module], list[bool]]:
    """``modes = record_modes(module)``: from now on one entry a forward call, True in train mode."""

    def record(module: nn.Module) -> list[bool]:
        modes: list[bool] = []
        module.register_forward_pre_hook(lambda called, _inputs: modes.append(called.training))
        return modes

    return record


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, Tensor]]:
    """``snapshot(module)``: a copy of its parameters and buffers."""
    return lambda module: {name: value.clone() for name, value in module.state_dict().items()}
