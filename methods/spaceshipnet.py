"""SpaceshipNet: Data-Free Knowledge Distillation via Feature Exchange and Activation Region Constraint.

Shikang Yu, Jiachen Chen, Hu Han, Shuqiang Jiang; CVPR 2023.
https://cvpr.thecvf.com/virtual/2023/poster/21071, code: https://github.com/skgyu/SpaceshipNet

The generator's hidden features of good images are kept; student batches are decoded from them after two images have
exchanged half of their channels (CFE). The student must also look where the teacher looks (mSARC): class activation
maps of the last features and Grad-CAM maps of all stages are matched.

Differences from the paper
1. The student's KL divergence is averaged over the classes, too, that is divided by K, as in the released code.
2. Features are decoded by the present generator in eval mode, not by the one that made them, as in the released code.

Differences from the released code
1. Stored features are float16 by default, which moves a decoded pixel by less than 1/255 (``feature_dtype``).
2. All levels' features of an image are drawn together from one pass over the pool; released: one pass a level.
3. The student starts as all students of the suite do; released: Xavier-normal with gain sqrt(2).
4. Maps of different size are averaged down to the smaller one, and stages are paired from the first on; released:
   networks of their own for mixed families, with one Grad-CAM stage less for VGG-11 -> ResNet-18.
5. With more classes than a batch has images, labels start anywhere; released: the rest would never be made.
6. Crops have a padding of an eighth of the side; released: 4 pixels, on Tiny-ImageNet too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.augment import random_crop_flip
from dfkd_bench.generators import Generator
from dfkd_bench.inversion import BestStep
from dfkd_bench.losses import class_activation_maps, cross_entropy, grad_cam, kl_elementwise
from dfkd_bench.method import Batch, Method, MethodConfig, PoolView, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.statistics import BatchNormMatcher

CARD = {
    "title": "SpaceshipNet: channels exchanged between stored features, activation maps matched",
    "family": "pool",
    "year": 2023,
    "venue": "CVPR",
    "confirmed": True,
    "knowledge": "none",
}

LEVELS = ("level0", "level1", "level2")  # hidden features of ``ConvBody``, from its entrance to its last stage


class Config(MethodConfig):
    """Defaults: the released script (scripts/DFKD_Cifar100_ResNet34_ResNet18_V37_conv012_seed40.yaml)."""

    temperature: float = Field(30.0, gt=0, le=1000, description="T of the student's KL divergence (script)")
    synthesis_batch_size: int = Field(256, ge=2, le=100_000, description="images a batch; `batch_size` (script)")
    latent_dim: int = Field(256, ge=1, description="width of the latent vectors; `input_dim` (script)")
    generator_steps: int = Field(200, ge=1, le=100_000, description="generator steps a batch; `g_steps` (script)")
    generator_lr: float = Field(1e-3, gt=0, le=10, description="Adam on the generator, new a batch (script)")
    batchnorm: float = Field(1.0, ge=0, description="weight of BatchNorm matching; `lambda_bn_meanvar` (script)")
    onehot: float = Field(0.5, ge=0, description="weight of the cross entropy to the label; `lambda_cls` (script)")
    exchange: float = Field(0.7, ge=0, le=1, description="share of batches with exchanged channels (script)")
    class_maps: float = Field(1.0, ge=0, description="weight of the class activation maps' distance (script)")
    gradient_maps: float = Field(1.0, ge=0, description="weight of each stage's Grad-CAM distance (script)")
    feature_dtype: Literal["float16", "float32"] = Field(
        "float16", description="of stored features: float32 (code); float16 takes half of the memory (ours)"
    )
    generator_width: int = Field(64, ge=1, description="base width of the convolutions; `ngf` (script)")


class SpaceshipNet(Method):
    """The method. One call makes one batch and keeps its hidden features; one generator lives through the run."""

    Config = Config
    needs = frozenset({"batchnorm"})
    absorbs = "generator_steps"
    tiny: ClassVar = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_steps": 2, "generator_width": 4}

    def __init__(self, config: Any, task: Task) -> None:
        super().__init__(config, task)
        self.matcher = BatchNormMatcher(task.teacher)
        with task.device:
            generator = Generator(config.latent_dim, task.image_shape, config.generator_width)
            initialize(generator)
        self.generator = generator.to(memory_format=torch.channels_last)

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        task, config, generator = self.task, self.config, self.generator.train()
        size = config.synthesis_batch_size
        labels = balanced_labels(size, task.num_classes, task.rng, task.device)
        latent = torch.randn(size, config.latent_dim, device=task.device, generator=task.rng)
        optimizer = torch.optim.Adam(generator.parameters(), lr=config.generator_lr, betas=(0.5, 0.999), fused=True)
        best = BestStep()
        with self.matcher.watching():
            for _ in range(config.generator_steps):
                hidden = generator.body.hidden(generator.project(latent))
                images = generator.body.images(hidden[-1], level=2)
                view = task.normalize(random_crop_flip(images, task.crop_padding, task.flip_keeps_class, task.rng))
                classification = cross_entropy(task.teacher(view), labels)
                loss = config.batchnorm * self.matcher.loss() + config.onehot * classification
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                best.offer(loss, images, *hidden)
                optimizer.step()
        images, *features = best.tensors
        dtype = torch.float16 if config.feature_dtype == "float16" else torch.float32
        kept = {name: feature.to(dtype) for name, feature in zip(LEVELS, features, strict=True)}
        return Synthesis(images, extras=kept, scalars={"synthesis_loss": best.loss})

    def student_batch(self, pool: PoolView, size: int, at: Progress) -> Batch:
        """Images decoded from stored features of one level, in most batches after an exchange of channels."""
        task = self.task
        level = int(torch.randint(len(LEVELS), (), device="cpu"))  # the host must know, so it draws: nothing waits
        exchanged = bool(torch.rand((), device="cpu") < self.config.exchange)
        _, stored = pool.draw_with_extras(size)
        feature = stored[LEVELS[level]].float()
        with torch.no_grad():
            if exchanged:
                feature = exchange_channels(feature, draw_half(feature, task.rng))
            images = self.generator.eval().body.images(feature, level)
        return Batch(task.normalize(task.augment(images)))

    def student_loss(self, student: nn.Module, batch: Batch, at: Progress) -> Tensor:
        """KL divergence, the distance of the class activation maps and those of the stages' Grad-CAM maps."""
        config = self.config
        # The teacher's parameters need no gradient, so its stages have one only if the images do.
        teacher = look(self.task.teacher, batch.images.detach().requires_grad_())
        answers = teacher.logits.argmax(dim=1)
        seen = look(student, batch.images, answers)
        loss = kl_elementwise(seen.logits, teacher.logits.detach(), config.temperature)
        loss = loss + config.class_maps * map_distance(seen.classes, teacher.classes)
        for own, wanted in zip(seen.stages, teacher.stages, strict=False):  # as many as both have
            loss = loss + config.gradient_maps * map_distance(own, wanted)
        return loss

    @classmethod
    def generation_cost(cls, config: Any, schedule: Schedule, num_classes: int) -> int:
        return schedule.rounds * config.generator_steps * config.synthesis_batch_size


class Maps(NamedTuple):
    """Where a classifier looks: logits [b, K], class activation maps [b, K, h, w], Grad-CAM maps [b, h_i, w_i]."""

    logits: Tensor
    classes: Tensor
    stages: list[Tensor]


def look(model: nn.Module, images: Tensor, answers: Tensor | None = None) -> Maps:
    """The maps of ``model`` for the classes ``answers`` [b], by default its own.

    Gradients within Grad-CAM are constants and the classifier's weights in the class activation maps, too: what
    flows back goes through the features alone.
    """
    forward: Any = model.features
    classifier: Any = model.classifier
    with last_map(model, classifier.in_features) as seen:
        logits, _, stages = forward(images)
    answers = logits.argmax(dim=1) if answers is None else answers
    chosen = logits.gather(1, answers.unsqueeze(1)).sum()
    gradients = torch.autograd.grad(chosen, stages, retain_graph=True)
    classes = class_activation_maps(seen[-1].relu(), classifier.weight.detach())
    return Maps(logits, classes, [grad_cam(*pair) for pair in zip(stages, gradients, strict=True)])


@contextmanager
def last_map(model: nn.Module, width: int) -> Iterator[list[Tensor]]:
    """Inside the ``with`` a pass leaves in the list the map [b, width, h, w] whose ReLU is pooled for the classifier.

    It is the last output of a submodule with ``width`` channels that doesn't pool. For a wide ResNet that is not the
    last stage's output: between that and the pooling there are a BatchNorm and a ReLU.
    """
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] == width:
            seen[:] = [output]

    pooling = (nn.AdaptiveAvgPool2d, nn.AvgPool2d)
    handles = [module.register_forward_hook(hook) for module in model.modules() if not isinstance(module, pooling)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def map_distance(own: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared difference, 0-d, of maps [..., h, w], the larger averaged down; no gradient to ``wanted``."""
    wanted = wanted.detach()
    if own.shape != wanted.shape:
        side = (min(own.shape[-2], wanted.shape[-2]), min(own.shape[-1], wanted.shape[-1]))
        own, wanted = F.adaptive_avg_pool2d(own, side), F.adaptive_avg_pool2d(wanted, side)
    return F.mse_loss(own, wanted)


def draw_half(features: Tensor, rng: torch.Generator) -> Tensor:
    """Masks [b, C] for ``features`` [b, C, h, w], in every row C // 2 true entries, drawn uniformly and anew."""
    channels = features.shape[1]
    order = torch.rand(features.shape[:2], device=features.device, generator=rng).argsort(dim=1)
    return order < channels // 2


def exchange_channels(features: Tensor, own: Tensor) -> Tensor:
    """Row i of ``features`` [b, C, h, w] keeps the channels ``own`` [b, C] and has the rest from row b - 1 - i."""
    return torch.where(own[:, :, None, None], features, features.flip(0))


def balanced_labels(size: int, classes: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """``size`` labels [size]: 0..K-1 again and again; where there are fewer than K, from a random one on."""
    labels = torch.arange(size, device=device)
    if size < classes:
        labels = labels + torch.randint(classes, (1,), device=device, generator=rng)
    return labels % classes


def initialize(generator: nn.Module) -> None:
    """Released initialisation: Kaiming-normal weights (fan-in), BatchNorm weights N(1, 0.02), biases 0."""
    for module in generator.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.02)
        if isinstance(bias := getattr(module, "bias", None), Tensor):
            nn.init.zeros_(bias)


def _released(epochs: int, script: str) -> Published:
    return Published(
        schedule=Schedule(epochs=epochs, student_steps=2000, batch_size=256, lr=0.1, weight_decay=1e-4),
        origin="code",
        source=f"skgyu/SpaceshipNet, scripts/{script}.yaml",
    )


SpaceshipNet.published = {
    "cifar10/resnet34:resnet18": _released(200, "DFKD_Cifar10_ResNet34_ResNet18_V37_conv012"),
    "cifar100/resnet34:resnet18": _released(200, "DFKD_Cifar100_ResNet34_ResNet18_V37_conv012_seed40"),
    "tiny_imagenet/resnet34:resnet18": _released(400, "DFKD_tiny_imagenet_V37_conv012"),
}
SpaceshipNet.published = {
    **SpaceshipNet.published,
    # Other pairs get the values of their own data set.
    **{
        key.partition("/")[0]: entry.model_copy(update={"origin": "transferred"})
        for key, entry in SpaceshipNet.published.items()
    },
}
SpaceshipNet.equal_lr = {"digits": 0.05}  # results/trials/digits_equal.json
SpaceshipNet.search = {
    "generator_steps": (25, 50),
    "generator_lr": (1e-3, 5e-3),
    "batchnorm": (1.0, 5.0),
    "class_maps": (0.1, 1.0),
    "gradient_maps": (0.1, 1.0),
    "exchange": (0.3, 0.7),
    "lr": (0.05, 0.1, 0.2),
}
SpaceshipNet.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=8, student_steps=30, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 100,
            "generator_steps": 50,
            "generator_width": 32,
            "generator_lr": 0.005,
            "batchnorm": 1.0,
            "class_maps": 1.0,
            "gradient_maps": 0.1,
            "exchange": 0.3,
        },
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=20, student_steps=100, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 100,
            "generator_steps": 50,
            "generator_width": 32,
            "generator_lr": 0.005,
            "batchnorm": 1.0,
            "class_maps": 1.0,
            "gradient_maps": 0.1,
            "exchange": 0.3,
        },
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=10, student_steps=30, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 100,
            "generator_steps": 50,
            "generator_width": 32,
            "generator_lr": 0.005,
            "batchnorm": 1.0,
            "class_maps": 1.0,
            "gradient_maps": 0.1,
            "exchange": 0.3,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
# Since then maps are found in models that pool by a module; none of those that had records does.
SpaceshipNet.same_results = ("75658cfc0900abf7fc71d2c7796cbe1dccf1efdc5b967d16ffd7efc018a67b7d",)
