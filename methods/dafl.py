"""DAFL: Data-Free Learning of Student Networks.

Hanting Chen, Yunhe Wang, Chang Xu, Zhaohui Yang, Chuanjian Liu, Boxin Shi, Chunjing Xu, Chao Xu, Qi Tian; ICCV 2019.
https://arxiv.org/abs/1904.01186, code: https://github.com/huawei-noah/Data-Efficient-Model-Compression; the form in
the comparison tables, which is built here: https://github.com/zju-vipa/CMI (datafree/synthesis/generative.py)

The teacher is a fixed discriminator: a generator learns images of which the teacher is sure, that excite its last
features, and that use all classes alike. The student imitates the teacher on such images; the generator ignores it.

Differences from the paper
1. Generator and student alternate, one generator step to five student steps, each on latent vectors of its own; the
   paper's code updates both from one batch, at a ratio of 1 : 1.
2. The generator ends in a sigmoid and the data set's normalisation; the paper's ends in tanh and a BatchNorm.
3. The weights are those of the comparison tables; the balance term has natural logarithms, in which the original's
   weight 5 is 2.17. ``log_base="10"`` counts as the original does.

Differences from the released code
1. The balance term is computed in logarithms: a class that is never predicted gives 0, not NaN.
2. The temperature that is set is used; the released driver overwrites its script's T = 20 with 1, the default here.
3. Accuracy is the last epoch's; the released drivers keep the best one on the test set.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.generators import Generator, LargeGenerator
from dfkd_bench.losses import activation, class_balance, confidence
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.taps import tapped

CARD = {
    "title": "DAFL: the teacher as a fixed discriminator",
    "family": "generator",
    "year": 2019,
    "venue": "ICCV",
    "confirmed": True,
    "knowledge": "none",
}


class Config(MethodConfig):
    """Defaults: zju-vipa/CMI, scripts/dafl/dafl_cifar10_wrn402_wrn161.sh and datafree_kd.py."""

    temperature: float = Field(
        1.0, gt=0, le=1000, description="T of the student's KL divergence; 1 made the published numbers (code)"
    )
    synthesis_batch_size: int = Field(
        256, ge=2, le=100_000, description="images a generator step; `batch_size` (script)"
    )
    latent_dim: int = Field(512, ge=1, description="width of the latent vectors; `nz` (code)")
    generator_steps: int = Field(1, ge=1, le=100_000, description="generator steps a round; `g_steps` (script)")
    generator_lr: float = Field(1e-3, gt=0, le=10, description="Adam on the generator; `lr_g` (script)")
    onehot: float = Field(1.0, ge=0, description="weight of the cross entropy to the own argmax; `oh` (script)")
    activation: float = Field(1e-3, ge=0, description="weight of the activation term; `act` (script)")
    balance: float = Field(20.0, ge=0, description="weight of the class balance; `balance` (script)")
    log_base: Literal["e", "10"] = Field("e", description="logarithm of the class balance: e (CMI) or 10 (original)")
    sample_bn: Literal["eval", "train"] = Field(
        "eval",
        description="the generator's BatchNorm for student batches: eval (CMI) or train (Fast-Datafree, original)",
    )
    generator: Literal["large", "small"] = Field("large", description="large (CMI) or small (Fast-Datafree)")
    generator_width: int = Field(64, ge=1, description="base width of the convolutions; `ngf` (code)")


class Dafl(Method):
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
            images = self.generator(self._latents(self.config.synthesis_batch_size))
            loss = self._loss(self.task.normalize(images))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return Synthesis(None, scalars={"synthesis_loss": loss.detach()})

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """``size`` fresh images of the generator as it is now."""
        self.generator.train(self.config.sample_bn == "train")
        with torch.no_grad():
            return Batch(self.task.normalize(self.generator(self._latents(size))))

    def _loss(self, images: Tensor) -> Tensor:
        config = self.config
        with tapped(self.task.teacher.classifier) as penultimate:
            logits = self.task.teacher(images)
        base = 10 if config.log_base == "10" else math.e
        return (
            config.onehot * confidence(logits)
            + config.activation * activation(penultimate[-1])
            + config.balance * class_balance(logits, base)
        )

    def _latents(self, size: int) -> Tensor:
        return torch.randn(size, self.config.latent_dim, device=self.task.device, generator=self.task.rng)

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        return schedule.rounds * config.generator_steps * config.synthesis_batch_size


Dafl.published = {
    "cifar10/wrn40_2:wrn16_1": Published(
        schedule=Schedule(
            epochs=200, rounds_per_epoch=80, student_steps=5, batch_size=256, lr=0.1, weight_decay=1e-4, lr_min=0.0
        ),
        origin="code",
        source="zju-vipa/CMI, scripts/dafl/dafl_cifar10_wrn402_wrn161.sh (the only released script of this form)",
    ),
}
Dafl.equal_lr = {"digits": 0.1}  # results/trials/digits_equal.json
Dafl.search = {
    "generator_steps": (1, 3, 5),
    "generator_lr": (1e-3, 4e-3),
    "onehot": (0.1, 1.0),
    "balance": (5.0, 20.0),
    "activation": (1e-3, 0.1),
    "sample_bn": ("eval", "train"),
    "lr": (0.05, 0.1, 0.2),
}
Dafl.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=8, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 5,
            "sample_bn": "eval",
            "generator_lr": 0.004,
            "onehot": 0.1,
            "balance": 20.0,
            "activation": 0.001,
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
            "sample_bn": "train",
            "generator_lr": 0.004,
            "onehot": 0.1,
            "balance": 20.0,
            "activation": 0.1,
        },
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=10, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.05, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 3,
            "sample_bn": "eval",
            "generator_lr": 0.004,
            "onehot": 1.0,
            "balance": 20.0,
            "activation": 0.1,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
