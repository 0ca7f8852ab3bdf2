"""CAE-DFKD: Bridging the Transferability Gap in Data-Free Knowledge Distillation.

Zherui Zhang, Changwei Wang, Rongtao Xu, Wenhao Xu, Shibiao Xu, Yu Zhang, Jie Zhou, Li Guo; arXiv 2025, a version at
DAC 2025. https://arxiv.org/abs/2504.21478. Unconfirmed: built from the abstract and summaries, not from the full text.

The generator's input is the label-text embedding of the wanted class plus noise from one of several sources (CEND);
the student also learns, by a contrastive loss, that images of one class made with different noise belong together.

Differences from the paper
1. Read nowhere, hence settings of ours: which noise sources, their magnitudes, all weights, the contrastive loss's
   form (Khosla et al.), temperature and head, the pairs' number, and that they are made afresh for every step.
2. The generator, its losses and its schedule are NAYER's without the noisy layer: the names of the losses (cross
   entropy, BatchNorm statistics, adversarial) are known, their weights are not.
3. Pool images and pairs go through the student in one forward pass, so that its BatchNorm sees one batch a step.

Differences from the released code
1. There is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.generators import ConvBody, DeepConvBody
from dfkd_bench.inversion import invert
from dfkd_bench.losses import kl_divergence, supervised_contrastive
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.prompts import names_classes
from dfkd_bench.statistics import BatchNormMatcher

CARD = {
    "title": "CAE-DFKD: noise around label-text embeddings, contrastive student",
    "family": "pool",
    "year": 2025,
    "venue": "DAC",
    "confirmed": False,
    "knowledge": "class names and a text encoder",
}

LARGE = 128  # pixels: from here on the ladder for large images is used (H/16 instead of H/4)


class Config(MethodConfig):
    """Defaults are ours; those marked NAYER are its values for CIFAR-100 (tmtuan1307/NAYER, scripts/nayer_100.sh)."""

    encoder: str = Field("clip", description="text encoder: clip (paper), sbert, doc2vec, ...: docs/text_encoders.md")
    prompt: str = Field("a image of {name}", description="prompt; fields {name} and {index} (ours: NAYER)")
    noise_sources: int = Field(
        4, ge=1, le=4, description="how many (4: paper): the first of Gaussian, uniform, Laplace, signs (which: ours)"
    )
    noise_scale: float = Field(
        0.1, ge=0, description="source n = 1, 2, ...: deviation over n * rms of the embeddings (ours)"
    )
    synthesis_batch_size: int = Field(400, ge=2, le=100_000, description="images a synthesised batch (ours: NAYER)")
    generator_steps: int = Field(40, ge=1, le=100_000, description="generator steps a batch (ours: NAYER)")
    loops: int = Field(2, ge=1, description="batches an epoch after the warm-up (ours: NAYER)")
    warmup_loops: int = Field(10, ge=1, description="batches an epoch in the warm-up (ours: NAYER)")
    generator_life: int | None = Field(None, ge=1, description="epochs until the generator is new; null: never (ours)")
    generator_lr: float = Field(4e-3, gt=0, le=10, description="Adam on the generator, new a batch (ours: NAYER)")
    adversarial: float = Field(1.33, ge=0, description="weight of the masked adversarial term (ours: NAYER)")
    batchnorm: float = Field(10.0, ge=0, description="weight of the BatchNorm matching (ours: NAYER)")
    onehot: float = Field(0.5, ge=0, description="weight of the cross entropy to the wanted class (ours: NAYER)")
    batchnorm_momentum: float = Field(0.9, ge=0, lt=1, description="of remembered statistics (ours: NAYER)")
    generator_width: int = Field(64, ge=1, description="base width of the convolutions (ours: NAYER)")
    contrast: float = Field(0.1, ge=0, description="weight of the contrastive loss; 0: no pairs are made (ours)")
    contrast_temperature: float = Field(0.1, gt=0, le=10, description="of the contrastive loss (ours)")
    contrast_width: int = Field(256, ge=1, description="outputs of the student's projection head (ours)")
    contrast_lr: float = Field(1e-3, gt=0, le=10, description="Adam on the projection head (ours)")


class EmbeddingGenerator(nn.Module):
    """Diffused embedding [B, d] -> BatchNorm1d -> linear -> convolutions: [B, C, H, W] in (0, 1)."""

    def __init__(self, inputs: int, image_shape: tuple[int, int, int], width: int) -> None:
        super().__init__()
        self.body = (DeepConvBody if image_shape[1] >= LARGE else ConvBody)(image_shape, width)
        self.norm = nn.BatchNorm1d(inputs)
        self.project = nn.Linear(inputs, self.body.in_features)

    def forward(self, diffused: Tensor) -> Tensor:
        """Images."""
        return self.body(self.project(self.norm(diffused)))


class CaeDfkd(Method):
    """The method. One call makes ``loops`` batches; one generator lives through the whole run."""

    Config = Config
    needs = frozenset({"batchnorm", "label_text"})
    absorbs = "generator_steps"
    tiny: ClassVar = {"encoder": "random:16", "synthesis_batch_size": 12, "generator_steps": 2, "warmup_loops": 1}
    tiny |= {"generator_width": 4, "contrast_width": 8}
    transient = frozenset({"embeddings", "spread"})  # constants, made again on resume

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        self.embeddings = task.label_embeddings(config.encoder, config.prompt)
        self.spread = self.embeddings.square().mean().sqrt()
        self.matcher = BatchNormMatcher(task.teacher, config.batchnorm_momentum)
        self.generator = self._build_generator()
        self.head: nn.Sequential | None = None  # its width is the student's, who comes with the first call
        self.head_optimizer: torch.optim.Adam | None = None

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        config = self.config
        if self.head is None and config.contrast > 0:
            classifier: Any = student.classifier
            self._build_head(classifier.in_features)
        if config.generator_life is not None and at.round == 0 and at.epoch and at.epoch % config.generator_life == 0:
            self.generator = self._build_generator()
        adversarial = config.adversarial > 0 and not at.warming_up
        loops = config.warmup_loops if at.warming_up else config.loops
        images, losses = zip(*(self._one_batch(student, adversarial) for _ in range(loops)), strict=True)
        return Synthesis(torch.cat(images), scalars={"synthesis_loss": torch.stack(losses).mean()})

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """Images of the pool and, behind them, pairs made on the spot: one class, two sources of noise, no crops."""
        task, config = self.task, self.config
        batch = super().student_batch(pool, size, at)
        if config.contrast == 0:
            return batch
        pairs = size // 2
        labels = torch.randint(task.num_classes, (pairs,), device=task.device, generator=task.rng).repeat(2)
        source = torch.randint(config.noise_sources, (pairs,), device=task.device, generator=task.rng)
        away = torch.randint(1, max(config.noise_sources, 2), (pairs,), device=task.device, generator=task.rng)
        other = (source + away) % config.noise_sources
        with torch.no_grad():
            images = self.generator(self._diffused(labels, torch.cat([source, other])))
        rows = batch.images.shape[0]
        return Batch(
            torch.cat([batch.images, task.normalize(images)]),
            parts={"pool": slice(0, rows), "pairs": slice(rows, rows + 2 * pairs)},
            extras={"labels": torch.cat([labels.new_full((rows,), -1), labels])},
        )

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        """KL on the pool's images, the contrastive loss on the pairs' projected features."""
        if not batch.parts:
            return super().student_loss(student, batch, at)
        assert self.head is not None
        config, pool, pairs = self.config, batch.parts["pool"], batch.parts["pairs"]
        forward: Any = student.features
        logits, features, _ = forward(batch.images)
        distance = kl_divergence(logits[pool], self.task.teach(batch.images[pool]), config.temperature)
        projected, labels = self.head(features[pairs]), batch.extras["labels"][pairs]
        return distance + config.contrast * supervised_contrastive(projected, labels, config.contrast_temperature)

    def after_student_step(self, student: nn.Module, batch: Batch, at: Progress) -> None:
        """The projection head's step, by the gradient that the student's loss has left on it."""
        if self.head_optimizer is not None:
            self.head_optimizer.step()
            self.head_optimizer.zero_grad(set_to_none=True)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The head is built first: the saved one tells its width."""
        if state["head"] is not None:
            self._build_head(state["head"]["0.weight"].shape[1])
        super().load_state_dict(state)

    def _one_batch(self, student: nn.Module, adversarial: bool) -> tuple[Tensor, Tensor]:
        """The images of the step with the lowest loss, before that step's update, and that loss."""
        task, config = self.task, self.config
        labels = balanced_labels(config.synthesis_batch_size, task.num_classes, task.rng, task.device)
        sources = torch.randint(config.noise_sources, labels.shape, device=task.device, generator=task.rng)
        diffused = self._diffused(labels, sources)  # drawn once: a fixed input is what the generator is fitted to
        opponent = student if adversarial else None
        best = invert(self.generator, diffused, labels, task, self.matcher, config, opponent)
        return best.tensors[0], best.loss

    def _diffused(self, labels: Tensor, sources: Tensor) -> Tensor:
        """Embeddings [b, d] of ``labels`` [b] with noise of ``sources`` [b] (0, 1, ...) around them."""
        noise = draw_noise(sources, self.embeddings.shape[1], self.task.rng)
        magnitudes = self.config.noise_scale * self.spread * (sources + 1)
        return diffuse(self.embeddings[labels], magnitudes.unsqueeze(1), noise)

    def _build_generator(self) -> EmbeddingGenerator:
        with self.task.device:
            generator = EmbeddingGenerator(self.embeddings.shape[1], self.task.image_shape, self.config.generator_width)
        return generator.to(memory_format=torch.channels_last)

    def _build_head(self, features: int) -> None:
        width = self.config.contrast_width
        with self.task.device:
            self.head = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width))
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=self.config.contrast_lr, fused=True)

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        later = schedule.epochs - schedule.warmup_epochs
        batches = schedule.warmup_epochs * config.warmup_loops + later * config.loops
        return batches * schedule.rounds_per_epoch * config.generator_steps * config.synthesis_batch_size

    @classmethod
    def batch_rows(cls, config: Any, size: int) -> int:
        return size + 2 * (size // 2) if config.contrast > 0 else size

    @classmethod
    def outside_knowledge(cls, config: Any) -> str | None:
        if config.encoder.partition(":")[0] in ("onehot", "random"):
            return "none"
        return None if names_classes(config.prompt) else "a text encoder (index prompt)"


def diffuse(embedded: Tensor, magnitude: Tensor | float, noise: Tensor) -> Tensor:
    """Category embedding noise diffusion: ``embedded + magnitude * noise``, element by element (paper)."""
    return embedded + magnitude * noise


def draw_noise(sources: Tensor, width: int, rng: torch.Generator) -> Tensor:
    """Noise [b, width] of mean 0 and variance 1, row by row from Gaussian (0), uniform (1), Laplace (2), signs (3)."""
    shape, device = (sources.shape[0], width), sources.device
    gaussian = torch.randn(shape, device=device, generator=rng)
    uniform = math.sqrt(3) * (2 * torch.rand(shape, device=device, generator=rng) - 1)
    one, other = torch.empty((2, *shape), device=device).exponential_(generator=rng)
    signs = 2.0 * torch.randint(2, shape, device=device, generator=rng) - 1
    laplace = (one - other) / math.sqrt(2)
    return torch.stack([gaussian, uniform, laplace, signs])[sources, torch.arange(shape[0], device=device)]


def balanced_labels(size: int, classes: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """``size`` labels [size], the classes in turn from a random one on, so that none has two more than another."""
    first = torch.randint(classes, (1,), device=device, generator=rng)
    return (first + torch.arange(size, device=device)) % classes


def _as_nayer(schedule: Schedule, **config: Any) -> Published:
    source = "the paper's are unknown; NAYER's for this data set (tmtuan1307/NAYER, scripts/nayer_100.sh)"
    return Published(schedule=schedule, config=config, origin="ours", source=source)


_CIFAR = Schedule(epochs=120, warmup_epochs=20, student_steps=400, batch_size=512, lr=0.2, lr_min=2e-4)
_TINY = Schedule(epochs=120, warmup_epochs=20, student_steps=1000, batch_size=256, lr=0.1, lr_min=2e-4)
CaeDfkd.published = {
    "cifar10": _as_nayer(_CIFAR, generator_steps=30),
    "cifar100": _as_nayer(_CIFAR, generator_steps=40),
    "tiny_imagenet": _as_nayer(_TINY, synthesis_batch_size=200, generator_steps=60, loops=4, warmup_loops=20),
}
CaeDfkd.equal_lr = {"digits": 0.1}  # results/trials/digits_equal.json
CaeDfkd.search = {
    "contrast": (0.1, 0.3, 1.0),
    "noise_scale": (0.3, 0.5),
    "generator_steps": (10, 20),
    "loops": (1, 2),
    "generator_lr": (4e-3, 1e-2),
    "batchnorm": (1.0, 10.0),
    "lr": (0.05, 0.1, 0.2),
}
_SMALL = {"encoder": "sbert", "synthesis_batch_size": 100, "generator_width": 32, "generator_steps": 20}
CaeDfkd.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=10, warmup_epochs=2, student_steps=30, batch_size=128, lr=0.1, lr_min=2e-4),
        config={
            **_SMALL,
            "warmup_loops": 4,
            "generator_lr": 0.01,
            "noise_scale": 0.5,
            "contrast": 0.3,
            "generator_steps": 10,
            "loops": 2,
            "batchnorm": 10.0,
        },
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=23, warmup_epochs=3, student_steps=100, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            **_SMALL,
            "warmup_loops": 4,
            "generator_lr": 0.004,
            "noise_scale": 0.5,
            "contrast": 1.0,
            "generator_steps": 10,
            "loops": 2,
            "batchnorm": 1.0,
        },
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=12, warmup_epochs=2, student_steps=30, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            **_SMALL,
            "warmup_loops": 4,
            "generator_lr": 0.01,
            "noise_scale": 0.5,
            "contrast": 1.0,
            "generator_steps": 20,
            "loops": 2,
            "batchnorm": 10.0,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
