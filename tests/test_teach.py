from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from dfkd_bench.compute import Compute
from dfkd_bench.models import build_model
from dfkd_bench.teach import OnePass, folded, has_one_pass_kernels, in_one_pass, teaching

CPU = torch.device("cpu")


def trained(name: str) -> nn.Module:
    """A model whose BatchNorms have statistics and weights that are not those of a fresh one."""
    torch.manual_seed(0)
    model = build_model(name, 10, 3).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        for _ in range(5):
            model(torch.randn(32, 3, 16, 16))
    return model.eval().requires_grad_(False)


def images() -> Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_fp32_answers_are_the_teachers_own_bits() -> None:
    teacher = trained("wrn16_1")
    assert torch.equal(teaching(teacher, Compute(CPU, "fp32"))(images()), teacher(images()))


@pytest.mark.parametrize("name", ["wrn16_1", "convnet8", "resnet18", "vgg11"])
def test_bf16_answers_are_as_near_to_fp32_as_autocast_is(name: str) -> None:
    teacher, half = trained(name), Compute(CPU, "bf16")
    exact = teacher(images())
    with half.autocast():
        rounding = (teacher(images()).float() - exact).abs().mean()
    answers = teaching(teacher, half)(images())
    assert answers.dtype == torch.float32
    assert (answers - exact).abs().mean() < 2 * rounding


@pytest.mark.parametrize(("name", "left"), [("wrn16_1", 7), ("convnet8", 0), ("resnet18", 0), ("vgg11", 0)])
def test_batchnorms_behind_a_convolution_are_folded(name: str, left: int) -> None:
    """A wide ResNet normalises before the first convolution of each of its six blocks, and at its end."""
    copy = folded(trained(name))
    assert copy is not None
    assert sum(isinstance(module, nn.BatchNorm2d) for module in copy.modules()) == left


one_pass_kernels = pytest.mark.skipif(not has_one_pass_kernels(), reason="this PyTorch has no oneDNN")


def both(network: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    """``network`` in one pass, and what it and the folded one make of ``x``."""
    first, second = folded(network), folded(network)
    assert first is not None
    assert second is not None
    once = in_one_pass(second)
    with torch.no_grad():
        return once, once(x.bfloat16()).float(), first(x.bfloat16()).float()


@one_pass_kernels
@pytest.mark.parametrize("name", ["convnet8", "convnet16"])
def test_a_relu_in_the_same_pass_changes_no_bit(name: str) -> None:
    _, once, plain = both(trained(name), images())
    assert torch.equal(once, plain)


@one_pass_kernels
@pytest.mark.parametrize("name", ["wrn16_1", "resnet18"])
def test_sums_and_slopes_in_the_same_pass_are_about_as_exact(name: str) -> None:
    teacher = trained(name)
    exact = teacher(images())
    _, once, plain = both(teacher, images())
    assert (once - exact).abs().mean() < 1.5 * (plain - exact).abs().mean()


@one_pass_kernels
@pytest.mark.parametrize("name", ["convnet8", "wrn16_1", "resnet18", "vgg11"])
def test_convolutions_take_along_what_follows_them(name: str) -> None:
    """No BatchNorm, addition or ReLU is left to itself, in none of the four kinds of network."""
    once, *_ = both(trained(name), images())
    assert isinstance(once, GraphModule)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.ReLU) for module in once.children())
    functions = {node.target for node in once.graph.nodes if node.op in ("call_function", "call_method")}
    assert not functions & {operator.add, operator.iadd, torch.add, F.relu, torch.relu, "relu", "relu_", "add"}


@one_pass_kernels
def test_weights_that_were_laid_out_serve_other_batches() -> None:
    """Of another size, and rows of other layouts, as a last batch or a user may have them."""
    once, *_ = both(trained("wrn16_1"), images())
    whole = images().bfloat16()
    with torch.no_grad():
        wanted = once(whole)
        assert torch.equal(once(whole[:3]), wanted[:3])
        assert torch.equal(once(whole.to(memory_format=torch.channels_last)), wanted)


class Small(nn.Module):
    """One convolution and what a subclass does with it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class UsedTwice(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(y) - y


class Doubled(Small):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + y


class Shifted(Small):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + 1.5


class Reflected(Small):
    def __init__(self) -> None:
        super().__init__()
        self.conv.padding_mode = "reflect"
        self.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


@one_pass_kernels
@pytest.mark.parametrize("network", [UsedTwice, Doubled, Shifted, Reflected])
def test_what_one_pass_can_not_do_stays_as_it_is(network: type[Small]) -> None:
    once, now, plain = both(network().eval().requires_grad_(False), images())
    assert isinstance(once, GraphModule)
    assert not any(module.relu for module in once.modules() if isinstance(module, OnePass))
    assert not any(len(node.args) > 1 for node in once.graph.nodes if node.op == "call_module")
    assert torch.equal(now, plain)


class Branches(Small):
    """A sum of two convolutions, then a ReLU that works in place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + self.conv(x.flip(3)), inplace=True)


@one_pass_kernels
def test_of_two_convolutions_in_a_sum_one_takes_the_other_along() -> None:
    once, now, plain = both(Branches().eval().requires_grad_(False), images())
    assert isinstance(once, GraphModule)
    assert sorted(len(node.args) for node in once.graph.nodes if node.op == "call_module") == [1, 2]
    torch.testing.assert_close(now, plain, rtol=0.02, atol=0.02)


class Broadcast(Small):
    """A sum with a mean of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x.mean((2, 3), keepdim=True))


class Strided(Small):
    """A sum of one shape behind a convolution that changes height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, stride=2, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x[:, :, ::2, ::2]


@one_pass_kernels
def test_a_broadcast_sum_is_computed_apart() -> None:
    _, now, plain = both(Broadcast().eval().requires_grad_(False), images())
    assert torch.equal(now, plain)


@one_pass_kernels
def test_a_sum_behind_a_stride_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Conv2d, "forward", None)  # what the way apart would call
    frozen = folded(Strided().eval())
    assert frozen is not None
    with torch.no_grad():
        now = in_one_pass(frozen)(images().bfloat16())
    assert now.shape == (8, 3, 8, 8)


def test_the_teacher_itself_stays_as_it_is() -> None:
    teacher = trained("convnet8")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    teaching(teacher, Compute(CPU, "bf16"))(images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert sum(isinstance(module, nn.BatchNorm2d) for module in teacher.modules()) == 3


def test_answers_have_no_graph() -> None:
    teacher = trained("convnet8").requires_grad_(True)
    assert not teaching(teacher, Compute(CPU, "bf16"))(images()).requires_grad


class Forked(nn.Module):
    """A network whose way depends on its input, which nothing can trace."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) if x.mean() > 0 else self.linear(-x.flatten(1))


def test_a_network_that_can_not_be_traced_is_taken_as_it_is() -> None:
    half = Compute(CPU, "bf16")
    teacher = Forked()
    assert folded(teacher) is None
    with half.autocast():
        wanted = teacher(images()).float()
    assert torch.equal(teaching(teacher, half)(images()), wanted)


class Counting(nn.Module):
    """Asks for the length of its batch, which tracing doesn't know."""

    def forward(self, images: Tensor) -> Tensor:
        return images.reshape(len(images), -1)


def test_a_network_whose_tracing_fails_in_another_way_is_taken_as_it_is() -> None:
    assert folded(Counting()) is None
