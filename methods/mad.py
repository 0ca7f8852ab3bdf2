"""MAD: Momentum Adversarial Distillation, handling large distribution shifts in data-free knowledge distillation.

Kien Do, Hung Le, Dung Nguyen, Dang Nguyen, Haripriya Harikumar, Truyen Tran, Santu Rana, Svetha Venkatesh; NeurIPS
2022. https://arxiv.org/abs/2209.10359, no released code is known

An adversarial generator moves fast and the student forgets: an exponential moving average of the generator moves
slowly, and the student learns from images of both.

Not confirmed: the abstract, a figure's caption and an excerpt of the appendix were at hand, and a summary by others,
but not the paper. What only the summary says is marked "summary", what nobody says is marked "ours".

Differences from the paper
1. The generator's losses are DFQ's by default: which regularisers the paper uses, and with which weights, is not known.
2. The discrepancy is the KL divergence at T = 1, or the distance of logits; which one the paper uses is not known.
3. Of the bound on the adversarial term only its existence is known: here the term is min(KL, bound), off by default.
4. The average covers BatchNorm statistics, too, and images of both generators pass the student in one batch (ours).
5. Of the generators conditioned on the class only the sum z + e_y is built, which the paper found best.

Differences from the released code
1. There is none to differ from.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.generators import Generator, LargeGenerator
from dfkd_bench.losses import class_balance, confidence, cross_entropy, kl_divergence, logit_distance
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.statistics import BatchNormMatcher

CARD = {
    "title": "MAD: the student learns from the generator and its moving average",
    "family": "generator",
    "year": 2022,
    "venue": "NeurIPS",
    "confirmed": False,
    "knowledge": "none",
}


class Config(MethodConfig):
    """Defaults: DFQ's generator (ours) and the summary's momentum."""

    temperature: float = Field(1.0, gt=0, le=1000, description="T of the student's KL divergence (ours: as in DFQ)")
    ema_momentum: float = Field(0.95, ge=0, le=1, description="of the moving average, a generator step (summary)")
    current: float = Field(0.5, ge=0, description="weight of the generator's images in the student's loss (ours)")
    remembered: float = Field(0.5, ge=0, description="weight of the average's images, likewise (ours: 1 in total)")
    discrepancy: Literal["kl", "l1"] = Field(
        "kl", description="of student and teacher: KL or distance of logits (ours)"
    )
    adversarial: float = Field(1.0, ge=0, description="weight of minus the discrepancy (ours)")
    bound: float | None = Field(None, gt=0, description="the discrepancy counts up to this for the generator (ours)")
    batchnorm: float = Field(1.0, ge=0, description="weight of the BatchNorm matching (ours)")
    onehot: float = Field(1.0, ge=0, description="cross entropy to the own argmax or to the wanted class (ours)")
    balance: float = Field(20.0, ge=0, description="weight of the class balance (ours)")
    conditional: Literal["none", "sum"] = Field(
        "none", description="generator's input: z, or z + e_y with learnt e_y, for data sets of many classes (abstract)"
    )
    embedding_norm: float = Field(0.0, ge=0, description="weight of the mean of |e_y|^2 (summary; form and value ours)")
    pretraining_steps: int = Field(0, ge=0, description="first generator steps, without adversarial term (ours)")
    synthesis_batch_size: int = Field(256, ge=2, le=100_000, description="images a generator step (ours)")
    latent_dim: int = Field(256, ge=1, description="width of the latent vectors (ours)")
    generator_steps: int = Field(1, ge=1, le=100_000, description="generator steps a round (ours)")
    generator_lr: float = Field(1e-3, gt=0, le=10, description="Adam on the generator (ours)")
    sample_bn: Literal["eval", "train"] = Field(
        "train", description="the generators' BatchNorm for student batches: running or batch statistics (ours)"
    )
    generator: Literal["large", "small"] = Field("small", description="the generator's size (ours)")
    generator_width: int = Field(64, ge=1, description="base width of the convolutions (ours)")

    def model_post_init(self, _context: Any) -> None:
        if self.current + self.remembered == 0:
            raise ValueError("current and remembered are both 0: the student would learn nothing")
        if self.discrepancy == "l1" and self.temperature != 1:
            raise ValueError("temperature must be 1 with discrepancy='l1': the distance of logits has none")


class LatentGenerator(nn.Module):
    """Latent vectors [b, d], and labels [b] if it is conditional, to images [b, C, H, W] in (0, 1)."""

    def __init__(self, task: Task, config: Config) -> None:
        super().__init__()
        build = LargeGenerator if config.generator == "large" else Generator
        self.body = build(config.latent_dim, task.image_shape, config.generator_width)
        self.embedding = nn.Embedding(task.num_classes, config.latent_dim) if config.conditional == "sum" else None

    def forward(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """The generator's images of z, or of z + e_y."""
        images: Tensor = self.body(latents if self.embedding is None else latents + self.embedding(labels))
        return images

    def embedding_norm(self, labels: Tensor) -> Tensor:
        """Mean of |e_y|^2 over the batch, 0-d; 0 without embeddings."""
        if self.embedding is None:
            return torch.zeros((), device=labels.device)
        norm: Tensor = self.embedding(labels).square().sum(dim=1).mean()
        return norm


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, momentum: float) -> None:
    """average <- momentum * average + (1 - momentum) * model: parameters and statistics; counters are copied."""
    for slow, fast in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - momentum)
        else:
            slow.copy_(fast)


class Mad(Method):
    """The method. One call takes ``generator_steps`` steps of one persistent generator; its average follows each."""

    Config = Config
    needs = frozenset({"batchnorm"})
    absorbs = "generator_steps"
    tiny: ClassVar = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4}

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        self.matcher = BatchNormMatcher(task.teacher)
        with task.device:
            generator = LatentGenerator(task, config)
        self.generator = generator.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.optimizer = torch.optim.Adam(
            self.generator.parameters(), lr=config.generator_lr, betas=(0.5, 0.999), fused=True
        )

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        loss = torch.zeros(())
        if at.epoch == 0 and at.round == 0:
            for _ in range(self.config.pretraining_steps):
                self._generator_step(student, adversarial=0.0)
            self.average.load_state_dict(self.generator.state_dict())
        for _ in range(self.config.generator_steps):
            loss = self._generator_step(student, self.config.adversarial)
            follow(self.average, self.generator, self.config.ema_momentum)
        return Synthesis(None, scalars={"synthesis_loss": loss})

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """``size`` fresh images of each generator that has a weight, from latent vectors of its own."""
        images: list[Tensor] = []
        parts: dict[str, slice] = {}
        for part, generator in (("current", self.generator), ("remembered", self.average)):
            if getattr(self.config, part) > 0:
                parts[part] = slice(len(images) * size, (len(images) + 1) * size)
                generator.train(self.config.sample_bn == "train")
                with torch.no_grad():
                    images.append(generator(*self._draw(size)))
        return Batch(self.task.normalize(torch.cat(images)), parts)

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        """The discrepancy on the images of the generator and of its average, weighted."""
        logits, targets = student(batch.images), self.task.teach(batch.images)
        temperature = self.config.temperature
        terms = [
            getattr(self.config, part) * self._discrepancy(logits[rows], targets[rows], temperature)
            for part, rows in batch.parts.items()
        ]
        return torch.stack(terms).sum()

    def _generator_step(self, student: nn.Module, adversarial: float) -> Tensor:
        """One step of Adam; the loss before it."""
        self.generator.train()
        latents, labels = self._draw(self.config.synthesis_batch_size)
        images = self.task.normalize(self.generator(latents, labels))
        loss = self._generator_loss(student, images, labels, adversarial)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _generator_loss(self, student: nn.Module, images: Tensor, labels: Tensor | None, adversarial: float) -> Tensor:
        config = self.config
        with self.matcher.watching():
            logits = self.task.teacher(images)
        sure = confidence(logits) if labels is None else cross_entropy(logits, labels)
        loss = config.batchnorm * self.matcher.loss() + config.onehot * sure + config.balance * class_balance(logits)
        if labels is not None and config.embedding_norm > 0:
            loss = loss + config.embedding_norm * self.generator.embedding_norm(labels)
        if adversarial > 0:
            # Above the bound the clamp has no gradient: the generator can't push disagreement without limit.
            raised = self._discrepancy(student(images), logits, 1.0).clamp(max=config.bound or math.inf)
            loss = loss - adversarial * raised
        return loss

    def _discrepancy(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
        if self.config.discrepancy == "l1":
            return logit_distance(student_logits, teacher_logits)
        return kl_divergence(student_logits, teacher_logits, temperature)

    def _draw(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Latent vectors [size, d], and labels [size] where the generator is conditional."""
        task, config = self.task, self.config
        latents = torch.randn(size, config.latent_dim, device=task.device, generator=task.rng)
        if config.conditional == "none":
            return latents, None
        return latents, torch.randint(task.num_classes, (size,), device=task.device, generator=task.rng)

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        steps = config.pretraining_steps + schedule.rounds * config.generator_steps
        return steps * config.synthesis_batch_size

    @classmethod
    def batch_rows(cls, config: Any, size: int) -> int:
        return size * ((config.current > 0) + (config.remembered > 0))


def _ours(config: dict[str, Any], lr: float = 0.1) -> Published:
    return Published(
        schedule=Schedule(
            epochs=200, rounds_per_epoch=40, student_steps=10, batch_size=256, lr=lr, weight_decay=1e-4, lr_min=0.0
        ),
        config=config,
        origin="ours",
        source="DFQ's released script with a moving average; the paper's settings are not known",
    )


Mad.published = {
    "cifar10": _ours({}),
    "cifar100": _ours({}, lr=0.05),
    "tiny_imagenet": _ours({"conditional": "sum", "bound": math.log(200)}),
    "imagenet": _ours({"conditional": "sum", "bound": math.log(1000)}),
}
Mad.equal_lr = {"digits": 0.2}  # results/trials/digits_equal.json
Mad.search = {
    "generator_steps": (1, 3, 5),
    "generator_lr": (1e-3, 4e-3),
    "ema_momentum": (0.8, 0.95),
    "batchnorm": (1.0, 10.0),
    "balance": (5.0, 20.0),
    "adversarial": (0.1, 1.0),
    "lr": (0.05, 0.1, 0.2),
}
Mad.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=8, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.1, lr_min=2e-4),
        config={"synthesis_batch_size": 128, "generator_width": 32, "generator_steps": 5},
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=20, rounds_per_epoch=20, student_steps=5, batch_size=128, lr=0.1, lr_min=2e-4),
        config={"synthesis_batch_size": 128, "generator_width": 32, "generator_steps": 5},
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=10, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "generator_width": 32,
            "generator_steps": 5,
            "generator_lr": 0.001,
            "ema_momentum": 0.95,
            "batchnorm": 10.0,
            "balance": 20.0,
            "adversarial": 0.1,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
# Since then a published learning rate has changed, and nothing else.
Mad.same_results = ("43960c97de9907bf4b53dd61b28f99ddb3c5f17c3716d24e67d5949f2eb36b50",)
