from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.compute import Compute
from dfkd_bench.models import build_model
from dfkd_bench.teach import folded, teaching

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
    teacher, compute = trained(name), Compute(CPU, "bf16")
    exact = teacher(images())
    with compute.autocast():
        rounding = (teacher(images()).float() - exact).abs().mean()
    answers = teaching(teacher, compute)(images())
    assert answers.dtype == torch.float32
    assert (answers - exact).abs().mean() < 2 * rounding


@pytest.mark.parametrize(("name", "left"), [("wrn16_1", 7), ("convnet8", 0), ("resnet18", 0)])
def test_batchnorms_behind_a_convolution_are_folded(name: str, left: int) -> None:
    """A wide ResNet normalises before the first convolution of each of its six blocks, and at its end."""
    copy = folded(trained(name))
    assert copy is not None
    assert sum(isinstance(module, nn.BatchNorm2d) for module in copy.modules()) == left


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
    compute = Compute(CPU, "bf16")
    teacher = Forked()
    assert folded(teacher) is None
    with compute.autocast():
        wanted = teacher(images()).float()
    assert torch.equal(teaching(teacher, compute)(images()), wanted)
