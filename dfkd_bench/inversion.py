"""Inversion through a generator: a batch of images is made by optimising the generator, not by drawing from it.

The generator's steps lower one loss: statistics and labels that the teacher should see, and a student that should
disagree with it. The images of the step with the lowest loss are kept. Source: CMI (IJCAI 2021), section 3;
zju-vipa/CMI, datafree/synthesis/contrastive.py; the same in zju-vipa/Fast-Datafree and tmtuan1307/NAYER.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from dfkd_bench.augment import random_crop_flip
from dfkd_bench.losses import cross_entropy, masked_adversarial
from dfkd_bench.method import Task
from dfkd_bench.statistics import BatchNormMatcher


class Weights(Protocol):
    """Settings that ``inversion_loss`` reads: the weights of its terms."""

    @property
    def batchnorm(self) -> float: ...
    @property
    def onehot(self) -> float: ...
    @property
    def adversarial(self) -> float: ...


class Settings(Weights, Protocol):
    """Settings that ``invert`` reads, too: steps, and the learning rate of its Adam."""

    @property
    def generator_steps(self) -> int: ...
    @property
    def generator_lr(self) -> float: ...


class BestStep:
    """The tensors of the step with the lowest loss so far, chosen on the device: the host waits for nothing.

    Of equal losses the first counts. ``loss``: 0-d; ``tensors``: what was offered with it, without graph.
    """

    def __init__(self) -> None:
        self.loss = torch.empty(0)
        self.tensors: list[Tensor] = []

    def offer(self, loss: Tensor, *tensors: Tensor) -> None:
        """Keep ``tensors`` if ``loss`` is the lowest yet. They are not copied: they must not change in place later."""
        loss, new = loss.detach(), [tensor.detach() for tensor in tensors]
        if not self.tensors:
            self.loss, self.tensors = loss, new
            return
        lower = loss < self.loss
        self.tensors = [torch.where(lower, *pair) for pair in zip(new, self.tensors, strict=True)]
        self.loss = torch.minimum(loss, self.loss)


def inversion_loss(
    task: Task, matcher: BatchNormMatcher, weights: Weights, view: Tensor, labels: Tensor, opponent: nn.Module | None
) -> Tensor:
    """BatchNorm matching, cross entropy to ``labels`` [b] and, with an ``opponent``, the masked adversarial term; 0-d.

    ``view``: normalised images [b, C, H, W], seen by teacher and opponent. ``matcher`` must be watching.
    """
    logits = task.teacher(view)
    loss = weights.batchnorm * matcher.loss() + weights.onehot * cross_entropy(logits, labels)
    if opponent is not None:
        loss = loss + weights.adversarial * masked_adversarial(opponent(view), logits)
    return loss


def invert(
    generator: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    task: Task,
    matcher: BatchNormMatcher,
    settings: Settings,
    opponent: nn.Module | None,
) -> BestStep:
    """Fit ``generator`` to its fixed ``inputs`` [b, ...] and their ``labels`` [b] by the steps of one fresh Adam.

    Returns the images [b, C, H, W] in [0, 1] of the best step, neither augmented nor normalised, from before that
    step's update. Each step's loss sees them under a random crop and flip. ``matcher`` remembers the last step.
    """
    best = BestStep()
    optimizer = torch.optim.Adam(generator.parameters(), lr=settings.generator_lr, betas=(0.5, 0.999), fused=True)
    with matcher.watching():
        for _ in range(settings.generator_steps):
            images = generator(inputs)
            view = task.normalize(random_crop_flip(images, task.crop_padding, task.flip_keeps_class, task.rng))
            loss = inversion_loss(task, matcher, settings, view, labels, opponent)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            best.offer(loss, images)
            optimizer.step()
    matcher.update()
    return best
