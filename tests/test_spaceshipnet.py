from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.generators import Generator
from dfkd_bench.losses import class_activation_maps, grad_cam, kl_elementwise
from dfkd_bench.method import Batch, Progress, Task
from dfkd_bench.methods import spaceshipnet
from dfkd_bench.methods.spaceshipnet import (
    LEVELS,
    Config,
    SpaceshipNet,
    balanced_labels,
    draw_half,
    exchange_channels,
    initialize,
    look,
    map_distance,
)
from dfkd_bench.models import build_model
from dfkd_bench.pool import Pool

B, STEPS = 12, 3
CPU = torch.device("cpu")
At = Callable[..., Progress]
Snapshot = Callable[[nn.Module], dict[str, Tensor]]


def new_method(task: Task, **fields: Any) -> SpaceshipNet:
    values = {"synthesis_batch_size": B, "latent_dim": 8, "generator_steps": STEPS, "generator_width": 4}
    torch.manual_seed(0)
    return SpaceshipNet(Config(**(values | fields)), task)


def ready(task: Task, student: nn.Module, at: At, **fields: Any) -> tuple[SpaceshipNet, Pool]:
    """A method after its first call, and the pool with what that made."""
    method = new_method(task, **fields)
    pool = Pool(task.image_shape, CPU, torch.Generator().manual_seed(5))
    made = method.synthesize(student, at(0))
    assert made.images is not None
    pool.add(made.images, made.extras)
    return method, pool


def model_of(name: str, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, classes, 1).eval()


# -- Golden values: computed in float64 by the released code's functions ----------------------------------------------

S = torch.tensor([[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]], dtype=torch.float64)
T = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)
FEATURES = torch.arange(24, dtype=torch.float64).sin().view(2, 3, 2, 2)
GRADIENTS = torch.arange(24, dtype=torch.float64).cos().view(2, 3, 2, 2)
GRAD_CAM = [
    [[-0.7220902838268964, -0.4888542980688666], [0.19383207486657753, 0.6983101320721019]],
    [[-0.5630285291496736, -0.3313234842922933], [0.20499884404688878, 0.5528461805699676]],
]
CLASS_MAPS = [
    [
        [[-0.9893582466233818, 0.4293524995661399], [1.4533185377150515, 1.1411102146105707]],
        [[-1.5136049906158564, -1.4971130569223288], [-0.10418228298501087, 1.3845332014675118]],
    ],
    [
        [[-1.4495181687280625, -0.41648860170941515], [0.9994586649852742, 1.4965082443322875]],
        [[-0.844093092330348, -1.712711465345793], [-1.006670815695917, 0.6248983394044632]],
    ],
]


def test_golden_kl_averaged_over_the_classes() -> None:
    assert kl_elementwise(S, T, 30).item() == pytest.approx(0.17947301258969955, rel=1e-10)


def test_golden_grad_cam() -> None:
    torch.testing.assert_close(
        grad_cam(FEATURES, GRADIENTS), torch.tensor(GRAD_CAM, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


def test_golden_class_activation_maps() -> None:
    weight = torch.tensor([[1, 0, -1], [0.5, 2, 0]], dtype=torch.float64)
    torch.testing.assert_close(
        class_activation_maps(FEATURES, weight), torch.tensor(CLASS_MAPS, dtype=torch.float64), rtol=1e-9, atol=1e-9
    )


# -- Where a classifier looks -----------------------------------------------------------------------------------------

SIDES = {"convnet8": 12, "wrn16_1": 12, "resnet18": 8, "vgg8": 16, "resnet18_imagenet": 64, "mobilenetv2_imagenet": 64}
LAST = {"convnet8": 3, "wrn16_1": 3, "resnet18": 1, "vgg8": 2, "resnet18_imagenet": 2, "mobilenetv2_imagenet": 2}
"""Sides of images, and of the last map that a model makes of them before it pools."""


@pytest.mark.parametrize("name", SIDES)
def test_class_activation_maps_average_to_the_logits(name: str) -> None:
    """So they are made of the features that are pooled into the classifier's input, in every family of models."""
    model = model_of(name)
    classifier: nn.Linear = model.classifier  # type: ignore[assignment]
    maps = look(model, torch.rand(2, 1, SIDES[name], SIDES[name], requires_grad=True))
    expected = maps.classes.mean(dim=(2, 3)) + classifier.bias
    torch.testing.assert_close(expected, maps.logits, rtol=1e-4, atol=1e-5)
    assert maps.classes.shape[2:] == (LAST[name], LAST[name])


@pytest.mark.parametrize("answers", [None, [3, 0]])
def test_grad_cam_maps_are_those_of_the_asked_classes(answers: list[int] | None) -> None:
    model, images = model_of("wrn16_1"), torch.rand(2, 1, 8, 8, requires_grad=True)
    maps = look(model, images, None if answers is None else torch.tensor(answers))
    logits, _, stages = model.features(images)  # type: ignore[operator]
    wanted = logits.argmax(dim=1).tolist() if answers is None else answers
    for row, answer in enumerate(wanted):
        gradients = torch.autograd.grad(logits[row, answer], stages, retain_graph=True)
        for got, stage, gradient in zip(maps.stages, stages, gradients, strict=True):
            weights = gradient[row].mean(dim=(1, 2))
            expected = torch.einsum("c,chw->hw", weights, stage[row])
            torch.testing.assert_close(got[row], expected, rtol=1e-4, atol=1e-6)


def test_maps_reach_the_features_but_not_the_classifier() -> None:
    """Grad-CAM's gradients and the classifier's weights are constants."""
    model = model_of("convnet8")
    maps = look(model, torch.rand(2, 1, 8, 8))
    (maps.classes.square().sum() + sum(stage.square().sum() for stage in maps.stages)).backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in model.named_parameters()} - {"classifier.weight", "classifier.bias"}


def test_looking_leaves_no_hook_and_no_gradient() -> None:
    model = model_of("convnet8")
    look(model, torch.rand(2, 1, 8, 8))
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_map_distance_averages_the_larger_map_down() -> None:
    large, small = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 2, 2)
    expected = (large.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5)) - small).square().mean()
    torch.testing.assert_close(map_distance(large, small), expected)
    torch.testing.assert_close(map_distance(small, large), expected)


def test_map_distance_has_no_gradient_to_the_wanted_map() -> None:
    own, wanted = torch.rand(2, 3, 3, requires_grad=True), torch.rand(2, 3, 3, requires_grad=True)
    map_distance(own, wanted).backward()
    torch.testing.assert_close(own.grad, 2 * (own - wanted).detach() / 18)
    assert wanted.grad is None


# -- Exchange of channels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [8, 7])
def test_half_of_the_channels_are_drawn_for_every_row(channels: int) -> None:
    own = draw_half(torch.empty(1000, channels, 1, 1), torch.Generator().manual_seed(0))
    assert own.sum(dim=1).unique().tolist() == [channels // 2]
    share, deviation = channels // 2 / channels, math.sqrt(1 / 4 / 1000)
    assert (own.double().mean(dim=0) - share).abs().max() < 5 * deviation
    assert own.unique(dim=0).shape[0] == math.comb(channels, channels // 2)  # every choice, so rows differ


def test_a_row_exchanges_with_its_mirror_image() -> None:
    features = torch.arange(5.0)[:, None, None, None].expand(5, 4, 2, 2)
    own = torch.tensor([[True, True, False, False]] * 5)
    mixed = exchange_channels(features, own)
    assert mixed[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert mixed[:, 3, 1, 1].tolist() == [4, 3, 2, 1, 0]


def test_exchanging_twice_gives_the_originals_back() -> None:
    features = torch.rand(6, 8, 2, 2)
    half = draw_half(features[:3], torch.Generator().manual_seed(0))
    own = torch.cat([half, half.flip(0)])  # both of a pair keep the same channels, so the others change places
    once = exchange_channels(features, own)
    assert not torch.equal(once, features)
    assert torch.equal(exchange_channels(once, own), features)


# -- One call ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([3.0, 2.0, 1.0], 2)])
def test_images_and_features_of_the_lowest_loss_are_kept(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch, losses: list[float], best: int
) -> None:
    """Bit by bit what the layers gave in that step, before its update."""
    script = iter(losses)
    monkeypatch.setattr(
        spaceshipnet, "cross_entropy", lambda x, labels: next(script) + x.square().sum() - x.square().sum().detach()
    )
    method = new_method(task, batchnorm=0.0, onehot=1.0, feature_dtype="float32")
    body = method.generator.body
    outputs: dict[str, list[Tensor]] = {}
    for name, layer in zip((*LEVELS, "images"), (body.norm, *body.stages, body.to_image), strict=True):
        seen = outputs.setdefault(name, [])
        layer.register_forward_hook(lambda _module, _inputs, output, seen=seen: seen.append(output.detach().clone()))
    made = method.synthesize(student, at(0))
    assert made.images is not None
    for name in LEVELS:
        assert [torch.equal(made.extras[name], x) for x in outputs[name]] == [step == best for step in range(STEPS)]
    assert torch.equal(made.images, outputs["images"][best].sigmoid())
    assert made.scalars["synthesis_loss"].item() == min(losses)


def test_shapes_of_what_is_kept(make_task: Callable[..., Task], make_student: Callable[..., nn.Module], at: At) -> None:
    task = make_task(image_shape=(1, 16, 16))
    made = new_method(task).synthesize(make_student(), at(0))
    assert {name: tuple(rows.shape) for name, rows in made.extras.items()} == {
        "level0": (B, 8, 4, 4),
        "level1": (B, 8, 8, 8),
        "level2": (B, 4, 16, 16),
    }
    assert {rows.dtype for rows in made.extras.values()} == {torch.float16}


def test_only_the_generator_is_optimised_by_an_adam_of_its_own_a_call(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, made, adam = new_method(task, generator_lr=0.003), [], torch.optim.Adam

    def watched(parameters: Any, **settings: Any) -> torch.optim.Adam:
        made.append(adam(parameters, **settings))
        return made[-1]

    monkeypatch.setattr(torch.optim, "Adam", watched)
    generator = method.generator
    for epoch in range(2):
        method.synthesize(student, at(epoch))
    assert method.generator is generator
    for optimizer in made:
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.003, (0.5, 0.999), 0)
        assert {id(p) for p in group["params"]} == {id(p) for p in generator.parameters()}
    assert len(made) == 2


def test_steps_lower_the_loss(task: Task, student: nn.Module, at: At) -> None:
    losses = [
        new_method(task, generator_steps=steps, generator_lr=0.01)
        .synthesize(student, at(0))
        .scalars["synthesis_loss"]
        .item()
        for steps in (1, 30)
    ]
    assert losses[1] < 0.8 * losses[0]


def test_synthesis_never_calls_the_student_and_leaves_the_teacher(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]], snapshot: Snapshot
) -> None:
    modes, before = record_modes(student), snapshot(task.teacher)
    new_method(task).synthesize(student, at(0))
    assert modes == []
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())


def test_total_generator_loss(
    make_task: Callable[..., Task], student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lambda_bn * plain BatchNorm matching + lambda_cls * cross entropy, each as it stands in that step."""
    parts: list[float] = []

    def loss_of(**weights: float) -> float:
        method = new_method(make_task(), generator_steps=1, **weights)
        return method.synthesize(student, at(0)).scalars["synthesis_loss"].item()

    parts = [loss_of(batchnorm=1.0, onehot=0.0), loss_of(batchnorm=0.0, onehot=1.0)]
    assert loss_of() == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5)


def test_statistics_are_matched_without_momentum(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    method.synthesize(student, at(0))
    assert method.matcher.remembered is None


@pytest.mark.parametrize(("size", "expected"), [(7, [0, 1, 2, 0, 1, 2, 0]), (3, [0, 1, 2])])
def test_labels_are_whole_blocks_and_the_first_of_the_next(size: int, expected: list[int]) -> None:
    assert balanced_labels(size, 3, torch.Generator(), CPU).tolist() == expected


def test_all_classes_have_their_turn_where_a_batch_is_smaller_than_their_number() -> None:
    rng = torch.Generator().manual_seed(0)
    seen = torch.cat([balanced_labels(4, 20, rng, CPU) for _ in range(100)])
    assert seen.unique().tolist() == list(range(20))


def test_initialisation() -> None:
    torch.manual_seed(0)
    generator = Generator(256, (3, 32, 32), 64)
    initialize(generator)
    for module in generator.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.06)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.mean().item() == pytest.approx(1, abs=0.01)
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.4)
        if getattr(module, "bias", None) is not None:
            assert module.bias.count_nonzero() == 0


# -- Student batches --------------------------------------------------------------------------------------------------


def test_a_batch_is_decoded_by_the_present_generator_in_eval_mode(
    make_task: Callable[..., Task], student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch, snapshot: Snapshot
) -> None:
    task = make_task(augment=lambda images: images)
    method, pool = ready(task, student, at, exchange=0.0, feature_dtype="float32")
    method.synthesize(student, at(1))  # the generator has moved on since the pool was filled
    generator, levels = method.generator, []
    decode, before = generator.body.images, snapshot(generator)
    monkeypatch.setattr(generator.body, "images", lambda feature, level: levels.append(level) or decode(feature, level))
    batches = [method.student_batch(pool, B, at(1)).images for _ in range(20)]
    assert set(levels) == {0, 1, 2}
    assert all(torch.equal(value, before[name]) for name, value in generator.state_dict().items())
    generator.eval()
    for level, batch in zip(levels, batches, strict=True):
        expected = task.normalize(decode(pool.extras[LEVELS[level]], level)).detach()
        rows = torch.cdist(batch.flatten(1), expected.flatten(1)).argmin(dim=1)
        assert rows.sort().values.tolist() == list(range(B))
        torch.testing.assert_close(batch, expected[rows])


def test_levels_are_equally_frequent_and_most_batches_are_exchanged(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, pool = ready(task, student, at)
    levels: list[int] = []
    exchanged: list[int] = []
    body = method.generator.body
    decode, exchange = body.images, spaceshipnet.exchange_channels
    monkeypatch.setattr(body, "images", lambda feature, level: levels.append(level) or decode(feature, level))
    monkeypatch.setattr(
        spaceshipnet, "exchange_channels", lambda feature, own: exchanged.append(1) or exchange(feature, own)
    )
    for _ in range(900):
        method.student_batch(pool, 4, at(0))
    counts = torch.tensor(levels).bincount(minlength=3)
    assert (counts - 300).abs().max() < 5 * math.sqrt(900 * 2 / 9)
    assert abs(len(exchanged) - 630) < 5 * math.sqrt(900 * 0.7 * 0.3)


def test_a_batch_has_no_graph_and_is_augmented(make_task: Callable[..., Task], student: nn.Module, at: At) -> None:
    task = make_task(augment=lambda images: torch.full_like(images, 0.25))
    method, pool = ready(task, student, at)
    batch = method.student_batch(pool, 8, at(0))
    assert torch.equal(batch.images, task.normalize(torch.full((8, *task.image_shape), 0.25)))
    assert not batch.images.requires_grad


def test_half_precision_moves_a_decoded_pixel_by_less_than_one_step_of_eight_bits() -> None:
    torch.manual_seed(0)
    generator = Generator(256, (3, 32, 32), 64)
    initialize(generator)
    with torch.no_grad():
        for _ in range(30):
            hidden = generator.body.hidden(generator.project(torch.randn(16, 256)))
        body = generator.eval().body
        for level, feature in enumerate(hidden):
            moved = body.images(feature.half().float(), level) - body.images(feature, level)
            assert 0 < moved.abs().max() < 1 / 255


# -- The student's loss -----------------------------------------------------------------------------------------------


def batch_of(task: Task, rows: int = 6) -> Batch:
    return Batch(torch.randn(rows, *task.image_shape, generator=torch.Generator().manual_seed(1)))


def test_student_loss_is_the_sum_of_its_parts(task: Task, student: nn.Module, at: At) -> None:
    batch = batch_of(task)
    images = batch.images.clone().requires_grad_()
    teacher = look(task.teacher, images)
    own = look(student.requires_grad_(True), batch.images, teacher.logits.argmax(dim=1))
    expected = (
        9
        * (own.logits / 3)
        .log_softmax(1)
        .sub((teacher.logits / 3).log_softmax(1))
        .neg()
        .mul((teacher.logits / 3).softmax(1))
        .mean()
    )
    expected = expected + 0.5 * (own.classes - teacher.classes).square().mean()
    for mine, wanted in zip(own.stages, teacher.stages, strict=True):
        expected = expected + 0.2 * (mine - wanted).square().mean()
    method = new_method(task, temperature=3.0, class_maps=0.5, gradient_maps=0.2)
    torch.testing.assert_close(method.student_loss(student, batch, at(0)), expected)


def test_the_loss_of_the_teacher_itself_is_zero(task: Task, at: At) -> None:
    twin = build_model("convnet8", 5, 1).eval()
    twin.load_state_dict(task.teacher.state_dict())
    loss = new_method(task).student_loss(twin, batch_of(task), at(0))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_both_networks_are_asked_about_the_teachers_answer(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, Any]] = []

    def watched(model: nn.Module, images: Tensor, answers: Tensor | None = None) -> Any:
        asked.append((model is task.teacher, answers))
        return look(model, images, answers)

    monkeypatch.setattr(spaceshipnet, "look", watched)
    batch = batch_of(task)
    new_method(task).student_loss(student.requires_grad_(True), batch, at(0))
    assert [is_teacher for is_teacher, _ in asked] == [True, False]
    assert asked[0][1] is None
    assert torch.equal(asked[1][1], task.teacher(batch.images).argmax(dim=1))


def test_the_students_gradient_is_that_of_the_loss_alone(task: Task, student: nn.Module, at: At) -> None:
    """The inner gradients of Grad-CAM leave nothing on student, teacher or batch."""
    batch = batch_of(task)
    loss = new_method(task).student_loss(student.requires_grad_(True), batch, at(0))
    assert all(parameter.grad is None for parameter in [*student.parameters(), *task.teacher.parameters()])
    assert not batch.images.requires_grad
    loss.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("name", ["vgg8", "wrn16_1"])
def test_networks_of_different_families(make_task: Callable[..., Task], at: At, name: str) -> None:
    """Maps differ in number and size: convnet8 has three stages, VGG five and a smaller last map."""
    task = make_task(image_shape=(1, 16, 16), classes=4)
    loss = new_method(task).student_loss(model_of(name).train(), batch_of(task), at(0))
    loss.backward()
    assert torch.isfinite(loss)


def test_maps_are_fp32_under_autocast(task: Task) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = look(task.teacher, batch_of(task).images.requires_grad_())
    assert maps.logits.dtype == torch.bfloat16
    assert {value.dtype for value in (maps.classes, *maps.stages)} == {torch.float32}


def test_defaults_are_the_released_scripts() -> None:
    config = Config()
    assert (config.temperature, config.exchange, config.generator_steps, config.synthesis_batch_size) == (
        30,
        0.7,
        200,
        256,
    )
    assert {entry.schedule.total_student_steps for entry in SpaceshipNet.published.values()} == {400_000, 800_000}
