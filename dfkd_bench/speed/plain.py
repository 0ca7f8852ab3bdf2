"""NAYER's generator step and student step in plain PyTorch: eager, fp32, NCHW, one layer after the other.

The yardstick for the project's fast paths, written from the method's description, so that none of them is in it: hooks
that ask torch for mean and variance, a loop over the noisy layers, torch's default optimisers. It computes the same
numbers as the method with its default settings (a test compares them). Teacher and student are the project's own
networks in another layout: what is fast in their files is so here, too, so that ratios are rather too small.
Source: NAYER (CVPR 2024), section 3; the facts of the code from tmtuan1307/NAYER, datafree/synthesis/nayer.py and
datafree/hooks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_bench.method import Schedule, Task

METHOD = "nayer"
"""The method whose steps these are: the one that the tool measures unless told otherwise."""

LARGE = 128
"""Pixels: from here on the generator is the ladder for large images."""

Keep = Callable[[Tensor, Tensor, "Best | None"], "Best"]
"""Images and loss of a step, and the best so far -> the better of both."""

Best = tuple[Tensor, Any]


class PlainGenerator(nn.Module):
    """Embeddings [B, d] -> BatchNorm1d -> noisy layers, K rows each -> linear -> up-sampling convolutions -> images."""

    def __init__(
        self, image_shape: tuple[int, int, int], classes: int, inputs: int, rows: int, noisy_width: int, width: int
    ) -> None:
        super().__init__()
        channels, self.height, self.wide = image_shape
        large = self.height >= LARGE
        down = 16 if large else 4
        self.shape = (2 * width, -(-self.height // down), -(-self.wide // down))
        self.classes = classes
        self.norm = nn.BatchNorm1d(inputs)
        self.noisy = nn.ModuleList(nn.Linear(inputs, noisy_width) for _ in range(-(-rows // classes)))
        self.project = nn.Linear(noisy_width, self.shape[0] * self.shape[1] * self.shape[2])
        layers: list[nn.Module] = [] if large else [nn.BatchNorm2d(2 * width)]
        ladder = (2, 2, 2, 1, 1, 1) if large else (2, 2, 1)  # channels, in units of ``width``
        for level, (before, after) in enumerate(pairwise(ladder)):
            if level or not large:
                layers.append(nn.Upsample(scale_factor=2))
            layers.append(nn.Conv2d(before * width, after * width, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(after * width), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid())

    def reinitialize(self) -> None:
        """Draw the noisy layers anew: weights N(0, 1), biases 0."""
        for layer in self.noisy:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, embedded: Tensor) -> Tensor:
        """Images [B, C, H, W] in (0, 1)."""
        x = self.norm(embedded)
        x = torch.cat([layer(rows) for layer, rows in zip(self.noisy, x.split(self.classes), strict=True)])
        images: Tensor = self.body(self.project(x).view(-1, *self.shape))
        return images[:, :, : self.height, : self.wide]


class BatchNormHook:
    """What one BatchNorm layer of the teacher adds to the generator's loss, with remembered statistics."""

    def __init__(self, layer: nn.BatchNorm2d, momentum: float) -> None:
        self.momentum = momentum
        self.remembered: tuple[Tensor, Tensor] | None = None
        self.layer = layer
        self.mean, self.variance, self.loss = (torch.empty(0) for _ in range(3))

    def look(self, layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        """The forward hook."""
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        variance = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        self.mean, self.variance = mean.detach(), variance.detach()
        if self.remembered is not None:
            mean = self.momentum * self.remembered[0] + (1 - self.momentum) * mean
            variance = self.momentum * self.remembered[1] + (1 - self.momentum) * variance
        assert layer.running_mean is not None
        assert layer.running_var is not None
        self.loss = torch.norm(layer.running_var - variance, 2) + torch.norm(layer.running_mean - mean, 2)

    def update(self) -> None:
        """Remember the last forward pass."""
        if self.remembered is None:
            self.remembered = (self.mean, self.variance)
            return
        old, m = self.remembered, self.momentum
        self.remembered = (m * old[0] + (1 - m) * self.mean, m * old[1] + (1 - m) * self.variance)


class Plain:
    """Both steps. ``teacher`` and ``student`` are its own: fp32, made NCHW here."""

    def __init__(self, config: Any, schedule: Schedule, task: Task, teacher: nn.Module, student: nn.Module) -> None:
        self.config, self.task = config, task
        self.teacher = teacher.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
        self.student = student.to(memory_format=torch.contiguous_format)
        self.embeddings = task.label_embeddings(config.encoder, config.prompt)
        rows = config.synthesis_batch_size
        inputs = self.embeddings.shape[1]
        self.generator = PlainGenerator(
            task.image_shape, task.num_classes, inputs, rows, config.noisy_width, config.generator_width
        ).to(task.device)
        layers = [module for module in self.teacher.modules() if isinstance(module, nn.BatchNorm2d)]
        self.hooks = [BatchNormHook(layer, config.batchnorm_momentum) for layer in layers]
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            lr=schedule.lr,
            momentum=schedule.momentum,
            weight_decay=schedule.weight_decay,
        )

    def synthesize(self, keep: Keep, reinitialize: bool = True) -> Best:
        """One batch in ``generator_steps`` steps, after the warm-up: the images of its best step, and that loss."""
        config, task = self.config, self.task
        self.student.eval().requires_grad_(False)
        if reinitialize:
            self.generator.reinitialize()
        size, classes = config.synthesis_batch_size, task.num_classes
        rest = torch.randint(classes, (size % classes,), device=task.device)
        labels = torch.cat([torch.arange(classes, device=task.device).repeat(size // classes), rest])
        embedded = self.embeddings[labels]
        optimizer = torch.optim.Adam(self.generator.parameters(), lr=config.generator_lr, betas=(0.5, 0.999))
        best: Best | None = None
        handles = [hook.layer.register_forward_hook(hook.look) for hook in self.hooks]
        for _ in range(config.generator_steps):
            images = self.generator(embedded)
            loss = self.generator_loss(images, labels)
            best = keep(images.detach(), loss.detach(), best)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for hook, handle in zip(self.hooks, handles, strict=True):
            hook.update()
            handle.remove()
        self.student.train().requires_grad_(True)
        assert best is not None
        return best

    def generator_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """BatchNorm matching, cross entropy to the wanted class and the masked adversarial term; 0-d."""
        config, task = self.config, self.task
        view = self._normalize(crop_flip(images, task.crop_padding, task.flip_keeps_class))
        answers = self.teacher(view)
        matching = sum((hook.loss for hook in self.hooks), torch.zeros((), device=task.device))
        opinions = self.student(view)
        agree = (opinions.max(1)[1] == answers.max(1)[1]).float().detach()
        log_ratio = F.kl_div(F.log_softmax(opinions, 1), F.softmax(answers, 1), reduction="none").sum(1)
        adversarial = -(log_ratio * agree).mean()
        wanted = F.cross_entropy(answers, labels)
        loss: Tensor = config.batchnorm * matching + config.onehot * wanted + config.adversarial * adversarial
        return loss

    def teach(self, images: Tensor) -> Tensor:
        """The teacher's logits [b, K] of normalised images, no gradient."""
        with torch.no_grad():
            logits: Tensor = self.teacher(images)
        return logits

    def student_step(self, images: Tensor) -> Tensor:
        """One step on normalised images [b, C, H, W] that are at hand; the loss before it."""
        temperature = self.config.temperature
        answers = self.teach(images)
        loss = F.kl_div(
            F.log_softmax(self.student(images) / temperature, 1),
            F.softmax(answers / temperature, 1),
            reduction="batchmean",
        )
        loss = loss * temperature**2
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def evaluate(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """The student's classes [n] of uint8 images [n, C, H, W]."""
        self.student.eval()
        with torch.no_grad():
            parts = [self.student(self._normalize(part.float() / 255)).max(1)[1] for part in images.split(batch_size)]
        self.student.train()
        return torch.cat(parts)

    def _normalize(self, images: Tensor) -> Tensor:
        return (images - self.task.normalize.mean) / self.task.normalize.std


def keep_on_device(images: Tensor, loss: Tensor, best: Best | None) -> Best:
    """The better of both, chosen without asking the device."""
    if best is None:
        return images, loss
    return torch.where(loss < best[1], images, best[0]), torch.minimum(loss, best[1])


def crop_flip(images: Tensor, padding: int, flip: bool) -> Tensor:
    """Random crop after zero padding and random flip, each on its own, in one gather; [n, C, H, W] -> the same."""
    if padding == 0 and not flip:
        return images
    n, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=device).unbind()
    flips = torch.rand(n, 1, device=device) < 0.5
    rows = top + torch.arange(height, device=device)  # [n, H]
    columns = torch.arange(width, device=device)
    columns = left + (torch.where(flips, columns.flip(0), columns) if flip else columns)  # [n, W]
    padded = F.pad(images, [padding] * 4)
    source = rows.unsqueeze(2) * padded.shape[3] + columns.unsqueeze(1)  # [n, H, W]
    picked = padded.flatten(2).gather(2, source.view(n, 1, -1).expand(-1, channels, -1))
    return picked.view(images.shape)
