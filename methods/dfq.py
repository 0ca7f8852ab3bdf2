"""DFQ: Data-Free Network Quantization with Adversarial Knowledge Distillation, as a distillation baseline.

Yoojin Choi, Jihwan Choi, Mostafa El-Khamy, Jungwon Lee; CVPR Workshops 2020. https://arxiv.org/abs/2005.04136,
code of the form in the comparison tables, which is built here: https://github.com/zju-vipa/CMI
(datafree/synthesis/generative.py); no code of the authors is known

ZSKT's game with three constraints on the images: the teacher's BatchNorm statistics match, the teacher is sure of
each image, and a batch uses all classes alike.

Differences from the paper
1. Nothing is quantised, and there is one generator and one student.
2. BatchNorm statistics are compared by L2 norms; ``batchnorm_form="gaussian_kl"`` compares them as Gaussians, as the
   paper is said to do (direction and sum over channels and layers are ours: its text was not at hand).
3. The teacher's certainty is the cross entropy to its own argmax; the paper's is the entropy.

Differences from the released code
1. The student in the generator's loss is the student. zju-vipa/Fast-Datafree passes the teacher in its place, so that
   the adversarial term is 0.
2. The balance term is computed in logarithms: a class that is never predicted gives 0, not NaN.
3. The temperature that is set is used; the released driver overwrites its script's T = 20 with 1, the default here.
4. Accuracy is the last epoch's; the released driver keeps the best one on the test set.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.generators import Generator, LargeGenerator
from dfkd_bench.losses import class_balance, confidence, kl_divergence
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.statistics import BatchNormMatcher

CARD = {
    "title": "DFQ: adversarial generation with matched statistics",
    "family": "generator",
    "year": 2020,
    "venue": "CVPR Workshops",
    "confirmed": True,
    "knowledge": "none",
}


class Config(MethodConfig):
    """Defaults: zju-vipa/CMI, scripts/dfq/dfq_cifar10_wrn402_wrn161.sh and datafree_kd.py."""

    temperature: float = Field(
        1.0, gt=0, le=1000, description="T of the student's KL divergence; 1 made the published numbers (code)"
    )
    synthesis_batch_size: int = Field(
        256, ge=2, le=100_000, description="images a generator step; `batch_size` (script)"
    )
    latent_dim: int = Field(256, ge=1, description="width of the latent vectors; `nz` (code)")
    generator_steps: int = Field(1, ge=1, le=100_000, description="generator steps a round; `g_steps` (script)")
    generator_lr: float = Field(1e-3, gt=0, le=10, description="Adam on the generator; `lr_g` (script)")
    adversarial: float = Field(1.0, ge=0, description="weight of minus the KL divergence; `adv` (script)")
    batchnorm: float = Field(1.0, ge=0, description="weight of the BatchNorm matching; `bn` (script)")
    onehot: float = Field(1.0, ge=0, description="weight of the cross entropy to the own argmax; `oh` (script)")
    balance: float = Field(20.0, ge=0, description="weight of the class balance; `balance` (script)")
    batchnorm_form: Literal["norms", "gaussian_kl"] = Field(
        "norms",
        description="BatchNorm matching by L2 norms (code) or by the KL divergence of Gaussians (paper, in part)",
    )
    sample_bn: Literal["eval", "train"] = Field(
        "eval", description="the generator's BatchNorm for student batches: eval (CMI) or train (Fast-Datafree)"
    )
    generator: Literal["large", "small"] = Field("large", description="large (CMI) or small (Fast-Datafree)")
    generator_width: int = Field(64, ge=1, description="base width of the convolutions; `ngf` (code)")


class GaussianMatcher(BatchNormMatcher):
    """BatchNorm matching by KL(N(batch) || N(running)), summed over channels and layers; 0 only if they match."""

    def loss(self) -> Tensor:
        """The divergence of the teacher's last forward pass under ``watching``; 0-d, with gradient to its input."""
        terms = []
        for index, layer in enumerate(self.layers):
            mean, variance = self._moments(index)
            assert layer.running_mean is not None
            assert layer.running_var is not None
            # Both variances get the layer's own eps: a constant channel has variance 0.
            ours, theirs = variance + layer.eps, layer.running_var + layer.eps
            distance = (mean - layer.running_mean).square()
            terms.append((0.5 * (theirs / ours).log() + (ours + distance) / (2 * theirs) - 0.5).sum())
        return torch.stack(terms).sum()


class Dfq(Method):
    """The method. One call takes ``generator_steps`` steps of one persistent generator; no image is kept."""

    Config = Config
    needs = frozenset({"batchnorm"})
    absorbs = "generator_steps"
    tiny: ClassVar = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4}

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        self.matcher = {"norms": BatchNormMatcher, "gaussian_kl": GaussianMatcher}[config.batchnorm_form](task.teacher)
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
        with self.matcher.watching():
            for _ in range(self.config.generator_steps):
                images = self.task.normalize(self.generator(self._draw(self.config.synthesis_batch_size)))
                loss = self._loss(student, images)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
        return Synthesis(None, scalars={"synthesis_loss": loss.detach()})

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """``size`` fresh images of the generator as it is now."""
        self.generator.train(self.config.sample_bn == "train")
        with torch.no_grad():
            return Batch(self.task.normalize(self.generator(self._draw(size))))

    def _loss(self, student: nn.Module, images: Tensor) -> Tensor:
        config = self.config
        logits = self.task.teacher(images)
        loss = (
            config.batchnorm * self.matcher.loss()
            + config.onehot * confidence(logits)
            + config.balance * class_balance(logits)
        )
        if config.adversarial > 0:
            loss = loss - config.adversarial * kl_divergence(student(images), logits)
        return loss

    def _draw(self, size: int) -> Tensor:
        return torch.randn(size, self.config.latent_dim, device=self.task.device, generator=self.task.rng)

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        return schedule.rounds * config.generator_steps * config.synthesis_batch_size


def _script(lr: float, name: str) -> Published:
    return Published(
        schedule=Schedule(
            epochs=200, rounds_per_epoch=40, student_steps=10, batch_size=256, lr=lr, weight_decay=1e-4, lr_min=0.0
        ),
        origin="code",
        source=f"zju-vipa/CMI, scripts/dfq/{name}.sh",
    )


Dfq.published = {
    "cifar10/wrn40_2:wrn16_1": _script(0.1, "dfq_cifar10_wrn402_wrn161"),
    "cifar100/resnet34:resnet18": _script(0.05, "dfq_cifar10_res34_res18"),  # its name is wrong: --dataset cifar100
}
Dfq.equal_lr = {"digits": 0.1}  # results/trials/digits_equal.json
Dfq.search = {
    "generator_steps": (1, 3, 5),
    "generator_lr": (1e-3, 4e-3),
    "batchnorm": (1.0, 10.0),
    "balance": (5.0, 20.0),
    "adversarial": (0.1, 1.0),
    "sample_bn": ("eval", "train"),
    "lr": (0.05, 0.1, 0.2),
}
Dfq.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=8, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 5,
            "sample_bn": "eval",
            "generator_lr": 0.004,
            "batchnorm": 1.0,
            "balance": 20.0,
            "adversarial": 0.1,
        },
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=20, rounds_per_epoch=20, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 5,
            "sample_bn": "eval",
            "generator_lr": 0.004,
            "batchnorm": 1.0,
            "balance": 20.0,
            "adversarial": 0.1,
        },
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=10, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 3,
            "sample_bn": "train",
            "generator_lr": 0.004,
            "batchnorm": 1.0,
            "balance": 5.0,
            "adversarial": 1.0,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
