"""PRE-DFKD: Robust and Resource-Efficient Data-Free Knowledge Distillation by Generative Pseudo Replay.

Kuluhan Binici, Shivam Aggarwal, Nam Trung Pham, Karianto Leman, Tulika Mitra; AAAI 2022.
https://arxiv.org/abs/2201.03019, code: https://github.com/kuluhan/PRE-DFKD

A generator looks for images that please the teacher and on which the student disagrees; a variational autoencoder
remembers what it has made so far, and its decoder's images join every student batch, so that nothing is forgotten.

Differences from the paper
1. The autoencoder reproduces pixels and the teacher's logits, not its features, as in the released code.
2. The gradient of the latents' tuning stays on the decoder and is part of its next step, as in the released code; the
   paper does not speak of it. ``tuning_trains_memory=false`` does without.

Differences from the released code
1. Student steps do not run backward through the generator: the released images keep a graph that nothing uses.
2. The class balance is computed in logarithms: a class that is never predicted gives 0, not NaN.
3. The task's own normalisation is used; the released code normalises CIFAR-100 with CIFAR-10's constants.
4. Where 8 does not divide the side of the images, the encoder's strides round up instead of down.
5. In the generator's step the student is in train mode, where its BatchNorm statistics move: this released behaviour
   made the published numbers and is the default; ``student_eval=true`` keeps it in eval mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.generators import EarlyGenerator, MemoryGenerator, uniform_
from dfkd_bench.losses import (
    activation,
    bounded_agreement,
    class_balance,
    confidence,
    latent_moments,
    logit_distance,
    normal_kl,
)
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task

CARD = {
    "title": "PRE-DFKD: a generator and a variational autoencoder that replays its past",
    "family": "generator",
    "year": 2022,
    "venue": "AAAI",
    "confirmed": True,
    "knowledge": "none",
}


class Config(MethodConfig):
    """Defaults: the released script for CIFAR-100 (main.py)."""

    temperature: float = Field(1.0, ge=1, le=1, description="1: the student's distance of logits has no temperature")
    synthesis_batch_size: int = Field(1024, ge=2, le=100_000, description="images a generator step; `batch_size`")
    latent_dim: int = Field(1000, ge=1, description="width of the latent vectors; `latent_dim` (code)")
    generator_steps: int = Field(1, ge=1, le=100_000, description="generator steps a round; `gen_iter` (code)")
    generator_lr: float = Field(0.02, gt=0, le=10, description="Adam on the generator; `lr_G` (code)")
    onehot: float = Field(1.0, ge=0, description="weight of the cross entropy to the own argmax; `oh` (code)")
    balance: float = Field(5.0, ge=0, description="weight of the class balance in base-10 logarithms; `ie` (code)")
    activation: float = Field(0.1, ge=0, description="weight of the activation term; `a` (code)")
    adversarial: float = Field(1.0, ge=0, description="weight of the disagreement (code: 1)")
    replay_divisor: int = Field(8, ge=1, description="one replayed image to so many new ones (code: 8)")
    memory_steps: int = Field(4, ge=1, description="memory steps a round, one after each of the first student steps")
    memory_lr: float = Field(5e-4, gt=0, le=10, description="Adam on encoder and decoder; `lr_G` / 40 (code)")
    latent_lr: float = Field(0.02, gt=0, le=10, description="one Adam step on replayed latents; `lr_G` (code)")
    kl: float = Field(1e-5, ge=0, description="weight of the autoencoder's KL divergence (code)")
    tuning_trains_memory: bool = Field(
        True, description="the gradient of the latents' tuning is part of the decoder's step (so in the released code)"
    )
    student_eval: bool = Field(
        False, description="student in eval mode in the generator's step (not so in the released code: false)"
    )
    generator_width: int = Field(64, ge=1, description="base width of the convolutions (code)")


@contextmanager
def tapped(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Inside the ``with`` every forward call of ``layer`` appends its input to the list."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _layer, given: inputs.append(given[0]))
    try:
        yield inputs
    finally:
        handle.remove()


class PreDfkd(Method):
    """The method. One call takes ``generator_steps`` steps of one persistent generator; no image is kept."""

    Config = Config
    quirks: ClassVar = {
        "student_unchanged_by_synthesis": "in the generator's step the released code leaves the student in train mode, "
        "so that its BatchNorm statistics move; student_eval=true does without",
        "student_batch_range": "the generators end in tanh and a BatchNorm: their images have the mean and variance of "
        "normalised images, but not their range",
    }
    absorbs = "generator_steps"
    described: ClassVar = {"student_eval": True, "tuning_trains_memory": False}
    tiny: ClassVar = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4, "memory_steps": 2}

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        size = config.latent_dim, task.image_shape, config.generator_width
        with task.device:
            generator, memory = EarlyGenerator(*size, spectral=True), MemoryGenerator(*size)
            uniform_(generator)
            uniform_(memory)
        self.generator = generator.to(memory_format=torch.channels_last)
        self.memory = memory.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr, fused=True)
        self.memory_optimizer = torch.optim.Adam(self.memory.parameters(), lr=config.memory_lr, fused=True)
        self.student_steps = 0  # of the current round

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        loss = torch.zeros(())
        self.student_steps = 0
        student.train(not self.config.student_eval)
        for _ in range(self.config.generator_steps):
            loss = self._loss(self.generator(self._draw(self.config.synthesis_batch_size)), student)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        student.eval()
        return Synthesis(None, scalars={"synthesis_loss": loss.detach()})

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """``size`` new images and the memory's share, which comes on top."""
        with torch.no_grad():
            new = self.generator(self._draw(size))
        self.memory.eval()
        images = torch.cat([new, self._replayed(size, train_decoder=False)])
        return Batch(images, parts={"new": slice(0, size), "replay": slice(size, images.shape[0])})

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        """Mean absolute difference of the logits, new and replayed images alike."""
        return logit_distance(student(batch.images), self.task.teach(batch.images))

    def after_student_step(self, student: nn.Module, batch: Batch, at: Progress) -> None:
        """In the first student steps of a round the memory learns half of the new images, and its own."""
        self.student_steps += 1
        if self.student_steps <= self.config.memory_steps:
            new = batch.images[batch.parts["new"]]
            nothing_to_remember = at.epoch == at.warmup_epochs and at.round == 0
            self._memory_step(new, replay=not nothing_to_remember)

    def _loss(self, images: Tensor, student: nn.Module) -> Tensor:
        config = self.config
        with tapped(self.task.teacher.classifier) as penultimate:
            logits = self.task.teacher(images)
        return (
            config.onehot * confidence(logits)
            + config.balance * class_balance(logits, 10)
            + config.activation * activation(penultimate[-1])
            + config.adversarial * bounded_agreement(student(images), logits.detach())
        )

    def _replayed(self, size: int, train_decoder: bool) -> Tensor:
        """The memory's images that join ``size`` new ones."""
        latents = self._draw(max(2, size // self.config.replay_divisor))
        return self.memory.recall(latents, self._tuning_loss, self.config.latent_lr, train_decoder)

    def _tuning_loss(self, latents: Tensor, images: Tensor) -> Tensor:
        logits = self.task.teacher(images)
        prior = self.config.onehot * confidence(logits) + self.config.balance * class_balance(logits, 10)
        return prior + latent_moments(latents)

    def _memory_step(self, new: Tensor, replay: bool) -> None:
        """One step of the autoencoder; ``new``: a student batch's new images."""
        self.memory.train()
        self.memory_optimizer.zero_grad(set_to_none=True)
        images = new[: new.shape[0] // 2]
        if replay:
            images = torch.cat([images, self._replayed(new.shape[0], self.config.tuning_trains_memory)])
        remembered, mean, log_variance = self.memory(images, self._draw(images.shape[0]))
        pixels = (remembered - images).abs().mean()
        logits = logit_distance(self.task.teacher(remembered), self.task.teach(images))
        (pixels + logits + self.config.kl * normal_kl(mean, log_variance)).backward()
        self.memory_optimizer.step()

    def _draw(self, size: int) -> Tensor:
        return torch.randn(size, self.config.latent_dim, device=self.task.device, generator=self.task.rng)

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        return schedule.rounds * config.generator_steps * config.synthesis_batch_size

    @classmethod
    def batch_rows(cls, config: Any, size: int) -> int:
        return size + max(2, size // config.replay_divisor)


PreDfkd.published = {
    "cifar100/resnet34:resnet18": Published(
        schedule=Schedule(
            epochs=400, rounds_per_epoch=36, student_steps=10, batch_size=1024, lr=0.1, weight_decay=5e-4
        ),
        origin="code",
        source="kuluhan/PRE-DFKD, main.py (its only script)",
    ),
}
PreDfkd.search = {
    "generator_steps": (1, 3, 5),
    "generator_lr": (1e-3, 5e-3, 0.02),
    "balance": (5.0, 20.0),
    "activation": (0.0, 0.1),
    "adversarial": (1.0, 10.0),
    "latent_dim": (100, 1000),
    "lr": (0.05, 0.1, 0.2),
}
PreDfkd.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=20, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.1, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "latent_dim": 100,
            "generator_width": 32,
            "generator_steps": 5,
            "memory_steps": 2,
        },
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split",
    ),
}
