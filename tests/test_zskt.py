"""ZSKT, and DFAD, which is the same game with another distance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dfkd_bench.losses import kl_divergence, logit_distance
from dfkd_bench.method import Batch, Method, Progress, Task
from dfkd_bench.methods import dfad, zskt
from dfkd_bench.methods.dfad import Dfad
from dfkd_bench.methods.zskt import Zskt, attention_distance, attention_map

# Golden values were computed in float64 by the released codes (CMI; polo5/ZeroShotKnowledgeTransfer) on these inputs.
S = torch.tensor([[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]], dtype=torch.float64)
T = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)
A1 = torch.arange(24, dtype=torch.float64).sin().view(2, 3, 2, 2)
A2 = torch.arange(24, dtype=torch.float64).cos().view(2, 3, 2, 2)
ATTENTION = 0.02479354364145199
KL = 0.41110463798259733
POOL: Any = None  # these methods keep none
At = Callable[..., Progress]
TINY = {"synthesis_batch_size": 12, "latent_dim": 8, "generator_width": 4}


def new_zskt(task: Task, **fields: Any) -> Zskt:
    torch.manual_seed(0)
    return Zskt(zskt.Config(**(TINY | fields)), task)


def new_dfad(task: Task, **fields: Any) -> Dfad:
    torch.manual_seed(0)
    return Dfad(dfad.Config(**(TINY | fields)), task)


both = pytest.mark.parametrize("new_method", [new_zskt, new_dfad], ids=["zskt", "dfad"])
New = Callable[..., Any]


def weights(module: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def gradient_norm(module: nn.Module) -> float:
    gradients = [parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None]
    return torch.cat(gradients).norm().item()


def constant(logits: Tensor) -> Callable[[Tensor], Tensor]:
    """A "network" with these logits for whatever images."""
    return lambda images: logits


# -- The losses -----------------------------------------------------------------------------------------------------


def test_attention_map() -> None:
    golden = [
        [0.5118966805754951, 0.5930143832527595, 0.39618528880539117, 0.4788871961175489],
        [0.41476534677071775, 0.6202249438314326, 0.5322429503649057, 0.4000102098126038],
    ]
    torch.testing.assert_close(attention_map(A1), torch.tensor(golden, dtype=torch.float64), rtol=1e-9, atol=0)


def test_attention_distance() -> None:
    assert attention_distance(A1, A2).item() == pytest.approx(ATTENTION, rel=1e-9)


def test_attention_does_not_see_the_scale() -> None:
    torch.testing.assert_close(attention_map(7 * A1), attention_map(A1))


def test_attention_distance_is_zero_for_equal_stages() -> None:
    assert attention_distance(A1, A1).item() == 0


def test_stages_may_differ_in_channels() -> None:
    assert attention_distance(A1, torch.cat([A1, A1], dim=1)).item() == pytest.approx(0, abs=1e-15)


def test_logit_distance() -> None:
    rows = [[0.5, 0.5, 0.5], [1.3, 0.5, 2.0], [1.9, 0.5, 0.7], [1.0, 0.3, 1.0]]
    assert logit_distance(S, T).item() == pytest.approx(sum(map(sum, rows)) / 12, rel=1e-12)


def test_logit_distance_in_half_precision_is_computed_in_fp32() -> None:
    half = [logits.to(torch.bfloat16) for logits in (S, T)]
    assert logit_distance(*half).item() == pytest.approx(logit_distance(*(x.float() for x in half)).item(), rel=1e-7)


@pytest.mark.parametrize(("reduction", "value"), [("batchmean", KL), ("mean", 0.13703487932753244)])
def test_loss_of_the_students_step(make_task: Callable[..., Task], at: At, reduction: str, value: float) -> None:
    method = new_zskt(make_task(classes=3, teach=constant(T)), reduction=reduction)
    loss = method.student_loss(constant(S), Batch(torch.rand(4, 1, 8, 8)), at(0))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(value, rel=1e-9)


def test_original_loss_with_one_stage(make_task: Callable[..., Task], at: At) -> None:
    class Network(nn.Module):
        def __init__(self, logits: Tensor, stage: Tensor) -> None:
            super().__init__()
            self.features = lambda images: (logits, None, [stage])

    method = new_zskt(make_task(classes=3, teacher=Network(T, A2)), reduction="mean", attention=250.0)
    loss = method.student_loss(Network(S, A1), Batch(torch.rand(4, 1, 8, 8)), at(0))
    assert loss.item() == pytest.approx(6.33542078969053, rel=1e-9)


def test_attention_adds_up_over_the_stages(task: Task, student: nn.Module, at: At) -> None:
    batch = Batch(torch.randn(6, 1, 8, 8))
    plain, attentive = (new_zskt(task, attention=weight).student_loss(student, batch, at(0)) for weight in (0, 10))
    pairs = zip(student.features(batch.images)[2], task.teacher.features(batch.images)[2], strict=True)  # type: ignore[operator]
    expected = 10 * sum(attention_distance(*pair).item() for pair in pairs)
    assert attentive.item() - plain.item() == pytest.approx(expected, rel=1e-4)


def test_attention_between_unlike_networks_is_refused(task: Task, student: nn.Module, at: At) -> None:
    images = torch.randn(2, 1, 8, 8)
    logits, features, stages = student.features(images)  # type: ignore[operator]
    student.features = lambda _images: (logits, features, stages[:2])  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match="attention=0"):
        new_zskt(task, attention=1.0).student_loss(student, Batch(images), at(0))


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_the_temperature_is_the_one_that_was_set(task: Task, student: nn.Module, at: At, temperature: float) -> None:
    batch = Batch(torch.randn(6, 1, 8, 8))
    loss = new_zskt(task, temperature=temperature).student_loss(student, batch, at(0))
    expected = kl_divergence(student(batch.images), task.teacher(batch.images), temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_temperature_that_would_do_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="temperature"):
        dfad.Config(temperature=20)


def test_dfads_loss_of_the_students_step(make_task: Callable[..., Task], at: At) -> None:
    method = new_dfad(make_task(classes=3, teach=constant(T)))
    loss = method.student_loss(constant(S), Batch(torch.rand(4, 1, 8, 8)), at(0))  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(logit_distance(S, T).item(), rel=1e-12)


# -- The game -------------------------------------------------------------------------------------------------------


@both
def test_the_generator_has_minus_the_students_loss(task: Task, student: nn.Module, at: At, new_method: New) -> None:
    """On the same images, with both networks in eval mode."""
    method: Method = new_method(task)
    seen: list[Tensor] = []
    student.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    made = method.synthesize(student, at(0))
    loss = method.student_loss(student, Batch(seen[0]), at(0))
    assert loss.item() > 0
    assert made.scalars["synthesis_loss"].item() == pytest.approx(-loss.item(), rel=1e-5)


@both
def test_the_adversary_is_the_student_and_not_the_teacher(
    task: Task, student: nn.Module, at: At, new_method: New
) -> None:
    """With the teacher in the student's place, the fault of a released driver, there is nothing to learn from."""
    against_student, against_teacher = new_method(task), new_method(task)
    against_student.synthesize(student, at(0))
    against_teacher.synthesize(task.teacher, at(0))
    assert gradient_norm(against_student.generator) > 1e-3
    assert gradient_norm(against_teacher.generator) < 1e-6


@both
def test_the_generators_step_raises_the_distance(task: Task, student: nn.Module, at: At, new_method: New) -> None:
    method = new_method(task, generator_lr=1e-4)
    latents = torch.randn(12, 8)

    def distance() -> float:
        images = task.normalize(method.generator.train()(latents))
        return method.student_loss(student, Batch(images.detach()), at(0)).item()

    method._draw = lambda size: latents
    before = distance()
    method.synthesize(student, at(0))
    assert distance() > before


@both
def test_every_image_counts(task: Task, student: nn.Module, at: At, new_method: New) -> None:
    """There is no mask: each image of the batch gets a gradient."""
    gradients: list[Tensor] = []
    method = new_method(task)
    method.generator.register_forward_hook(lambda _m, _i, images: images.register_hook(gradients.append) and None)
    method.synthesize(student, at(0))
    assert (gradients[0].flatten(1).abs().sum(dim=1) > 0).all()


@both
def test_the_generator_follows_the_student_it_is_given(
    make_task: Callable[..., Task], make_student: Callable[..., nn.Module], at: At, new_method: New
) -> None:
    trained = []
    for seed in (1, 2):
        method = new_method(make_task())
        method.synthesize(make_student(seed=seed), at(0))
        trained.append(weights(method.generator))
    assert not all(torch.equal(*pair) for pair in zip(*trained, strict=True))


@both
def test_teacher_and_student_stay_as_they_are(
    task: Task, student: nn.Module, at: At, snapshot: Callable[[nn.Module], dict[str, Tensor]], new_method: New
) -> None:
    method, models = new_method(task, generator_steps=2), (task.teacher, student)
    before = [snapshot(model) for model in models]
    method.synthesize(student, at(0))
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


@both
def test_a_call_takes_the_steps_asked_for(task: Task, student: nn.Module, at: At, new_method: New) -> None:
    method = new_method(task, generator_steps=3)
    assert method.synthesize(student, at(0)).images is None
    assert {state["step"].item() for state in method.optimizer.state.values()} == {3}


# -- Sampling -------------------------------------------------------------------------------------------------------


@both
def test_student_batches_are_fresh(task: Task, at: At, new_method: New) -> None:
    method = new_method(task)
    first, second = (method.student_batch(POOL, 6, at(0)).images for _ in range(2))
    assert first.shape == (6, 1, 8, 8)
    assert not torch.equal(first, second)


@both
@pytest.mark.parametrize(("sample_bn", "moves"), [("eval", False), ("train", True)])
def test_the_generators_statistics_move_only_in_train_mode(
    task: Task, at: At, new_method: New, sample_bn: str, moves: bool
) -> None:
    method = new_method(task, sample_bn=sample_bn)
    before = method.generator.body.norm.running_mean.clone()
    method.student_batch(POOL, 6, at(0))
    assert torch.equal(before, method.generator.body.norm.running_mean) is not moves


def test_kept_latents_serve_the_whole_round(task: Task, student: nn.Module, at: At) -> None:
    method = new_zskt(task, keep_latents=True)
    method.synthesize(student, at(0))
    first, second = (method.student_batch(POOL, 12, at(0)).images for _ in range(2))
    method.synthesize(student, at(0, round_=1))
    assert torch.equal(first, second)
    assert not torch.equal(first, method.student_batch(POOL, 12, at(0)).images)


def test_kept_latents_are_those_of_the_generators_step(task: Task, student: nn.Module, at: At) -> None:
    method = new_zskt(task, keep_latents=True, sample_bn="train")
    given: list[Tensor] = []
    method.generator.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0]))
    method.synthesize(student, at(0))
    method.student_batch(POOL, 12, at(0))
    assert torch.equal(*given)


def test_the_generators_gradient_is_clipped(task: Task, student: nn.Module, at: At) -> None:
    free, clipped = new_zskt(task), new_zskt(task, generator_clip_norm=1e-3)
    for method in (free, clipped):
        method.synthesize(student, at(0))
    assert gradient_norm(free.generator) > 1e-3
    assert gradient_norm(clipped.generator) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("method", [Zskt, Dfad])
def test_published_schedule(method: type[Method]) -> None:
    schedule = method.published["cifar10/wrn40_2:wrn16_1"].schedule
    assert (schedule.rounds_per_epoch, schedule.rounds_per_epoch * schedule.student_steps) == (80, 400)
