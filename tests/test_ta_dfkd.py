from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.generators import EarlyGenerator
from dfkd_bench.losses import bounded_agreement, cross_entropy, logit_distance, variation_norms
from dfkd_bench.method import Progress, Task
from dfkd_bench.methods import ta_dfkd
from dfkd_bench.methods.ta_dfkd import Config, TaDfkd, clean_posterior, kept, scaled

# Golden values were computed in float64 by the released code's functions on these inputs.
S = torch.tensor([[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]], dtype=torch.float64)
T = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)
IMAGES = torch.arange(96, dtype=torch.float64).sin().view(2, 3, 4, 4)
SCALED = [0.19564738995859254, 1.0, 0.0, 0.22323584651430714]
# Posteriors of scikit-learn's GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4): nine and two steps of EM.
SKEWED = [0, 0.01, 0.03, 0.02, 0.05, 0.1, 0.3, 0.45, 0.6, 1]
SKEWED_POSTERIOR = [
    0.9819942808362718,
    0.9839160068949779,
    0.9845406562333757,
    0.9847138588833767,
    0.9809542450665222,
    0.909387723618254,
    2.023029129182647e-09,
    6.873945033557494e-24,
    1.582868008206423e-44,
    1.013978282905519e-129,
]
TWO_HILLS_POSTERIOR = [
    0.9999999999999869,
    0.9997978029493877,
    0.0003849076422803497,
    0.03583467712667706,
    0.9999999999808042,
    0.9999999999626106,
    0.0248073154257144,
    0.00041822360667565064,
    0.9999044959666,
    0.9999999999999867,
    0.9995766480058373,
    0.00035751320473463344,
]
POOL: Any = None  # the method keeps none
B = 12
At = Callable[..., Progress]


def new_method(task: Task, **fields: Any) -> TaDfkd:
    torch.manual_seed(0)
    return TaDfkd(Config(**({"synthesis_batch_size": B, "latent_dim": 8, "generator_width": 4} | fields)), task)


def replace(task: Task, **fields: Any) -> None:
    """Put something else into a (frozen) task."""
    for name, value in fields.items():
        object.__setattr__(task, name, value)


def gradients(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


# -- Golden values --------------------------------------------------------------------------------------------------


def test_scaled_losses_of_the_teachers_own_answers(task: Task) -> None:
    losses = -T.log_softmax(1).amax(1)
    assert scaled(losses).tolist() == pytest.approx(SCALED, rel=1e-10)
    assert losses.mean().item() == pytest.approx(cross_entropy(T, T.argmax(1)).item(), rel=1e-12)


def test_losses_of_both_networks() -> None:
    assert logit_distance(S, T).item() == pytest.approx(0.8916666666666666, rel=1e-12)
    assert bounded_agreement(S, T).item() == pytest.approx(0.994852930892441, rel=1e-12)


def test_image_priors() -> None:
    assert variation_norms(IMAGES).item() == pytest.approx(33.318351447177676, rel=1e-12)
    assert torch.linalg.vector_norm(IMAGES).item() == pytest.approx(6.897336688762969, rel=1e-12)


def test_mixture_that_takes_long_to_converge() -> None:
    posterior = clean_posterior(torch.tensor(SKEWED, dtype=torch.float64))
    assert posterior.tolist() == pytest.approx(SKEWED_POSTERIOR, rel=1e-9)


def test_mixture_that_stops_early() -> None:
    """Its second step changes the likelihood by less than the tolerance: the third must not count."""
    posterior = clean_posterior(scaled((torch.arange(12, dtype=torch.float64) * 0.7).sin().square()))
    assert posterior.tolist() == pytest.approx(TWO_HILLS_POSTERIOR, rel=1e-9)


# -- Selection ------------------------------------------------------------------------------------------------------


def test_scaled_losses_hold_a_zero_and_a_one() -> None:
    values = scaled(torch.rand(50, generator=torch.Generator().manual_seed(0)) * 7 + 3)
    assert (values.min().item(), values.max().item()) == (0, 1)


def test_equal_losses_are_all_kept() -> None:
    posterior = clean_posterior(scaled(torch.full((6,), 0.3)))
    assert kept(posterior, 0.5).all()


def test_the_posterior_is_that_of_the_smaller_mean_whatever_the_order() -> None:
    values = torch.cat([torch.linspace(0.8, 1, 30), torch.linspace(0, 0.2, 10)])
    assert clean_posterior(values).round().tolist() == [0] * 30 + [1] * 10


def test_selection_is_monotone_below_the_larger_mean() -> None:
    values = scaled(torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4)
    keep = kept(clean_posterior(values), 0.5)
    limit = values[~keep].mean()
    order = keep[values.argsort()][: int((values < limit).sum())]
    assert (order.int().diff() <= 0).all()
    assert 0.5 < keep.float().mean().item() < 1


def test_float32_is_enough() -> None:
    posterior = clean_posterior(torch.tensor(SKEWED))
    assert posterior.tolist() == pytest.approx(SKEWED_POSTERIOR, rel=1e-3, abs=1e-6)


def test_at_least_two_images_are_kept() -> None:
    assert kept(torch.tensor([0.1, 0.3, 0.2, 0.4]), 0.5).tolist() == [False, True, False, True]


# -- Student batches ------------------------------------------------------------------------------------------------


def posteriors(monkeypatch: pytest.MonkeyPatch, rows: list[list[float]]) -> list[Tensor]:
    """Each call of the selection gets the next of ``rows``; what it was asked about is kept."""
    asked: list[Tensor] = []
    left = iter(rows)

    def posterior(_self: TaDfkd, images: Tensor) -> Tensor:
        asked.append(images)
        return torch.tensor(next(left))

    monkeypatch.setattr(TaDfkd, "_posterior", posterior)
    return asked


def positions(batch: Tensor, candidates: list[Tensor], task: Task) -> list[tuple[int, int]]:
    """(candidate batch, row) of every image of a student batch, without shifted views."""
    places = []
    for image in batch:
        (place,) = [
            (number, row)
            for number, images in enumerate(candidates)
            for row, other in enumerate(task.normalize(images))
            if torch.equal(other, image)
        ]
        places.append(place)
    return places


def test_first_what_the_first_batch_keeps_then_part_of_the_next(
    task: Task, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = posteriors(monkeypatch, [[1, 0, 1, 0, 1, 0], [0, 1, 1, 1, 1, 1]])
    batch = new_method(task, shift_views=False).student_batch(POOL, 6, at(0))
    places = positions(batch.images, asked, task)
    assert {place for place in places if place[0] == 0} == {(0, 0), (0, 2), (0, 4)}
    assert {place[1] for place in places if place[0] == 1} < {1, 2, 3, 4, 5}
    assert len(set(places)) == 6


def test_the_likeliest_of_the_others_fill_up(task: Task, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = posteriors(monkeypatch, [[0.9, 0.1, 0.8, 0.3], [0.4, 0.6, 0.0, 0.45]])
    batch = new_method(task, shift_views=False).student_batch(POOL, 4, at(0))
    # 0.45 is kept as one of the two likeliest of its batch
    assert set(positions(batch.images, asked, task)) == {(0, 0), (0, 2), (1, 1), (1, 3)}
    asked = posteriors(monkeypatch, [[0.9, 0.1, 0.8, 0.3]])
    batch = new_method(task, shift_views=False, candidate_batches=1).student_batch(POOL, 4, at(0))
    assert positions(batch.images, asked, task)[-2:] == [(0, 3), (0, 1)]


@pytest.mark.parametrize("size", [2, 7, 30])
def test_a_batch_has_the_size_that_was_asked_for(task: Task, at: At, size: int) -> None:
    assert new_method(task).student_batch(POOL, size, at(0)).images.shape == (size, 1, 8, 8)


def test_the_decision_falls_on_the_unshifted_images(task: Task, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = posteriors(monkeypatch, [[1.0] * 8])
    method = new_method(task, candidate_batches=1)
    seen: list[Tensor] = []
    method.generator.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    batch = method.student_batch(POOL, 8, at(0))
    assert torch.equal(asked[0], seen[0])
    assert batch.images.shape == asked[0].shape


def test_all_images_of_a_view_are_shifted_alike(make_task: Callable[..., Task]) -> None:
    task = make_task((3, 16, 16))
    images = torch.rand(1, 3, 16, 16).expand(5, -1, -1, -1)
    method = new_method(task)
    views = [task.normalize.inverse(method._view(images)) for _ in range(8)]
    for view in views:
        torch.testing.assert_close(view, view[:1].expand_as(view))
    assert not all(torch.allclose(view, views[0]) for view in views)


def test_views_are_not_flipped_where_that_changes_the_class(make_task: Callable[..., Task]) -> None:
    task = make_task((1, 8, 8), flip_keeps_class=False, crop_padding=0)
    images = torch.rand(4, 1, 8, 8)
    method = new_method(task)
    for _ in range(8):
        torch.testing.assert_close(method._view(images), task.normalize(images))


def test_the_student_minimises_the_distance_of_logits(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    batch = method.student_batch(POOL, 6, at(0))
    expected = (student(batch.images) - task.teacher(batch.images)).abs().mean()
    torch.testing.assert_close(method.student_loss(student, batch, at(0)), expected)


# -- The generator's step -------------------------------------------------------------------------------------------


def test_total_loss(make_task: Callable[..., Task]) -> None:
    """10 * statistics + 6e-3 * norm + 1.5e-5 * variation + disagreement; no class prior."""
    task = make_task(classes=3)
    method = new_method(task)
    replace(task, teacher=lambda images: T)
    method.matcher.loss = lambda: torch.tensor(0.3993632302, dtype=torch.float64)  # type: ignore[method-assign]
    loss = method._loss(IMAGES, torch.tensor([True, True]), lambda images: S)  # type: ignore[arg-type]
    expected = 3.993632302 + 6e-3 * 6.897336688762969 + 1.5e-5 * 33.318351447177676 + 0.994852930892441
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_both_networks_see_only_what_is_kept(task: Task, student: nn.Module) -> None:
    method = new_method(task)
    seen: list[Tensor] = []
    for network in (student, task.teacher):
        network.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    view = torch.rand(4, 1, 8, 8)
    method._loss(view, torch.tensor([True, False, True, True]), student)
    assert len(seen) == 2
    for images in seen:
        torch.testing.assert_close(images, view[[0, 2, 3]])


def test_statistics_are_matched_on_what_is_kept_alone(task: Task, student: nn.Module) -> None:
    method = new_method(task, l2=0, variation=0, adversarial=0)
    view = torch.randn(6, 1, 8, 8, requires_grad=True)
    method._loss(view, torch.tensor([True] * 4 + [False] * 2), student).backward()
    assert view.grad is not None
    assert view.grad[:4].abs().sum() > 0
    assert view.grad[4:].abs().sum() == 0


def test_the_rival_is_the_student(task: Task, student: nn.Module) -> None:
    """With the teacher in the student's place there were no disagreement and no gradient."""
    view = torch.randn(6, 1, 8, 8, requires_grad=True)
    keep = torch.ones(6, dtype=torch.bool)
    new_method(task, l2=0, variation=0, batchnorm=0)._loss(view, keep, student).backward()
    assert view.grad is not None
    assert view.grad.abs().sum() > 0


def test_a_call_moves_the_generator_and_keeps_no_images(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    before = method.generator.project.weight.detach().clone()
    made = method.synthesize(student, at(0))
    assert made.images is None
    assert not torch.equal(before, method.generator.project.weight)
    assert 2 / B <= made.scalars["kept_share"].item() <= 1


@pytest.mark.parametrize("student_eval", [False, True])
def test_mode_of_the_student(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]], student_eval: bool
) -> None:
    modes = record_modes(student)
    new_method(task, student_eval=student_eval, generator_steps=2).synthesize(student, at(0))
    assert modes == [not student_eval] * 2
    assert not student.training


def test_in_eval_mode_the_student_stays_as_it_is(
    task: Task, student: nn.Module, at: At, snapshot: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    before = snapshot(student)
    new_method(task, student_eval=True).synthesize(student, at(0))
    for name, value in snapshot(student).items():
        assert torch.equal(value, before[name]), name


def test_the_generator_is_the_original_one_with_a_sigmoid() -> None:
    with torch.device("meta"):
        generators = {side: EarlyGenerator(1000, (3, side, side), output="sigmoid") for side in (32, 64)}
    counts = {side: sum(p.numel() for p in generator.parameters()) for side, generator in generators.items()}
    assert counts == {32: 8_423_939, 64: 33_024_515}


def test_published_settings() -> None:
    epochs = {key.partition("/")[0]: entry.schedule.epochs for key, entry in TaDfkd.published.items()}
    assert epochs == {"cifar10": 200, "cifar100": 500, "tiny_imagenet": 500}
    for entry in TaDfkd.published.values():
        schedule = entry.schedule
        assert (schedule.rounds_per_epoch, schedule.student_steps, schedule.batch_size) == (36, 10, 1024)
        assert (schedule.lr, schedule.weight_decay, schedule.lr_min) == (0.01, 5e-4, 0)
    assert ta_dfkd.Config(**TaDfkd.published["tiny_imagenet/resnet34:resnet18"].config).shift_views is False
