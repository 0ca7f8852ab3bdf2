from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.augment import Normalize, roll_flip
from dfkd_bench.losses import clamped_js, total_variation
from dfkd_bench.method import Progress, Task
from dfkd_bench.methods.deepinv import DeepInversion, DeepInversionConfig
from dfkd_bench.statistics import BatchNormMatcher

B, STEPS = 12, 3
At = Callable[..., Progress]

# Golden values were computed in float64 by the released code of zju-vipa/CMI; the NVlabs form is 1 - clamp(JS, 0, 1).
S = torch.tensor([[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]], dtype=torch.float64)
T = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)
JS = 0.015441207322676925  # the textbook's direction were 0.01513735923768545
FAR_S = torch.tensor([[8, -4, 0], [0, 9, -9]], dtype=torch.float64)
FAR_T = torch.tensor([[-6, 7, 0], [1, -8, 6]], dtype=torch.float64)
FAR_JS = 1.3590915114197548  # the clamp acts
IMAGES = torch.arange(96, dtype=torch.float64).sin().view(2, 3, 4, 4)
VARIATION = 3.8082852357431225


def new_method(task: Task, **fields: Any) -> DeepInversion:
    return DeepInversion(DeepInversionConfig(**({"synthesis_batch_size": B, "pixel_steps": STEPS} | fields)), task)


# -- The divergence and the image prior -----------------------------------------------------------------------------


@pytest.mark.parametrize(("s", "t", "value"), [(S, T, JS), (FAR_S, FAR_T, FAR_JS)])
def test_clamped_js(s: Tensor, t: Tensor, value: float) -> None:
    assert clamped_js(s, t).item() == pytest.approx(value, rel=1e-10)


def test_clamped_js_can_exceed_that_of_the_textbook() -> None:
    assert clamped_js(FAR_S, FAR_T).item() > math.log(2)


@pytest.mark.parametrize(("s", "t"), [(S, T), (FAR_S, FAR_T)])
def test_clamped_js_is_symmetric(s: Tensor, t: Tensor) -> None:
    assert clamped_js(t, s).item() == pytest.approx(clamped_js(s, t).item(), rel=1e-12)


def test_clamped_js_is_zero_for_equal_probabilities_only() -> None:
    assert clamped_js(T + 3, T).item() == pytest.approx(0, abs=1e-12)
    assert clamped_js(T + torch.tensor([0.1, 0, 0]), T).item() > 1e-5


def test_clamped_js_has_a_gradient_through_both() -> None:
    inputs = (S.clone().requires_grad_(), T.clone().requires_grad_())
    assert torch.autograd.gradcheck(clamped_js, inputs)


def test_clamped_js_of_half_precision_logits_is_fp32() -> None:
    s, t = S.bfloat16(), T.bfloat16()
    torch.testing.assert_close(clamped_js(s, t), clamped_js(s.float(), t.float()), rtol=0, atol=0)


def test_total_variation() -> None:
    assert total_variation(IMAGES).item() == pytest.approx(VARIATION, rel=1e-10)


def test_total_variation_of_constant_images_is_zero() -> None:
    assert total_variation(torch.full((2, 3, 4, 4), 0.7)).item() == 0


def test_total_variation_ignores_a_constant() -> None:
    assert total_variation(IMAGES + 5).item() == pytest.approx(VARIATION, rel=1e-10)


# -- The jitter -----------------------------------------------------------------------------------------------------


def numbered(n: int = 3, side: int = 5) -> Tensor:
    return torch.arange(n * 2 * side * side, dtype=torch.float64).view(n, 2, side, side)


def jitters(reach: int, flip: bool, n: int) -> Tensor:
    """How often each distinct outcome came."""
    image, generator = numbered(1, 4), torch.Generator().manual_seed(0)
    moved = torch.cat([roll_flip(image, reach, flip, generator) for _ in range(n)])
    return moved.flatten(1).unique(dim=0, return_counts=True)[1]


@pytest.mark.parametrize(("flip", "cases"), [(True, 18), (False, 9)])
def test_all_shifts_and_flips_are_equally_likely(flip: bool, cases: int) -> None:
    counts = jitters(1, flip, 3600)
    assert len(counts) == cases
    assert ((counts - 3600 / cases) ** 2 / (3600 / cases)).sum().item() < 45  # 17 degrees of freedom: 99.97 %


def test_without_reach_and_flip_nothing_moves() -> None:
    torch.testing.assert_close(roll_flip(numbered(), 0, False), numbered(), rtol=0, atol=0)


def test_all_images_are_moved_alike_by_a_roll_and_a_flip() -> None:
    images, generator = numbered(), torch.Generator().manual_seed(3)
    for _ in range(30):
        moved = roll_flip(images, 2, True, generator)
        shifts = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
        rolled = [images.roll(shift, (2, 3)) for shift in shifts]
        assert any(torch.equal(moved, candidate) for r in rolled for candidate in (r, r.flip(3)))


def test_the_gradient_goes_the_way_back() -> None:
    images = numbered().requires_grad_()
    for seed in range(5):
        moved = roll_flip(images, 2, True, torch.Generator().manual_seed(seed))
        (gradient,) = torch.autograd.grad(moved, images, moved.detach())
        torch.testing.assert_close(gradient, images.detach(), rtol=0, atol=0)


def test_the_reach_is_an_eighth_of_the_side_and_flips_obey_the_data_set(
    make_task: Callable[..., Task], student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool]] = []

    def watched(images: Tensor, reach: int, flip: bool, generator: torch.Generator) -> Tensor:
        asked.append((reach, flip))
        return images

    monkeypatch.setattr("dfkd_bench.methods.deepinv.roll_flip", watched)
    for side, keeps in ((16, True), (8, False)):
        method = new_method(make_task((1, side, side), flip_keeps_class=keeps))
        method._loss(torch.zeros(4, 1, side, side), torch.zeros(4, dtype=torch.int64), student)
    assert asked == [(2, True), (1, False)]


# -- The loss -------------------------------------------------------------------------------------------------------


def with_logits(task: Task, teacher: Tensor, **fields: Any) -> DeepInversion:
    """A method whose teacher always gives these logits, and whose BatchNorm distance is the golden one."""
    method = new_method(task, **fields)
    object.__setattr__(task, "teacher", lambda images: teacher)
    method.matcher.loss = lambda: torch.tensor(0.3993632302158505, dtype=torch.float64)  # type: ignore[method-assign]
    return method


LABELS = torch.tensor([2, 0, 0, 1])


def test_the_variation_is_that_of_the_images_before_the_jitter(
    task: Task, student: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, labels = torch.randn(4, *task.image_shape), LABELS
    monkeypatch.setattr("dfkd_bench.methods.deepinv.roll_flip", lambda images, *_: torch.zeros_like(images))
    without, with_it = (new_method(task, variation=weight)._loss(pixels, labels, student) for weight in (0.0, 2.0))
    torch.testing.assert_close(with_it - without, 2 * total_variation(pixels), rtol=1e-3, atol=0)


def test_total_loss(make_task: Callable[..., Task]) -> None:
    """10 * statistics + 1 * cross entropy - 1 * JS + 0.001 * total variation: the released script."""
    method = with_logits(make_task((3, 4, 4), 3), T)
    value = method._loss(IMAGES, LABELS, lambda view: S)  # type: ignore[arg-type]
    assert value.item() == pytest.approx(6.024577691978604, rel=1e-9)


def test_total_loss_without_competition_is_deepinversions(make_task: Callable[..., Task]) -> None:
    method = with_logits(make_task((3, 4, 4), 3), T, adversarial=0, l2=0.5)
    value = method._loss(IMAGES, LABELS, lambda view: S)  # type: ignore[arg-type]
    assert value.item() == pytest.approx(6.024577691978604 + JS + 0.5 * 6.897336688762969, rel=1e-9)


@pytest.mark.parametrize(
    ("s", "t", "bounded", "reward"),
    [(S, T, False, JS), (FAR_S, FAR_T, False, FAR_JS), (S, T, True, 1 - 0.984558792677323), (FAR_S, FAR_T, True, 1)],
)
def test_competition(task: Task, s: Tensor, t: Tensor, bounded: bool, reward: float) -> None:
    method = new_method(task, adversarial=2, bounded_competition=bounded)
    value = method._competition(lambda view: s, IMAGES, t)  # type: ignore[arg-type]
    assert value.item() == pytest.approx(2 * reward, rel=1e-9)


@pytest.mark.parametrize("adversarial", [0.0, 1.0])
def test_the_students_own_statistics(task: Task, student: nn.Module, adversarial: float) -> None:
    method, view = new_method(task, adversarial=adversarial, student_batchnorm=0.25), torch.randn(B, *task.image_shape)
    matcher = BatchNormMatcher(student)
    with matcher.watching():
        logits = student(view)
    expected = 10 * 0.25 * matcher.loss() + adversarial * clamped_js(logits, task.teacher(view))
    torch.testing.assert_close(method._competition(student, view, task.teacher(view)), expected)


def test_the_students_statistics_count_without_competition(task: Task, student: nn.Module) -> None:
    pixels, labels = torch.randn(B, *task.image_shape), torch.zeros(B, dtype=torch.int64)
    losses = []
    for share in (0.0, 0.1):
        task.rng.manual_seed(0)
        losses.append(new_method(task, adversarial=0, student_batchnorm=share)._loss(pixels, labels, student))
    assert losses[1].item() < losses[0].item() - 0.1


def test_the_gradient_goes_through_both_networks(task: Task, student: nn.Module) -> None:
    method, view = new_method(task), torch.randn(B, *task.image_shape, requires_grad=True)
    detached = method._competition(student, view, task.teacher(view).detach())
    (of_student,) = torch.autograd.grad(detached, view)
    of_both = torch.autograd.grad(method._competition(student, view, task.teacher(view)), view)[0]
    assert of_student.abs().max() > 0
    assert not torch.allclose(of_student, of_both)


def test_student_and_teacher_see_the_same_images(task: Task, student: nn.Module, at: At) -> None:
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    for name, model in (("teacher", task.teacher), ("student", student)):
        model.register_forward_pre_hook(lambda _model, inputs, to=seen[name]: to.append(inputs[0].detach().clone()))
    new_method(task).synthesize(student, at(0))
    assert len(seen["student"]) == STEPS
    assert all(torch.equal(one, other) for one, other in zip(seen["teacher"], seen["student"], strict=True))


def test_the_student_competes_from_the_first_epoch_in_eval_mode(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]]
) -> None:
    modes = record_modes(student)
    new_method(task).synthesize(student, at(0, warmup=5))
    assert modes == [False] * STEPS


def test_without_competition_the_student_is_never_called(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]]
) -> None:
    modes = record_modes(student)
    new_method(task, adversarial=0).synthesize(student, at(9))
    assert modes == []


# -- One call -------------------------------------------------------------------------------------------------------


class Script:
    """A loss with given values and a linear gradient; remembers the pixels it was called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, values: list[float], slopes: list[float]) -> None:
        self.leaf = torch.empty(0)
        self.seen: list[Tensor] = []
        self.labels = torch.empty(0)
        self._steps = iter(zip(values, slopes, strict=True))
        monkeypatch.setattr(DeepInversion, "_loss", self)

    def __call__(self, pixels: Tensor, labels: Tensor, _student: nn.Module) -> Tensor:
        self.leaf, self.labels = pixels, labels
        self.seen.append(pixels.detach().clone())
        value, slope = next(self._steps)
        return value + slope * (pixels.sum() - pixels.sum().detach())


def test_the_images_of_the_last_step_are_returned(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its update, although the loss was lowest before."""
    script = Script(monkeypatch, [1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    made = new_method(task).synthesize(student, at(0))
    assert made.images is not None
    assert made.images.shape == (B, *task.image_shape)
    torch.testing.assert_close(made.images, task.normalize.inverse(script.leaf.detach()).clamp(0, 1))
    assert not torch.equal(script.leaf.detach(), script.seen[-1])
    assert made.scalars["synthesis_loss"].item() == 3


@pytest.mark.parametrize(
    ("values", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([3.0, 2.0, 1.0], 2), ([2.0, 1.0, 1.0], 1)]
)
def test_the_images_of_the_lowest_loss_can_be_asked_for(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch, values: list[float], best: int
) -> None:
    script = Script(monkeypatch, values, [1.0, 1.0, 1.0])
    made = new_method(task, select="best").synthesize(student, at(0))
    assert made.images is not None
    torch.testing.assert_close(made.images, task.normalize.inverse(script.seen[best]).clamp(0, 1))
    assert made.scalars["synthesis_loss"].item() == values[best]


def test_pixels_take_adams_steps_and_stay_in_range(
    make_task: Callable[..., Task], student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against Adam with betas 0.5 and 0.99, cut after every step to CIFAR-10's range."""
    task = make_task((3, 8, 8), normalize=Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    low = torch.tensor([-2.4290657439, -2.4182547643, -2.2213930348]).view(1, 3, 1, 1)
    high = torch.tensor([2.5140879881, 2.5967903711, 2.7537313433]).view(1, 3, 1, 1)
    slopes = [1.0, -3.0, 0.5, 2.0]
    script = Script(monkeypatch, [0.0] * 4, slopes)
    new_method(task, pixel_steps=4, pixel_lr=1.0).synthesize(student, at(0))
    expected = script.seen[0].clone().requires_grad_()
    adam = torch.optim.Adam([expected], lr=1.0, betas=(0.5, 0.99))
    for slope, got in zip(slopes, [*script.seen[1:], script.leaf.detach()], strict=True):
        expected.grad = torch.full_like(expected, slope)
        adam.step()
        expected.data = expected.data.clamp(low, high)
        torch.testing.assert_close(got, expected.data)
    assert (script.seen[1] == low).any()  # the cut did act


def test_the_first_images_are_noise(task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch, [0.0], [1.0])
    new_method(task, synthesis_batch_size=200, pixel_steps=1).synthesize(student, at(0))
    assert script.seen[0].mean().item() == pytest.approx(0, abs=0.05)
    assert script.seen[0].std().item() == pytest.approx(1, abs=0.03)


def test_labels_are_sorted_and_random_over_all_classes(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(monkeypatch, [0.0], [1.0])
    new_method(task, synthesis_batch_size=1000, pixel_steps=1).synthesize(student, at(0))
    counts = script.labels.bincount(minlength=5)
    assert torch.equal(script.labels, script.labels.sort().values)
    assert (len(counts), int(counts.sum())) == (5, 1000)
    assert counts.sub(200).abs().max() < 65  # five standard deviations
    assert counts.unique().numel() > 1


def test_the_teacher_learns_to_see_the_labels(
    make_task: Callable[..., Task], student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task((3, 16, 16))  # room enough: a random teacher never sees some classes in 8x8 grey pixels
    labels: list[Tensor] = []
    loss = DeepInversion._loss

    def watched(self: DeepInversion, pixels: Tensor, wanted: Tensor, rival: nn.Module) -> Tensor:
        labels.append(wanted)
        return loss(self, pixels, wanted, rival)

    monkeypatch.setattr(DeepInversion, "_loss", watched)
    only_labels = {"adversarial": 0, "batchnorm": 0, "variation": 0, "onehot": 1}
    made = new_method(task, synthesis_batch_size=30, pixel_steps=100, **only_labels).synthesize(student, at(0))
    assert made.images is not None
    right = task.teacher(task.normalize(made.images)).argmax(1) == labels[0]
    assert right.float().mean().item() > 0.9


def test_statistics_come_nearer(task: Task, student: nn.Module, at: At) -> None:
    distances = []
    for steps in (1, 60):
        made = new_method(task, synthesis_batch_size=50, pixel_steps=steps, adversarial=0).synthesize(student, at(0))
        assert made.images is not None
        matcher = BatchNormMatcher(task.teacher)
        with matcher.watching():
            task.teacher(task.normalize(made.images))
        distances.append(matcher.loss().item())
    assert distances[1] < distances[0] / 2


def test_teacher_and_student_stay_as_they_are(
    task: Task, student: nn.Module, at: At, snapshot: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    models = (task.teacher, student)
    before = [snapshot(model) for model in models]
    new_method(task, student_batchnorm=0.001).synthesize(student, at(0))
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_equal_seeds_make_equal_images(make_task: Callable[..., Task], student: nn.Module, at: At) -> None:
    first, second = (new_method(make_task()).synthesize(student, at(0)).images for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


# -- Settings -------------------------------------------------------------------------------------------------------

# key: epochs, images a batch, weight of the competition, temperature (the newest scripts train at 1)
SCRIPTS = {
    "cifar10/wrn40_2:wrn16_1": (200, 256, 1, 20),
    "cifar10/wrn40_2:wrn16_2": (250, 256, 1, 20),
    "cifar10/wrn40_2:wrn40_1": (250, 256, 1, 20),
    "cifar10/resnet34:resnet18": (250, 256, 0, 1),
    "cifar10/vgg11:resnet18": (250, 512, 0, 1),
    "cifar100/wrn40_2:wrn16_2": (300, 1024, 1, 20),
    "cifar100/resnet34:wrn40_1": (400, 256, 1, 1),
}


@pytest.mark.parametrize("key", SCRIPTS)
def test_published_settings(key: str) -> None:
    published = DeepInversion.published[key]
    schedule, config = published.schedule, DeepInversionConfig(**published.config)
    assert (schedule.epochs, schedule.batch_size, config.adversarial, config.temperature) == SCRIPTS[key]
    assert config.synthesis_batch_size == schedule.batch_size
    assert (config.pixel_steps, config.pixel_lr) == (1000, 0.1)
    assert (config.batchnorm, config.onehot, config.variation, config.l2) == (10, 1, 1e-3, 0)
    assert (config.student_batchnorm, config.bounded_competition, config.select) == (0, False, "last")
    assert (schedule.warmup_epochs, schedule.rounds_per_epoch, schedule.student_steps) == (0, 1, 400)
    assert (schedule.lr, schedule.lr_rule, schedule.lr_min, schedule.lr_horizon) == (0.1, "cosine", 0, None)
    assert (schedule.optimizer, schedule.momentum, schedule.weight_decay) == ("sgd", 0.9, 1e-4)


def test_nothing_else_is_published() -> None:
    assert set(DeepInversion.published) == set(SCRIPTS)
    assert [key for key, entry in DeepInversion.published.items() if entry.origin == "code"] == [next(iter(SCRIPTS))]
