"""Gradients of products that stay in fp32, in a backward pass inside bf16 as those of the methods."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dfkd_bench.augment import random_resized_crop_flip
from dfkd_bench.compute import Compute
from dfkd_bench.generators import SpectralConv2d
from dfkd_bench.losses import class_activation_maps, contrastive, supervised_contrastive

PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "resized crop": lambda x: random_resized_crop_flip(x.view(8, 3, 4, 4), True, torch.Generator().manual_seed(0)),
    "contrast": lambda x: contrastive(x, x.flip(0), 0.1, fresh=4),
    "supervised contrast": lambda x: supervised_contrastive(x, torch.arange(8) % 3, 0.5),
    "class activation maps": lambda x: class_activation_maps(x.view(8, 3, 4, 4), torch.linspace(-1, 1, 15).view(5, 3)),
}


def gradient(product: Callable[[Tensor], Tensor], precision: str) -> Tensor:
    torch.manual_seed(0)
    x = torch.rand(8, 48, requires_grad=True)
    with Compute(torch.device("cpu"), precision).autocast():  # type: ignore[arg-type]
        made = product(x)
        (made * torch.linspace(-1, 1, made.numel()).view_as(made)).sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_gradient_is_that_of_fp32(name: str) -> None:
    product = PRODUCTS[name]
    torch.testing.assert_close(gradient(product, "bf16"), gradient(product, "fp32"), rtol=1e-4, atol=1e-6)


def test_so_is_the_one_of_a_spectral_norm() -> None:
    def norm(precision: str) -> Tensor:
        torch.manual_seed(0)
        conv = SpectralConv2d(3, 5, 3).eval()
        with Compute(torch.device("cpu"), precision).autocast():  # type: ignore[arg-type]
            conv._conv_forward = lambda x, weight, bias: weight  # type: ignore[assignment, method-assign, misc]
            conv(torch.zeros(1, 3, 4, 4)).square().sum().backward()
        assert conv.weight.grad is not None
        return conv.weight.grad

    torch.testing.assert_close(norm("bf16"), norm("fp32"), rtol=1e-4, atol=1e-5)
