"""BatchNorm of a frozen network on a GPU: PyTorch's numbers, the activation's layout, and where it is not taken."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench import frozen_norm
from dfkd_bench.compute import Compute
from dfkd_bench.frozen_norm import lighten
from dfkd_bench.models import build_model
from dfkd_bench.teach import folded

GPU = [
    pytest.param(
        torch.device("cuda", 0),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    )
]
CPU = torch.device("cpu")
ROWS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def line(x: Tensor, slope: Tensor, offset: Tensor, mean: Tensor, invstd: Tensor, _eps: float) -> Tensor:
    """``torch.batch_norm_elemt``, which is for GPUs alone: in fp32, rounded once."""
    a, b, m, s = (each.view(-1, 1, 1) for each in (slope, offset, mean, invstd))
    return ((x.float() - m) * s * a + b).to(x.dtype)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "batch_norm_elemt", line)


def norm(device: torch.device) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(8)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
        layer.running_mean.normal_()  # type: ignore[union-attr]
        layer.running_var.uniform_(0.1, 4)  # type: ignore[union-attr]
    return layer.to(device).eval().requires_grad_(False)


def activation(device: torch.device) -> Tensor:
    x = torch.randn(16, 8, 6, 5, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    return x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()


@pytest.mark.parametrize("device", [CPU, *GPU])
@pytest.mark.parametrize("came", [ROWS, CHANNELS_LAST])
def test_numbers_and_gradient_are_pytorchs(device: torch.device, came: torch.memory_format, kernel: None) -> None:
    """The gradient is channels-last, in whatever layout the next one comes."""
    plain, light = norm(device), lighten(norm(device))
    weights = torch.randn(16, 8, 6, 5, generator=torch.Generator().manual_seed(2)).to(device, torch.bfloat16)
    weights = weights.contiguous(memory_format=came)
    found = []
    for layer in (plain, light):
        x = activation(device)
        y = layer(x)
        (gradient,) = torch.autograd.grad(y, x, weights)
        found.append((y, gradient))
    torch.testing.assert_close(*found, rtol=2**-7, atol=2**-7)
    assert found[1][1].is_contiguous(memory_format=CHANNELS_LAST)


def taken(layer: nn.BatchNorm2d, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> bool:
    asked: list[Tensor] = []
    monkeypatch.setattr(frozen_norm._Frozen, "apply", lambda x, *_: asked.append(x) or x)
    lighten(layer)(x)
    return bool(asked)


def test_a_frozen_layer_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert taken(norm(CPU), activation(CPU), monkeypatch)


@pytest.mark.parametrize("why", ["training", "weights", "no gradient", "fp32", "no weights", "no statistics"])
def test_elsewhere_the_layer_is_pytorchs(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = norm(CPU), activation(CPU)
    if why == "training":
        layer.train()
    elif why == "weights":
        layer.requires_grad_(True)
    elif why == "no gradient":
        x = x.detach()
    elif why == "fp32":
        x = x.detach().float().requires_grad_()
    else:
        layer = nn.BatchNorm2d(8, affine=why != "no weights", track_running_stats=why != "no statistics").eval()
        layer.requires_grad_(False)
    assert not taken(layer, x, monkeypatch)


def test_copies_take_it_with_their_own_numbers(kernel: None) -> None:
    first = lighten(norm(CPU))
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.bias += 1  # type: ignore[operator]
    x = activation(CPU)
    torch.testing.assert_close(second(x), first(x) + 1, rtol=2**-7, atol=2**-6)


def test_a_network_keeps_its_names_and_can_be_folded() -> None:
    plain = build_model("resnet18", 5, 3).eval().requires_grad_(False)
    light = lighten(copy.deepcopy(plain))
    assert list(light.state_dict()) == list(plain.state_dict())
    copied = folded(light)
    assert copied is not None
    assert not any(isinstance(module, nn.BatchNorm2d) for module in copied.modules())


@pytest.mark.parametrize(("kind", "precision"), [("cpu", "bf16"), ("cpu", "fp32")])
def test_on_a_cpu_a_placed_model_is_as_it_was(kind: str, precision: str) -> None:
    placed = Compute(torch.device(kind), precision).place(build_model("convnet8", 5, 3))  # type: ignore[arg-type]
    assert not any("forward" in vars(module) for module in placed.modules())
