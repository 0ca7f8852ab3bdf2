from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench import inversion
from dfkd_bench.checkpoint import load_tree, save_tree
from dfkd_bench.method import Progress, Task
from dfkd_bench.methods import nayer
from dfkd_bench.methods.nayer import Nayer, NayerConfig, NoisyGenerator, NoisyLayers, balanced_labels
from dfkd_bench.statistics import batch_moments

B, STEPS, LOOPS, WARMUP_LOOPS = 12, 3, 2, 4  # 12 images of 5 classes: three noisy layers, the last for two rows
At = Callable[..., Progress]


def tiny_config(**fields: Any) -> NayerConfig:
    values = {
        "encoder": "random:16",
        "synthesis_batch_size": B,
        "generator_steps": STEPS,
        "loops": LOOPS,
        "warmup_loops": WARMUP_LOOPS,
        "noisy_width": 8,
        "generator_width": 4,
    }
    return NayerConfig(**(values | fields))


def new_method(task: Task, **fields: Any) -> Nayer:
    torch.manual_seed(0)
    return Nayer(tiny_config(**fields), task)


# -- The generator --------------------------------------------------------------------------------------------------


def shaped_task(image_shape: tuple[int, int, int], classes: int) -> Any:
    """All that the generator asks of a task."""

    class Shapes:
        num_classes = classes

    Shapes.image_shape = image_shape  # type: ignore[attr-defined]
    return Shapes


def build(image_shape: tuple[int, int, int], classes: int, size: int, embeddings: Tensor) -> NoisyGenerator:
    config = NayerConfig(synthesis_batch_size=size)
    return NoisyGenerator(shaped_task(image_shape, classes), config, embeddings.shape[1])


def fill(generator: NoisyGenerator) -> None:
    """Weights that depend on no random stream: sines scaled by the fan-in, cosines for the biases."""
    for module in generator.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            count = module.weight.numel()
            values = torch.arange(count, dtype=torch.float64).sin() * math.sqrt(2 * module.weight.shape[0] / count)
            module.weight.copy_(values.view_as(module.weight))
            if module.bias is not None:
                module.bias.copy_(0.01 * torch.arange(module.bias.numel(), dtype=torch.float64).cos())
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            channel = torch.arange(module.num_features, dtype=torch.float64)
            module.weight.copy_(1 + 0.1 * channel.sin())
            module.bias.copy_(0.05 * channel.cos())
    noisy = generator.noisy
    for index, weight in enumerate(noisy.weight):
        weight.copy_((torch.arange(weight.numel(), dtype=torch.float64) + index).sin().view_as(weight))
    noisy.bias.zero_()


def test_golden_images() -> None:
    """K = 10, B = 25, three noisy layers; computed on the released code's generator in float64."""
    embeddings = (0.3 * torch.arange(10 * 512, dtype=torch.float64)).cos().view(10, 512)
    generator = build((3, 32, 32), 10, 25, embeddings).double()
    targets = [*range(10), *range(10), 2, 1, 4, 5, 1]
    with torch.no_grad():
        fill(generator)
        images = generator(embeddings[targets])
    assert images.shape == (25, 3, 32, 32)
    got = [images.mean().item(), images.std().item(), *images[0, 0, 0, :4].tolist(), *images[24, 2, 31, -2:].tolist()]
    golden = [0.5008730553262791, 0.05227001779364767]
    golden += [0.46875073124349304, 0.46201318618247866, 0.4553261213128521, 0.4588978994651657]
    golden += [0.44404261104073406, 0.47993085744628755]
    assert got == pytest.approx(golden, rel=1e-9)


@pytest.mark.parametrize(
    ("image_shape", "classes", "size", "noisy", "total"),
    [
        ((3, 32, 32), 10, 400, 20_520_000, 28_944_771),  # CIFAR-10
        ((3, 32, 32), 100, 400, 2_052_000, 10_476_771),  # CIFAR-100
        ((3, 64, 64), 200, 200, 513_000, 33_538_347),  # Tiny-ImageNet
        ((3, 224, 224), 1000, 10, 513_000, 26_072_107),  # ImageNet
    ],
    ids=["cifar10", "cifar100", "tiny_imagenet", "imagenet"],
)
def test_parameter_counts(image_shape: tuple[int, int, int], classes: int, size: int, noisy: int, total: int) -> None:
    with torch.device("meta"):
        generator = build(image_shape, classes, size, torch.empty(classes, 512))
    assert sum(p.numel() for p in generator.noisy.parameters()) == noisy
    assert sum(p.numel() for p in generator.parameters()) == total


@pytest.mark.parametrize("rows", [12, 10, 7, 3])
def test_noisy_layers_are_those_of_a_plain_loop(rows: int) -> None:
    classes, noisy = 5, NoisyLayers(3, 5, 6, 4).double()
    with torch.no_grad():
        noisy.bias.normal_()
    x = torch.randn(rows, 6, dtype=torch.float64)
    expected = []
    for start in range(0, rows, classes):
        layer = nn.Linear(6, 4).double()
        layer.weight, layer.bias = (nn.Parameter(p[start // classes]) for p in (noisy.weight, noisy.bias))
        expected.append(layer(x[start : start + classes]))
    torch.testing.assert_close(noisy(x), torch.cat(expected))


def test_noisy_layers_are_drawn_from_the_standard_normal_distribution() -> None:
    noisy = NoisyLayers(1, 10, 512, 1000)
    with torch.no_grad():
        noisy.bias.fill_(1)
        noisy.weight.fill_(1)
    noisy.reinitialize()
    assert noisy.weight.mean().item() == pytest.approx(0, abs=0.01)
    assert noisy.weight.std().item() == pytest.approx(1, abs=0.01)
    assert noisy.bias.count_nonzero() == 0


def test_batchnorm_of_the_embeddings() -> None:
    rows = torch.tensor([[0, 1, 2], [3, -1, 0.5], [1, 1, -2], [0.5, 2, 1]], dtype=torch.float64)
    golden = [
        [-0.9878745312416637, 0.22941476791567783, 1.1026430701280177],
        [1.6464575520694393, -1.6059033754097447, 0.08481869770215522],
        [-0.10976383680462931, 0.22941476791567783, -1.611555256340949],
        [-0.5488191840231464, 1.1470738395783893, 0.42409349348851077605],
    ]
    normalised = build((1, 8, 8), 4, 4, rows).double().norm(rows)
    torch.testing.assert_close(normalised, torch.tensor(golden, dtype=torch.float64), rtol=1e-6, atol=1e-8)


def test_batchnorm_spreads_balanced_classes() -> None:
    classes, width = 10, 512
    embeddings = torch.randn(classes, width, dtype=torch.float64)
    generator = build((1, 8, 8), classes, 40, embeddings).double()
    normalised = generator.norm(embeddings.repeat(4, 1))
    assert torch.equal(normalised[:10], normalised[30:])  # equal labels, equal rows
    squared = torch.cdist(normalised[:10], normalised[:10]).square().sum() / (classes * (classes - 1))
    assert squared.item() == pytest.approx(2 * width * classes / (classes - 1), rel=1e-3)


def test_only_the_noisy_layers_make_images_of_one_label_differ(task: Task) -> None:
    method = new_method(task)
    embedded = method.embeddings[balanced_labels(10, 5, task.rng, task.device)]
    with torch.no_grad():
        first, again = method.generator(embedded), method.generator(embedded)
        method.generator.noisy.weight.copy_(method.generator.noisy.weight[:1].expand_as(method.generator.noisy.weight))
        shared = method.generator(embedded)
        method.generator.noisy.reinitialize()
        redrawn = method.generator(embedded)
    assert torch.equal(first, again)
    assert (first[:5] - first[5:]).abs().mean() > 0.01  # the same labels through two layers
    assert (redrawn - first).abs().mean() > 0.01
    torch.testing.assert_close(shared[:5], shared[5:])


# -- Labels ---------------------------------------------------------------------------------------------------------


def test_labels_are_whole_blocks_and_a_random_rest() -> None:
    labels = balanced_labels(25, 10, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert labels[:20].tolist() == [*range(10), *range(10)]
    assert labels.shape == (25,)
    assert labels.dtype == torch.int64


def test_the_rest_of_the_labels_is_uniform() -> None:
    rng = torch.Generator().manual_seed(0)
    rest = torch.cat([balanced_labels(9, 5, rng, torch.device("cpu"))[5:] for _ in range(1000)])
    assert rest.bincount(minlength=5).sub(800).abs().max() < 130  # five standard deviations


def test_fewer_images_than_classes_get_random_labels() -> None:
    labels = balanced_labels(4, 100, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert len(labels) == 4
    assert labels.max() > 3


# -- One call -------------------------------------------------------------------------------------------------------


def test_a_call_makes_all_batches_of_its_loops(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    sizes = [len(method.synthesize(student, at(epoch, warmup=1)).images) for epoch in range(3)]  # type: ignore[arg-type]
    assert sizes == [WARMUP_LOOPS * B, LOOPS * B, LOOPS * B]


def test_images_are_detached_pixels(task: Task, student: nn.Module, at: At) -> None:
    made = new_method(task).synthesize(student, at(0))
    assert made.images is not None
    assert made.images.shape == (LOOPS * B, *task.image_shape)
    assert made.images.dtype == torch.float32
    assert not made.images.requires_grad
    assert 0 <= made.images.min() < made.images.max() <= 1


def test_equal_seeds_make_equal_images(make_task: Callable[..., Task], student: nn.Module, at: At) -> None:
    first, second = (new_method(make_task(), student_eval=True).synthesize(student, at(0)).images for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_the_student_is_not_called_in_the_warm_up(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]]
) -> None:
    method, modes = new_method(task), record_modes(student)
    for epoch in range(2):
        method.synthesize(student, at(epoch, warmup=2))
    assert modes == []


@pytest.mark.parametrize(
    ("student_eval", "later_loops"),
    [(False, True), (True, False)],  # released: train mode in all loops but the first
)
def test_the_students_mode(
    task: Task,
    student: nn.Module,
    at: At,
    record_modes: Callable[[nn.Module], list[bool]],
    student_eval: bool,
    later_loops: bool,
) -> None:
    method, modes = new_method(task, loops=3, student_eval=student_eval), record_modes(student)
    method.synthesize(student, at(2, warmup=2))
    assert modes == [False] * STEPS + [later_loops] * (2 * STEPS)


def test_without_the_adversarial_term_the_student_is_never_called(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]]
) -> None:
    method, modes = new_method(task, adversarial=0.0), record_modes(student)
    method.synthesize(student, at(5, warmup=2))
    assert modes == []


@pytest.mark.parametrize("student_eval", [True, False])
def test_what_changes_in_the_student(
    task: Task, student: nn.Module, at: At, snapshot: Callable[[nn.Module], dict[str, Tensor]], student_eval: bool
) -> None:
    before = snapshot(student)
    new_method(task, student_eval=student_eval).synthesize(student, at(0))
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    buffers = {name for name, _ in student.named_buffers()}
    assert changed == (set() if student_eval else buffers)


def test_the_teacher_stays_as_it_is(
    task: Task, student: nn.Module, at: At, snapshot: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    before, method = snapshot(task.teacher), new_method(task)
    for epoch in range(2):
        method.synthesize(student, at(epoch))
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.state_dict().items())
    assert not task.teacher.training
    assert not any(module._forward_pre_hooks for module in task.teacher.modules())


def test_embeddings_are_constants(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    before = method.embeddings.clone()
    method.synthesize(student, at(0))
    assert torch.equal(method.embeddings, before)
    assert method.embeddings.grad is None


def test_every_loop_has_an_adam_of_its_own_and_new_noisy_layers(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = new_method(task)
    events: list[Any] = []
    adam, redraw = torch.optim.Adam, NoisyLayers.reinitialize

    def watched_adam(parameters: Any, **settings: Any) -> torch.optim.Adam:
        made = adam(parameters, **settings)
        group = made.param_groups[0]
        events.append((group["lr"], group["betas"], group["weight_decay"], len(group["params"])))
        return made

    def watched_redraw(layers: NoisyLayers) -> None:
        events.append("redrawn")
        redraw(layers)

    monkeypatch.setattr(torch.optim, "Adam", watched_adam)
    monkeypatch.setattr(NoisyLayers, "reinitialize", watched_redraw)
    method.synthesize(student, at(1))
    assert events == ["redrawn", (4e-3, (0.5, 0.999), 0, len(list(method.generator.parameters())))] * LOOPS


def test_all_but_the_noisy_layers_goes_on_from_loop_to_loop(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = new_method(task, loops=3)
    starts, ends = [], []
    one_batch = Nayer._one_batch

    def watched(self: Nayer, *arguments: Any, **options: Any) -> Any:
        starts.append({name: p.clone() for name, p in self.generator.named_parameters()})
        made = one_batch(self, *arguments, **options)
        ends.append({name: p.clone() for name, p in self.generator.named_parameters()})
        return made

    monkeypatch.setattr(Nayer, "_one_batch", watched)
    method.synthesize(student, at(1))
    for end, start in zip(ends, starts[1:], strict=False):
        assert all(torch.equal(end[name], start[name]) for name in end)
    trained = [name for name in starts[0] if not torch.equal(starts[0][name], ends[0][name])]
    assert trained == list(starts[0])  # every parameter is


# -- The choice of the best step ------------------------------------------------------------------------------------


def outputs_of(generator: nn.Module) -> list[Tensor]:
    outputs: list[Tensor] = []
    generator.register_forward_hook(lambda _module, _inputs, output: outputs.append(output.detach().clone()))
    return outputs


def worth(value: float, x: Tensor) -> Tensor:
    """A loss of exactly ``value`` whose gradient moves the generator all the same."""
    return value + (x.square().sum() - x.square().sum().detach())


@pytest.mark.parametrize(
    ("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([3.0, 2.0, 1.0], 2), ([2.0, 1.0, 1.0], 1)]
)
def test_the_generators_output_at_the_lowest_loss_is_kept(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch, losses: list[float], best: int
) -> None:
    """Un-augmented, and from before that step's update: bit by bit what the generator gave."""
    script = iter(losses)
    monkeypatch.setattr(inversion, "cross_entropy", lambda logits, labels: worth(next(script), logits))
    method = new_method(task, loops=1, batchnorm=0.0, onehot=1.0, adversarial=0.0)
    outputs = outputs_of(method.generator)
    made = method.synthesize(student, at(1))
    assert made.images is not None
    assert [torch.equal(made.images, output) for output in outputs] == [step == best for step in range(STEPS)]
    assert made.scalars["synthesis_loss"].item() == min(losses)


def test_the_best_step_is_chosen_in_every_loop_anew(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = iter([1.0, 2.0, 3.0, 9.0, 8.0, 7.0])  # the second loop is worse throughout
    monkeypatch.setattr(inversion, "cross_entropy", lambda logits, labels: worth(next(script), logits))
    method = new_method(task, batchnorm=0.0, onehot=1.0, adversarial=0.0)
    outputs = outputs_of(method.generator)
    made = method.synthesize(student, at(1))
    assert made.images is not None
    assert torch.equal(made.images, torch.cat([outputs[0], outputs[5]]))
    assert made.scalars["synthesis_loss"].item() == 4  # the mean of 1 and 7


def test_steps_lower_the_loss(task: Task, student: nn.Module, at: At) -> None:
    """The best of 30 steps must be well below the first one."""
    losses = []
    for steps in (1, 30):
        method = new_method(task, generator_steps=steps, loops=1, adversarial=0.0, batchnorm_momentum=0.0)
        losses.append(method.synthesize(student, at(1)).scalars["synthesis_loss"].item())
    assert losses[1] < 0.8 * losses[0]


def test_the_last_step_is_remembered_not_the_best(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(inversion, "cross_entropy", lambda logits, labels: worth(next(script), logits))
    method, seen = new_method(task, loops=1), []
    task.teacher.bn1.register_forward_pre_hook(lambda _module, inputs: seen.append(batch_moments(inputs[0].detach())))
    method.synthesize(student, at(0, warmup=0))
    assert method.matcher.remembered is not None
    torch.testing.assert_close(method.matcher.remembered[0], seen[STEPS - 1], rtol=0, atol=0)


class FixedMatcher:
    """A regulariser with a given value."""

    def __init__(self, value: float) -> None:
        self.value = value

    @contextmanager
    def watching(self) -> Iterator[None]:
        yield

    def loss(self) -> Tensor:
        return torch.tensor(self.value, dtype=torch.float64)

    def update(self) -> None:
        pass


def test_total_loss(make_task: Callable[..., Task], at: At, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 * statistics + 0.5 * cross entropy + 1.33 * masked adversarial term, the published weights."""
    student_logits = [[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]]
    teacher_logits = [[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]]

    class Fixed(nn.Module):
        def __init__(self, logits: Any) -> None:
            super().__init__()
            self.logits = torch.tensor(logits, dtype=torch.float64)

        def forward(self, images: Tensor) -> Tensor:
            return self.logits + 0 * images.sum()

    task = make_task(classes=3)
    method = new_method(task, synthesis_batch_size=4, generator_steps=1, loops=1)
    object.__setattr__(task, "teacher", Fixed(teacher_logits))
    method.matcher = FixedMatcher(0.4400862770313635)  # type: ignore[assignment]
    monkeypatch.setattr(nayer, "balanced_labels", lambda *arguments: torch.tensor([2, 0, 0, 1]))
    made = method.synthesize(Fixed(student_logits), at(1))
    assert made.scalars["synthesis_loss"].item() == pytest.approx(5.2444422242390045, rel=1e-9)


# -- The generator's life -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "life", "expected"),
    [
        (20, 10, {0, 10, 20, 30, 40}),
        (5, 10, {0, 5, 10, 15, 20, 25, 30, 35, 40, 45}),  # counted from the start and from the end of the warm-up
        (0, 20, {0, 20, 40}),
    ],
)
def test_when_the_generator_is_built_anew(
    task: Task,
    student: nn.Module,
    at: At,
    monkeypatch: pytest.MonkeyPatch,
    warmup: int,
    life: int,
    expected: set[int],
) -> None:
    monkeypatch.setattr(Nayer, "_one_batch", lambda *_arguments, **_options: (torch.zeros(1, 1, 8, 8), torch.zeros(())))
    method, rebuilt = new_method(task, generator_life=life), set()
    for epoch in range(50):
        before = method.generator
        method.synthesize(student, at(epoch, warmup))
        if method.generator is not before:
            rebuilt.add(epoch)
    assert rebuilt == expected


def test_later_rounds_of_an_epoch_keep_the_generator(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    method.synthesize(student, at(0, round_=0))
    before = method.generator
    method.synthesize(student, at(0, round_=1))
    assert method.generator is before


def test_remembered_statistics_outlive_the_generator(task: Task, student: nn.Module, at: At) -> None:
    method, means = new_method(task, generator_life=1, loops=1), []
    task.teacher.bn1.register_forward_pre_hook(lambda _module, inputs: means.append(inputs[0].detach().mean((0, 2, 3))))
    for epoch in range(3):
        method.synthesize(student, at(epoch))
    first, second, third = means[STEPS - 1 :: STEPS]
    assert method.matcher.remembered is not None
    expected = 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third
    torch.testing.assert_close(method.matcher.remembered[0][0], expected)


# -- Resuming, settings ---------------------------------------------------------------------------------------------


def test_a_resumed_method_makes_the_same_images(
    make_task: Callable[..., Task], make_student: Callable[..., nn.Module], at: At, tmp_path: Path
) -> None:
    task, student = make_task(), make_student()
    method = new_method(task)
    for epoch in range(2):
        method.synthesize(student, at(epoch))
    tree = {"method": method.state_dict(), "student": student.state_dict(), "rng": task.rng.get_state()}
    save_tree(tmp_path / "state", {**tree, "torch": torch.get_rng_state()})
    expected = method.synthesize(student, at(2)).images

    saved = load_tree(tmp_path / "state")
    other_task, other_student = make_task(), make_student()
    other = new_method(other_task)
    other.load_state_dict(saved["method"])
    other_student.load_state_dict(saved["student"])
    other_task.rng.set_state(saved["rng"])
    torch.set_rng_state(saved["torch"])
    got = other.synthesize(other_student, at(2)).images
    assert got is not None
    assert expected is not None
    assert torch.equal(got, expected)


# data set: student batch, synthesis batch, student's lr, generator steps, loops, loops in the warm-up, student steps
SCRIPTS = {
    "cifar10": (512, 400, 0.2, 30, 2, 10, 400),
    "cifar100": (512, 400, 0.2, 40, 2, 10, 400),
    "tiny_imagenet": (256, 200, 0.1, 60, 4, 20, 1000),
}


@pytest.mark.parametrize("dataset", SCRIPTS)
def test_published_settings(dataset: str) -> None:
    published = Nayer.published[dataset]
    schedule, config = published.schedule, NayerConfig(**published.config)
    assert (
        schedule.batch_size,
        config.synthesis_batch_size,
        schedule.lr,
        config.generator_steps,
        config.loops,
        config.warmup_loops,
        schedule.student_steps,
    ) == SCRIPTS[dataset]
    assert (schedule.epochs, schedule.warmup_epochs, schedule.rounds_per_epoch) == (120, 20, 1)
    assert (schedule.optimizer, schedule.momentum, schedule.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (schedule.lr_rule, schedule.lr_min, schedule.lr_horizon) == ("cosine", 2e-4, None)
    assert (config.adversarial, config.batchnorm, config.onehot, config.batchnorm_momentum) == (1.33, 10, 0.5, 0.9)
    assert (config.generator_life, config.generator_lr, config.noisy_width) == (10, 4e-3, 1000)
    assert (config.temperature, config.student_eval) == (20, False)


@pytest.mark.parametrize("dataset", SCRIPTS)
def test_published_settings_make_160_000_images(dataset: str) -> None:
    schedule, config = Nayer.published[dataset].schedule, NayerConfig(**Nayer.published[dataset].config)
    later = schedule.epochs - schedule.warmup_epochs
    loops = schedule.warmup_epochs * config.warmup_loops + later * config.loops
    assert loops * config.synthesis_batch_size == 160_000


@pytest.mark.parametrize(
    ("config", "knowledge"),
    [
        (NayerConfig(), None),
        (NayerConfig(encoder="random:64"), "none"),
        (NayerConfig(encoder="onehot"), "none"),
        (NayerConfig(prompt="class {index}"), "a text encoder (index prompt)"),
    ],
)
def test_what_a_run_knows_depends_on_the_encoder(config: NayerConfig, knowledge: str | None) -> None:
    assert Nayer.outside_knowledge(config) == knowledge
