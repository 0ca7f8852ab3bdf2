"""Generators that several methods share: images in [0, 1] from a latent vector, nearest-neighbour up-sampling.

``Generator`` and ``LargeGenerator`` are a linear layer and a ``ConvBody``; a method with a front of its own puts it
before a ``ConvBody``, or a ``DeepConvBody`` for large images. Architectures: zju-vipa/CMI and zju-vipa/Fast-Datafree,
datafree/models/generator.py; and, for the deep ladder, tmtuan1307/NAYER, same file. All layers have PyTorch's
default initialisation; Adam's and the reset's settings belong to the methods.

Shapes: b images; C, H, W channels, height, width; w the base width (64 in every published setting);
s = ceil(H / 4), t = ceil(W / 4). Where 4s > H the image is cropped to H, likewise for W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ImageShape = tuple[int, int, int]
"""C, H, W of the images to be made."""


class ConvBody(nn.Module):
    """From the linear layer's output to images, up-sampling twice.

    BN(n), then up x2, conv 3x3 n -> 2w, BN, LeakyReLU(0.2), then up x2, conv 3x3 2w -> w, BN, LeakyReLU(0.2), then
    conv 3x3 w -> C with bias and the sigmoid. n is ``inputs``, by default 2w; the other convolutions have no bias.
    """

    def __init__(self, image_shape: ImageShape, width: int = 64, inputs: int | None = None) -> None:
        super().__init__()
        inputs = 2 * width if inputs is None else inputs
        self.image_shape = image_shape
        self.out_channels, height, wide = image_shape
        self.in_shape = (inputs, -(-height // 4), -(-wide // 4))
        self.norm = nn.BatchNorm2d(inputs)  # right after the reshape: FM's one-time reset addresses it
        self.stages = nn.ModuleList([_Stage(inputs, 2 * width), _Stage(2 * width, width)])
        self.to_image = nn.Conv2d(width, self.out_channels, 3, padding=1)

    @property
    def in_features(self) -> int:
        """n * s * t: the width of the linear layer that comes before."""
        channels, height, wide = self.in_shape
        return channels * height * wide

    def forward(self, x: Tensor) -> Tensor:
        """Images [b, C, H, W] in (0, 1) from [b, n * s * t] or [b, n, s, t]."""
        return self.images(self._enter(x), 0)

    def hidden(self, x: Tensor) -> list[Tensor]:
        """The hidden features of ``x``, as in ``forward``: [b, n, s, t], [b, 2w, 2s, 2t] and [b, w, 4s, 4t].

        The first is the output of ``norm``, the others come after their LeakyReLU.
        """
        features = [self._enter(x)]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features

    def images(self, feature: Tensor, level: int) -> Tensor:
        """Images [b, C, H, W] from ``hidden(x)[level]``, by the layers that come after it."""
        for stage in list(self.stages)[level:]:
            feature = stage(feature)
        return _squash(self.to_image(feature), self.image_shape)

    def _enter(self, x: Tensor) -> Tensor:
        return self.norm(x.reshape(x.shape[0], *self.in_shape))


class Generator(nn.Module):
    """The small generator: z [b, latent_dim] -> images [b, C, H, W] in (0, 1).

    ``project`` is the linear layer to 2w * s * t, ``body`` the rest. 2,328,899 parameters at latent_dim 256, 3x32x32.
    """

    _entrance = 2  # channels after the linear layer, in units of ``width``

    def __init__(self, latent_dim: int, image_shape: ImageShape, width: int = 64) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.body = ConvBody(image_shape, width, self._entrance * width)
        self.project = nn.Linear(latent_dim, self.body.in_features)

    @property
    def out_channels(self) -> int:
        """C of the images."""
        return self.body.out_channels

    def forward(self, z: Tensor) -> Tensor:
        """Images [b, C, H, W] in (0, 1) of latent vectors [b, latent_dim]."""
        return self.body(self.project(z))


class LargeGenerator(Generator):
    """The same with 4w channels after the linear layer. 4,581,955 parameters at latent_dim 256, 3x32x32."""

    _entrance = 4


class DeepConvBody(nn.Module):
    """The ladder for large images, up-sampling four times; no BN at its entrance.

    conv-BN-LeakyReLU(0.2) n -> 2w at H/16, then up x2 and the same 2w -> 2w, 2w -> w, w -> w and w -> w, then
    conv w -> C with bias and the sigmoid. All convolutions are 3x3, all but the last without bias; n is ``inputs``,
    by default 2w. NAYER's generator for ImageNet puts its linear layer before it (n = 128, 3x224x224: 444,995
    parameters); FM's is this module alone, with n the latent channels and a latent *map* [b, n, 14, 14] as input
    (n = 100: 412,739 parameters, without the linear layer of the released code that nothing uses).
    """

    def __init__(self, image_shape: ImageShape, width: int = 64, inputs: int | None = None) -> None:
        super().__init__()
        inputs = 2 * width if inputs is None else inputs
        self.image_shape = image_shape
        self.out_channels, height, wide = image_shape
        self.in_shape = (inputs, -(-height // 16), -(-wide // 16))
        self.stages = nn.Sequential(
            _Stage(inputs, 2 * width, scale=1),
            _Stage(2 * width, 2 * width),
            _Stage(2 * width, width),
            _Stage(width, width),
            _Stage(width, width),
        )
        self.to_image = nn.Conv2d(width, self.out_channels, 3, padding=1)

    @property
    def in_features(self) -> int:
        """n * ceil(H / 16) * ceil(W / 16): the width of a linear layer that comes before."""
        channels, height, wide = self.in_shape
        return channels * height * wide

    def forward(self, x: Tensor) -> Tensor:
        """Images [b, C, H, W] in (0, 1) from [b, n, ceil(H / 16), ceil(W / 16)], flattened or not."""
        return _squash(self.to_image(self.stages(x.reshape(x.shape[0], *self.in_shape))), self.image_shape)


class _Stage(nn.Module):
    """Nearest-neighbour up-sampling by ``scale``, conv 3x3 without bias, BN, LeakyReLU(0.2)."""

    def __init__(self, inputs: int, outputs: int, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale > 1:
            x = F.interpolate(x, scale_factor=float(self.scale), mode="nearest")
        return F.leaky_relu(self.norm(self.conv(x)), 0.2)


def _squash(x: Tensor, image_shape: ImageShape) -> Tensor:
    """The sigmoid of ``x`` [b, C, 4s, 4t], cropped to H and W at the lower and right edge."""
    _, height, wide = image_shape
    # bf16 keeps 8 bits, no more than the pool does: rounding images twice would show, so the sigmoid is fp32.
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x[:, :, :height, :wide].sigmoid()
