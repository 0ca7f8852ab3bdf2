"""NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free Knowledge Distillation.

Minh-Tuan Tran, Trung Le, Xuan-May Le, Mehrtash Harandi, Quan Hung Tran, Dinh Phung; CVPR 2024.
https://arxiv.org/abs/2310.00258, code: https://github.com/tmtuan1307/NAYER

The generator's input is not noise but the label-text embedding of the wanted class; randomness sits in the weights
of a linear *noisy layer* between the two, drawn anew for every synthesised batch. The paper's ablations are settings.

Differences from the paper
1. The whole generator is built anew every ``generator_life`` epochs, as in the released code; the paper names only
   the noisy layer's re-initialisation.
2. The noisy layer's BatchNorm keeps its weights when the linear part is drawn anew, as in the released code.
3. The default prompt is the released code's "a image of {name}"; the paper's figure has "a photo of a ...".
4. Ablations: no code of them is released, and of what stands in the noisy layers' place (``build_noise``) only the
   names are known. Where the noise enters, its scale and the learned layer behind it are ours.

Differences from the released code
1. Labels, losses and the choice of the best step stay on the device; nothing is printed or synchronised.
2. The noisy layers are one batched matrix product instead of a loop over layers; the values are the same.
3. Label-text embeddings are constants: the released tensors gather a gradient that nothing uses.
4. ImageNet: labels are drawn from all classes, not from ten hard-coded ones; no released settings produced numbers.
5. In the first synthesis loop of a call the student is in eval mode, in later loops in train mode, where its
   BatchNorm statistics move: this released behaviour made the published numbers and is the default;
   ``student_eval=true`` keeps it in eval mode, which is what the authors describe.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dfkd_bench.generators import ConvBody, DeepConvBody
from dfkd_bench.inversion import invert
from dfkd_bench.method import Method, MethodConfig, Progress, Published, Schedule, Synthesis, Task
from dfkd_bench.prompts import names_classes
from dfkd_bench.statistics import BatchNormMatcher

CARD = {
    "title": "NAYER: noisy-layer generation from label-text embeddings",
    "family": "pool",
    "year": 2024,
    "venue": "CVPR",
    "confirmed": True,
    "knowledge": "class names and a text encoder",
}

LARGE = 128  # pixels: from here on the released ladder for large images is used (H/16 instead of H/4)


class NayerConfig(MethodConfig):
    """Defaults: the released script for CIFAR-100 (scripts/nayer_100.sh, datafree_kd.py)."""

    encoder: str = Field("clip", description="text encoder: clip, sbert, doc2vec, onehot, ... (docs/text_encoders.md)")
    prompt: str = Field("a image of {name}", description="prompt; fields {name} and {index}")
    synthesis_batch_size: int = Field(400, ge=2, le=100_000, description="images a synthesised batch (script)")
    generator_steps: int = Field(40, ge=1, le=100_000, description="generator steps a batch; `g_steps` (script)")
    loops: int = Field(2, ge=1, description="batches an epoch after the warm-up; `g_loops` (script)")
    warmup_loops: int = Field(10, ge=1, description="batches an epoch in the warm-up; `gwp_loops` (script)")
    generator_life: int | None = Field(
        10, ge=1, description="epochs until the generator is built anew; null: never (paper); `g_life` (script)"
    )
    generator_lr: float = Field(4e-3, gt=0, le=10, description="Adam on the generator; `lr_g` (script)")
    adversarial: float = Field(1.33, ge=0, description="weight of the masked adversarial term; `adv` (script)")
    batchnorm: float = Field(10.0, ge=0, description="weight of the BatchNorm matching; `bn` (script)")
    onehot: float = Field(0.5, ge=0, description="weight of the cross entropy to the wanted class; `oh` (script)")
    batchnorm_momentum: float = Field(0.9, ge=0, lt=1, description="of remembered statistics; `bn_mmt` (default)")
    noisy_width: int = Field(1000, ge=1, description="outputs of the noisy layer; `le_emb_size` (default)")
    generator_width: int = Field(64, ge=1, description="base width of the convolutions; `ngf` (code)")
    student_eval: bool = Field(
        False, description="student in eval mode in every loop (described) or only in the first one (released: false)"
    )
    # The ablations
    input: Literal["text", "noise"] = Field("text", description="label text (one-hot: encoder=onehot) or N(0, 1) noise")
    noise: Literal["layer", "concat", "sum", "mix", "none", "concat_normal", "sum_normal", "none_normal"] = Field(
        "layer",
        description="noisy layers, (e, z), e + beta * z, mixed embeddings, none (details: ours, but for layer); "
        "..._normal: the learned layer's weights start as the noisy layers' do",
    )
    noise_width: int = Field(512, ge=1, description="numbers of z an image, for noise=concat and input=noise (ours)")
    noise_scale: float = Field(1.0, ge=0, description="beta of noise=sum, where embeddings have deviation 1 (ours)")
    layers: Literal["k_to_1", "one_to_one"] = Field(
        "k_to_1", description="a noisy layer for K images, one of each class, or for one: K times the memory (paper)"
    )
    reinitialize: bool = Field(
        True, description="noisy layers are drawn anew for every batch, or trained on: false (paper, Table 3)"
    )
    noisy_batchnorm: bool = Field(True, description="BatchNorm1d of embeddings before the noisy layers (paper: true)")

    def model_post_init(self, _context: Any) -> None:
        if self.input == "noise" and self.noise not in ("layer", "none"):
            raise ValueError(f"noise={self.noise} goes with label text: with input=noise it must be layer or none")
        if self.noise != "layer" and not (self.reinitialize and self.layers == "k_to_1"):
            raise ValueError(f"reinitialize and layers are about noisy layers: leave them out at noise={self.noise}")


class NoisyLayers(nn.Module):
    """M linear layers, one for each block of R rows. ``weight`` [M, out, d] and ``bias`` [M, out].

    Row r of the batch goes through layer r // R. "K-to-1": R = K, every layer sees each class once; "1-to-1": R = 1.
    """

    def __init__(self, blocks: int, block_rows: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block_rows = block_rows
        self.weight = nn.Parameter(torch.empty(blocks, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(blocks, outputs))
        self.reinitialize()

    def reinitialize(self) -> None:
        """Weights N(0, 1), biases 0: the source of randomness."""
        with torch.no_grad():
            self.weight.normal_()
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[B, d] -> [B, out]; B <= M * R."""
        blocks, outputs, inputs = self.weight.shape
        padding = blocks * self.block_rows - x.shape[0]
        rows = torch.cat([x, x.new_zeros(padding, inputs)]).view(blocks, self.block_rows, inputs)
        noisy = torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.transpose(1, 2))
        return noisy.reshape(-1, outputs)[: x.shape[0]]


class PlainLayer(nn.Linear):
    """An ordinary layer in the noisy layers' place, trained on from batch to batch: [B, d] -> [B, out] without noise.

    The classes built on it put noise into its input, drawn once for all steps of a batch of B images.
    """

    def start_as_noisy_layers(self) -> None:
        """Weights N(0, 1), biases 0. PyTorch's own are some 30 times as small, so that a step of Adam moves them far.

        So a difference to the noisy layers can be told from one that comes of how they start.
        """
        with torch.no_grad():
            self.weight.normal_()
            self.bias.zero_()

    def reinitialize(self) -> None:
        """There is nothing to draw."""


class InputNoise(PlainLayer):
    """Base of the next two: z [B, width], normal, mean 0, deviation ``scale``. It is noise, no parameter."""

    z: Tensor

    def __init__(self, inputs: int, outputs: int, rows: int, width: int, scale: float = 1.0) -> None:
        super().__init__(inputs, outputs)
        self.scale = scale
        self.register_buffer("z", torch.empty(rows, width), persistent=False)
        self.reinitialize()

    def reinitialize(self) -> None:
        """Draw z."""
        self.z.normal_(std=self.scale)


class ConcatNoise(InputNoise):
    """The layer's input is (e, z), one behind the other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, self.z], dim=1))


class SumNoise(InputNoise):
    """The layer's input is e + z."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.z)


class MixNoise(PlainLayer):
    """The layer's input is (1 - u) * e + u * e': e' is a random row of the batch, u ~ U(0, 1/2), so that e prevails."""

    share: Tensor
    partner: Tensor

    def __init__(self, inputs: int, outputs: int, rows: int) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("share", torch.empty(rows, 1), persistent=False)
        self.register_buffer("partner", torch.arange(rows), persistent=False)
        self.reinitialize()

    def reinitialize(self) -> None:
        """Draw u, and which row is mixed with which."""
        self.share.uniform_(0, 0.5)
        self.partner = torch.randperm(len(self.partner), device=self.partner.device)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.lerp(x, x[self.partner], self.share))


def build_noise(config: NayerConfig, classes: int, inputs: int) -> NoisyLayers | PlainLayer:
    """The source of noise, a module [B, inputs] -> [B, noisy_width]; its ``reinitialize`` draws the noise anew."""
    if config.noise == "layer":
        rows, block_rows = config.synthesis_batch_size, classes if config.layers == "k_to_1" else 1
        return NoisyLayers(-(-rows // block_rows), block_rows, inputs, config.noisy_width)
    source, _, start = config.noise.partition("_")
    layer = _build_plain_layer(source, config, inputs)
    if start:
        layer.start_as_noisy_layers()
    return layer


def _build_plain_layer(source: str, config: NayerConfig, inputs: int) -> PlainLayer:
    rows, outputs = config.synthesis_batch_size, config.noisy_width
    if source == "concat":
        return ConcatNoise(inputs + config.noise_width, outputs, rows, config.noise_width)
    if source == "sum":
        return SumNoise(inputs, outputs, rows, inputs, config.noise_scale)
    if source == "mix":
        return MixNoise(inputs, outputs, rows)
    return PlainLayer(inputs, outputs)


class NoisyGenerator(nn.Module):
    """Label-text embedding -> BatchNorm1d -> noisy layers -> linear -> convolutions: [B, inputs] to [B, C, H, W]."""

    def __init__(self, task: Task, config: NayerConfig, inputs: int) -> None:
        super().__init__()
        body = DeepConvBody if task.image_shape[1] >= LARGE else ConvBody
        self.norm = nn.BatchNorm1d(inputs) if config.noisy_batchnorm else nn.Identity()
        self.noisy = build_noise(config, task.num_classes, inputs)
        self.body = body(task.image_shape, config.generator_width)
        self.project = nn.Linear(config.noisy_width, self.body.in_features)

    def forward(self, embedded: Tensor) -> Tensor:
        """Images in (0, 1) of the embeddings [B, inputs] of the wanted labels."""
        images: Tensor = self.body(self.project(self.noisy(self.norm(embedded))))
        return images

    @property
    def noisy_bytes(self) -> int:
        """Memory of the noisy layers' parameters; their gradients and Adam's state take three times as much again."""
        parameters = self.noisy.parameters() if isinstance(self.noisy, NoisyLayers) else ()
        return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


class Nayer(Method):
    """The method. One call makes ``loops`` batches, each from freshly drawn noisy layers and a fresh Adam."""

    Config = NayerConfig
    needs = frozenset({"batchnorm", "label_text"})
    absorbs = "generator_steps"
    described: ClassVar = {"student_eval": True}
    quirks: ClassVar = {
        "student_unchanged_by_synthesis": "in loops after the first the released code leaves the student in train "
        "mode, so that its BatchNorm statistics move; student_eval=true does without"
    }
    tiny: ClassVar = {"encoder": "random:16", "synthesis_batch_size": 12, "generator_steps": 2, "warmup_loops": 1}
    tiny |= {"noisy_width": 8, "generator_width": 4, "noise_width": 8}
    transient = frozenset({"embeddings"})  # constants, read again on resume

    def __init__(self, config: NayerConfig, task: Task) -> None:
        super().__init__(config, task)
        of_text = config.input == "text"
        self.embeddings = task.label_embeddings(config.encoder, config.prompt) if of_text else None
        self.matcher = BatchNormMatcher(task.teacher, config.batchnorm_momentum)
        self.generator = self._build_generator()

    def synthesize(self, student: nn.Module, at: Progress) -> Synthesis:
        config = self.config
        life = config.generator_life
        if life and at.round == 0 and (at.epoch % life == 0 or (at.epoch - at.warmup_epochs) % life == 0):
            self.generator = self._build_generator()
        batches, losses = [], []
        for loop in range(config.warmup_loops if at.warming_up else config.loops):
            student.train(loop > 0 and not config.student_eval)
            images, loss = self._one_batch(student, adversarial=config.adversarial > 0 and not at.warming_up)
            batches.append(images)
            losses.append(loss)
        size = torch.full((), self.generator.noisy_bytes, device=self.task.device)
        scalars = {"synthesis_loss": torch.stack(losses).mean(), "noisy_layer_bytes": size}
        return Synthesis(torch.cat(batches), scalars=scalars)

    def _one_batch(self, student: nn.Module, adversarial: bool) -> tuple[Tensor, Tensor]:
        """The images of the step with the lowest loss, before that step's update, and that loss."""
        task, config = self.task, self.config
        if config.reinitialize:
            self.generator.noisy.reinitialize()
        labels = balanced_labels(config.synthesis_batch_size, task.num_classes, task.rng, task.device)
        embedded = self._embed(labels)
        opponent = student if adversarial else None
        best = invert(self.generator, embedded, labels, task, self.matcher, config, opponent)
        return best.tensors[0], best.loss

    def _embed(self, labels: Tensor) -> Tensor:
        """The generator's input [B, inputs] for ``labels`` [B]; noise knows nothing of them."""
        if self.embeddings is not None:
            return self.embeddings[labels]
        shape = (labels.shape[0], self.config.noise_width)
        return torch.randn(shape, device=labels.device, generator=self.task.rng)

    def _build_generator(self) -> NoisyGenerator:
        inputs = self.config.noise_width if self.embeddings is None else self.embeddings.shape[1]
        with self.task.device:
            generator = NoisyGenerator(self.task, self.config, inputs)
        return generator.to(memory_format=torch.channels_last)

    @classmethod
    def generation_cost(cls, config: NayerConfig, schedule: Schedule, num_classes: int) -> int:
        later = schedule.epochs - schedule.warmup_epochs
        batches = schedule.warmup_epochs * config.warmup_loops + later * config.loops
        return batches * schedule.rounds_per_epoch * config.generator_steps * config.synthesis_batch_size

    @classmethod
    def reads_label_text(cls, config: NayerConfig) -> bool:
        return config.input == "text"

    @classmethod
    def outside_knowledge(cls, config: NayerConfig) -> str | None:
        if config.input == "noise" or config.encoder.partition(":")[0] in ("onehot", "random"):
            return "none"
        return None if names_classes(config.prompt) else "a text encoder (index prompt)"


def balanced_labels(size: int, classes: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """``size`` labels [size]: as many whole blocks 0..K-1 as fit, then uniform ones, not shuffled."""
    blocks = torch.arange(classes, device=device).repeat(size // classes)
    rest = torch.randint(classes, (size % classes,), device=device, generator=rng)
    return torch.cat([blocks, rest])


def _cifar(generator_steps: int) -> Published:
    return Published(
        schedule=Schedule(
            epochs=120, warmup_epochs=20, student_steps=400, batch_size=512, lr=0.2, weight_decay=1e-4, lr_min=2e-4
        ),
        config={"generator_steps": generator_steps},
        origin="code",
        source="tmtuan1307/NAYER, scripts/nayer_100.sh (the 100-epoch variant)",
    )


Nayer.published = {
    "cifar10/resnet34:resnet18": _cifar(generator_steps=30),  # before Tiny-ImageNet's for data sets without settings
    "cifar10": _cifar(generator_steps=30),
    "cifar100": _cifar(generator_steps=40),
    "tiny_imagenet/resnet34:resnet18": Published(
        schedule=Schedule(
            epochs=120, warmup_epochs=20, student_steps=1000, batch_size=256, lr=0.1, weight_decay=1e-4, lr_min=2e-4
        ),
        config={"synthesis_batch_size": 200, "generator_steps": 60, "loops": 4, "warmup_loops": 20},
        origin="code",
        source="tmtuan1307/NAYER, scripts/nayer_100.sh (the 100-epoch variant)",
    ),
}
Nayer.published = {
    **Nayer.published,
    "tiny_imagenet": Nayer.published["tiny_imagenet/resnet34:resnet18"].model_copy(update={"origin": "transferred"}),
}
SMALL = {"encoder": "sbert", "student_eval": True, "synthesis_batch_size": 100, "noisy_width": 256}
SMALL |= {"generator_width": 32, "generator_lr": 0.01, "loops": 2, "warmup_loops": 4}

Nayer.equal_lr = {"digits": 0.05}  # results/trials/digits_equal.json
Nayer.search = {
    "generator_steps": (10, 20, 30),
    "loops": (1, 2),
    "warmup_loops": (4, 8),
    "generator_lr": (4e-3, 1e-2),
    "batchnorm": (1.0, 10.0),
    "adversarial": (0.0, 1.33),
    "lr": (0.05, 0.1, 0.2),
}
Nayer.smoke = {
    "digits": Published(
        schedule=Schedule(epochs=10, warmup_epochs=2, student_steps=30, batch_size=128, lr=0.2, lr_min=2e-4),
        config={**SMALL, "generator_steps": 20},
        origin="ours",
        source="results/trials/digits.json: eight trials on the validation split, with 600 student steps",
    ),
    "glyphs16": Published(
        schedule=Schedule(epochs=23, warmup_epochs=3, student_steps=100, batch_size=128, lr=0.2, lr_min=2e-4),
        config={
            **SMALL,
            "generator_steps": 30,
            "loops": 2,
            "warmup_loops": 4,
            "generator_lr": 0.01,
            "batchnorm": 1.0,
            "adversarial": 0.0,
        },
        origin="ours",
        source="results/trials/glyphs16.json: digits' settings at 2,000 student steps, and three more trials",
    ),
    "fashion_mnist": Published(
        schedule=Schedule(epochs=12, warmup_epochs=2, student_steps=30, batch_size=128, lr=0.2, lr_min=2e-4),
        config={**SMALL, "generator_steps": 20},
        origin="ours",
        source="results/trials/fashion_mnist.json: digits' settings at 300 student steps, and three more trials",
    ),
}
# The released form's path is as it was: only ways to start an ordinary layer came after this source.
Nayer.same_results = ("97428cd97fc0602453bec8978a0bf854a3d03555c0829ed2791432f0d3ddb011",)
