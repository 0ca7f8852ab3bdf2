"""A job: everything that decides the result of one run, its canonical form and its id."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field

from dfkd_bench.method import Frozen, Origin, Schedule

PROTOCOL_VERSION = 1
"""Raised whenever the runner computes something else from the same job; tables refuse to mix versions."""

ProtocolName = Literal["paper", "equal", "smoke"]
Precision = Literal["fp32", "bf16"]

ARITHMETIC: dict[Precision, int] = {"fp32": 1, "bf16": 2}
"""Raised whenever a precision computes other numbers from the same job: then its jobs are new ones, and no old result
is taken for theirs. bf16, 1: weights were those of a batch's first generator step in all of its steps."""


class Recipe(Frozen):
    """How a teacher is trained on real data; the last epoch counts. Defaults: the CIFAR recipe of NAYER's
    train_scratch.py (SGD 0.1, momentum 0.9, weight decay 5e-4, cosine to 0, 200 epochs of batches of 256)."""

    epochs: int = Field(200, ge=1, description="epochs over the training images")
    batch_size: int = Field(256, ge=2, description="images a step")
    lr: float = Field(0.1, gt=0, description="initial learning rate of SGD, cosine to 0")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    weight_decay: float = Field(5e-4, ge=0, description="on all parameters")
    augment: bool = Field(True, description="random crop and, where the data set allows it, flip")
    include_validation: bool = Field(
        True, description="train on the validation part, too; False where settings are chosen on it"
    )


class TeacherSpec(Frozen):
    """Which teacher: one trained here by a recipe and a seed, or an imported checkpoint named by its SHA-256."""

    model: str
    recipe: Recipe | None = Recipe()
    seed: int = Field(0, ge=0)
    sha256: str | None = Field(None, description="of an imported checkpoint's weights; then there is no recipe")


class Job(Frozen):
    """One run. Equal jobs have equal ids; what does not change the result (device index, workers) is not in it."""

    method: str
    config: dict[str, Any]
    schedule: Schedule
    dataset: str
    teacher: TeacherSpec
    student: str
    seed: int = Field(ge=0)
    protocol: ProtocolName
    protocol_version: int = PROTOCOL_VERSION
    evaluate_on: Literal["test", "validation"] = "test"
    precision: Precision = "fp32"
    generation_cap: int | None = Field(
        None, ge=0, description="protocol `equal`: images that may pass through the teacher with gradient in synthesis"
    )
    inputs: dict[str, str] = Field(
        {}, description="digests of what names do not fix, by setting: the user's own files and data sets"
    )
    # Where the settings come from. Not part of the identity: a better citation does not change a result.
    origin: Origin = "ours"
    source: str = ""

    @property
    def pair(self) -> str:
        """``teacher:student``."""
        return f"{self.teacher.model}:{self.student}"

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits: a hash of everything that changes the result."""
        identity = self.model_dump(mode="json", exclude={"origin", "source"})
        if self.generation_cap is None:  # the ids of the other protocols' jobs do not know of it
            del identity["generation_cap"]
        if not self.inputs:  # nor those of jobs on built-in data sets of this
            del identity["inputs"]
        if ARITHMETIC[self.precision] > 1:  # nor those of fp32 of this
            identity["arithmetic"] = ARITHMETIC[self.precision]
        return digest(identity)[:12]


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON form (sorted keys, no blanks, shortest floats)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
