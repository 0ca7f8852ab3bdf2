"""ZSKT (ABM): Zero-shot Knowledge Transfer via Adversarial Belief Matching.

Paul Micaelli, Amos Storkey; NeurIPS 2019. https://arxiv.org/abs/1905.09768,
code: https://github.com/polo5/ZeroShotKnowledgeTransfer; the form in the comparison tables, which is built here:
https://github.com/zju-vipa/CMI (datafree/synthesis/generative.py)

A game of two: the generator looks for images on which student and teacher differ, the student learns to agree.

Differences from the paper
1. No attention transfer, no clipping, fresh latent vectors for every student step and KL divided by b alone, as in the
   comparison tables. ``attention=250``, ``generator_clip_norm=5`` with the schedule's ``clip_norm=5``,
   ``keep_latents=true`` with ``sample_bn="train"``, ``reduction="mean"`` and Adam without weight decay bring back the
   paper's.
2. Generator and student alternate 1 : 5 (paper 1 : 10), and the student is in eval mode in the generator's step; in the
   paper's code it is in train mode there, where its BatchNorm statistics move.
3. The generator ends in a sigmoid and the data set's normalisation, the paper's in an affine BatchNorm; its Adam has a
   constant rate and betas (0.5, 0.999), the paper's a cosine and (0.9, 0.999).

Differences from the released code
1. The student in the generator's loss is the student. zju-vipa/Fast-Datafree passes the teacher in its place, so that
   the loss is 0 and Adam turns round-off into a random walk.
2. The temperature that is set is used; the released driver overwrites its script's T = 20 with 1, the default here.
3. Accuracy is the last epoch's; the released driver keeps the best one on the test set.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.generators import Generator, LargeGenerator
from dfkd_bench.losses import kl_divergence, kl_elementwise
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task

CARD = {
    "title": "ZSKT: adversarial belief matching",
    "family": "generator",
    "year": 2019,
    "venue": "NeurIPS",
    "confirmed": True,
    "knowledge": "none",
}


class Config(MethodConfig):
    """Defaults: zju-vipa/CMI, scripts/zskt/zskt_cifar10_wrn402_wrn161.sh and datafree_kd.py."""

    temperature: float = Field(
        1.0, gt=0, le=1000, description="T of the student's KL divergence; 1 made the published numbers (code, paper)"
    )
    synthesis_batch_size: int = Field(
        256, ge=2, le=100_000, description="images a generator step; `batch_size` (script)"
    )
    latent_dim: int = Field(256, ge=1, description="width of the latent vectors; `nz` (code; paper 100)")
    generator_steps: int = Field(1, ge=1, le=100_000, description="generator steps a round; `g_steps` (script)")
    generator_lr: float = Field(1e-3, gt=0, le=10, description="Adam on the generator; `lr_g` (script)")
    generator_clip_norm: float | None = Field(
        None, gt=0, description="the generator's gradient norm is clipped to this (paper's code: 5)"
    )
    adversarial: float = Field(1.0, gt=0, description="weight of the generator's only loss; `adv` (script)")
    reduction: Literal["batchmean", "mean"] = Field(
        "batchmean", description="KL divided by b (CMI) or by b * K (paper's code), for generator and student"
    )
    attention: float = Field(0.0, ge=0, description="weight of the student's attention transfer (paper's code: 250)")
    keep_latents: bool = Field(
        False, description="the generator step's latent vectors serve the round's student steps, too (paper's code)"
    )
    sample_bn: Literal["eval", "train"] = Field(
        "eval", description="the generator's BatchNorm for student batches: eval (CMI) or train (Fast-Datafree, paper)"
    )
    generator: Literal["large", "small"] = Field("large", description="large (CMI) or small (Fast-Datafree)")
    generator_width: int = Field(64, ge=1, description="base width of the convolutions; `ngf` (code)")


def attention_map(activations: Tensor) -> Tensor:
    """[b, C, H, W] -> [b, H * W]: the mean square over channels, each row of unit L2 norm (fp32 or better)."""
    exact = activations.to(torch.promote_types(activations.dtype, torch.float32))
    return F.normalize(exact.square().mean(dim=1).flatten(1), dim=1)


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the attention maps of two stages, 0-d; H and W agree, channels may differ."""
    return (attention_map(student) - attention_map(teacher)).square().mean()


class Zskt(Method):
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
        self.latents = torch.empty(0, config.latent_dim, device=task.device)

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        config = self.config
        loss = torch.zeros(())
        self.generator.train()
        for _ in range(config.generator_steps):
            self.latents = self._draw(config.synthesis_batch_size)
            images = self.task.normalize(self.generator(self.latents))
            loss = -config.adversarial * self._divergence(student(images), self.task.teacher(images), 1.0)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.generator_clip_norm is not None:
                nn.utils.clip_grad_norm_(self.generator.parameters(), config.generator_clip_norm)
            self.optimizer.step()
        return Synthesis(None, scalars={"synthesis_loss": loss.detach()})

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """``size`` fresh images of the generator as it is now; with ``keep_latents`` up to the generator's batch."""
        latents = self.latents[:size] if self.config.keep_latents else self._draw(size)
        self.generator.train(self.config.sample_bn == "train")
        with torch.no_grad():
            return Batch(self.task.normalize(self.generator(latents)))

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        """The divergence that the generator raises, now lowered, and the attention transfer."""
        if self.config.attention == 0:
            logits = student(batch.images)
            return self._divergence(logits, self.task.teach(batch.images), self.config.temperature)
        logits, _, stages = student.features(batch.images)  # type: ignore[operator]
        with torch.no_grad():
            teacher_logits, _, teacher_stages = self.task.teacher.features(batch.images)
        if [stage.shape[2:] for stage in stages] != [stage.shape[2:] for stage in teacher_stages]:
            raise ValueError("attention transfer needs stages of equal sides: use a pair of one family, or attention=0")
        distances = [attention_distance(*pair) for pair in zip(stages, teacher_stages, strict=True)]
        loss = self._divergence(logits, teacher_logits, self.config.temperature)
        return loss + self.config.attention * torch.stack(distances).sum()

    def _divergence(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        divergence = kl_elementwise if self.config.reduction == "mean" else kl_divergence
        return divergence(student_logits, teacher_logits, temperature)

    def _draw(self, size: int) -> Tensor:
        return torch.randn(size, self.config.latent_dim, device=self.task.device, generator=self.task.rng)

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        return schedule.rounds * config.generator_steps * config.synthesis_batch_size


Zskt.published = {
    "cifar10/wrn40_2:wrn16_1": Published(
        schedule=Schedule(
            epochs=200, rounds_per_epoch=80, student_steps=5, batch_size=256, lr=0.1, weight_decay=1e-4, lr_min=0.0
        ),
        origin="code",
        source="zju-vipa/CMI, scripts/zskt/zskt_cifar10_wrn402_wrn161.sh (the only released script of this form)",
    ),
}
Zskt.equal_lr = {"digits": 0.05}  # results/trials/digits_equal.json
Zskt.search = {
    "generator_steps": (1, 3, 5),
    "generator_lr": (1e-3, 4e-3),
    "latent_dim": (100, 256),
    "attention": (0.0, 250.0),
    "sample_bn": ("eval", "train"),
    "lr": (0.05, 0.1, 0.2),
}
Zskt.smoke = {
    "digits": Published(
        schedule=Schedule(
            epochs=8, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.1, lr_min=2e-4, clip_norm=5.0
        ),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 3,
            "sample_bn": "train",
            "attention": 250.0,
        },
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(
            epochs=20, rounds_per_epoch=20, student_steps=5, batch_size=128, lr=0.05, lr_min=2e-4, clip_norm=5.0
        ),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 1,
            "sample_bn": "train",
            "attention": 0.0,
            "generator_lr": 0.001,
            "latent_dim": 256,
        },
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(
            epochs=10, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.1, lr_min=2e-4, clip_norm=5.0
        ),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 1,
            "sample_bn": "train",
            "attention": 250.0,
            "generator_lr": 0.001,
            "latent_dim": 256,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
