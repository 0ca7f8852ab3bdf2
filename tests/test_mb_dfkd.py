"""MB-DFKD: the memory bank, and that the method is KAKR's stored replay without its meta-learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dfkd_bench.losses import activation, bounded_agreement, class_balance, confidence, logit_distance
from dfkd_bench.method import Batch, Progress, Task
from dfkd_bench.methods import kakr
from dfkd_bench.methods.mb_dfkd import Config, MbDfkd

B = 16
POOL: Any = None  # the method keeps none
At = Callable[..., Progress]
TINY: dict[str, Any] = {"synthesis_batch_size": B, "latent_dim": 8, "generator_width": 4}


def new_method(task: Task, **fields: Any) -> MbDfkd:
    torch.manual_seed(0)
    task.rng.manual_seed(0)
    return MbDfkd(Config(**(TINY | fields)), task)


def play_epoch(method: Any, student: nn.Module, progress: Progress) -> list[Batch]:
    method.synthesize(student, progress)
    batches = []
    for _ in range(2):
        batches.append(method.student_batch(POOL, B, progress))
        method.after_student_step(student, batches[-1], progress)
    return batches


# -- The bank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_last_batch_of_every_fifth_epoch_is_stored(task: Task, student: nn.Module, at: At, warmup: int) -> None:
    method = new_method(task)
    for epoch in range(warmup):
        method.synthesize(student, at(epoch, warmup=warmup))
    last = [play_epoch(method, student, at(warmup + epoch, warmup=warmup))[-1].images for epoch in range(12)]
    assert len(method.bank.batches) == 3
    for images, epoch in zip(method.bank.batches, (0, 5, 10), strict=True):
        assert torch.equal(images, last[epoch][: B // 8])


def test_within_an_epoch_nothing_is_stored(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task)
    for round_ in range(3):
        play_epoch(method, student, at(0, round_=round_))
    assert method.bank.batches == []


# -- Student batches ------------------------------------------------------------------------------------------------


def test_before_the_first_one_is_stored_there_is_no_replay(task: Task, student: nn.Module, at: At) -> None:
    (batch, *_) = play_epoch(new_method(task), student, at(0))
    assert batch.images.shape[0] == B
    assert batch.parts["replay"] == slice(B, B)


def test_a_stored_batch_comes_on_top(task: Task, student: nn.Module, at: At) -> None:
    method = new_method(task, store_every=1)
    drawn = set()
    for epoch in range(8):
        play_epoch(method, student, at(epoch))
    for _ in range(30):
        batch = method.student_batch(POOL, B, at(8))
        assert batch.images.shape[0] == B + B // 8 == MbDfkd.batch_rows(method.config, B)
        replayed = batch.images[batch.parts["replay"]]
        (number,) = [n for n, images in enumerate(method.bank.batches) if torch.equal(images, replayed)]
        drawn.add(number)
    assert drawn == set(range(7))


def test_new_and_stored_images_weigh_alike(task: Task, student: nn.Module, at: At) -> None:
    images = torch.randn(6, *task.image_shape)
    batch = Batch(images, parts={"new": slice(0, 4), "replay": slice(4, 6)})
    loss = new_method(task).student_loss(student.train(), batch, at(0))
    torch.testing.assert_close(loss, logit_distance(student(images), task.teacher(images)))


# -- The generator --------------------------------------------------------------------------------------------------


def test_the_generators_loss(task: Task, student: nn.Module) -> None:
    images = torch.randn(B, *task.image_shape)
    logits, features, _ = task.teacher.features(images)
    expected = confidence(logits) + 5 * class_balance(logits, 10) + 0.1 * activation(features)
    expected = expected + bounded_agreement(student(images), logits)
    torch.testing.assert_close(new_method(task)._loss(images, student), expected)


def test_the_opponent_is_the_student(task: Task, student: nn.Module, at: At) -> None:
    seen: list[Tensor] = []
    student.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    new_method(task, generator_steps=3).synthesize(student, at(0))
    assert [len(images) for images in seen] == [B] * 3
    assert seen[0].requires_grad


@pytest.mark.parametrize("student_eval", [False, True])
def test_mode_of_the_student(
    task: Task, student: nn.Module, at: At, record_modes: Callable[[nn.Module], list[bool]], student_eval: bool
) -> None:
    modes = record_modes(student)
    new_method(task, student_eval=student_eval, generator_steps=2).synthesize(student, at(0))
    assert modes == [not student_eval] * 2
    assert not student.training


# -- Its relatives --------------------------------------------------------------------------------------------------


def test_it_is_kakrs_stored_replay_without_meta_learning(make_task: Any, make_student: Any, at: At) -> None:
    """From one generator and one random stream: the same batches, losses and weights."""
    traces = []
    for kind in (MbDfkd, kakr.Kakr):
        task, student = make_task(), make_student()
        if kind is MbDfkd:
            method: Any = new_method(task, store_every=1)
        else:
            method = kakr.Kakr(kakr.Config(**TINY, replay="memory", store_every=1), task)
        method.generator.load_state_dict(new_method(make_task()).generator.state_dict())
        task.rng.manual_seed(3)
        trace = []
        for epoch in range(3):
            student.eval().requires_grad_(False)
            trace.append(method.synthesize(student, at(epoch)).scalars["synthesis_loss"])
            for _ in range(2):
                batch = method.student_batch(POOL, B, at(epoch))
                trace += [batch.images, method.student_loss(student, batch, at(epoch))]
                method.after_student_step(student, batch, at(epoch))
        traces.append([*trace, *method.generator.state_dict().values()])
    assert len(traces[0]) == len(traces[1])
    for one, other in zip(*traces, strict=True):
        assert torch.equal(one, other)


def test_settings_shared_with_kakr_have_the_same_defaults() -> None:
    ours, theirs = Config().model_dump(), kakr.Config().model_dump()
    assert {name for name in ours if ours[name] != theirs[name]} == {"synthesis_batch_size"}


def test_published_settings() -> None:
    entry = MbDfkd.published["cifar100/resnet34:resnet18"]
    schedule = entry.schedule
    assert (schedule.epochs, schedule.rounds_per_epoch, schedule.student_steps) == (400, 36, 10)
    assert (schedule.batch_size, schedule.lr, schedule.weight_decay, schedule.lr_min) == (1024, 0.1, 5e-4, 0)
    assert (entry.origin, Config().synthesis_batch_size) == ("third-party", 1024)
