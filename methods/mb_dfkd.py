"""MB-DFKD: Preventing Catastrophic Forgetting and Distribution Mismatch in Knowledge Distillation via Synthetic Data.

Kuluhan Binici, Nam Trung Pham, Tulika Mitra, Karianto Leman; WACV 2022. https://arxiv.org/abs/2108.05698, no code of
theirs is known; a re-implementation for comparison: https://github.com/gaurav104/LRA, src/agents/predfkd_memory.py.

A generator looks for images on which the student disagrees and that look to the teacher like its training data. Some
of what it has made is kept in a memory bank and joins every student batch, so that the student forgets nothing.
Generator, losses and the bank itself are in dfkd_bench/replay.py: PRE-DFKD and KAKR have them, too.

Not confirmed: the abstract and that re-implementation were at hand, but not the paper's text. Everything is what the
re-implementation does; which of it is the paper's is not known.

Differences from the paper
1. How often the bank gets images, how many it holds and how many join a batch are the re-implementation's, and so are
   the generator, the weights of its losses and the distances: those of the same authors' later PRE-DFKD.

Differences from the released code
1. That is the re-implementation's. A batch enters the bank at the start of the next epoch, not at the end of its own.
2. The class balance is computed in logarithms: a class that is never predicted gives 0, not NaN.
3. The task's own normalisation is used.
4. In the generator's step the student is in train mode, where its BatchNorm statistics move; ``student_eval=true``
   keeps it in eval mode. The code does so only in the first round of an epoch, after the evaluation.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from dfkd_bench.method import Batch, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.replay import BatchStore, Opponent, ReplayMethod, build, joined

CARD = {
    "title": "MB-DFKD: a generator and a memory bank of what it made before",
    "family": "generator",
    "year": 2022,
    "venue": "WACV",
    "confirmed": False,
    "knowledge": "none",
}


class Config(MethodConfig):
    """Defaults: the re-implementation's configuration (src/configs/MB-DFKD.json) and code, here "third-party"."""

    temperature: float = Field(1.0, ge=1, le=1, description="1: the student's distance of logits has no temperature")
    capacity: int = Field(10, ge=1, le=1000, description="stored batches, the newest; `memory_capacity` (third-party)")
    store_every: int = Field(5, ge=1, description="epochs from one stored batch to the next (third-party)")
    replay_divisor: int = Field(8, ge=1, description="one stored image to so many new ones (third-party: 8)")
    synthesis_batch_size: int = Field(1024, ge=2, le=100_000, description="images a generator step (third-party)")
    latent_dim: int = Field(1000, ge=1, description="width of the latent vectors; `latent_dim` (third-party)")
    generator_steps: int = Field(1, ge=1, le=100_000, description="generator steps a round; `gen_iter` (third-party)")
    generator_lr: float = Field(0.02, gt=0, le=10, description="Adam on the generator; `lr_G` (third-party)")
    onehot: float = Field(1.0, ge=0, description="weight of the cross entropy to the own argmax; `oh` (third-party)")
    balance: float = Field(5.0, ge=0, description="weight of the class balance, base-10; `ie` (third-party)")
    activation: float = Field(0.1, ge=0, description="weight of the activation term; `a` (third-party)")
    adversarial: float = Field(1.0, ge=0, description="weight of the disagreement (third-party: 1)")
    student_eval: bool = Field(
        False, description="student in eval mode in the generator's step (not so in the third-party code: false)"
    )
    generator_width: int = Field(64, ge=1, description="base width of the convolutions (third-party)")


class MbDfkd(ReplayMethod):
    """The method. One call takes ``generator_steps`` steps of one persistent generator; the bank is fed by epochs."""

    Config = Config
    quirks: ClassVar = {
        "student_unchanged_by_synthesis": "in the generator's step the third-party code leaves the student in train "
        "mode, so that its BatchNorm statistics move; student_eval=true does without",
        "student_batch_range": "the generator ends in tanh and a BatchNorm: its images have the mean and variance of "
        "normalised images, but not their range",
    }
    described: ClassVar = {"student_eval": True}
    tiny: ClassVar = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4, "store_every": 1}

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task, *build(config, task, Opponent))
        self.bank = BatchStore(config.capacity, config.store_every)

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        if at.round == 0:
            self.bank.begin(at.epoch - at.warmup_epochs)
        return super().synthesize(student, at)

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """``size`` new images and, once there are some, a stored batch, which comes on top."""
        new = self._new(size)
        self.bank.note(new[: self._share(size)])
        return joined(new, self.bank.draw(self.task.rng))


MbDfkd.published = {
    "cifar100/resnet34:resnet18": Published(
        schedule=Schedule(
            epochs=400, rounds_per_epoch=36, student_steps=10, batch_size=1024, lr=0.1, weight_decay=5e-4
        ),
        origin="third-party",
        source="gaurav104/LRA, src/configs/MB-DFKD.json and src/agents/predfkd_memory.py",
    ),
}
MbDfkd.equal_lr = {"digits": 0.2}  # results/trials/digits_equal.json
MbDfkd.search = {
    "generator_steps": (1, 3, 5),
    "generator_lr": (1e-3, 5e-3, 0.02),
    "balance": (5.0, 20.0),
    "adversarial": (1.0, 10.0),
    "store_every": (1, 5),
    "replay_divisor": (2, 8),
    "lr": (0.05, 0.1, 0.2),
}
MbDfkd.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=8, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.1, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "latent_dim": 100,
            "generator_width": 32,
            "generator_steps": 5,
            "generator_lr": 1e-3,
            "store_every": 1,
        },
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=20, rounds_per_epoch=20, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "latent_dim": 100,
            "generator_width": 32,
            "generator_steps": 5,
            "generator_lr": 0.005,
            "store_every": 1,
            "balance": 5.0,
            "adversarial": 10.0,
            "replay_divisor": 2,
        },
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=10, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "latent_dim": 100,
            "generator_width": 32,
            "generator_steps": 1,
            "generator_lr": 0.001,
            "store_every": 5,
            "balance": 20.0,
            "adversarial": 10.0,
            "replay_divisor": 2,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
