"""PRE-DFKD, and the generators and losses that it brought with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.generators import EarlyGenerator, Encoder, MemoryGenerator, SpectralConv2d
from dfkd_bench.losses import bounded_agreement, latent_moments, normal_kl
from dfkd_bench.method import Batch, Progress, Task
from dfkd_bench.methods.pre_dfkd import Config, PreDfkd

# Golden values were computed in float64 by the released code on these inputs.
S = torch.tensor([[1, 2, 0.5], [0.2, -1, 3], [2, 2.5, -0.5], [0, 0, 1]], dtype=torch.float64)
T = torch.tensor([[0.5, 2.5, 0], [1.5, -0.5, 1], [0.1, 3, 0.2], [-1, 0.3, 2]], dtype=torch.float64)
BIG_S = torch.tensor([[8, -4, 0], [0, 9, -9]], dtype=torch.float64)
BIG_T = torch.tensor([[-6, 7, 0], [1, -8, 6]], dtype=torch.float64)
FEATURES = torch.arange(20, dtype=torch.float64).sin().view(4, 5)
# In train mode, of ``fill`` and ``waves``: mean, unbiased deviation, four pixels of the first row, two of the last.
GOLDEN: dict[str, tuple[dict[str, Any], list[float]]] = {
    "plain": (
        {},
        [
            0.0,
            0.5241075212652234,
            -1.0850115394872744,
            -1.1696890956733563,
            -1.1485029718134518,
            -1.1889117736958124,
            0.6129607585809068,
            0.4704941422992379,
        ],
    ),
    "spectral": (
        {"spectral": True},
        [
            0.0,
            0.24855515263421685,
            -1.1074667517346721,
            -1.1830562661643749,
            -1.1823816453545601,
            -1.1838605458145877,
            0.5331200992731805,
            0.530941315313431,
        ],
    ),
    "sigmoid": (
        {"output": "sigmoid"},
        [
            0.5009224987703794,
            0.002264100654620182,
            0.5026365323727852,
            0.5025759175513794,
            0.5026016047694637,
            0.50257012564548,
            0.4987823930795122,
            0.49869856433907694,
        ],
    ),
}
B = 16
POOL: Any = None  # the method keeps none
At = Callable[..., Progress]


def new_method(task: Task, **fields: Any) -> PreDfkd:
    torch.manual_seed(0)
    return PreDfkd(Config(**({"synthesis_batch_size": B, "latent_dim": 8, "generator_width": 4} | fields)), task)


def steps(weights: list[Tensor], module: nn.Module) -> bool:
    """Whether ``module`` differs from the ``weights`` it had."""
    return any(not torch.equal(old, new) for old, new in zip(weights, module.parameters(), strict=True))


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


# -- Losses ---------------------------------------------------------------------------------------------------------


def test_disagreement() -> None:
    assert bounded_agreement(S, T).item() == pytest.approx(0.994852930892441, rel=1e-12)
    assert bounded_agreement(BIG_S, BIG_T).item() == pytest.approx(0.5469694961934151, rel=1e-12)


@pytest.mark.parametrize("scale", [0, 1, 30])
def test_disagreement_lies_between_0_and_1(scale: float) -> None:
    assert 0 <= bounded_agreement(scale * BIG_S, scale * BIG_T).item() <= 1


def test_statistics_of_the_latents() -> None:
    latents = torch.arange(12, dtype=torch.float64).sin().view(4, 3)
    assert latent_moments(latents).item() == pytest.approx(0.3392955532444342, rel=1e-12)


def test_statistics_of_the_latents_are_0_for_mean_0_and_unbiased_variance_1() -> None:
    latents = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    latents = (latents - latents.mean(0)) / latents.std(0)
    assert latent_moments(latents).item() == pytest.approx(0, abs=1e-20)
    assert latent_moments(latents + 0.1).item() == pytest.approx(0.01)


def test_kl_divergence_of_the_autoencoder() -> None:
    numbers = torch.arange(12, dtype=torch.float64).view(4, 3)
    value = Config().kl * normal_kl(0.5 * numbers.cos(), 0.3 * numbers.sin())
    assert value.item() == pytest.approx(2.21507654574348e-06, rel=1e-12)


def test_kl_divergence_is_0_only_for_the_standard_normal() -> None:
    zeros = torch.zeros(3, 5)
    assert normal_kl(zeros, zeros).item() == 0
    assert normal_kl(zeros + 0.1, zeros).item() > 0
    assert normal_kl(zeros, zeros - 0.1).item() > 0


# -- Generators -----------------------------------------------------------------------------------------------------


def fill(model: nn.Module) -> None:
    """Weights that do not depend on a random stream or on the order of the modules."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                n, outputs = module.weight.numel(), module.weight.shape[0]
                values = torch.arange(n, dtype=torch.float64).sin() * (2 * outputs / n) ** 0.5
                module.weight.copy_(values.view_as(module.weight))
                if module.bias is not None:
                    module.bias.copy_(0.01 * torch.arange(outputs, dtype=torch.float64).cos())
                if isinstance(module, SpectralConv2d):
                    start = torch.arange(1, outputs + 1, dtype=torch.float64).cos()
                    module.u.copy_(nn.functional.normalize(start, dim=0))
            elif isinstance(module, nn.BatchNorm2d) and module.affine:
                k = torch.arange(module.num_features, dtype=torch.float64)
                module.weight.copy_(1 + 0.1 * k.sin())
                module.bias.copy_(0.05 * k.cos())


def waves(*shape: int, step: float) -> Tensor:
    return (step * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).sin().view(shape)


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_images(kind: str) -> None:
    options, expected = GOLDEN[kind]
    generator = EarlyGenerator(100, (3, 32, 32), **options).double()
    fill(generator)
    with torch.no_grad():
        images = generator(waves(4, 100, step=0.1))
    got = [float(images.mean()), float(images.std()), *images[0, 0, 0, :4].tolist(), *images[3, 2, 31, -2:].tolist()]
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_golden_latents() -> None:
    encoder = Encoder(100, (3, 32, 32)).double()
    fill(encoder)
    with torch.no_grad():
        encoder.log_variance.weight.mul_(0.5)
        mean, log_variance = encoder(waves(4, 3, 32, 32, step=0.01))
    assert mean[0, :3].tolist() == pytest.approx(
        [-0.04115788884832088, -0.05508499768664498, -0.06789867981187418], rel=1e-9
    )
    assert log_variance[3, -2:].tolist() == pytest.approx([0.04176240070039784, 0.0456160160878506], rel=1e-9)
    assert mean.std().item() == pytest.approx(0.0527615285658516, rel=1e-9)


def test_parameter_counts() -> None:
    with torch.device("meta"):
        networks = [EarlyGenerator(1000, (3, 32, 32), spectral=True), Encoder(1000, (3, 32, 32))]
        networks.append(MemoryGenerator(1000, (3, 32, 32)))
    counts = [sum(p.numel() for p in network.parameters()) for network in networks]
    assert counts == [8_423_939, 4_321_872, 8_423_939 + 4_321_872]


@pytest.mark.parametrize("side", [8, 12, 28])
def test_other_sides_work(side: int) -> None:
    memory = MemoryGenerator(6, (1, side, side), width=4)
    images, mean, log_variance = memory(torch.randn(3, 1, side, side), torch.zeros(3, 6))
    assert images.shape == (3, 1, side, side)
    assert mean.shape == log_variance.shape == (3, 6)


def test_images_are_standardised_over_the_batch() -> None:
    generator = EarlyGenerator(8, (3, 8, 8), width=4)
    nn.init.normal_(generator.to_image.weight)  # so that the variance is far above the BatchNorm's eps
    images = generator(torch.randn(32, 8))
    assert images.mean((0, 2, 3)).tolist() == pytest.approx([0] * 3, abs=1e-5)
    assert images.var((0, 2, 3), correction=0).tolist() == pytest.approx([1] * 3, rel=1e-3)


def test_the_spectral_norm_becomes_1() -> None:
    torch.manual_seed(0)
    conv = SpectralConv2d(3, 5, 3, padding=1)
    for _ in range(200):
        conv(torch.zeros(1, 3, 4, 4))
    matrix = conv.weight.detach().flatten(1)
    assert (conv.u @ matrix @ conv.v).item() == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-4)
    x = torch.randn(2, 3, 4, 4)
    expected = nn.functional.conv2d(x, conv.weight / torch.linalg.matrix_norm(matrix, 2), conv.bias, padding=1)
    torch.testing.assert_close(conv(x), expected, rtol=1e-3, atol=1e-4)


def test_in_eval_mode_the_singular_vectors_stay() -> None:
    conv = SpectralConv2d(3, 5, 3).eval()
    before = conv.u.clone()
    conv(torch.randn(1, 3, 4, 4))
    assert torch.equal(conv.u, before)


def test_initial_weights_are_uniform(task: Task) -> None:
    method = new_method(task, generator_width=16)
    for network in (method.generator, method.memory):
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert module.weight.abs().max().item() <= 0.08
                assert module.weight.std().item() == pytest.approx(0.16 / 12**0.5, rel=0.2)
                assert module.bias is not None
                assert not module.bias.any()


def test_latents_take_one_adam_step() -> None:
    torch.manual_seed(0)
    memory = MemoryGenerator(6, (1, 8, 8), width=4).eval()
    latents = torch.randn(4, 6)
    before = latents.clone()
    images = memory.recall(latents, lambda z, _images: z.square().sum(), lr=0.02)
    torch.testing.assert_close(latents.detach(), before - 0.02 * before.sign())
    torch.testing.assert_close(images, memory.decoder(latents).detach())
    assert not images.requires_grad
    assert all(p.grad is None for p in memory.parameters())


def test_the_tuning_gradient_stays_on_the_decoder_if_wanted() -> None:
    memory = MemoryGenerator(6, (1, 8, 8), width=4)
    memory.recall(torch.randn(4, 6), lambda _z, images: images.square().mean(), lr=0.02, train_decoder=True)
    assert all(p.grad is not None for p in memory.decoder.parameters())
    assert all(p.grad is None for p in memory.encoder.parameters())


# -- The generator's step -------------------------------------------------------------------------------------------


def test_total_loss(make_task: Callable[..., Task]) -> None:
    """Cross entropy + 5 * balance (log10) + 0.1 * activation, and the disagreement."""
    task = make_task(classes=3)
    method = new_method(task)

    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            self.classifier(FEATURES)
            return T

    object.__setattr__(task, "teacher", Teacher())
    loss = method._loss(torch.rand(4, 1, 8, 8), lambda images: S)  # type: ignore[arg-type]
    assert loss.item() == pytest.approx(-2.037502342347719 + 0.994852930892441, rel=1e-10)


def test_the_rival_is_the_student_and_the_teacher_is_no_part_of_the_game(task: Task, student: nn.Module) -> None:
    method = new_method(task, onehot=0, balance=0, activation=0)
    images = torch.randn(6, 1, 8, 8, requires_grad=True)
    method._loss(images, student).backward()
    expected = torch.autograd.grad(bounded_agreement(student(images), task.teacher(images).detach()), images)[0]
    torch.testing.assert_close(images.grad, expected)
    assert expected.abs().sum() > 0


def test_a_call_moves_the_generator_alone(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    generator, memory = weights(method.generator), weights(method.memory)
    assert method.synthesize(student, at(0)).images is None
    assert steps(generator, method.generator)
    assert not steps(memory, method.memory)


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


# -- Student batches and the memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "replayed"), [(B, 2), (64, 8), (8, 2)])
def test_an_eighth_of_the_batch_comes_on_top(task: Task, at: At, size: int, replayed: int) -> None:
    batch = new_method(task).student_batch(POOL, size, at(0))
    assert batch.images.shape[0] == size + replayed
    assert batch.parts == {"new": slice(0, size), "replay": slice(size, size + replayed)}


def test_replayed_images_are_the_decoders_in_eval_mode(task: Task, at: At) -> None:
    method = new_method(task)
    seen: list[tuple[bool, Tensor]] = []
    method.memory.decoder.register_forward_hook(lambda module, _inputs, output: seen.append((module.training, output)))
    batch = method.student_batch(POOL, B, at(0))
    assert [training for training, _ in seen] == [False, False]
    assert torch.equal(batch.images[batch.parts["replay"]], seen[-1][1])


def test_student_steps_leave_the_generator_and_the_memory_as_they_are(task: Task, at: At) -> None:
    method = new_method(task)
    generator, memory = weights(method.generator), weights(method.memory)
    batch = method.student_batch(POOL, B, at(0))
    assert not batch.images.requires_grad
    assert not steps(generator, method.generator)
    assert not steps(memory, method.memory)


def memory_batches(method: PreDfkd) -> list[int]:
    """Rows of the images that the autoencoder gets, one entry a step."""
    rows: list[int] = []
    method.memory.encoder.register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0].shape[0]))
    return rows


def play_round(method: PreDfkd, student: nn.Module, progress: Progress, count: int = 10, size: int = B) -> None:
    method.synthesize(student, progress)
    for _ in range(count):
        batch = method.student_batch(POOL, size, progress)
        method.after_student_step(student, batch, progress)


def test_the_memory_learns_in_the_first_four_student_steps(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    rows = memory_batches(method)
    play_round(method, student, at(0))
    assert rows == [B // 2] * 4  # the first round of all: there is nothing to remember yet
    play_round(method, student, at(0, round_=1))
    play_round(method, student, at(1))
    assert rows[4:] == [B // 2 + B // 8] * 8


def test_after_a_warm_up_the_first_round_is_the_first_one_with_a_student(
    task: Task, student: nn.Module, at: At
) -> None:
    method = new_method(task)
    rows = memory_batches(method)
    play_round(method, student, at(3, warmup=3), count=1)
    play_round(method, student, at(4, warmup=3), count=1)
    assert rows == [B // 2, B // 2 + B // 8]


def test_the_memory_reproduces_pixels_and_logits(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient on the encoder is that of pixels, logits and 1e-5 of the KL divergence, written out."""
    method = new_method(task, kl=0.5)
    new = torch.randn(8, 1, 8, 8)
    noise = torch.randn(4, 8)
    monkeypatch.setattr(method, "_draw", lambda size: noise[:size])
    monkeypatch.setattr(method.memory_optimizer, "step", lambda: None)
    method._memory_step(new, replay=False)
    got = [p.grad.clone() for p in method.memory.parameters() if p.grad is not None]
    half = new[:4]
    remembered, mean, log_variance = method.memory(half, noise)
    loss = (remembered - half).abs().mean() + (task.teacher(remembered) - task.teacher(half)).abs().mean()
    loss = loss + 0.5 * normal_kl(mean, log_variance)
    expected = torch.autograd.grad(loss, list(method.memory.parameters()))
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("leaks", [True, False])
def test_tuning_trains_the_decoder_only_if_it_should(task: Task, monkeypatch: pytest.MonkeyPatch, leaks: bool) -> None:
    """With a tuning loss that leaves the latents where they are but is steep in the decoder's weights."""
    found = {}
    for weight in (0.0, 1e3):
        method = new_method(task, tuning_trains_memory=leaks)
        noise = torch.randn(B, 8, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(method, "_draw", lambda size, noise=noise: noise[:size].clone())
        monkeypatch.setattr(method.memory_optimizer, "step", lambda: None)
        decoder = method.memory.decoder

        def tuning(latents: Tensor, _images: Tensor, weight: float = weight, decoder: Any = decoder) -> Tensor:
            return 0 * latents.sum() + weight * sum(p.sum() for p in decoder.parameters())

        monkeypatch.setattr(method, "_tuning_loss", tuning)
        method._memory_step(torch.randn(B, 1, 8, 8, generator=torch.Generator().manual_seed(1)), replay=True)
        found[weight] = torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])
    difference = (found[1e3] - found[0.0]).abs().max().item()
    assert difference == pytest.approx(1e3 if leaks else 0, rel=1e-3)


def test_the_tuning_loss(task: Task) -> None:
    method = new_method(task, onehot=0, balance=0)
    latents = torch.randn(6, 8)
    assert method._tuning_loss(latents, torch.randn(6, 1, 8, 8)).item() == pytest.approx(latent_moments(latents).item())
    images = torch.randn(6, 1, 8, 8)
    logits = task.teacher(images)
    share = logits.softmax(1).mean(0)
    expected = nn.functional.cross_entropy(logits, logits.argmax(1)) + 5 * (share * share.log10()).sum()
    value = new_method(task)._tuning_loss(latents, images) - latent_moments(latents)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_the_student_minimises_the_distance_of_logits(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    images = torch.randn(6, 1, 8, 8)
    expected = (student(images) - task.teacher(images)).abs().mean()
    torch.testing.assert_close(method.student_loss(student, Batch(images), at(0)), expected)


def test_the_memory_learns(task: Task, student: nn.Module) -> None:
    """Two hundred steps on the same images: what it remembers comes closer to them."""
    method = new_method(task, memory_lr=5e-3, generator_width=8)
    new = torch.randn(B, 1, 8, 8, generator=torch.Generator().manual_seed(0)).sign() * torch.linspace(0.2, 1, 8)

    def error() -> float:
        with torch.no_grad():
            remembered, _, _ = method.memory(new[: B // 2], torch.zeros(B // 2, 8))
        return (remembered - new[: B // 2]).abs().mean().item()

    before = error()
    for _ in range(200):
        method._memory_step(new, replay=False)
    assert error() < 0.8 * before


def test_published_settings() -> None:
    schedule = PreDfkd.published["cifar100/resnet34:resnet18"].schedule
    assert (schedule.epochs, schedule.rounds_per_epoch, schedule.student_steps) == (400, 36, 10)
    assert (schedule.batch_size, schedule.lr, schedule.weight_decay, schedule.lr_min) == (1024, 0.1, 5e-4, 0)
    assert Config().generator_lr / 40 == Config().memory_lr
