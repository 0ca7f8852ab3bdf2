"""KAKR. What it shares with PRE-DFKD, generators and memory, is tested there; here that it is put together alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench import check, plugins
from dfkd_bench.losses import logit_distance
from dfkd_bench.method import Batch, Progress, Task
from dfkd_bench.methods import kakr, pre_dfkd
from dfkd_bench.methods.kakr import Config, Kakr, retention
from dfkd_bench.methods.pre_dfkd import PreDfkd

B = 16
POOL: Any = None  # the method keeps none
At = Callable[..., Progress]
TINY: dict[str, Any] = {"synthesis_batch_size": B, "latent_dim": 8, "generator_width": 4}


def new_method(task: Task, **fields: Any) -> Kakr:
    torch.manual_seed(0)
    task.rng.manual_seed(0)
    return Kakr(Config(**(TINY | fields)), task)


def train_mode(student: nn.Module) -> nn.Module:
    return student.train().requires_grad_(True)


def double(module: nn.Module) -> nn.Module:
    return module.double()


def gradient(loss: Tensor, student: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))])


# -- The student's loss ---------------------------------------------------------------------------------------------

Data = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture
def data(task: Task) -> Data:
    """New images and old ones with the teacher's logits, float64."""
    generator = torch.Generator().manual_seed(0)
    new, old = (torch.randn(n, 1, 8, 8, generator=generator) for n in (8, 4))
    return new.double(), task.teacher(new).double(), old.double(), task.teacher(old).double()


def batch_of(data: Data) -> Batch:
    new, old = data[0].float(), data[2].float()
    return Batch(torch.cat([new, old]), parts={"new": slice(0, 8), "replay": slice(8, 12)})


def test_released_is_the_distance_of_logits_alone(task: Task, student: nn.Module, at: At, data: Data) -> None:
    batch = batch_of(data)
    train_mode(student)
    found = gradient(new_method(task).student_loss(student, batch, at(0)), student)
    expected = gradient(logit_distance(student(batch.images), task.teacher(batch.images)), student)
    assert torch.equal(found, expected)


def test_intended_adds_the_retention(task: Task, student: nn.Module, at: At, data: Data) -> None:
    batch = batch_of(data)
    train_mode(student)
    new, new_targets, old, old_targets = (part.float() for part in data)
    released = new_method(task).student_loss(student, batch, at(0))
    intended = new_method(task, meta="intended", inner_lr=0.1).student_loss(student, batch, at(0))
    added = retention(student, new, new_targets, old, old_targets, (0.1, 5e-4))
    torch.testing.assert_close(intended - released, added, rtol=1e-4, atol=1e-6)


def test_without_a_trial_step_it_is_the_loss_on_old_images(student: nn.Module, data: Data) -> None:
    train_mode(double(student))
    found = gradient(retention(student, *data, step=(0.0, 5e-4)), student)
    expected = gradient(logit_distance(student(data[2]), data[3]), student)
    torch.testing.assert_close(found, expected)


def test_the_trial_step_is_sgds(student: nn.Module, data: Data) -> None:
    train_mode(double(student))
    found = retention(student, *data, step=(0.3, 0.01))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    logit_distance(student(data[0]), data[1]).backward()
    optimizer.step()
    torch.testing.assert_close(found, logit_distance(student(data[2]), data[3]))


def test_the_gradient_goes_through_the_trial_step(make_student: Callable[..., nn.Module], data: Data) -> None:
    """Against differences of the loss: a first-order gradient is another one."""
    student = train_mode(double(make_student()))
    student.eval()  # no statistics of the batch: the check is about the weights
    step = (0.05, 0.01)
    found = gradient(retention(student, *data, step=step), student)
    parameters = list(student.parameters())
    torch.manual_seed(0)
    direction = [torch.randn_like(p) for p in parameters]

    def moved(distance: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(distance * d)
        value = retention(student, *data, step=step).item()
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.sub_(distance * d)
        return value

    slope = (moved(1e-7) - moved(-1e-7)) / 2e-7
    assert (found @ torch.cat([d.flatten() for d in direction])).item() == pytest.approx(slope, rel=1e-3)
    inner = gradient(logit_distance(student(data[0]), data[1]), student)
    with torch.no_grad():
        offset = 0
        for p in parameters:
            p.sub_(step[0] * (inner[offset : offset + p.numel()].view_as(p) + step[1] * p))
            offset += p.numel()
    first_order = gradient(logit_distance(student(data[2]), data[3]), student)
    assert not torch.allclose(found, first_order, rtol=1e-2)


def test_small_trial_steps_align_the_gradients(student: nn.Module, data: Data) -> None:
    """grad L_ret(theta') ~ grad L_ret - a * grad(g_acq . g_ret) without weight decay, to first order in a."""
    train_mode(double(student)).eval()
    parameters = list(student.parameters())
    acquired = torch.autograd.grad(logit_distance(student(data[0]), data[1]), parameters, create_graph=True)
    retained = torch.autograd.grad(logit_distance(student(data[2]), data[3]), parameters, create_graph=True)
    product = torch.stack([(a * r).sum() for a, r in zip(acquired, retained, strict=True)]).sum()
    correction = gradient(product, student)
    plain = gradient(retention(student, *data, step=(0.0, 0.0)), student)
    small = 1e-6
    found = (plain - gradient(retention(student, *data, step=(small, 0.0)), student)) / small
    assert torch.cosine_similarity(found, correction, dim=0).item() > 0.99
    assert found.norm().item() == pytest.approx(correction.norm().item(), rel=0.05)


def test_the_trial_passes_leave_the_students_statistics_as_they_are(
    student: nn.Module, data: Data, snapshot: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    train_mode(double(student))
    before = snapshot(student)
    retention(student, *data, step=(0.9, 5e-4)).backward()
    for name, value in snapshot(student).items():
        assert torch.equal(value, before[name]), name


# -- Stored images --------------------------------------------------------------------------------------------------


def play_epoch(method: Kakr, student: nn.Module, progress: Progress) -> list[Batch]:
    method.synthesize(student, progress)
    batches = []
    for _ in range(2):
        batches.append(method.student_batch(POOL, B, progress))
        method.after_student_step(student, batches[-1], progress)
    return batches


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_last_batch_of_every_fifth_epoch_is_stored(task: Task, student: nn.Module, at: At, warmup: int) -> None:
    method = new_method(task, replay="memory")
    for epoch in range(warmup):
        method.synthesize(student, at(epoch, warmup=warmup))
    last = [play_epoch(method, student, at(warmup + epoch, warmup=warmup))[-1].images for epoch in range(12)]
    stored = method.stored.batches
    assert len(stored) == 3
    for images, epoch in zip(stored, (0, 5, 10), strict=True):
        assert torch.equal(images, last[epoch][: B // 8])


def test_before_the_first_one_is_stored_there_is_no_replay(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task, replay="memory", meta="intended")
    (batch, *_) = play_epoch(method, student, at(0))
    assert batch.images.shape[0] == B
    assert batch.parts["replay"] == slice(B, B)
    assert torch.isfinite(method.student_loss(train_mode(student), batch, at(0)))


def test_replayed_is_one_of_the_stored_batches(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task, replay="memory", store_every=1)
    drawn = set()
    for epoch in range(8):
        batches = play_epoch(method, student, at(epoch))
    for _ in range(30):
        batch = method.student_batch(POOL, B, at(8))
        replayed = batch.images[batch.parts["replay"]]
        (number,) = [n for n, images in enumerate(method.stored.batches) if torch.equal(images, replayed)]
        drawn.add(number)
    assert len(batches) == 2
    assert drawn == set(range(7))


def test_without_generative_replay_the_autoencoder_rests(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task, replay="memory")
    method.memory.register_forward_pre_hook(lambda _module, _inputs: pytest.fail("the autoencoder was called"))
    for epoch in range(3):
        play_epoch(method, student, at(epoch))


# -- As in PRE-DFKD -------------------------------------------------------------------------------------------------


def test_released_generative_replay_is_pre_dfkd(make_task: Callable[..., Task], make_student: Any, at: At) -> None:
    """With one batch size everything is the same: batches, losses, generator and memory."""
    traces = []
    for kind in (PreDfkd, Kakr):
        task, student = make_task(), make_student()
        torch.manual_seed(0)
        config = pre_dfkd.Config(**TINY) if kind is PreDfkd else kakr.Config(**TINY)
        method: Any = kind(config, task)
        trace = []
        for epoch in range(2):
            student.eval().requires_grad_(False)
            trace.append(method.synthesize(student, at(epoch)).scalars["synthesis_loss"])
            for _ in range(3):
                batch = method.student_batch(POOL, B, at(epoch))
                trace += [batch.images, method.student_loss(student, batch, at(epoch))]
                method.after_student_step(student, batch, at(epoch))
        trace += [*method.generator.state_dict().values(), *method.memory.state_dict().values()]
        traces.append(trace)
    assert len(traces[0]) == len(traces[1])
    for one, other in zip(*traces, strict=True):
        assert torch.equal(one, other)


def test_settings_shared_with_pre_dfkd_have_the_same_defaults() -> None:
    ours, theirs = kakr.Config().model_dump(), pre_dfkd.Config().model_dump()
    assert {name for name in theirs if ours[name] != theirs[name]} == {"synthesis_batch_size"}


@pytest.mark.parametrize("student_eval", [False, True])
def test_mode_of_the_student(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]], student_eval: bool
) -> None:
    modes = record_modes(student)
    new_method(task, student_eval=student_eval, generator_steps=2).synthesize(student, at(0))
    assert modes == [not student_eval] * 2
    assert not student.training


def test_published_settings() -> None:
    schedule = Kakr.published["cifar100/resnet34:resnet18"].schedule
    assert (schedule.epochs, schedule.rounds_per_epoch, schedule.student_steps) == (400, 72, 10)
    assert (schedule.batch_size, schedule.lr, schedule.weight_decay, schedule.lr_min) == (512, 0.1, 5e-4, 0)
    assert Config().synthesis_batch_size == 512


# -- The settings that conformance does not see ---------------------------------------------------------------------


class Intended(Kakr):
    """The paper's method."""

    tiny = Kakr.tiny | {"meta": "intended", "replay": "memory", "store_every": 1}


@pytest.mark.parametrize(
    "name",
    [
        "state_can_be_saved",
        "resumed_run_is_the_same",
        "same_seed_same_bits",
        "student_loss_reaches_the_student",
        "student_trained_by_runner_only",
        "no_hooks_left",
        "works_at_32x32_colour",
    ],
)
def test_conformance_with_intended_meta_learning_and_stored_images(name: str) -> None:
    source = plugins.discover().source("kakr")
    holds = {function.__name__: function for function in check.CHECKS}[name]
    holds(check.Subject(source, Intended))
