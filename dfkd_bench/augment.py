"""Normalisation and augmentation on the device: per image, differentiable, without a Python loop over images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dfkd_bench.exact import exact


class Normalize:
    """[0, 1] images to the teacher's input space: ``(x - mean) / std`` per channel; ``inverse`` goes back."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised images, same shape [n, C, H, W]."""
        return (images - self.mean) / self.std

    def inverse(self, images: Tensor) -> Tensor:
        """Back to [0, 1] space (not clamped)."""
        return images * self.std + self.mean


class _Shift(torch.autograd.Function):
    """Crop of a zero-padded image (a shift by whole pixels), then a flip. The backward is the opposite, one gather."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
        ctx.save_for_backward(down, right, flip)
        return _shifted(images, down, right, flip)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        down, right, flip = ctx.saved_tensors
        # out(i, j) = in(i + down, f(j) + right), so in(i, j) = out(i - down, f(j - right)): shifting by f'(right)
        # after the flip is the same with the sign of `right` kept where the image was flipped.
        return _shifted(gradients[0], -down, torch.where(flip, right, -right), flip), None, None, None


def _shifted(images: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
    n, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device).view(1, -1) + down.view(-1, 1)  # [n, H]
    columns = torch.arange(width, device=images.device).view(1, -1)
    columns = torch.where(flip.view(-1, 1), width - 1 - columns, columns) + right.view(-1, 1)  # [n, W]
    inside = ((rows >= 0) & (rows < height)).unsqueeze(2) & ((columns >= 0) & (columns < width)).unsqueeze(1)
    source = rows.clamp(0, height - 1).unsqueeze(2) * width + columns.clamp(0, width - 1).unsqueeze(1)  # [n, H, W]
    picked = images.reshape(n, channels, -1).gather(2, source.view(n, 1, -1).expand(-1, channels, -1))
    return picked.view(n, channels, height, width) * inside.unsqueeze(1)


def random_crop_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """Random crop after zero padding by ``padding`` pixels, then a random horizontal flip; each image on its own.

    ``images``: [n, C, H, W], float or uint8; the same shape comes back. Zero is black in [0, 1] space. Offsets are
    whole pixels, uniform over the (2 * padding + 1)^2 positions; flips have probability 1/2 (never if not ``flip``).
    Source: kornia's RandomCrop and RandomHorizontalFlip as used in tmtuan1307/NAYER, datafree/synthesis/nayer.py.
    """
    n, device = images.shape[0], images.device
    if padding == 0 and not flip:
        return images
    offsets = torch.randint(-padding, padding + 1, (2, n), device=device, generator=generator)
    flips = (
        torch.rand(n, device=device, generator=generator) < 0.5
        if flip
        else torch.zeros(n, dtype=torch.bool, device=device)
    )
    shifted: Tensor = _Shift.apply(images, offsets[0], offsets[1], flips)
    return shifted


def to_uint8(images: Tensor) -> Tensor:
    """[0, 1] to uint8 as the released code stores images: clamp, times 255, *truncate* (no rounding)."""
    return images.clamp(0, 1).mul(255).to(torch.uint8)


def to_unit(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]."""
    return images.float().div_(255)


def roll_flip(images: Tensor, reach: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """Wrap all images around by the same random shift, then flip all of them or none: one draw for the whole batch.

    ``images``: float [n, C, H, W]. Both shifts are whole pixels, uniform over [-reach, reach]; the horizontal flip has
    probability 1/2 (never if not ``flip``). Pixels are permuted, so the statistics of the batch stay what they are.
    Source: zju-vipa/CMI, datafree/synthesis/deepinversion.py.
    """
    height, width, device = *images.shape[2:], images.device
    down, right = torch.randint(-reach, reach + 1, (2,), device=device, generator=generator)
    rows = (torch.arange(height, device=device) - down) % height
    columns = torch.arange(width, device=device)
    if flip:
        flipped = torch.rand((), device=device, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(0), columns)
    return images.index_select(2, rows).index_select(3, (columns - right) % width)


def random_resized_crop_flip(
    images: Tensor,
    flip: bool,
    generator: torch.Generator | None = None,
    scale: tuple[float, float] = (0.25, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """Blow a random part of each image up to its full size, then flip it at random; each image on its own.

    ``images``: floating-point [n, C, H, W]; the same shape comes back. The part has a share of the area uniform in
    ``scale`` and a width / height uniform in logarithm in ``ratio``, in whole pixels and at a uniform place. Of ten
    draws the first that fits into the image counts, and the whole image if none does. Interpolation is bilinear,
    corner pixels on corner pixels; flips have probability 1/2 (never if not ``flip``).
    Source: kornia's RandomResizedCrop as used in zju-vipa/CMI, datafree/synthesis/contrastive.py; its draw does not
    accept a part as high or as wide as the image, this one does.
    """
    n, _, height, width = images.shape
    device = images.device
    drawn = torch.rand(2, n, 10, device=device, generator=generator)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * drawn[0])
    aspect = torch.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * drawn[1])
    high, wide = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (high >= 1) & (high <= height) & (wide >= 1) & (wide <= width)
    first = fits & (fits.cumsum(1) == 1)
    high = torch.where(fits.any(1), (high * first).sum(1), height)
    wide = torch.where(fits.any(1), (wide * first).sum(1), width)
    place = torch.rand(2, n, device=device, generator=generator)
    top, left = (place[0] * (height - high + 1)).floor(), (place[1] * (width - wide + 1)).floor()
    flips = torch.rand(n, device=device, generator=generator) < 0.5 if flip else torch.zeros_like(top, dtype=torch.bool)
    return _enlarged(images, (top, high), (left, wide), flips)


def _enlarged(
    images: Tensor, vertical: tuple[Tensor, Tensor], horizontal: tuple[Tensor, Tensor], flip: Tensor
) -> Tensor:
    """Parts of ``images``, given by their (start, size) [n] along both axes, resized to whole images and flipped."""
    rows = _interpolation(*vertical, images.shape[2]).to(images.dtype)
    columns = _interpolation(*horizontal, images.shape[3]).to(images.dtype)
    columns = torch.where(flip.view(-1, 1, 1), columns.flip(1), columns)
    # Two small matrix products an image: unlike grid_sample's, their gradient is deterministic on a GPU. In bf16 they
    # would have as many bits as the pool keeps.
    return torch.einsum("nhy,ncyx,nwx->nchw", exact(rows), exact(images), exact(columns)).to(images.dtype)


def _interpolation(start: Tensor, size: Tensor, length: int) -> Tensor:
    """Weights [n, length, length] of old pixels (last) in new ones: hats around the places that new ones come from."""
    steps = torch.linspace(0, 1, length, device=start.device)
    position = start.unsqueeze(1) + steps * (size - 1).unsqueeze(1)
    distance = position.unsqueeze(2) - torch.arange(length, device=start.device)
    return (1 - distance.abs()).clamp(min=0)
