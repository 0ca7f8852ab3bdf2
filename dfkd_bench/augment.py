"""Normalisation and augmentation on the device: per image, differentiable, without a Python loop over images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
