from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.checkpoint import load_tree, save_tree
from dfkd_bench.method import Progress, Task
from dfkd_bench.methods import fm
from dfkd_bench.methods.fm import REPTILE_FACTOR, FastMeta, FastMetaConfig, add_gradients, reptile_gradients

B, STEPS, META_LR = 12, 3, 3 * 2e-3
At = Callable[..., Progress]


def new_method(task: Task, **fields: Any) -> FastMeta:
    torch.manual_seed(0)
    values = {"synthesis_batch_size": B, "latent_dim": 8, "generator_steps": STEPS, "generator_width": 4}
    values |= {"meta_lr": META_LR}
    return FastMeta(FastMetaConfig(**(values | fields)), task)


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


class Watch:
    """Every copy of the meta-generator that a call makes, and what it gave and got at each of its steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.copies: list[nn.Module] = []
        self.outputs: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.gradients: list[list[Tensor]] = []
        deepcopy = fm.copy.deepcopy

        def watched(generator: nn.Module) -> nn.Module:
            made: nn.Module = deepcopy(generator)
            self.copies.append(made)
            made.register_forward_hook(self._seen)
            return made

        monkeypatch.setattr(fm, "copy", types.SimpleNamespace(deepcopy=watched))
        add = fm.add_gradients

        def watched_add(meta: nn.Module, fast: nn.Module) -> None:
            self.gradients.append([p.grad.clone() for p in fast.parameters() if p.grad is not None])
            add(meta, fast)

        monkeypatch.setattr(fm, "add_gradients", watched_add)

    def _seen(self, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.latents.append(inputs[0].detach().clone())
        self.outputs.append(output.detach().clone())


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


# -- Golden values --------------------------------------------------------------------------------------------------

# theta = [1, -2]; losses 0.5 * ||phi - c * (1 + 0.1 i)||^2 with c = [3, 0.5] for i = 0, 1, 2; inner Adam 0.1, meta
# Adam 0.3, betas (0.5, 0.999); float64, computed with the released code's meta step.
INNER_GRADIENTS = [[-2.0, -2.5], [-2.2000000005, -2.4500000004], [-2.398530093887855, -2.400341281562376]]
FAST_AFTER = [1.3050616997846611, -1.7012248805773826]  # the last inner step included
META_GRADIENT = {
    "fomaml": [-6.598530094387855, -7.350341281962376],  # the sum; the last alone were [-2.3985, -2.4003]
    "reptile": [-20.439133885572296, -20.017933001315363],
}
META_AFTER = {
    "fomaml": [1.2999999995453533, -1.7000000004081444],
    "reptile": [1.2999999998532228, -1.7000000001498656],
}


class Toy(nn.Module):
    """Two weights that are at once the "images"."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(values, dtype=torch.float64))

    def forward(self, latent: Tensor) -> Tensor:
        return self.weight * 1


def with_toy(method: FastMeta) -> Toy:
    """Put the toy in the meta-generator's place, with a meta optimiser of the same settings."""
    settings = {key: method.meta_optimizer.param_groups[0][key] for key in ("lr", "betas", "eps")}
    toy = Toy([1, -2])
    method.generator = toy  # type: ignore[assignment]
    method.meta_optimizer = torch.optim.Adam(toy.parameters(), **settings)
    return toy


def test_fomaml_adds_up_the_inner_gradients() -> None:
    meta, fast = Toy([1, -2]), Toy([0, 0])
    for gradient in INNER_GRADIENTS:
        fast.weight.grad = torch.tensor(gradient, dtype=torch.float64)
        add_gradients(meta, fast)
    assert meta.weight.grad is not None
    assert meta.weight.grad.tolist() == pytest.approx(META_GRADIENT["fomaml"], rel=1e-12)


def test_adding_does_not_share_memory_with_the_copy() -> None:
    meta, fast = Toy([1, -2]), Toy([0, 0])
    fast.weight.grad = torch.ones(2, dtype=torch.float64)
    add_gradients(meta, fast)
    fast.weight.grad.zero_()
    assert meta.weight.grad is not None
    assert meta.weight.grad.tolist() == [1, 1]


def test_reptile_points_from_the_fast_weights_to_the_meta_weights() -> None:
    meta = Toy([1, -2])
    reptile_gradients(meta, Toy(FAST_AFTER))
    assert meta.weight.grad is not None
    assert meta.weight.grad.tolist() == pytest.approx(META_GRADIENT["reptile"], rel=1e-9)


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_a_whole_call_on_the_toy(
    task: Task, student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch, watch: Watch, meta: str
) -> None:
    """Through ``synthesize`` itself, with the toy for the generator and its losses for the method's."""
    step = iter(range(3))

    def loss(_self: FastMeta, images: Tensor, *_arguments: Any) -> Tensor:
        goal = torch.tensor([3, 0.5], dtype=torch.float64) * (1 + 0.1 * next(step))
        return 0.5 * (images - goal).square().sum()

    monkeypatch.setattr(FastMeta, "_loss", loss)
    method = new_method(task, meta=meta, generator_lr=0.1, meta_lr=0.1 * STEPS, batchnorm_momentum=0.0)
    toy = with_toy(method)
    method.synthesize(student, at(0))
    assert toy.weight.grad is not None
    assert toy.weight.grad.tolist() == pytest.approx(META_GRADIENT[meta], rel=1e-9)
    assert toy.weight.tolist() == pytest.approx(META_AFTER[meta], rel=1e-9)
    if meta == "fomaml":
        inner = torch.stack([gradient for (gradient,) in watch.gradients])
        torch.testing.assert_close(inner, torch.tensor(INNER_GRADIENTS, dtype=torch.float64), rtol=1e-9, atol=0)
    else:
        assert weights(watch.copies[0])[0].tolist() == pytest.approx(FAST_AFTER, rel=1e-9)


def test_total_loss(make_task: Callable[..., Task]) -> None:
    """10 * statistics + 0.4 * cross entropy + 1.1 * masked adversarial term: the weights for the WRN pairs."""
    student_logits = torch.tensor([[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]], dtype=torch.float64)
    teacher_logits = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)
    task = make_task(classes=3)
    method = new_method(task)
    object.__setattr__(task, "teacher", lambda images: teacher_logits)
    method.matcher.loss = lambda: torch.tensor(0.4400862770313635, dtype=torch.float64)  # type: ignore[method-assign]
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([2, 0, 0, 1])
    value = method._loss(images, labels, lambda view: student_logits, adversarial=True)  # type: ignore[arg-type]
    assert value.item() == pytest.approx(5.070916146030612, rel=1e-9)
    without = method._loss(images, labels, lambda view: student_logits, adversarial=False)  # type: ignore[arg-type]
    assert without.item() == pytest.approx(4.400862770313635 + 0.4 * 2.0425783119070333, rel=1e-9)


# -- Meta-learning on the real generator ----------------------------------------------------------------------------


def test_fomaml_gradient_is_the_sum_of_the_inner_ones(task: Task, student: nn.Module, at: At, watch: Watch) -> None:
    method = new_method(task)
    method.synthesize(student, at(0))
    assert len(watch.gradients) == STEPS
    for parameter, *inner in zip(method.generator.parameters(), *watch.gradients, strict=True):
        torch.testing.assert_close(parameter.grad, torch.stack(inner).sum(0))


def test_reptile_gradient_is_the_way_back_times_67(task: Task, student: nn.Module, at: At, watch: Watch) -> None:
    method = new_method(task, meta="reptile")
    before = weights(method.generator)
    method.synthesize(student, at(0))
    for parameter, start, fast in zip(method.generator.parameters(), before, weights(watch.copies[0]), strict=True):
        torch.testing.assert_close(parameter.grad, 67 * (start - fast), rtol=0, atol=0)
    assert REPTILE_FACTOR == 67


def test_all_inner_steps_are_taken_for_reptile(task: Task, student: nn.Module, at: At, watch: Watch) -> None:
    method = new_method(task, meta="reptile", generator_steps=1)
    before = weights(method.generator)
    method.synthesize(student, at(0))
    moved = [not torch.equal(start, fast) for start, fast in zip(before, weights(watch.copies[0]), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_the_first_meta_step_is_adams_first(task: Task, student: nn.Module, at: At, meta: str) -> None:
    method = new_method(task, meta=meta)
    before = weights(method.generator)
    method.synthesize(student, at(0))
    for parameter, start in zip(method.generator.parameters(), before, strict=True):
        assert parameter.grad is not None
        clear = parameter.grad.abs() > 1e-4  # elsewhere Adam's eps counts
        expected = -META_LR * parameter.grad.sign()
        torch.testing.assert_close((parameter.detach() - start)[clear], expected[clear], rtol=1e-3, atol=1e-6)


def test_the_meta_learning_rate_does_not_grow_with_the_steps(task: Task) -> None:
    group = new_method(task, generator_steps=7, meta_lr=0.03).meta_optimizer.param_groups[0]
    assert group["lr"] == 0.03
    assert group["betas"] == (0.5, 0.999)


def test_with_one_step_the_gradient_is_the_ordinary_one(
    task: Task, student: nn.Module, at: At, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FastMeta, "_loss", lambda _self, images, *_arguments: images.square().mean())
    method = new_method(task, generator_steps=1, batchnorm_momentum=0.0)
    untouched = new_method(task, generator_steps=1).generator
    made = method.synthesize(student, at(0))
    images = untouched(watch.latents[0])
    gradients = torch.autograd.grad(images.square().mean(), list(untouched.parameters()))
    assert made.images is not None
    torch.testing.assert_close(made.images, images.detach(), rtol=0, atol=0)
    for parameter, gradient in zip(method.generator.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_each_call_starts_from_the_meta_weights_with_new_latents(
    task: Task, student: nn.Module, at: At, watch: Watch
) -> None:
    method = new_method(task)
    starts = []
    for epoch in range(3):
        starts.append({name: value.clone() for name, value in method.generator.state_dict().items()})
        method.synthesize(student, at(epoch))
    first_outputs, first_latents = watch.outputs[::STEPS], watch.latents[::STEPS]
    for start, output, latent in zip(starts, first_outputs, first_latents, strict=True):
        generator = new_method(task).generator
        generator.load_state_dict(start)
        torch.testing.assert_close(generator(latent).detach(), output)
    assert not torch.equal(first_latents[0], first_latents[1])
    assert first_latents[0].mean().item() == pytest.approx(0, abs=0.5)
    assert first_latents[0].std().item() == pytest.approx(1, abs=0.3)


def test_latents_are_optimised_at_a_rate_of_their_own(task: Task, student: nn.Module, at: At, watch: Watch) -> None:
    method = new_method(task, latent_lr=0.05, generator_steps=2)
    method.synthesize(student, at(0))
    change = (watch.latents[1] - watch.latents[0]).abs()
    assert change.median().item() == pytest.approx(0.05, rel=0.01)  # Adam's first step


def test_the_inner_steps_have_the_inner_rate(task: Task, student: nn.Module, at: At, watch: Watch) -> None:
    method = new_method(task, meta="reptile", generator_steps=1, generator_lr=7e-3)
    before = weights(method.generator)
    method.synthesize(student, at(0))
    change = (weights(watch.copies[0])[-1] - before[-1]).abs()
    assert change.median().item() == pytest.approx(7e-3, rel=0.01)


def test_running_statistics_of_the_copy_are_thrown_away(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    before = {name: buffer.clone() for name, buffer in method.generator.named_buffers()}
    method.synthesize(student, at(0))
    assert before
    assert all(torch.equal(buffer, before[name]) for name, buffer in method.generator.named_buffers())


# -- One call -------------------------------------------------------------------------------------------------------


def test_a_call_makes_one_batch(task: Task, student: nn.Module, at: At) -> None:
    made = new_method(task).synthesize(student, at(0))
    assert made.images is not None
    assert made.images.shape == (B, *task.image_shape)
    assert made.images.dtype == torch.float32
    assert not made.images.requires_grad
    assert 0 <= made.images.min() < made.images.max() <= 1


def worth(value: float, x: Tensor) -> Tensor:
    """A loss of exactly ``value`` whose gradient moves the generator all the same."""
    return value + (x.square().sum() - x.square().sum().detach())


@pytest.mark.parametrize(
    ("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0), ([3.0, 2.0, 1.0], 2), ([2.0, 1.0, 1.0], 1)]
)
def test_the_generators_output_at_the_lowest_loss_is_kept(
    task: Task,
    student: nn.Module,
    at: At,
    monkeypatch: pytest.MonkeyPatch,
    watch: Watch,
    losses: list[float],
    best: int,
) -> None:
    """Un-augmented, and from before that step's update: bit by bit what the copy gave."""
    script = iter(losses)
    monkeypatch.setattr(FastMeta, "_loss", lambda _self, images, *_arguments: worth(next(script), images))
    made = new_method(task, batchnorm_momentum=0.0).synthesize(student, at(0))
    assert made.images is not None
    assert [torch.equal(made.images, output) for output in watch.outputs] == [step == best for step in range(STEPS)]
    assert made.scalars["synthesis_loss"].item() == min(losses)


def test_labels_are_random_over_all_classes(
    make_task: Callable[..., Task], student: nn.Module, at: At, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    loss = FastMeta._loss

    def watched(self: FastMeta, images: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        seen.append(labels)
        return loss(self, images, labels, *rest)

    monkeypatch.setattr(FastMeta, "_loss", watched)
    new_method(make_task(), synthesis_batch_size=1000, generator_steps=2, adversarial=0.0).synthesize(student, at(0))
    assert torch.equal(seen[0], seen[1])  # the same in all steps of a call
    counts = seen[0].bincount(minlength=5)
    assert len(counts) == 5
    assert counts.sub(200).abs().max() < 65  # five standard deviations
    assert not torch.equal(seen[0], seen[0].sort().values)


def test_the_student_is_called_from_one_epoch_before_its_training_and_in_eval_mode(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]]
) -> None:
    method, modes, calls = new_method(task), record_modes(student), []
    for epoch in range(6):
        method.synthesize(student, at(epoch, warmup=4))
        calls.append(len(modes))
        assert not any(modes)
        modes.clear()
    assert calls == [0, 0, 0, STEPS, STEPS, STEPS]


def test_without_the_adversarial_term_the_student_is_never_called(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]]
) -> None:
    method, modes = new_method(task, adversarial=0.0), record_modes(student)
    method.synthesize(student, at(9))
    assert modes == []


def test_teacher_and_student_stay_as_they_are(
    task: Task, student: nn.Module, at: At, snapshot: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    method, models = new_method(task), (task.teacher, student)
    before = [snapshot(model) for model in models]
    for epoch in range(2):
        method.synthesize(student, at(epoch))
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
        assert not model.training
        assert not any(module._forward_pre_hooks for module in model.modules())


def test_equal_seeds_make_equal_images(make_task: Callable[..., Task], student: nn.Module, at: At) -> None:
    first, second = (new_method(make_task()).synthesize(student, at(0)).images for _ in range(2))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_the_last_step_is_remembered(task: Task, student: nn.Module, at: At) -> None:
    method, means = new_method(task), []
    task.teacher.bn1.register_forward_pre_hook(lambda _module, inputs: means.append(inputs[0].detach().mean((0, 2, 3))))
    for epoch in range(2):
        method.synthesize(student, at(epoch))
    assert method.matcher.remembered is not None
    expected = 0.9 * means[STEPS - 1] + 0.1 * means[2 * STEPS - 1]
    torch.testing.assert_close(method.matcher.remembered[0][0], expected)


# -- The reset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reset_epoch", "warmup", "expected"),
    [(120, 20, [139]), (3, 2, [4]), (3, 0, [2]), (None, 20, [])],  # released: epoch index 139 of 220
)
def test_when_the_first_layers_are_drawn_anew(
    task: Task,
    student: nn.Module,
    at: At,
    monkeypatch: pytest.MonkeyPatch,
    reset_epoch: int | None,
    warmup: int,
    expected: list[int],
) -> None:
    monkeypatch.setattr(FastMeta, "_loss", lambda _self, images, *_arguments: images.mean())
    method, resets = new_method(task, reset_epoch=reset_epoch, generator_steps=1, batchnorm_momentum=0.0), []
    with_toy(method)
    current = -1
    monkeypatch.setattr(FastMeta, "_reset_first_layers", lambda _self: resets.append(current))
    for current in range(160):
        for round_ in range(2):
            method.synthesize(student, at(current, warmup, round_))
    assert resets == expected


def test_what_the_reset_draws(task: Task) -> None:
    method = new_method(task, latent_dim=256, generator_width=64)
    before = {name: value.clone() for name, value in method.generator.state_dict().items()}
    method._reset_first_layers()
    after = method.generator.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # The BatchNorm's bias is 0 before, too; its weight is drawn around 0, not around 1.
    assert changed == {"project.weight", "project.bias", "body.norm.weight"}
    for name in ("project.weight", "body.norm.weight"):
        assert after[name].mean().item() == pytest.approx(0, abs=0.01)
        assert after[name].std().item() == pytest.approx(0.02, rel=0.25)
    assert after["project.bias"].count_nonzero() == after["body.norm.bias"].count_nonzero() == 0


def test_the_reset_keeps_the_meta_optimisers_state(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task, reset_epoch=2)
    for epoch in range(2):
        method.synthesize(student, at(epoch))
    assert [int(state["step"]) for state in method.meta_optimizer.state.values()] == [2] * len(
        weights(method.generator)
    )


# -- Resuming, settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", ["fomaml", "reptile"])
def test_a_resumed_method_makes_the_same_images(
    make_task: Callable[..., Task], student: nn.Module, at: At, tmp_path: Path, meta: str
) -> None:
    task = make_task()
    method = new_method(task, meta=meta)
    for epoch in range(2):
        method.synthesize(student, at(epoch))
    save_tree(tmp_path / "state", {"method": method.state_dict(), "rng": task.rng.get_state()})
    expected = [method.synthesize(student, at(epoch)).images for epoch in (2, 3)]

    saved = load_tree(tmp_path / "state")
    other_task = make_task()
    other = new_method(other_task, meta=meta)
    other.load_state_dict(saved["method"])
    other_task.rng.set_state(saved["rng"])
    got = [other.synthesize(student, at(epoch)).images for epoch in (2, 3)]
    for one, same in zip(got, expected, strict=True):
        assert one is not None
        assert same is not None
        assert torch.equal(one, same)


# pair: weights of the adversarial term and of the cross entropy
SCRIPT = {
    "resnet34:resnet18": (1.33, 0.5),
    "vgg11:resnet18": (1.0, 0.5),
    "wrn40_2:wrn16_1": (1.1, 0.4),
    "wrn40_2:wrn40_1": (1.1, 0.4),
    "wrn40_2:wrn16_2": (1.1, 0.4),
}


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
@pytest.mark.parametrize("pair", SCRIPT)
def test_published_settings(dataset: str, pair: str) -> None:
    published = FastMeta.published[f"{dataset}/{pair}"]
    schedule, config = published.schedule, FastMetaConfig(**published.config)
    assert (config.adversarial, config.onehot) == SCRIPT[pair]
    assert (config.generator_steps, config.latent_lr, config.generator_lr) == (10, 0.01, 2e-3)
    assert config.meta_lr == config.generator_lr * config.generator_steps  # the released rule
    assert (config.batchnorm, config.batchnorm_momentum, config.meta, config.reset_epoch) == (10, 0.9, "fomaml", 120)
    assert (config.synthesis_batch_size, config.latent_dim, config.temperature) == (256, 256, 20)
    assert (schedule.epochs, schedule.warmup_epochs, schedule.rounds_per_epoch) == (220, 20, 1)
    assert (schedule.batch_size, schedule.student_steps, schedule.lr) == (256, 400, 0.2)
    assert (schedule.optimizer, schedule.momentum, schedule.weight_decay) == ("sgd", 0.9, 1e-4)
    assert (schedule.lr_rule, schedule.lr_min, schedule.epochs - schedule.warmup_epochs) == ("cosine", 2e-4, 200)
    assert schedule.epochs * config.synthesis_batch_size == 56_320


LOGS = {"resnet50_imagenet": 0.1, "resnet18_imagenet": 1.0, "mobilenetv2_imagenet": 0.1}


@pytest.mark.parametrize("student", LOGS)
def test_imagenet_has_the_logs_budget(student: str) -> None:
    published = FastMeta.published[f"imagenet/resnet50_imagenet:{student}"]
    schedule, config = published.schedule, FastMetaConfig(**published.config)
    assert config.adversarial == LOGS[student]
    assert (config.meta, config.generator_steps, config.reset_epoch, config.temperature) == ("reptile", 50, None, 5)
    assert (schedule.epochs, schedule.rounds_per_epoch * schedule.student_steps) == (400, 1000)
    assert (schedule.warmup_epochs, schedule.lr, schedule.lr_min, schedule.lr_horizon) == (0, 0.1, 0, None)


def test_nothing_else_is_published() -> None:
    small = {f"{dataset}/{pair}" for dataset in ("cifar10", "cifar100") for pair in SCRIPT}
    assert set(FastMeta.published) == small | {f"imagenet/resnet50_imagenet:{student}" for student in LOGS}
