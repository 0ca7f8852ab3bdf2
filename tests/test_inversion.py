from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench import inversion
from dfkd_bench.augment import random_crop_flip
from dfkd_bench.generators import Generator
from dfkd_bench.inversion import BestStep, inversion_loss, invert
from dfkd_bench.losses import cross_entropy, masked_adversarial
from dfkd_bench.method import Task
from dfkd_bench.statistics import BatchNormMatcher

B = 12
LABELS = torch.arange(B) % 5
SETTINGS = SimpleNamespace(batchnorm=10.0, onehot=0.5, adversarial=1.33, generator_steps=3, generator_lr=4e-3)


@pytest.mark.parametrize(
    ("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([3.0, 2.0, 1.0], 2), ([2.0, 1.0, 1.0], 1)]
)
def test_all_tensors_are_those_of_the_lowest_loss(losses: list[float], best: int) -> None:
    kept = BestStep()
    for step, loss in enumerate(losses):
        kept.offer(torch.tensor(loss), torch.full((2, 3), step), torch.full((4,), float(step)))
    assert kept.loss.item() == min(losses)
    assert [tensor.unique().tolist() for tensor in kept.tensors] == [[best], [best]]


def test_what_is_kept_has_no_graph() -> None:
    kept, x = BestStep(), torch.rand(2, requires_grad=True)
    kept.offer(x.sum(), 2 * x)
    assert not any(tensor.requires_grad for tensor in (kept.loss, *kept.tensors))


def test_terms_of_the_loss(task: Task, student: nn.Module) -> None:
    view = torch.randn(B, *task.image_shape)
    matcher, alone = BatchNormMatcher(task.teacher), BatchNormMatcher(task.teacher)
    with matcher.watching():
        loss = inversion_loss(task, matcher, SETTINGS, view, LABELS, student)
        without = inversion_loss(task, matcher, SETTINGS, view, LABELS, None)
    with alone.watching():
        logits = task.teacher(view)
    expected = 10 * alone.loss() + 0.5 * cross_entropy(logits, LABELS)
    torch.testing.assert_close(without, expected)
    torch.testing.assert_close(loss, expected + 1.33 * masked_adversarial(student(view), logits))


class Scene:
    """An inversion whose steps, by the losses that its terms are told to have, differ; ``made``: what came out."""

    def __init__(self, task: Task, monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
        torch.manual_seed(0)
        self.outputs: list[Tensor] = []
        self.views: list[Tensor] = []
        script = iter(losses)

        def loss(_task: Task, _matcher: object, _weights: object, view: Tensor, *_rest: object) -> Tensor:
            self.views.append(view.detach())
            task.teacher(view)  # the matcher is watching
            return next(script) + view.sum() - view.sum().detach()

        monkeypatch.setattr(inversion, "inversion_loss", loss)
        generator = Generator(8, task.image_shape, 4)
        generator.register_forward_hook(lambda _module, _inputs, output: self.outputs.append(output.detach().clone()))
        self.matcher = BatchNormMatcher(task.teacher, momentum=0.9)
        settings = SimpleNamespace(**(vars(SETTINGS) | {"generator_steps": len(losses)}))
        self.made = invert(generator, torch.randn(B, 8), LABELS, task, self.matcher, settings, None)


@pytest.mark.parametrize(("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([3.0, 2.0, 1.0], 2)])
def test_the_generators_output_of_the_best_step_is_returned(
    task: Task, monkeypatch: pytest.MonkeyPatch, losses: list[float], best: int
) -> None:
    """From before that step's update, bit by bit what the generator gave: neither augmented nor normalised."""
    scene = Scene(task, monkeypatch, losses)
    (images,) = scene.made.tensors
    assert [torch.equal(images, output) for output in scene.outputs] == [step == best for step in range(3)]
    assert scene.made.loss.item() == min(losses)


def test_the_loss_sees_normalised_crops(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    padded: list[tuple[Any, ...]] = []

    def watched(images: Tensor, *settings: Any) -> Tensor:
        padded.append(settings)
        return random_crop_flip(images, *settings)

    monkeypatch.setattr(inversion, "random_crop_flip", watched)
    scene = Scene(task, monkeypatch, [1.0])
    assert padded == [(task.crop_padding, task.flip_keeps_class, task.rng)]
    assert not torch.equal(scene.views[0], task.normalize(scene.outputs[0]))
    assert scene.views[0].min().item() == pytest.approx(task.normalize(torch.zeros(1)).item())  # black of a crop


def test_the_last_step_is_remembered_not_the_best(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(task, monkeypatch, [1.0, 2.0, 3.0])
    expected = BatchNormMatcher(task.teacher, momentum=0.9)
    with expected.watching():
        task.teacher(scene.views[-1])
    expected.update()
    assert scene.matcher.remembered is not None
    assert expected.remembered is not None
    torch.testing.assert_close(scene.matcher.remembered[0], expected.remembered[0])


def test_steps_lower_the_loss(task: Task) -> None:
    losses = []
    for steps in (1, 30):
        torch.manual_seed(0)
        task.rng.manual_seed(0)
        settings = SimpleNamespace(**(vars(SETTINGS) | {"generator_steps": steps}))
        generator = Generator(8, task.image_shape, 4)
        made = invert(generator, torch.randn(B, 8), LABELS, task, BatchNormMatcher(task.teacher), settings, None)
        losses.append(made.loss.item())
    assert math.isfinite(losses[0])
    assert losses[1] < 0.8 * losses[0]
