"""PRE-DFKD: Robust and Resource-Efficient Data-Free Knowledge Distillation by Generative Pseudo Replay.

Kuluhan Binici, Shivam Aggarwal, Nam Trung Pham, Karianto Leman, Tulika Mitra; AAAI 2022.
https://arxiv.org/abs/2201.03019, code: https://github.com/kuluhan/PRE-DFKD

A generator looks for images that please the teacher and on which the student disagrees; a variational autoencoder
remembers what it has made so far, and its decoder's images join every student batch, so that nothing is forgotten. The
algorithm is ``AutoencoderReplay`` in dfkd_bench/replay.py, which KAKR uses, too; here are its settings.

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

from typing import ClassVar

from pydantic import Field

from dfkd_bench.method import MethodConfig, Published, Schedule
from dfkd_bench.replay import AutoencoderReplay

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


class PreDfkd(AutoencoderReplay):
    """The method: ``AutoencoderReplay`` and nothing else. No image is kept."""

    Config = Config
    quirks: ClassVar = {
        "student_unchanged_by_synthesis": "in the generator's step the released code leaves the student in train mode, "
        "so that its BatchNorm statistics move; student_eval=true does without",
        "student_batch_range": "the generators end in tanh and a BatchNorm: their images have the mean and variance of "
        "normalised images, but not their range",
    }
    described: ClassVar = {"student_eval": True, "tuning_trains_memory": False}
    tiny: ClassVar = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4, "memory_steps": 2}


PreDfkd.published = {
    "cifar100/resnet34:resnet18": Published(
        schedule=Schedule(
            epochs=400, rounds_per_epoch=36, student_steps=10, batch_size=1024, lr=0.1, weight_decay=5e-4
        ),
        origin="code",
        source="kuluhan/PRE-DFKD, main.py (its only script)",
    ),
}
PreDfkd.equal_lr = {"digits": 0.2}  # results/trials/digits_equal.json
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
        schedule=Schedule(epochs=8, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.1, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "latent_dim": 100,
            "generator_width": 32,
            "generator_steps": 5,
            "memory_steps": 2,
        },
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=20, rounds_per_epoch=20, student_steps=5, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "latent_dim": 100,
            "generator_width": 32,
            "generator_steps": 5,
            "memory_steps": 2,
            "generator_lr": 0.005,
            "balance": 5.0,
            "activation": 0.1,
            "adversarial": 1.0,
        },
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=10, rounds_per_epoch=6, student_steps=5, batch_size=128, lr=0.05, lr_min=2e-4),
        config={
            "synthesis_batch_size": 128,
            "latent_dim": 100,
            "generator_width": 32,
            "generator_steps": 5,
            "memory_steps": 2,
            "generator_lr": 0.001,
            "balance": 5.0,
            "activation": 0.1,
            "adversarial": 10.0,
        },
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
