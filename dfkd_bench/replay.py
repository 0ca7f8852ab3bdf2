"""Replay: a generator that looks for what the student gets wrong, and old images beside its new ones.

PRE-DFKD, MB-DFKD and KAKR have one generator, one student loss and one rule for the batches; they differ in where the
old images come from. ``ReplayMethod`` is what all three do, ``BatchStore`` keeps images, ``AutoencoderReplay`` makes
them again by an autoencoder that has learnt them. Source: kuluhan/PRE-DFKD, distillation.py; gaurav104/LRA, src/agents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
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
from dfkd_bench.method import Batch, Method, PoolView, Progress, Schedule, Synthesis, Task
from dfkd_bench.taps import tapped

Opponent = partial(EarlyGenerator, spectral=True)
"""The generator of all three methods."""


def build(config: Any, task: Task, *kinds: Callable[..., nn.Module]) -> list[nn.Module]:
    """Networks on the task's device: all are built before the first one's weights are drawn (``uniform_``)."""
    with task.device:
        networks = [kind(config.latent_dim, task.image_shape, config.generator_width) for kind in kinds]
        for network in networks:
            uniform_(network)
    return [network.to(memory_format=torch.channels_last) for network in networks]


class BatchStore:
    """The newest ``capacity`` batches of images, one of every ``every``-th epoch, beginning with the first: its last.

    Images as the student gets them, [b, C, H, W], on their device.
    """

    def __init__(self, capacity: int, every: int) -> None:
        self.capacity, self.every = capacity, every
        self.batches: list[Tensor] = []
        self.latest: Tensor | None = None  # of the current epoch, so far

    def begin(self, epoch: int) -> None:
        """A new epoch, from 0: what ``note`` kept last is stored if it is of an epoch whose turn it was."""
        if self.latest is not None and (epoch - 1) % self.every == 0:
            self.batches = [*self.batches, self.latest][-self.capacity :]
        self.latest = None

    def note(self, images: Tensor) -> None:
        """Keep ``images`` until the next ones come or the epoch ends."""
        self.latest = images.clone()

    def draw(self, rng: torch.Generator) -> Tensor | None:
        """One stored batch at random; None before the first one."""
        if not self.batches:
            return None
        number = torch.randint(len(self.batches), (1,), device=rng.device, generator=rng)
        return torch.stack(self.batches).index_select(0, number)[0]

    def state_dict(self) -> dict[str, Any]:
        """Stored batches and the one of the current epoch."""
        return {"batches": self.batches, "latest": self.latest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.batches, self.latest = list(state["batches"]), state["latest"]


class ReplayMethod(Method):
    """One persistent generator of normalised images; ``generator_steps`` steps a call, and no pool.

    The ``Config`` has ``synthesis_batch_size``, ``latent_dim``, ``generator_steps``, ``generator_lr``,
    ``generator_width``, ``replay_divisor``, ``student_eval`` and the weights ``onehot``, ``balance``, ``activation``
    and ``adversarial``.
    """

    absorbs = "generator_steps"

    def __init__(self, config: Any, task: Task, generator: nn.Module) -> None:
        super().__init__(config, task)
        self.generator = generator
        self.optimizer = torch.optim.Adam(generator.parameters(), lr=config.generator_lr, fused=True)

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        loss = torch.zeros(())
        student.train(not self.config.student_eval)
        for _ in range(self.config.generator_steps):
            loss = self._loss(self.generator(self._draw(self.config.synthesis_batch_size)), student)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        student.eval()
        return Synthesis(None, scalars={"synthesis_loss": loss.detach()})

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        """Mean absolute difference of the logits, new and old images alike."""
        return logit_distance(student(batch.images), self.task.teach(batch.images))

    def _new(self, size: int) -> Tensor:
        """``size`` images of the generator as it is now, without graph."""
        with torch.no_grad():
            images: Tensor = self.generator(self._draw(size))
        return images

    def _loss(self, images: Tensor, student: nn.Module) -> Tensor:
        """What the teacher says of images like its own, and the student's agreement with it; 0-d."""
        with tapped(self.task.teacher.classifier) as penultimate:
            logits = self.task.teacher(images)
        return (
            self._class_prior(logits)
            + self.config.activation * activation(penultimate[-1])
            + self.config.adversarial * bounded_agreement(student(images), logits.detach())
        )

    def _class_prior(self, logits: Tensor) -> Tensor:
        """The teacher should be sure of its ``logits`` [b, K] and use all classes alike; 0-d."""
        return self.config.onehot * confidence(logits) + self.config.balance * class_balance(logits, 10)

    def _share(self, size: int) -> int:
        """Old images to ``size`` new ones; BatchNorm needs two."""
        return _share(self.config, size)

    def _draw(self, size: int) -> Tensor:
        return torch.randn(size, self.config.latent_dim, device=self.task.device, generator=self.task.rng)

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        return schedule.rounds * config.generator_steps * config.synthesis_batch_size

    @classmethod
    def batch_rows(cls, config: Any, size: int) -> int:
        return size + _share(config, size)


class AutoencoderReplay(ReplayMethod):
    """Old images are those of a variational autoencoder that learns the new ones and goes on learning its own.

    The ``Config`` has also ``memory_steps``, ``memory_lr``, ``latent_lr``, ``kl`` and ``tuning_trains_memory``.
    """

    def __init__(self, config: Any, task: Task) -> None:
        generator, memory = build(config, task, Opponent, MemoryGenerator)
        super().__init__(config, task, generator)
        self.memory: Any = memory
        self.memory_optimizer = torch.optim.Adam(memory.parameters(), lr=config.memory_lr, fused=True)
        self.student_steps = 0  # of the current round

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        self.student_steps = 0
        return super().synthesize(student, at)

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """``size`` new images and the memory's share, which comes on top."""
        new = self._new(size)
        self.memory.eval()
        return joined(new, self._replayed(size, train_decoder=False))

    def after_student_step(self, student: nn.Module, batch: Batch, at: Progress) -> None:
        """In the first student steps of a round the memory learns half of the new images, and its own."""
        self.student_steps += 1
        if self.student_steps <= self.config.memory_steps:
            nothing_to_remember = at.epoch == at.warmup_epochs and at.round == 0
            self._memory_step(batch.images[batch.parts["new"]], replay=not nothing_to_remember)

    def _replayed(self, size: int, train_decoder: bool) -> Tensor:
        """The memory's images that join ``size`` new ones."""
        latents = self._draw(self._share(size))
        images: Tensor = self.memory.recall(latents, self._tuning_loss, self.config.latent_lr, train_decoder)
        return images

    def _tuning_loss(self, latents: Tensor, images: Tensor) -> Tensor:
        return self._class_prior(self.task.teacher(images)) + latent_moments(latents)

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


def joined(new: Tensor, old: Tensor | None) -> Batch:
    """A student batch of ``new`` images and, behind them, ``old`` ones, if there are any: parts "new" and "replay"."""
    images = new if old is None else torch.cat([new, old])
    rows = new.shape[0]
    return Batch(images, parts={"new": slice(0, rows), "replay": slice(rows, images.shape[0])})


def _share(config: Any, size: int) -> int:
    return max(2, size // config.replay_divisor)
