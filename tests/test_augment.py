from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_bench.augment import Normalize, _Shift, random_crop_flip, to_uint8, to_unit


def naive(images: Tensor, down: Tensor, right: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Pad, crop, flip: image by image, with the operations that everybody knows."""
    height, width = images.shape[2:]
    out = []
    for image, i, j, flipped in zip(images, down.tolist(), right.tolist(), flip.tolist(), strict=True):
        padded = F.pad(image, [padding] * 4)
        crop = padded[:, padding + i : padding + i + height, padding + j : padding + j + width]
        out.append(crop.flip(2) if flipped else crop)
    return torch.stack(out)


def every_case(padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets down and right and the flip of every possible outcome."""
    shifts = range(-padding, padding + 1)
    down, right, flip = zip(*itertools.product(shifts, shifts, (False, True)), strict=True)
    return torch.tensor(down), torch.tensor(right), torch.tensor(flip)


def numbered(n: int, channels: int = 2, height: int = 5, width: int = 7) -> Tensor:
    """Images with no two pixels alike and none 0."""
    return 1 + torch.arange(n * channels * height * width, dtype=torch.float64).view(n, channels, height, width)


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_forward_is_that_of_padding_cropping_and_flipping(padding: int) -> None:
    case = every_case(padding)
    images = numbered(len(case[0]))
    torch.testing.assert_close(_Shift.apply(images, *case), naive(images, *case, padding), rtol=0, atol=0)


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_backward_is_that_of_padding_cropping_and_flipping(padding: int) -> None:
    case = every_case(padding)
    images = numbered(len(case[0])).requires_grad_()
    weights = torch.rand(images.shape, dtype=torch.float64)  # a gradient that differs from pixel to pixel
    (got,) = torch.autograd.grad(_Shift.apply(images, *case), images, weights)
    (expected,) = torch.autograd.grad(naive(images, *case, padding), images, weights)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_backward_passes_the_numerical_check() -> None:
    case = every_case(1)
    images = torch.rand(len(case[0]), 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Shift.apply(x, *case), (images,))


def outcomes(padding: int, flip: bool, n: int = 18_000) -> Tensor:
    """How often each distinct result came out of ``n`` copies of one image."""
    images = numbered(1, 1, 4, 4).expand(n, -1, -1, -1)
    moved = random_crop_flip(images, padding, flip, torch.Generator().manual_seed(0))
    return moved.flatten(1).unique(dim=0, return_counts=True)[1]


@pytest.mark.parametrize(("flip", "cases"), [(True, 18), (False, 9)])
def test_offsets_and_flips_are_independent_and_uniform_for_every_image(flip: bool, cases: int) -> None:
    counts = outcomes(1, flip)
    assert len(counts) == cases
    expected = 18_000 / cases
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 45  # 17 degrees of freedom: the 99.97th percentile


def test_without_padding_only_the_flip_is_left() -> None:
    counts = outcomes(0, True)
    assert len(counts) == 2
    assert abs(int(counts[0]) - 9_000) < 350  # five standard deviations


def test_without_padding_and_flip_nothing_happens() -> None:
    images = numbered(3)
    torch.testing.assert_close(random_crop_flip(images, 0, False), images, rtol=0, atol=0)


def test_what_comes_in_at_the_border_is_zero() -> None:
    moved = random_crop_flip(torch.ones(200, 1, 4, 4), 2, True, torch.Generator().manual_seed(0))
    assert moved.unique().tolist() == [0, 1]


def test_the_generator_decides_the_result() -> None:
    images = numbered(20)
    first, again, other = (random_crop_flip(images, 2, True, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_uint8_images_stay_uint8() -> None:
    images = torch.randint(256, (30, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    moved = random_crop_flip(images, 2, True, torch.Generator().manual_seed(1))
    assert moved.dtype == torch.uint8
    as_float = random_crop_flip(images.double(), 2, True, torch.Generator().manual_seed(1))
    torch.testing.assert_close(moved.double(), as_float, rtol=0, atol=0)


def test_quantisation_truncates() -> None:
    values = [0.0, 0.999 / 255, 1 / 255, 1.9 / 255, 127.9 / 255, 254.99 / 255, 1.0, 1.2, -0.1]
    assert to_uint8(torch.tensor(values)).tolist() == [0, 0, 1, 1, 127, 254, 255, 255, 0]


def test_quantisation_keeps_what_is_quantised_already() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit(levels)), levels)


def test_to_unit_leaves_its_input_alone() -> None:
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_unit(levels).tolist() == pytest.approx([0, 0.2, 1])
    assert levels.tolist() == [0, 51, 255]


def test_normalise_to_the_range_of_cifar10() -> None:
    normalize = Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    ends = torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)])
    golden = [-2.4290657, -2.4182548, -2.2213930, 2.5140880, 2.5967904, 2.7537313]
    assert normalize(ends).flatten().tolist() == pytest.approx(golden, rel=1e-6)


def test_inverse_undoes_normalise() -> None:
    normalize, images = Normalize((0.4, 0.5), (0.1, 0.3)), torch.rand(4, 2, 3, 3)
    torch.testing.assert_close(normalize.inverse(normalize(images)), images)
    torch.testing.assert_close(normalize(normalize.inverse(images)), images)
