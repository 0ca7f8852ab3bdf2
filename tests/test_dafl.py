from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.losses import activation, class_balance, confidence, kl_divergence
from dfkd_bench.method import Batch, Progress, Task
from dfkd_bench.methods.dafl import Config, Dafl

# Golden values were computed in float64 by the released code of CMI on these logits and features.
T = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)
FEATURES = torch.arange(20, dtype=torch.float64).sin().view(4, 5)
POOL: Any = None  # these methods keep none
At = Callable[..., Progress]


def new_method(task: Task, **fields: Any) -> Dafl:
    torch.manual_seed(0)
    values = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4}
    return Dafl(Config(**(values | fields)), task)


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


# -- The losses -----------------------------------------------------------------------------------------------------


def test_confidence() -> None:
    assert confidence(T).item() == pytest.approx(0.26757831190703335, rel=1e-10)


def test_confidence_is_at_most_log_k() -> None:
    assert confidence(torch.zeros(4, 10)).item() == pytest.approx(math.log(10))


@pytest.mark.parametrize(("base", "value"), [(math.e, -1.0333514327252713), (10, -0.4487788250994047)])
def test_class_balance(base: float, value: float) -> None:
    assert class_balance(T, base).item() == pytest.approx(value, rel=1e-10)


def test_class_balance_is_lowest_for_equal_use() -> None:
    assert class_balance(100 * torch.eye(10)).item() == pytest.approx(-2.302585, rel=1e-6)


def test_class_balance_is_zero_where_one_class_has_everything() -> None:
    logits = torch.zeros(5, 10)
    logits[:, 3] = 1000  # the others' mean probability underflows: p * ln p were 0 * -inf = NaN
    assert class_balance(logits).item() == pytest.approx(0, abs=1e-6)


def test_class_balance_has_finite_gradients_where_a_class_is_never_predicted() -> None:
    logits = torch.zeros(5, 10)
    logits[:, 3] = 1000
    logits.requires_grad_()
    class_balance(logits).backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_class_balance_gradient() -> None:
    assert torch.autograd.gradcheck(class_balance, (T.clone().requires_grad_(),))


def test_activation() -> None:
    assert activation(FEATURES).item() == pytest.approx(-0.6118652875772875, rel=1e-10)


def test_activation_scales_with_the_features() -> None:
    assert activation(-3 * FEATURES).item() == pytest.approx(3 * -0.6118652875772875, rel=1e-10)


@pytest.mark.parametrize("loss", [confidence, class_balance, lambda rows: activation(rows)])
def test_the_order_of_a_batch_does_not_matter(loss: Callable[[Tensor], Tensor]) -> None:
    assert loss(T[[2, 0, 3, 1]]).item() == pytest.approx(loss(T).item(), rel=1e-12)


def test_half_precision_is_computed_in_fp32() -> None:
    half = T.to(torch.bfloat16)
    assert class_balance(half).item() == pytest.approx(class_balance(half.float()).item(), rel=1e-7)


class GoldenTeacher(nn.Module):
    """Answers with the golden features and logits, whatever the images."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        self.classifier(FEATURES)
        return T


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        ({}, -20.40006220788597),  # 1, 0.001 and 20, natural logarithm: the comparison tables'
        ({"onehot": 0.05, "activation": 0.01, "balance": 5.0, "log_base": "10"}, -2.2366338627774445),  # the original's
    ],
    ids=["tables", "original"],
)
def test_total_loss(task: Task, settings: dict[str, Any], total: float) -> None:
    method = new_method(task, **settings)
    object.__setattr__(task, "teacher", GoldenTeacher())
    assert method._loss(torch.rand(4, 1, 8, 8)).item() == pytest.approx(total, rel=1e-9)


# -- The generator's steps ------------------------------------------------------------------------------------------


def test_a_call_takes_the_steps_asked_for(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task, generator_steps=3)
    method.synthesize(student, at(0))
    assert {state["step"].item() for state in method.optimizer.state.values()} == {3}


def test_no_images_go_to_the_pool(task: Task, student: nn.Module, at: At) -> None:
    made = new_method(task).synthesize(student, at(0))
    assert made.images is None


def test_steps_lower_the_loss(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task, generator_steps=5, synthesis_batch_size=64)
    losses = [method.synthesize(student, at(epoch)).scalars["synthesis_loss"].item() for epoch in range(10)]
    assert losses[-1] < losses[0] - 0.5


def test_the_teacher_sees_normalised_images_of_the_generator(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    made: list[Tensor] = []
    seen: list[Tensor] = []
    method.generator.register_forward_hook(lambda _module, _inputs, images: made.append(images))
    handle = task.teacher.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    method.synthesize(student, at(0))
    handle.remove()
    torch.testing.assert_close(seen[0], (made[0] - 0.5) / 0.25)


def test_the_student_has_no_say(make_task: Callable[..., Task], make_student: Callable[..., nn.Module], at: At) -> None:
    """Without an adversarial term two different students get the same generator."""
    trajectories = []
    for seed in (1, 2):
        method = new_method(make_task())
        for epoch in range(2):
            method.synthesize(make_student(seed=seed), at(epoch))
        trajectories.append(weights(method.generator))
    assert all(torch.equal(*pair) for pair in zip(*trajectories, strict=True))


# -- The student's steps --------------------------------------------------------------------------------------------


def test_student_batches_are_fresh_and_normalised(task: Task, at: At) -> None:
    method = new_method(task)
    first, second = (method.student_batch(POOL, 6, at(0)).images for _ in range(2))
    pixels = task.normalize.inverse(first)
    assert first.shape == (6, 1, 8, 8)
    assert not torch.equal(first, second)
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_sampling_leaves_the_generators_weights_alone(task: Task, at: At) -> None:
    method = new_method(task)
    before = weights(method.generator)
    batch = method.student_batch(POOL, 6, at(0))
    assert not batch.images.requires_grad
    assert all(parameter.grad is None for parameter in method.generator.parameters())
    assert all(torch.equal(*pair) for pair in zip(before, weights(method.generator), strict=True))


@pytest.mark.parametrize(("sample_bn", "moves"), [("eval", False), ("train", True)])
def test_the_generators_statistics_move_only_in_train_mode(task: Task, at: At, sample_bn: str, moves: bool) -> None:
    method = new_method(task, sample_bn=sample_bn)
    before = method.generator.body.norm.running_mean.clone()  # type: ignore[operator, union-attr]
    method.student_batch(POOL, 6, at(0))
    assert torch.equal(before, method.generator.body.norm.running_mean) is not moves  # type: ignore[arg-type]


@pytest.mark.parametrize("sample_bn", ["eval", "train"])
def test_the_generators_step_is_in_train_mode(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]], sample_bn: str
) -> None:
    method = new_method(task, sample_bn=sample_bn)
    method.student_batch(POOL, 6, at(0))
    modes = record_modes(method.generator)
    method.synthesize(student, at(0))
    method.student_batch(POOL, 6, at(0))
    assert modes == [True, sample_bn == "train"]


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_the_temperature_is_the_one_that_was_set(task: Task, student: nn.Module, at: At, temperature: float) -> None:
    batch = Batch(torch.randn(6, 1, 8, 8))
    loss = new_method(task, temperature=temperature).student_loss(student, batch, at(0))
    expected = kl_divergence(student(batch.images), task.teacher(batch.images), temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_default_temperature_is_the_one_behind_the_published_numbers() -> None:
    assert Config().temperature == 1


def test_published_schedule() -> None:
    schedule = Dafl.published["cifar10/wrn40_2:wrn16_1"].schedule
    assert (schedule.rounds_per_epoch, schedule.rounds_per_epoch * schedule.student_steps) == (80, 400)


@pytest.mark.parametrize(("size", "parameters"), [("large", 8_776_259), ("small", 4_426_051)])
def test_generator_of_the_published_size(size: str, parameters: int) -> None:
    shapes: Any = SimpleNamespace(image_shape=(3, 32, 32), device=torch.device("meta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", lambda *_arguments, **_settings: None)
        method = Dafl(Config(generator=size), shapes)  # type: ignore[arg-type]
    assert sum(parameter.numel() for parameter in method.generator.parameters()) == parameters
