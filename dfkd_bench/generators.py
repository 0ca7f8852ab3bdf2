"""Generators that several methods share: images in [0, 1] from a latent vector, nearest-neighbour up-sampling.

At the end stand the generator of the older codes, which can make normalised images, and the memory built on it.

``Generator`` and ``LargeGenerator`` are a linear layer and a ``ConvBody``; a method with a front of its own puts it
before a ``ConvBody``, or a ``DeepConvBody`` for large images. Architectures: zju-vipa/CMI and zju-vipa/Fast-Datafree,
datafree/models/generator.py; and, for the deep ladder, tmtuan1307/NAYER, same file. All layers have PyTorch's
default initialisation; Adam's and the reset's settings belong to the methods.

Shapes: b images; C, H, W channels, height, width; w the base width (64 in every published setting);
s = ceil(H / 4), t = ceil(W / 4). Where 4s > H the image is cropped to H, likewise for W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfkd_bench.exact import exact

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
        return self.norm(_channels_last(x.reshape(x.shape[0], *self.in_shape)))


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
        return _squash(
            self.to_image(self.stages(_channels_last(x.reshape(x.shape[0], *self.in_shape)))), self.image_shape
        )


class _Stage(nn.Module):
    """Nearest-neighbour up-sampling by ``scale``, conv 3x3 without bias, BN, LeakyReLU(0.2)."""

    def __init__(self, inputs: int, outputs: int, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = upsampled_conv(x, self.conv) if self.scale == 2 else self.conv(x)
        return F.leaky_relu(self.norm(x), 0.2, inplace=True)


def upsampled_conv(x: Tensor, conv: nn.Module) -> Tensor:
    """``conv``, 3x3 with padding 1, of the nearest-neighbour up-sampling by 2 of ``x``: [b, n, s, t] -> [b, m, 2s, 2t].

    Each output pixel sees two by two different input pixels, so nine products are four: the same is a transposed
    convolution of stride 2 whose 4x4 kernel adds up the weights that meet the same pixel. In bf16 on a CPU it takes a
    third to two thirds of the time, from 4 pixels on. fp32 keeps the order of additions that is written in ``conv``.
    """
    if type(conv) is nn.Conv2d and x.device.type == "cpu" and _half(x) and x.shape[2] >= 4:
        merged = _merged(conv.weight).contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(x, merged, conv.bias, stride=2, padding=1)
    with torch.autocast("cuda", enabled=False) if x.is_cuda else nullcontext():  # there it would be made in fp32
        wide = F.interpolate(x, scale_factor=2.0, mode="nearest")
    up: Tensor = conv(wide)
    return up


def _half(x: Tensor) -> bool:
    """bf16. fp32 keeps layouts and the order of additions, and so every bit of its results."""
    return x.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(x.device.type)


class _ChannelsLast(torch.autograd.Function):
    """The same numbers channels-last, and so the gradient: between two layouts each operator copies its input."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous(memory_format=torch.channels_last)


def _channels_last(x: Tensor) -> Tensor:
    changed: Tensor = _ChannelsLast.apply(x) if _half(x) else x
    return changed


def _merged(weight: Tensor) -> Tensor:
    """The kernel [n, m, 4, 4] of the transposed convolution, of a convolution's [m, n, 3, 3]."""
    wide = F.pad(weight, (1, 1, 1, 1))
    merged = wide[:, :, :-1, :-1] + wide[:, :, 1:, :-1] + wide[:, :, :-1, 1:] + wide[:, :, 1:, 1:]
    return merged.flip(2, 3).transpose(0, 1)


def _squash(x: Tensor, image_shape: ImageShape) -> Tensor:
    """The sigmoid of ``x`` [b, C, 4s, 4t], cropped to H and W at the lower and right edge."""
    _, height, wide = image_shape
    x = _channels_last(x)
    # bf16 keeps 8 bits, no more than the pool does: rounding images twice would show, so the sigmoid is fp32.
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x[:, :, :height, :wide].sigmoid()


class EarlyGenerator(nn.Module):
    """The generator of DAFL's own code and its heirs: z [b, latent_dim] -> images [b, C, H, W], here *normalised* ones.

    Linear to 2w * s * t, BN, then up x2, conv 3x3 2w -> 2w, BN, LeakyReLU(0.2), then the same 2w -> w, then conv
    w -> C; all convolutions have biases and both BNs after them an eps of 0.8. ``output`` "tanh": tanh and a BN
    without weights, whose channels have mean 0 and variance 1 over a batch: the teacher's input space, roughly.
    "sigmoid" (TA-DFKD): a sigmoid, so images in (0, 1), and a LeakyReLU after the first BN. ``spectral``: convolutions
    are divided by their largest singular value (PRE-DFKD). 8,423,939 parameters at latent_dim 1000, 3x32x32.
    Source: kuluhan/PRE-DFKD, networks/generator.py; bigdata-inha/TA-DFKD-Official, networks/gan.py.
    """

    def __init__(
        self,
        latent_dim: int,
        image_shape: ImageShape,
        width: int = 64,
        output: Literal["tanh", "sigmoid"] = "tanh",
        spectral: bool = False,
    ) -> None:
        super().__init__()
        conv = SpectralConv2d if spectral else nn.Conv2d
        self.image_shape, self.output = image_shape, output
        channels, height, wide = image_shape
        self.in_shape = (2 * width, -(-height // 4), -(-wide // 4))
        self.project = nn.Linear(latent_dim, math.prod(self.in_shape))
        self.norm = nn.BatchNorm2d(2 * width)
        self.convs = nn.ModuleList([conv(2 * width, n, 3, padding=1) for n in (2 * width, width)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(n, eps=0.8) for n in (2 * width, width)])
        self.to_image = conv(width, channels, 3, padding=1)
        self.standardize = nn.BatchNorm2d(channels, affine=False) if output == "tanh" else None

    def forward(self, z: Tensor) -> Tensor:
        """Images [b, C, H, W] of latent vectors [b, latent_dim]; b >= 2 in train mode."""
        x = self.norm(_channels_last(self.project(z).reshape(-1, *self.in_shape)))
        if self.standardize is None:
            x = F.leaky_relu(x, 0.2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(upsampled_conv(x, conv)), 0.2, inplace=True)
        x = self.to_image(x)
        if self.standardize is None:
            return _squash(x, self.image_shape)
        x = _channels_last(x)
        images: Tensor = self.standardize(_full(x[:, :, : self.image_shape[1], : self.image_shape[2]]).tanh())
        return images


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight [out, in, k, k] is divided by the largest singular value of [out, in * k * k].

    One power iteration a forward in train mode; the singular vectors are constants for the gradient. fp32 or better.
    Source: Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (ICLR 2018), algorithm 1.
    """

    u: Tensor
    v: Tensor

    def __init__(self, inputs: int, outputs: int, kernel_size: int, padding: int = 0) -> None:
        super().__init__(inputs, outputs, kernel_size, padding=padding)
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(self.weight[0].numel()), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        matrix, u, v = exact(self.weight.flatten(1)), exact(self.u), exact(self.v)
        if self.training:
            with torch.no_grad():
                v = F.normalize(matrix.T @ u, dim=0)
                u = F.normalize(matrix @ v, dim=0)
                self.u, self.v = u.to(self.u.dtype), v.to(self.v.dtype)
        weight = self.weight / (u @ (matrix @ v)).to(self.weight.dtype)
        return self._conv_forward(x, weight, self.bias)


class Encoder(nn.Module):
    """PRE-DFKD's encoder: normalised images [b, C, H, W] -> mean and log-variance [b, latent_dim] of their latents.

    Each column of an image is scaled to unit L2 norm, then conv 3x3 C -> w, BN(eps 0.8), LeakyReLU(0.2), the same
    w -> 2w, every second pixel, conv 2w -> 2w of stride 2, BN, every second pixel, and two linear layers.
    4,321,872 parameters at latent_dim 1000, 3x32x32. Source: kuluhan/PRE-DFKD, networks/generator.py.
    """

    def __init__(self, latent_dim: int, image_shape: ImageShape, width: int = 64) -> None:
        super().__init__()
        channels, height, wide = image_shape
        self.convs = nn.ModuleList(
            [nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(width, eps=0.8), nn.BatchNorm2d(2 * width, eps=0.8)])
        self.shrink = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width))
        features = 2 * width * -(-height // 8) * -(-wide // 8)
        self.mean, self.log_variance = nn.Linear(features, latent_dim), nn.Linear(features, latent_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [b, latent_dim], in fp32 or better."""
        x = F.normalize(images, dim=2)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        x = self.shrink(x[:, :, ::2, ::2])[:, :, ::2, ::2].flatten(1)
        return _full(self.mean(x)), _full(self.log_variance(x))


class MemoryGenerator(nn.Module):
    """PRE-DFKD's memory: an autoencoder of images instead of the images; ``decoder`` makes them again from noise."""

    def __init__(self, latent_dim: int, image_shape: ImageShape, width: int = 64) -> None:
        super().__init__()
        self.encoder = Encoder(latent_dim, image_shape, width)
        self.decoder = EarlyGenerator(latent_dim, image_shape, width)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images as remembered, mean and log-variance; ``noise``: N(0, 1) of shape [b, latent_dim]."""
        mean, log_variance = self.encoder(images)
        remembered: Tensor = self.decoder(mean + (log_variance / 2).exp() * noise)
        return remembered, mean, log_variance

    def recall(
        self, latents: Tensor, loss: Callable[[Tensor, Tensor], Tensor], lr: float, train_decoder: bool = False
    ) -> Tensor:
        """The decoder's images, without graph, of ``latents`` [b, latent_dim] after one Adam step that lowers ``loss``.

        ``loss``: latents and their images -> 0-d. ``latents`` move in place. ``train_decoder`` leaves the step's
        gradient on the decoder, too. Source: kuluhan/PRE-DFKD, distillation.py.
        """
        latents.requires_grad_()
        decoder = list(self.decoder.parameters()) if train_decoder else []
        loss(latents, self.decoder(latents)).backward(inputs=[latents, *decoder])
        torch.optim.Adam([latents], lr=lr).step()
        with torch.no_grad():
            images: Tensor = self.decoder(latents)
        return images


def uniform_(network: nn.Module, bound: float = 0.08) -> None:
    """Draw the weights of convolutions and linear layers from U(-bound, bound), biases 0; BNs stay.

    Source: kuluhan/PRE-DFKD, networks/generator.py.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
