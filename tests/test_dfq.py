from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.losses import class_balance, confidence, kl_divergence
from dfkd_bench.method import Batch, Progress, Task
from dfkd_bench.methods.dfq import Config, Dfq, GaussianMatcher
from dfkd_bench.statistics import BatchNormMatcher

# Golden values were computed in float64 by the released code of CMI on these logits and activations.
S = torch.tensor([[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]], dtype=torch.float64)
T = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)
X1 = (torch.arange(16, dtype=torch.float64) / 10).view(2, 2, 2, 2)
NORMS, GAUSSIAN_KL = 0.3993632302158505, 0.2185654960136999
POOL: Any = None  # this method keeps none
At = Callable[..., Progress]


def new_method(task: Task, **fields: Any) -> Dfq:
    torch.manual_seed(0)
    values = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4}
    return Dfq(Config(**(values | fields)), task)


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def golden_layer(eps: float = 0.0) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(2, eps=eps).double().eval()
    layer.running_mean.copy_(torch.tensor([0.5, 1.0], dtype=torch.float64))  # type: ignore[union-attr]
    layer.running_var.copy_(torch.tensor([0.2, 0.5], dtype=torch.float64))  # type: ignore[union-attr]
    return layer


def matched(matcher: BatchNormMatcher, layer: nn.Module, x: Tensor) -> Tensor:
    with matcher.watching():
        layer(x)
    return matcher.loss()


# -- The losses -----------------------------------------------------------------------------------------------------


def test_gaussian_form() -> None:
    layer = golden_layer()
    assert matched(GaussianMatcher(layer), layer, X1).item() == pytest.approx(GAUSSIAN_KL, rel=1e-9)


def test_gaussian_form_is_zero_for_matching_statistics() -> None:
    layer = golden_layer(eps=1e-5)
    moments = X1.transpose(0, 1).flatten(1)
    layer.running_mean.copy_(moments.mean(1))  # type: ignore[union-attr]
    layer.running_var.copy_(moments.var(1, unbiased=False))  # type: ignore[union-attr]
    assert matched(GaussianMatcher(layer), layer, X1).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("x", [X1, -X1, 10 * X1, X1.sin()], ids=["x", "-x", "10x", "sin x"])
def test_gaussian_form_is_positive(x: Tensor) -> None:
    layer = golden_layer(eps=1e-5)
    assert matched(GaussianMatcher(layer), layer, x).item() > 0


def test_gaussian_form_is_finite_for_a_constant_channel() -> None:
    layer, x = golden_layer(eps=1e-5), torch.zeros(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    loss = matched(GaussianMatcher(layer), layer, x)
    loss.backward()
    assert torch.isfinite(loss)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("form", "matcher"), [("norms", BatchNormMatcher), ("gaussian_kl", GaussianMatcher)])
def test_the_form_that_was_set_is_used(task: Task, form: str, matcher: type) -> None:
    assert type(new_method(task, batchnorm_form=form).matcher) is matcher


def golden_total(make_task: Callable[..., Task], **weights: float) -> float:
    """The loss of a generator step where all four terms have their golden values."""
    method = new_method(make_task(classes=3), **weights)
    object.__setattr__(method.task, "teacher", lambda images: T)
    method.matcher.loss = lambda: torch.tensor(NORMS, dtype=torch.float64)  # type: ignore[method-assign]
    return method._loss(lambda images: S, torch.rand(4, 1, 8, 8)).item()  # type: ignore[arg-type]


def test_total_loss(make_task: Callable[..., Task]) -> None:
    assert golden_total(make_task) == pytest.approx(-20.41119175036514, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batchnorm", NORMS),
        ("onehot", confidence(T).item()),
        ("balance", class_balance(T).item()),
        ("adversarial", -kl_divergence(S, T).item()),
    ],
)
def test_the_total_is_the_weighted_sum(make_task: Callable[..., Task], name: str, value: float) -> None:
    zero = dict.fromkeys(("batchnorm", "onehot", "balance", "adversarial"), 0.0)
    assert golden_total(make_task, **{**zero, name: 3.0}) == pytest.approx(3 * value, rel=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_the_temperature_is_the_one_that_was_set(task: Task, student: nn.Module, at: At, temperature: float) -> None:
    batch = Batch(torch.randn(6, 1, 8, 8))
    loss = new_method(task, temperature=temperature).student_loss(student, batch, at(0))
    expected = kl_divergence(student(batch.images), task.teacher(batch.images), temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# -- The generator's steps ------------------------------------------------------------------------------------------


def trained(make_task: Callable[..., Task], student: nn.Module, at: At, **settings: Any) -> list[Tensor]:
    method = new_method(make_task(), **settings)
    for epoch in range(2):
        method.synthesize(student, at(epoch))
    return weights(method.generator)


@pytest.mark.parametrize(("adversarial", "same"), [(0.0, True), (1.0, False)])
def test_the_student_has_a_say_through_the_adversarial_term_only(
    make_task: Callable[..., Task], make_student: Callable[..., nn.Module], at: At, adversarial: float, same: bool
) -> None:
    one, other = (trained(make_task, make_student(seed=seed), at, adversarial=adversarial) for seed in (1, 2))
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True)) is same


def test_the_adversary_is_the_student_and_not_the_teacher(task: Task, student: nn.Module, at: At) -> None:
    """The adversarial term alone: with the teacher in the student's place it has no gradient."""
    alone = {"batchnorm": 0.0, "onehot": 0.0, "balance": 0.0}
    norms = []
    for adversary in (student, task.teacher):
        method = new_method(task, **alone)
        method.synthesize(adversary, at(0))
        gradients = [
            parameter.grad.flatten() for parameter in method.generator.parameters() if parameter.grad is not None
        ]
        norms.append(torch.cat(gradients).norm().item())
    assert norms[0] > 1e-3
    assert norms[1] < 1e-6


@pytest.mark.parametrize("form", ["norms", "gaussian_kl"])
def test_steps_match_the_teachers_statistics(task: Task, student: nn.Module, at: At, form: str) -> None:
    method = new_method(
        task, batchnorm_form=form, generator_steps=20, onehot=0.0, balance=0.0, adversarial=0.0, generator_lr=1e-2
    )
    first = method.synthesize(student, at(0)).scalars["synthesis_loss"].item()
    second = method.synthesize(student, at(1)).scalars["synthesis_loss"].item()
    assert 0 <= second < 0.9 * first


def test_statistics_are_those_of_the_normalised_images(task: Task, student: nn.Module, at: At) -> None:
    """What the teacher's first layer sees in the generator's step: no crop and no flip in between."""
    method = new_method(task)
    made: list[Tensor] = []
    seen: list[Tensor] = []
    method.generator.register_forward_hook(lambda _module, _inputs, images: made.append(images.detach()))
    handle = task.teacher.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    method.synthesize(student, at(0))
    handle.remove()
    torch.testing.assert_close(seen[0], task.normalize(made[0]))


def test_a_call_takes_the_steps_asked_for(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task, generator_steps=3)
    assert method.synthesize(student, at(0)).images is None
    assert {state["step"].item() for state in method.optimizer.state.values()} == {3}


def test_teacher_and_student_stay_as_they_are(
    task: Task, student: nn.Module, at: At, snapshot: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    method, models = new_method(task, generator_steps=2), (task.teacher, student)
    before = [snapshot(model) for model in models]
    method.synthesize(student, at(0))
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())


# -- Sampling -------------------------------------------------------------------------------------------------------


def test_student_batches_are_fresh(task: Task, at: At) -> None:
    method = new_method(task)
    first, second = (method.student_batch(POOL, 6, at(0)).images for _ in range(2))
    assert first.shape == (6, 1, 8, 8)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("sample_bn", "moves"), [("eval", False), ("train", True)])
def test_the_generators_statistics_move_only_in_train_mode(task: Task, at: At, sample_bn: str, moves: bool) -> None:
    method = new_method(task, sample_bn=sample_bn)
    before = method.generator.body.norm.running_mean.clone()  # type: ignore[operator, union-attr]
    method.student_batch(POOL, 6, at(0))
    assert torch.equal(before, method.generator.body.norm.running_mean) is not moves  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "lr"), [("cifar10/wrn40_2:wrn16_1", 0.1), ("cifar100/resnet34:resnet18", 0.05)])
def test_published_schedules(key: str, lr: float) -> None:
    schedule = Dfq.published[key].schedule
    assert (schedule.rounds_per_epoch, schedule.rounds_per_epoch * schedule.student_steps) == (40, 400)
    assert schedule.lr == lr
