"""Text2image: knowledge distillation on images that a text-to-image model made from the names of the classes.

An idea of NAYER's public discussion (ICLR 2024). The nearest method with a paper is DM-KD: Zheng Li et al., "Is
Synthetic Data From Diffusion Models Ready for Knowledge Distillation?", 2023. https://arxiv.org/abs/2305.12954,
code: https://github.com/zhengli97/DM-KD

A diffusion model knows what a cat looks like from photographs that the teacher never saw: its images of "a photo of a
cat" take the place of the generator's. Nothing is made in the run: the images lie in a folder, which
``python -m dfkd_bench.benchmarks.text_to_image`` fills.

Differences from the paper
1. DM-KD's images are those of a diffusion transformer conditioned on ImageNet's labels. Here any model that reads
   text can have made them; it is told the names of the classes.
2. DM-KD's settings for small data sets are not known. The loss is the other methods' (KL, T = 20), and the schedule is
   that of the table's first data-free method.

Differences from the released code
1. None of it is used. Which class an image was made for is not, either: the teacher's answers are the targets.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator
from torch import nn

from dfkd_bench.augment import to_unit
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Synthesis, Task
from dfkd_bench.shuffle import Shuffle

CARD = {
    "title": "KD on images that a text-to-image model made from the class names",
    "family": "selection",
    "year": 2024,
    "venue": "",
    "confirmed": False,
    "knowledge": "the class names and a text-to-image model",
}

FOLDER = "folder:"
NOT_NAMED = f"{FOLDER}FOLDER, which has to be named: -s text2image.pool={FOLDER}FOLDER"
"""The default: no images are at hand. As a folder it doesn't exist, so that a run ends in a line that says so."""


class Config(MethodConfig):
    """Which images. The temperature is the other methods'."""

    pool: str = Field(
        NOT_NAMED, description="folder:PATH with any images below it, made by a text-to-image model; must be given"
    )

    @field_validator("pool")
    @classmethod
    def _a_folder(cls, pool: str) -> str:
        if not pool.removeprefix(FOLDER) or not pool.startswith(FOLDER):
            raise ValueError(f"expected {FOLDER}PATH with images that a text-to-image model made, given: '{pool}'")
        return pool


def _some_images() -> str:
    """matplotlib's own icons, for the conformance checks: the one folder of images that is installed everywhere."""
    found = importlib.util.find_spec("matplotlib")
    places = found.submodule_search_locations if found else None
    return f"{FOLDER}{Path(places[0], 'mpl-data', 'images')}" if places else NOT_NAMED


class Text2Image(Method):
    """KL divergence to the teacher on the folder's images, augmented as in training.

    There are no ``published`` or ``smoke`` settings, so that a table of all methods leaves it out: where nobody has
    made images, it can't run.
    """

    Config = Config
    needs = frozenset({"unlabelled"})
    tiny: ClassVar = {"pool": _some_images()}

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        self.shuffle = Shuffle(task.rng, task.device)

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        return Synthesis(None)

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """The folder's images, pass after pass."""
        images = self.task.unlabelled
        assert images is not None  # lent because `needs` asks for it
        rows = self.shuffle.next(images.shape[0], size)
        return Batch(self.task.normalize(self.task.augment(to_unit(images[rows]))))

    @classmethod
    def outside_knowledge(cls, config: Any) -> str | None:
        return f"the class names and a text-to-image model ({config.pool})"


Text2Image.search = {"temperature": (4.0, 20.0), "lr": (0.05, 0.1, 0.2)}
