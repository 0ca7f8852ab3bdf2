"""TA-DFKD: Teacher as a Lenient Expert, Teacher-Agnostic Data-Free Knowledge Distillation.

Hyunjune Shin, Dong-Wan Choi; AAAI 2024. https://arxiv.org/abs/2402.12406,
code: https://github.com/bigdata-inha/TA-DFKD-Official

The generator is never told to please the teacher with a class; instead those of its images are kept on which the
teacher's loss belongs to the lower of two Gaussians. Student and adversarial term see only these.

Differences from the paper
1. The adversarial term is 1 - JS in the clamped form of the released code, divided by b * K.
2. The losses are scaled to [0, 1] within each batch before the mixture is fitted, as in the released code, so that a
   batch that is clean throughout is split, too.

Differences from the released code
1. The mixture is fitted on the device by ten steps of EM that stop to count once converged, from 2-means that starts
   at 0 and 1; the released fit runs on the CPU (scikit-learn) from a random start in every step.
2. A student batch is filled from ``candidate_batches`` batches, whatever share of them is kept; the released code
   draws batches until the kept images exceed one batch, at least two and without a limit. If too few are kept, the
   likeliest of the others fill up. With a kept share above one half both are the same.
3. In a round the generator goes first; in the released code the student does. Its cosine begins at its start.
4. The task's own test images and normalisation are used; the released code tests on CIFAR-10's images and normalises
   with CIFAR-10's constants even for CIFAR-100.
5. Images of a data set whose classes a flip would change, such as digits, are not flipped; the crop's padding is H/8.
6. In the generator's step the student is in train mode, where its BatchNorm statistics move: this released behaviour
   made the published numbers and is the default; ``student_eval=true`` keeps it in eval mode.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.augment import random_crop_flip
from dfkd_bench.generators import EarlyGenerator
from dfkd_bench.losses import bounded_agreement, logit_distance, variation_norms
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.statistics import BatchNormMatcher

CARD = {
    "title": "TA-DFKD: images selected by the teacher's loss, no class prior",
    "family": "generator",
    "year": 2024,
    "venue": "AAAI",
    "confirmed": True,
    "knowledge": "none",
}

EM_STEPS, EM_TOLERANCE, VARIANCE_FLOOR = 10, 1e-2, 5e-4  # Sample_Selection.py


class Config(MethodConfig):
    """Defaults: TA-DFKD-main-CIFAR.py with the README's batch size."""

    temperature: float = Field(1.0, ge=1, le=1, description="1: the student's distance of logits has no temperature")
    synthesis_batch_size: int = Field(
        1024, ge=2, le=100_000, description="images a generator step; `batch_size` (README)"
    )
    latent_dim: int = Field(1000, ge=1, description="width of the latent vectors; `latent_dim` (code)")
    generator_steps: int = Field(1, ge=1, le=100_000, description="generator steps a round (code)")
    generator_lr: float = Field(1e-3, gt=0, le=10, description="Adam on the generator; `lr_G` (code)")
    batchnorm: float = Field(10.0, ge=0, description="weight of the BatchNorm matching; `BNS` (code)")
    l2: float = Field(6e-3, ge=0, description="weight of the norm of the batch of normalised images; `R_l2` (code)")
    variation: float = Field(1.5e-5, ge=0, description="weight of the total variation, l2 form; `R_tv` (code)")
    adversarial: float = Field(1.0, ge=0, description="weight of the disagreement on selected images (code: 1)")
    selection: float = Field(
        0.5, ge=0, lt=1, description="posterior above which an image is kept; `selection_score` (code)"
    )
    candidate_batches: int = Field(
        2, ge=1, le=100, description="batches a student batch is filled from (ours; code: at least 2)"
    )
    shift_views: bool = Field(
        True, description="one random crop and flip for the whole batch that is learnt from (code; not Tiny-ImageNet)"
    )
    student_eval: bool = Field(
        False, description="student in eval mode in the generator's step (not so in the released code: false)"
    )
    generator_width: int = Field(64, ge=1, description="base width of the convolutions; `ngf` (code)")


def scaled(losses: Tensor) -> Tensor:
    """``losses`` [b] moved and stretched to [0, 1]; all 0 if they are all the same."""
    low, high = losses.aminmax()
    return (losses - low) / (high - low).clamp(min=torch.finfo(losses.dtype).tiny)


def clean_posterior(values: Tensor) -> Tensor:
    """Posterior [b] of the component with the smaller mean of a mixture of two Gaussians fitted to ``values`` [b].

    ``values`` lie in [0, 1]. Ten steps of EM with a tolerance of 1e-2 on the mean log-likelihood and 5e-4 added to the
    variances, from the clusters of 2-means with centres that start at 0 and 1. No synchronisation: a fit that has
    converged is kept while the remaining steps are computed. 1 for values that are all 0.
    Source: bigdata-inha/TA-DFKD-Official, Sample_Selection.py (scikit-learn's GaussianMixture).
    """
    x = values.unsqueeze(1)  # [b, 1] against two components
    centres = torch.stack([torch.zeros_like(values[0]), torch.ones_like(values[0])])
    share = _nearest(x, centres)
    for _ in range(EM_STEPS):
        centres = torch.where(share.sum(0) > 0, (share * x).sum(0) / share.sum(0).clamp(min=1), centres)
        share = _nearest(x, centres)
    fit = _maximised(x, share)
    likelihood = torch.full_like(values[0], -math.inf)
    running = torch.ones_like(likelihood, dtype=torch.bool)
    for _ in range(EM_STEPS):
        joint = _log_joint(x, fit)
        new_likelihood = joint.logsumexp(1).mean()
        update = _maximised(x, joint.softmax(1))
        fit = torch.where(running, update, fit)
        running = running & ((new_likelihood - likelihood).abs() >= EM_TOLERANCE)
        likelihood = new_likelihood
    posterior = _log_joint(x, fit).softmax(1)
    return torch.where(fit[1, 0] <= fit[1, 1], posterior[:, 0], posterior[:, 1])


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    """[b, 2] of 0 and 1: the nearer centre of each value."""
    second = ((x[:, 0] - centres[1]).abs() < (x[:, 0] - centres[0]).abs()).to(x.dtype)
    return torch.stack([1 - second, second], dim=1)


def _maximised(x: Tensor, share: Tensor) -> Tensor:
    """[3, 2]: weights, means and variances of two components to which ``x`` [b, 1] belongs by ``share`` [b, 2]."""
    total = share.sum(0) + 10 * torch.finfo(x.dtype).eps
    mean = (share * x).sum(0) / total
    variance = (share * (x - mean).square()).sum(0) / total + VARIANCE_FLOOR
    return torch.stack([total / x.shape[0], mean, variance])


def _log_joint(x: Tensor, fit: Tensor) -> Tensor:
    """[b, 2]: log of weight times density of ``x`` [b, 1] in each component."""
    weight, mean, variance = fit
    return weight.log() - 0.5 * ((2 * math.pi * variance).log() + (x - mean).square() / variance)


def kept(posterior: Tensor, threshold: float) -> Tensor:
    """Which of [b] images are kept: those above ``threshold``, and in any case the two likeliest."""
    return (posterior > threshold) | (posterior >= posterior.topk(2).values[-1])


class TaDfkd(Method):
    """The method. One call takes ``generator_steps`` steps of one persistent generator; no image is kept."""

    Config = Config
    needs = frozenset({"batchnorm"})
    quirks: ClassVar = {
        "student_unchanged_by_synthesis": "in the generator's step the released code leaves the student in train mode, "
        "so that its BatchNorm statistics move; student_eval=true does without",
        "generation_cost_is_counted": "how many images are kept depends on the images; the cost is that of keeping all",
    }
    absorbs = "generator_steps"
    described: ClassVar = {"student_eval": True}
    tiny: ClassVar = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4}

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        self.matcher = BatchNormMatcher(task.teacher)
        with task.device:
            generator = EarlyGenerator(config.latent_dim, task.image_shape, config.generator_width, output="sigmoid")
        self.generator = generator.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr, fused=True)

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        loss, share = torch.zeros(()), torch.zeros(())
        student.train(not self.config.student_eval)
        for _ in range(self.config.generator_steps):
            images = self.generator(self._latents(self.config.synthesis_batch_size))
            keep = kept(self._posterior(images.detach()), self.config.selection)
            loss, share = self._loss(self._view(images), keep, student), keep.float().mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        student.eval()
        return Synthesis(None, scalars={"synthesis_loss": loss.detach(), "kept_share": share})

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """``size`` selected images: those kept of the first candidate batch, then a random part of the next, ..."""
        views, ranks = [], []
        for index in range(self.config.candidate_batches):
            with torch.no_grad():
                images = self.generator(self._latents(size))
            posterior = self._posterior(images)
            order = torch.rand(size, device=self.task.device, generator=self.task.rng)
            last = self.config.candidate_batches + 1 - posterior  # after all that are kept, the likeliest first
            ranks.append(torch.where(kept(posterior, self.config.selection), index + order, last))
            views.append(self._view(images))
        first = torch.cat(ranks).argsort()[:size]
        return Batch(torch.cat(views)[first])

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        """Mean absolute difference of the logits."""
        return logit_distance(student(batch.images), self.task.teach(batch.images))

    def _loss(self, view: Tensor, keep: Tensor, student: nn.Module) -> Tensor:
        """``view``: normalised images [b, C, H, W]. Teacher and student see only the kept ones."""
        config = self.config
        selected = view[keep]  # the one place that waits for the device: their number is needed
        with self.matcher.watching():
            logits = self.task.teacher(selected)
        return (
            config.batchnorm * self.matcher.loss()
            + config.l2 * torch.linalg.vector_norm(view)
            + config.variation * variation_norms(view)
            + config.adversarial * bounded_agreement(student(selected), logits)
        )

    def _posterior(self, images: Tensor) -> Tensor:
        """How likely each of [b, C, H, W] images in [0, 1] is clean, from the teacher's loss on its own answer; [b]."""
        log_probabilities = self.task.teach(self.task.normalize(images)).log_softmax(dim=1)
        return clean_posterior(scaled(-log_probabilities.amax(dim=1)))

    def _view(self, images: Tensor) -> Tensor:
        """Normalised; before that, cropped and flipped at random, all images of the batch alike."""
        if self.config.shift_views:
            stacked = images.reshape(1, -1, *images.shape[2:])  # one "image" of b * C channels
            task = self.task
            stacked = random_crop_flip(stacked, task.crop_padding, task.flip_keeps_class, task.rng)
            images = stacked.reshape(images.shape)
        return self.task.normalize(images)

    def _latents(self, size: int) -> Tensor:
        return torch.randn(size, self.config.latent_dim, device=self.task.device, generator=self.task.rng)

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        return schedule.rounds * config.generator_steps * config.synthesis_batch_size


def _script(epochs: int, source: str, **config: Any) -> Published:
    return Published(
        schedule=Schedule(
            epochs=epochs, rounds_per_epoch=36, student_steps=10, batch_size=1024, lr=0.01, weight_decay=5e-4
        ),
        config=config,
        origin="code",
        source=f"bigdata-inha/TA-DFKD-Official, {source}",
    )


TaDfkd.published = {
    "cifar10/resnet34:resnet18": _script(200, "README.md and TA-DFKD-main-CIFAR.py"),
    "cifar100/resnet34:resnet18": _script(500, "README.md and TA-DFKD-main-CIFAR.py"),
    "tiny_imagenet/resnet34:resnet18": _script(500, "README.md and TA-DFKD-main-TinyImageNet.py", shift_views=False),
}
TaDfkd.published = {
    **TaDfkd.published,
    # Other pairs get the values of their own data set.
    **{
        key.partition("/")[0]: entry.model_copy(update={"origin": "transferred"})
        for key, entry in TaDfkd.published.items()
    },
}
TaDfkd.equal_lr = {"digits": 0.2}  # results/trials/digits_equal.json
TaDfkd.search = {
    "generator_steps": (1, 3, 5),
    "generator_lr": (1e-3, 4e-3),
    "batchnorm": (1.0, 10.0),
    "adversarial": (1.0, 10.0),
    "selection": (0.0, 0.5),
    "latent_dim": (100, 1000),
    "lr": (0.05, 0.1, 0.2),
}
TaDfkd.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=8, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "latent_dim": 100,
            "generator_width": 32,
            "generator_steps": 5,
            "generator_lr": 0.004,
            "adversarial": 10.0,
            "batchnorm": 1.0,
            "selection": 0.0,
        },
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=20, rounds_per_epoch=20, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "latent_dim": 1000,
            "generator_width": 32,
            "generator_steps": 3,
            "generator_lr": 0.004,
            "adversarial": 10.0,
            "batchnorm": 1.0,
            "selection": 0.5,
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
            "generator_steps": 5,
            "generator_lr": 0.004,
            "adversarial": 10.0,
            "batchnorm": 1.0,
            "selection": 0.0,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
