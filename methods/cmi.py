"""CMI: Contrastive Model Inversion for Data-Free Knowledge Distillation.

Gongfan Fang, Jie Song, Xinchao Wang, Chengchao Shen, Xingen Wang, Mingli Song; IJCAI 2021.
https://arxiv.org/abs/2105.08584, code: https://github.com/zju-vipa/CMI

Every batch is inverted through a generator drawn anew, as in DeepInversion. A contrastive loss on the teacher's
features makes each new image different from the others of its batch and from those of earlier batches, whose features
are kept in a memory bank.

Differences from the paper
1. 200 generator steps a batch as in the released scripts; the paper's "CMI-500" takes 500.
2. The contrast has one direction, from a local to a global view, with detached keys; the means over new and over
   cached rows are added, as in the released code.
3. Training starts from scratch. The published 90.01 % (CIFAR-10, wrn40_2 to wrn16_1) start from some 50,000 images
   inverted beforehand; from scratch the authors report 88.82 %. ``initial_images`` names a folder of such images.

Differences from the released code
1. A bank that has just been filled to the brim is full: the released test for it finds no rows to draw at that one
   call, gets a NaN and stores what the untrained generator made.
2. The size of the bank need not be a multiple of the batch.
3. ``contrast=0`` needs neither local views nor a bank; it is an error in zju-vipa/Fast-Datafree.
4. A teacher of the ResNet family is tapped at the inputs of its four stages; the released rule names ResNet-34 alone.
5. Images of a data set whose classes a flip would change, such as digits, are not flipped.
6. Losses and the choice of the best step stay on the device.
7. Initial images are read once and lie in the pool, as its oldest; the released loader reads their folder beside that
   of the pool. Neither puts them into the bank.
8. A local view may span the image's full height or width; kornia's draw accepts smaller parts alone. At 32x32 that is
   about one view in twelve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.ahead import spare_memory
from dfkd_bench.augment import random_crop_flip, random_resized_crop_flip, to_unit
from dfkd_bench.generators import Generator
from dfkd_bench.inversion import BestStep, inversion_loss
from dfkd_bench.losses import contrastive
from dfkd_bench.method import Method, MethodConfig, Origin, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.statistics import BatchNormMatcher
from dfkd_bench.taps import tapped

HOST = torch.device("cpu")

CARD = {
    "title": "CMI: model inversion with a contrastive memory bank",
    "family": "pool",
    "year": 2021,
    "venue": "IJCAI",
    "confirmed": True,
    "knowledge": "none",
}


class CmiConfig(MethodConfig):
    """Defaults: zju-vipa/CMI, scripts/cmi/scratch_cmi_cifar10_wrn402_wrn161.sh and datafree_kd.py."""

    synthesis_batch_size: int = Field(256, ge=2, le=100_000, description="images a call (script)")
    latent_dim: int = Field(256, ge=1, description="width of the latent vectors; `nz` (code)")
    generator_steps: int = Field(200, ge=1, le=100_000, description="steps a call; `g_steps` (script)")
    generator_lr: float = Field(1e-3, gt=0, le=10, description="Adam on generator, latents and head; `lr_g` (script)")
    adversarial: float = Field(0.5, ge=0, description="weight of the masked adversarial term; `adv` (script)")
    batchnorm: float = Field(1.0, ge=0, description="weight of the BatchNorm matching; `bn` (script)")
    onehot: float = Field(1.0, ge=0, description="weight of the cross entropy to random labels; `oh` (script)")
    contrast: float = Field(0.8, ge=0, description="weight of the contrastive loss; `cr` (script)")
    contrast_temperature: float = Field(0.1, gt=0, le=100, description="of the contrastive loss; `cr_T` (script)")
    bank_size: int = Field(40_960, ge=1, description="images kept in the bank, 8 bytes a feature (code)")
    negatives: int = Field(4096, ge=1, description="rows drawn from the bank a step; `n_neg` (code)")
    contrast_width: int = Field(256, ge=1, description="outputs of the projection head (code)")
    generator_width: int = Field(64, ge=1, description="base width of the convolutions; `ngf` (code)")
    initial_images: str | None = Field(
        None, min_length=1, description="folder of images made beforehand, for the pool; null: none; `cmi_init` (code)"
    )


class Bank:
    """The newest ``size`` rows [width] ever added. ``written``: rows ever added.

    On the device if they take no more than half of what is free there, else in host memory, where the host gathers
    what is drawn in every step.
    """

    def __init__(self, size: int, width: int, device: torch.device = HOST) -> None:
        self.written = 0
        spare = spare_memory(device)
        place = HOST if spare is not None and 2 * 4 * size * width > spare else device
        self._rows = torch.empty(size, width, device=place)  # a CPU's system gives memory to what is written only

    def __len__(self) -> int:
        return min(self.written, self._rows.shape[0])

    def add(self, rows: Tensor) -> None:
        """Store ``rows`` [n, width], over the oldest ones if there is no room left."""
        self.written += rows.shape[0]
        newest = rows[-self._rows.shape[0] :].detach().float().to(self._rows.device)
        places = torch.arange(self.written - newest.shape[0], self.written, device=newest.device)
        self._rows[places % self._rows.shape[0]] = newest

    def draw(self, count: int, device: torch.device = HOST) -> Tensor:
        """Up to ``count`` different rows on ``device``, by torch's global stream of the CPU wherever they lie."""
        numbers = torch.randperm(len(self))[:count]
        return _sent(self._rows[_sent(numbers, self._rows.device)], device)

    def state_dict(self) -> dict[str, Any]:
        """The rows that were written, and how many were ever."""
        return {"rows": self._rows[: len(self)], "written": self.written}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.written = state["written"]
        self._rows[: len(self)] = state["rows"].to(self._rows.device)


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; a copy from memory that isn't pinned would wait for the device."""
    if values.device.type == device.type:  # a run has one device
        return values
    return values.pin_memory().to(device, non_blocking=True)


class Cmi(Method):
    """The method. One call makes one batch with a new generator; head and bank live on. The first one also hands over
    the initial images."""

    Config = CmiConfig
    needs = frozenset({"batchnorm", "initial_images"})
    absorbs = "generator_steps"
    tiny: ClassVar = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_steps": 2, "generator_width": 4}
    tiny |= {"bank_size": 30, "negatives": 16, "contrast_width": 8}
    transient = frozenset({"layers"})  # modules of the teacher

    def __init__(self, config: CmiConfig, task: Task) -> None:
        super().__init__(config, task)
        self.matcher = BatchNormMatcher(task.teacher)
        self.layers = feature_layers(task.teacher)
        with torch.no_grad(), spatial_means(self.layers) as means:
            task.teacher(torch.zeros(1, *task.image_shape, device=task.device))
        width = sum(mean.shape[1] for mean in means)
        self.bank = Bank(config.bank_size, 2 * width, task.device)
        with task.device:
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.contrast_width))
        self.head_optimizer = torch.optim.Adam(self.head.parameters(), lr=config.generator_lr, fused=True)

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        task, config = self.task, self.config
        size = config.synthesis_batch_size
        labels = torch.randint(task.num_classes, (size,), device=task.device, generator=task.rng).sort().values
        latent = torch.randn(size, config.latent_dim, device=task.device, generator=task.rng).requires_grad_()
        with task.device:
            generator = Generator(config.latent_dim, task.image_shape, config.generator_width)
        reinitialize(generator.to(memory_format=torch.channels_last))
        optimizer = torch.optim.Adam(
            [*generator.parameters(), latent], lr=config.generator_lr, betas=(0.5, 0.999), fused=True
        )
        best = BestStep()
        for _ in range(config.generator_steps):
            images = generator(latent)
            loss, pairs = self._loss(images, labels, student)
            optimizer.zero_grad(set_to_none=True)
            self.head_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            best.offer(loss, images, pairs)
            optimizer.step()
            self.head_optimizer.step()
        made, pairs = best.tensors
        if config.contrast > 0:
            self.bank.add(pairs)
        if task.initial_images is not None and at.epoch == 0 and at.round == 0:
            made = torch.cat([to_unit(task.initial_images), made])
        return Synthesis(made, scalars={"synthesis_loss": best.loss})

    def _loss(self, images: Tensor, labels: Tensor, student: nn.Module) -> tuple[Tensor, Tensor]:
        """The loss, and the features of both views [B, 2D] (local, global), detached; [B, 0] without contrast."""
        task, config = self.task, self.config
        view = task.normalize(random_crop_flip(images, task.crop_padding, task.flip_keeps_class, task.rng))
        opponent = student if config.adversarial > 0 else None
        with self.matcher.watching(), spatial_means(self.layers) as means:
            loss = inversion_loss(task, self.matcher, config, view, labels, opponent)
        if config.contrast == 0:
            return loss, images.new_empty(images.shape[0], 0)
        whole = torch.cat(means, dim=1).detach()
        with spatial_means(self.layers) as means:
            task.teacher(task.normalize(random_resized_crop_flip(images, task.flip_keeps_class, task.rng)))
        local = torch.cat(means, dim=1)
        return loss + config.contrast * self._contrast(local, whole), torch.cat([local.detach(), whole], dim=1)

    def _contrast(self, local: Tensor, whole: Tensor) -> Tensor:
        """New and cached local views against the global ones; gradient to ``local`` [B, D] and to the head, 0-d."""
        config = self.config
        cached_local, cached_whole = self.bank.draw(config.negatives, local.device).chunk(2, dim=1)
        queries = self.head(torch.cat([local, cached_local]))
        with torch.no_grad():
            keys = self.head(torch.cat([whole, cached_whole]))
        return contrastive(queries, keys, config.contrast_temperature, fresh=local.shape[0])

    @classmethod
    def generation_cost(cls, config: CmiConfig, schedule: Schedule, num_classes: int) -> int:
        views = 2 if config.contrast > 0 else 1  # the contrast sees a local view, too
        return views * schedule.rounds * config.generator_steps * config.synthesis_batch_size

    @classmethod
    def outside_knowledge(cls, config: CmiConfig) -> str | None:
        return None if config.initial_images is None else "images made beforehand"


def spatial_means(layers: Sequence[nn.Module]) -> AbstractContextManager[list[Tensor]]:
    """Inside the ``with`` every forward pass of one of ``layers`` appends the spatial mean [b, c] of its input."""

    return tapped(*layers, keep=_SpatialMean.apply)


class _SpatialMean(torch.autograd.Function):
    """[b, c, h, w] to [b, c] in fp32 or better. Torch's own backward writes one gradient a channel into every pixel, in
    fp32, and copies that into the activation's type; here it is spread without being written: the same numbers."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = features.shape, features.dtype
        return features.mean(dim=(2, 3), dtype=torch.promote_types(features.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        each = (gradients[0] / (ctx.shape[2] * ctx.shape[3])).to(ctx.dtype)
        return each[:, :, None, None].expand(ctx.shape)


def feature_layers(teacher: nn.Module) -> list[nn.Module]:
    """The layers whose inputs are the features: the four stages of a ResNet, else all BatchNorm2d layers."""
    children = dict(teacher.named_children())
    stages = [children[name] for name in ("layer1", "layer2", "layer3", "layer4") if name in children]
    return stages if len(stages) == 4 else [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]


def reinitialize(generator: nn.Module) -> None:
    """Weights N(0, 0.02), those of BatchNorm N(1, 0.02), biases 0."""
    with torch.no_grad():
        for module in generator.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                module.weight.normal_(1.0 if isinstance(module, nn.BatchNorm2d) else 0.0, 0.02)
                if module.bias is not None:
                    module.bias.zero_()


def _script(origin: Origin, source: str, batch: int, synthesised: int) -> Published:
    return Published(
        schedule=Schedule(epochs=200, student_steps=400, batch_size=batch, lr=0.1, weight_decay=1e-4, lr_min=0.0),
        config={"synthesis_batch_size": synthesised},
        origin=origin,
        source=source,
    )


FORK = "ljrprocc/DFKD, scripts/cmi/scratch_cmi_cifar10"  # a fork of zju-vipa/CMI
Cmi.published = {
    "cifar10/wrn40_2:wrn16_1": _script(
        "code", "zju-vipa/CMI, scripts/cmi/scratch_cmi_cifar10_wrn402_wrn161.sh", 128, 256
    ),
    "cifar10/wrn40_2:wrn16_2": _script("third-party", f"{FORK}_wrn402_wrn162.sh", 256, 512),
    "cifar10/wrn40_2:wrn40_1": _script("third-party", f"{FORK}_wrn402_wrn401.sh", 256, 512),
    "cifar10/resnet34:resnet18": _script("third-party", f"{FORK}_resnet34_resnet18.sh", 256, 512),
    "cifar10/vgg11:resnet18": _script("third-party", f"{FORK}_vgg11_resnet18.sh", 256, 512),
}
Cmi.equal_lr = {"digits": 0.1}  # results/trials/digits_equal.json
Cmi.search = {
    "generator_steps": (20, 45),
    "generator_lr": (2e-3, 5e-3, 1e-2),
    "batchnorm": (1.0, 10.0),
    "adversarial": (0.0, 0.5),
    "contrast": (0.0, 0.2, 0.8),
    "contrast_temperature": (0.1, 0.2),
    "lr": (0.05, 0.1, 0.2),
}
Cmi.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=8, student_steps=30, batch_size=128, lr=0.1, lr_min=2e-4),
        config={
            "synthesis_batch_size": 64,
            "generator_width": 32,
            "generator_steps": 45,
            "generator_lr": 0.005,
            "negatives": 64,
            "batchnorm": 10.0,
            "adversarial": 0.0,
            "contrast": 0.8,
            "contrast_temperature": 0.1,
        },
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=20, student_steps=100, batch_size=128, lr=0.1, lr_min=2e-4),
        config={
            "synthesis_batch_size": 64,
            "generator_width": 32,
            "generator_steps": 45,
            "generator_lr": 0.005,
            "negatives": 64,
            "batchnorm": 1.0,
            "adversarial": 0.5,
            "contrast": 0.8,
            "contrast_temperature": 0.2,
        },
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=10, student_steps=30, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 64,
            "generator_width": 32,
            "generator_steps": 20,
            "generator_lr": 0.002,
            "negatives": 64,
            "batchnorm": 1.0,
            "adversarial": 0.5,
            "contrast": 0.2,
            "contrast_temperature": 0.2,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
# Since the first of these the bank lies on a GPU where there is room; since the second spatial means have a backward of
# their own. On a CPU nothing has changed.
Cmi.same_results = (
    "150f4f059e1060ff4fa4e1ffba082bbe659f30a28cf07ee2e8f4ca38288dd44f",
    "f3567b903dd3f19529b320809b55f59972e942b9bdd9724f3f3e4b4641963574",
)
