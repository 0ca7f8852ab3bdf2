"""DFAD: Data-Free Adversarial Distillation.

Gongfan Fang, Jie Song, Chengchao Shen, Xinchao Wang, Da Chen, Mingli Song; arXiv 2019.
https://arxiv.org/abs/1912.11006, code: https://github.com/VainF/Data-Free-Adversarial-Distillation; the later form of
the same authors, which is built here: https://github.com/zju-vipa/CMI (datafree/synthesis/generative.py)

The game of ZSKT with another distance: the generator raises the mean absolute difference of student's and teacher's
logits, the student lowers it.

Differences from the paper
1. In a round the generator goes first; in the original code the student does.
2. The generator ends in a sigmoid and the data set's normalisation; the original ends in tanh and a BatchNorm. Its
   Adam has beta1 = 0.5 and a constant learning rate; the original has 0.9 and falls with the student's.
3. The student is in eval mode in the generator's step; in the original code it is in train mode.

Differences from the released code
1. The student in the generator's loss is the student. zju-vipa/Fast-Datafree and early versions of zju-vipa/CMI pass
   the teacher in its place, so that the loss is 0.
2. Accuracy is the last epoch's; the released drivers keep the best one on the test set.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.generators import Generator, LargeGenerator
from dfkd_bench.losses import logit_distance
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task

CARD = {
    "title": "DFAD: an adversarial game on the distance of logits",
    "family": "generator",
    "year": 2019,
    "venue": "arXiv",
    "confirmed": True,
    "knowledge": "none",
}


class Config(MethodConfig):
    """Defaults: zju-vipa/CMI, datafree_kd.py and scripts/dfad_cifar10.sh (of commit 3f791f9; later removed)."""

    temperature: float = Field(1.0, ge=1, le=1, description="1: the distance of logits has no temperature")
    synthesis_batch_size: int = Field(
        256, ge=2, le=100_000, description="images a generator step; `batch_size` (script)"
    )
    latent_dim: int = Field(256, ge=1, description="width of the latent vectors; `nz` (code)")
    generator_steps: int = Field(1, ge=1, le=100_000, description="generator steps a round; `g_steps` (script)")
    generator_lr: float = Field(1e-3, gt=0, le=10, description="Adam on the generator; `lr_g` (script)")
    adversarial: float = Field(1.0, gt=0, description="weight of the generator's only loss; `adv` (script)")
    sample_bn: Literal["eval", "train"] = Field(
        "eval", description="the generator's BatchNorm for student batches: eval (CMI) or train (original)"
    )
    generator: Literal["large", "small"] = Field("large", description="large (CMI) or small (original's size)")
    generator_width: int = Field(64, ge=1, description="base width of the convolutions; `ngf` (code)")


class Dfad(Method):
    """The method. One call takes ``generator_steps`` steps of one persistent generator; no image is kept."""

    Config = Config
    absorbs = "generator_steps"
    tiny: ClassVar = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4}

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        build = LargeGenerator if config.generator == "large" else Generator
        with task.device:
            generator = build(config.latent_dim, task.image_shape, config.generator_width)
        self.generator = generator.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=config.generator_lr, betas=(0.5, 0.999), fused=True
        )

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        loss = torch.zeros(())
        self.generator.train()
        for _ in range(self.config.generator_steps):
            images = self.task.normalize(self.generator(self._draw(self.config.synthesis_batch_size)))
            loss = -self.config.adversarial * logit_distance(student(images), self.task.teacher(images))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return Synthesis(None, scalars={"synthesis_loss": loss.detach()})

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """``size`` fresh images of the generator as it is now."""
        self.generator.train(self.config.sample_bn == "train")
        with torch.no_grad():
            return Batch(self.task.normalize(self.generator(self._draw(size))))

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        """The distance that the generator raises, now lowered."""
        return logit_distance(student(batch.images), self.task.teach(batch.images))

    def _draw(self, size: int) -> Tensor:
        return torch.randn(size, self.config.latent_dim, device=self.task.device, generator=self.task.rng)

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        return schedule.rounds * config.generator_steps * config.synthesis_batch_size


ORIGINAL = Published(
    schedule=Schedule(
        epochs=500,
        rounds_per_epoch=50,
        student_steps=5,
        batch_size=256,
        lr=0.1,
        weight_decay=5e-4,
        lr_rule="multistep",
        lr_milestones=(99, 199),  # its scheduler steps before each epoch, the first one excepted
    ),
    config={"generator": "small", "sample_bn": "train"},
    origin="code",
    source="VainF/Data-Free-Adversarial-Distillation, README.md and DFAD_cifar.py (schedule, batch, generator's size)",
)
Dfad.published = {
    "cifar10/wrn40_2:wrn16_1": Published(
        schedule=Schedule(
            epochs=200, rounds_per_epoch=80, student_steps=5, batch_size=256, lr=0.1, weight_decay=1e-4, lr_min=0.0
        ),
        origin="code",
        source="zju-vipa/CMI at 3f791f9, scripts/dfad_cifar10.sh; generator and cosine of the newest version",
    ),
    "cifar10/resnet34:resnet18": ORIGINAL,
    "cifar100/resnet34:resnet18": ORIGINAL,
}
Dfad.equal_lr = {"digits": 0.2}  # results/trials/digits_equal.json
Dfad.search = {
    "generator_steps": (1, 3, 5),
    "generator_lr": (1e-3, 4e-3),
    "latent_dim": (100, 256),
    "generator": ("large", "small"),
    "sample_bn": ("eval", "train"),
    "lr": (0.05, 0.1, 0.2),
}
Dfad.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=8, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 3,
            "generator_lr": 0.001,
            "latent_dim": 100,
            "generator": "large",
            "sample_bn": "train",
        },
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=20, rounds_per_epoch=20, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 3,
            "generator_lr": 0.001,
            "latent_dim": 100,
            "generator": "large",
            "sample_bn": "train",
        },
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=10, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.05, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 5,
            "generator_lr": 0.001,
            "latent_dim": 100,
            "generator": "small",
            "sample_bn": "train",
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
# Since then published milestones have changed, and nothing else.
Dfad.same_results = ("39c133dbe7a193028022224064a2bd1f931c10153faabdfa875cd62559febf41",)
