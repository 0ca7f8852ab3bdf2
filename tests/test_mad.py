from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dfkd_bench.losses import class_balance, cross_entropy, kl_divergence, logit_distance
from dfkd_bench.method import Batch, Method, Progress, Task
from dfkd_bench.methods import dfq
from dfkd_bench.methods.dfq import Dfq
from dfkd_bench.methods.mad import Config, LatentGenerator, Mad, follow

S = torch.tensor([[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]], dtype=torch.float64)
T = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)
POOL: Any = None  # this method keeps none
At = Callable[..., Progress]
TINY = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4}
ALONE = {"batchnorm": 0.0, "onehot": 0.0, "balance": 0.0}  # the adversarial term alone


def new_method(task: Task, **fields: Any) -> Mad:
    torch.manual_seed(0)
    return Mad(Config(**(TINY | fields)), task)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


# -- The moving average ---------------------------------------------------------------------------------------------


class Point(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_golden_average() -> None:
    average, reached = Point([0, 0]), []
    for values in ([1, 2], [3, -1], [0.5, 0.5]):
        follow(average, Point(values), 0.95)
        reached.append(average.weight.tolist())
    expected = [[0.05, 0.1], [0.1975, 0.045], [0.212625, 0.06775]]
    assert torch.tensor(reached).flatten().tolist() == pytest.approx([x for row in expected for x in row], rel=1e-6)


def test_statistics_are_averaged_and_counters_copied() -> None:
    average, model = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    model.running_mean.fill_(10)  # type: ignore[union-attr]
    model.num_batches_tracked.fill_(7)  # type: ignore[union-attr]
    follow(average, model, 0.9)
    assert average.running_mean.tolist() == pytest.approx([1, 1])  # type: ignore[union-attr]
    assert average.num_batches_tracked.item() == 7  # type: ignore[union-attr]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_limits_of_the_momentum(task: Task, student: nn.Module, at: At, momentum: float) -> None:
    method = new_method(task, ema_momentum=momentum)
    start = state(method.average)
    parameters = dict(method.generator.named_parameters())
    method.synthesize(student, at(3))
    for name, value in method.average.named_parameters():
        assert torch.equal(value, parameters[name] if momentum == 0 else start[name])


def test_the_average_follows_each_step_of_the_generator(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    """alpha^n theta~_0 + (1 - alpha) sum_i alpha^(n - i) theta_i, with theta_i from after the i-th step."""
    method = new_method(task, generator_steps=3, ema_momentum=0.8)
    expected = state(method.average)
    step = method.optimizer.step

    def watched() -> None:
        step()
        for name, value in method.generator.named_parameters():
            expected[name] = 0.8 * expected[name] + 0.2 * value.detach()

    monkeypatch.setattr(method.optimizer, "step", watched)
    method.synthesize(student, at(3))
    for name, value in method.average.named_parameters():
        torch.testing.assert_close(value, expected[name])


def test_the_average_gets_no_gradient_and_no_optimiser(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    method.synthesize(student, at(0))
    optimised = {id(parameter) for group in method.optimizer.param_groups for parameter in group["params"]}
    for parameter in method.average.parameters():
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert id(parameter) not in optimised


def test_both_start_alike(task: Task) -> None:
    method = new_method(task)
    assert same(state(method.generator), state(method.average))


# -- The student's steps --------------------------------------------------------------------------------------------


def test_a_batch_has_images_of_both(task: Task, at: At) -> None:
    batch = new_method(task).student_batch(POOL, 6, at(0))
    assert batch.images.shape == (12, 1, 8, 8)
    assert batch.parts == {"current": slice(0, 6), "remembered": slice(6, 12)}


def test_the_parts_come_from_the_generators_they_name(task: Task, at: At) -> None:
    method = new_method(task)
    made: dict[str, Tensor] = {}
    for part, generator in (("current", method.generator), ("remembered", method.average)):
        generator.register_forward_hook(lambda _m, _i, images, part=part: made.update({part: images}))
    batch = method.student_batch(POOL, 6, at(0))
    for part, rows in batch.parts.items():
        torch.testing.assert_close(batch.images[rows], task.normalize(made[part]))


def test_latents_of_the_two_are_independent(task: Task, at: At) -> None:
    batch = new_method(task).student_batch(POOL, 6, at(0))  # at the start the generators are equal
    assert not torch.equal(batch.images[:6], batch.images[6:])


@pytest.mark.parametrize(("settings", "part"), [({"remembered": 0.0}, "current"), ({"current": 0.0}, "remembered")])
def test_a_generator_without_weight_makes_no_images(task: Task, at: At, settings: dict[str, float], part: str) -> None:
    batch = new_method(task, **settings).student_batch(POOL, 6, at(0))
    assert batch.parts == {part: slice(0, 6)}
    assert len(batch.images) == 6


def test_golden_loss(make_task: Callable[..., Task], at: At) -> None:
    method = new_method(make_task(classes=3, teach=lambda images: torch.cat([T, S])))
    batch = Batch(torch.rand(8, 1, 8, 8), {"current": slice(0, 4), "remembered": slice(4, 8)})
    loss = method.student_loss(lambda images: torch.cat([S, T]), batch, at(0))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(0.4007924402599848, rel=1e-9)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"temperature": 20.0}, kl_divergence(S, T, 20)),
        ({"discrepancy": "l1"}, logit_distance(S, T)),
        ({"current": 3.0}, 3 * kl_divergence(S, T)),
    ],
    ids=["temperature", "l1", "weight"],
)
def test_the_students_loss_is_the_one_that_was_set(
    make_task: Callable[..., Task], at: At, settings: dict[str, Any], value: Tensor
) -> None:
    method = new_method(make_task(classes=3, teach=lambda images: T), **({"current": 1.0} | settings))
    batch = Batch(torch.rand(4, 1, 8, 8), {"current": slice(0, 4)})
    assert method.student_loss(lambda images: S, batch, at(0)).item() == pytest.approx(value.item(), rel=1e-9)  # type: ignore[arg-type]


def test_without_the_average_it_is_dfq(make_task: Callable[..., Task], student: nn.Module, at: At) -> None:
    """Bit by bit: the same generator, the same random stream, the same student batches."""
    torch.manual_seed(0)
    tables = Dfq(dfq.Config(**TINY, generator="small", sample_bn="train"), make_task())
    methods: list[Method] = [new_method(make_task(), current=1.0, remembered=0.0), tables]
    batches = []
    for method in methods:
        for epoch in range(2):
            method.synthesize(student, at(epoch))
            batches.append(method.student_batch(POOL, 6, at(epoch)).images)
    assert torch.equal(batches[0], batches[2])
    assert torch.equal(batches[1], batches[3])


# -- The generator's steps ------------------------------------------------------------------------------------------


def generator_gradient(method: Mad, student: nn.Module, at: At) -> float:
    method.synthesize(student, at(3))
    gradients = [p.grad.flatten() for p in method.generator.parameters() if p.grad is not None]
    return torch.cat(gradients).norm().item()


def test_the_adversary_is_the_student_and_not_the_teacher(task: Task, student: nn.Module, at: At) -> None:
    assert generator_gradient(new_method(task, **ALONE), student, at) > 1e-3
    assert generator_gradient(new_method(task, **ALONE), task.teacher, at) < 1e-6


def test_above_the_bound_nothing_pushes(task: Task, student: nn.Module, at: At) -> None:
    assert generator_gradient(new_method(task, **ALONE, bound=1e-6), student, at) == 0


def test_below_the_bound_it_makes_no_difference(make_task: Callable[..., Task], student: nn.Module, at: At) -> None:
    free, bounded = (new_method(make_task(), bound=bound) for bound in (None, 1e6))
    for method in (free, bounded):
        method.synthesize(student, at(3))
    assert same(state(free.generator), state(bounded.generator))


def test_pretraining_is_without_the_student_and_comes_once(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]]
) -> None:
    method, calls = new_method(task, pretraining_steps=4), record_modes(student)
    steps = []
    for epoch, round_ in ((0, 0), (0, 1), (1, 0)):
        method.synthesize(student, at(epoch, round_=round_))
        steps.append(max(int(value["step"].item()) for value in method.optimizer.state.values()))
    assert steps == [5, 6, 7]
    assert len(calls) == 3


def test_the_average_starts_from_the_pretrained_generator(task: Task, student: nn.Module, at: At) -> None:
    pretrained = new_method(task, pretraining_steps=4, ema_momentum=1.0)
    untrained = state(pretrained.average)
    pretrained.synthesize(student, at(0))
    assert not same(untrained, state(pretrained.average))


# -- Conditional on the class ---------------------------------------------------------------------------------------


def conditional() -> LatentGenerator:
    torch.manual_seed(0)
    task: Any = SimpleNamespace(image_shape=(1, 8, 8), num_classes=5)
    return LatentGenerator(task, Config(**(TINY | {"conditional": "sum"})))  # type: ignore[arg-type]


def test_the_input_is_the_sum_of_latent_and_embedding() -> None:
    generator, latents, labels = conditional(), torch.randn(6, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    assert generator.embedding is not None
    shifted = latents + generator.embedding.weight[labels]
    torch.testing.assert_close(generator(latents, labels), generator.body(shifted))


def test_pairs_in_another_order_give_the_images_in_that_order() -> None:
    generator, latents, labels, order = conditional(), torch.randn(4, 8), torch.tensor([0, 1, 2, 3]), [2, 0, 3, 1]
    torch.testing.assert_close(generator(latents[order], labels[order]), generator(latents, labels)[order])


def test_embeddings_learn(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task, conditional="sum")
    before = state(method.generator)["embedding.weight"]
    method.synthesize(student, at(0))
    assert not torch.equal(before, state(method.generator)["embedding.weight"])


def test_conditional_images_are_asked_to_be_of_their_class(make_task: Callable[..., Task]) -> None:
    method = new_method(make_task(classes=3), conditional="sum", batchnorm=0.0, embedding_norm=0.5)
    object.__setattr__(method.task, "teacher", lambda images: T)
    method.matcher.loss = lambda: torch.tensor(0.0)  # type: ignore[method-assign]
    labels = torch.tensor([2, 0, 0, 1])
    got = method._generator_loss(lambda images: S, torch.rand(4, 1, 8, 8), labels, adversarial=1.0)  # type: ignore[arg-type]
    assert method.generator.embedding is not None
    norm = method.generator.embedding.weight[labels].square().sum(1).mean()
    expected = cross_entropy(T, labels) + 20 * class_balance(T) - kl_divergence(S, T) + 0.5 * norm
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"current": 0, "remembered": 0}, "learn nothing"), ({"discrepancy": "l1", "temperature": 20}, "temperature")],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config(**settings)
