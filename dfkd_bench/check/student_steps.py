"""Checks of the student's steps: batches and losses."""

from __future__ import annotations

import torch

from dfkd_bench.check.bench import SCHEDULE, Subject
from dfkd_bench.check.broken import Broken


def student_batch_size(subject: Subject) -> None:
    """A student batch has 1 to the asked number of images [b, C, H, W]; more only if `parts` names them."""
    bench = subject.bench()
    for batch in bench.play().batches:
        shape, wanted = list(batch.images.shape), SCHEDULE.batch_size
        if batch.images.ndim != 4 or tuple(shape[1:]) != bench.case.image_shape:
            raise Broken(f"a student batch has shape {shape}, the task's images {list(bench.case.image_shape)}")
        named = {row for part in batch.parts.values() for row in range(shape[0])[part]}
        if not 1 <= shape[0] <= wanted and len(named) != shape[0]:
            raise Broken(f"a student batch has {shape[0]} rows, {wanted} were asked for and `parts` doesn't name them")


def batch_rows_are_right(subject: Subject) -> None:
    """`batch_rows` says how many rows a full student batch has."""
    bench = subject.bench()
    most = max(batch.images.shape[0] for batch in bench.play().batches)
    said = subject.method_class.batch_rows(bench.config, SCHEDULE.batch_size)
    if most != said:
        raise Broken(f"full student batches have {most} rows, `batch_rows` says {said}")


def student_batch_range(subject: Subject) -> None:
    """A student batch is normalised: put back, its pixels lie in [0, 1]."""
    bench = subject.bench()
    for batch in bench.play().batches:
        pixels = bench.task.normalize.inverse(batch.images)
        if not (torch.isfinite(pixels).all() and pixels.min() >= -1e-3 and pixels.max() <= 1 + 1e-3):
            raise Broken(
                f"pixels of a student batch lie in [{pixels.min().item():.3g}, {pixels.max().item():.3g}] once "
                "`task.normalize` is undone, expected [0, 1]"
            )


def student_batch_detached(subject: Subject) -> None:
    """A student batch carries no graph."""
    if any(batch.images.requires_grad for batch in subject.bench().play().batches):
        raise Broken("the images of a student batch have a graph: detach them")


def student_loss_finite(subject: Subject) -> None:
    """The student's loss is one finite number."""
    for loss in subject.bench().play().losses:
        if loss.ndim or not torch.isfinite(loss):
            raise Broken(f"the student's loss has shape {list(loss.shape)} or is not finite")


def student_loss_reaches_the_student(subject: Subject) -> None:
    """The gradient of the student's loss reaches every parameter of the student."""
    bench = subject.bench()
    bench.play()
    gradients = {name: parameter.grad for name, parameter in bench.student.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    if missing:
        raise Broken(f"no gradient reaches {', '.join(missing[:3])}")
    if not any(bool(gradient.any()) for gradient in gradients.values() if gradient is not None):
        raise Broken("the gradient is zero for every parameter of the student")


CHECKS = (
    student_batch_size,
    batch_rows_are_right,
    student_batch_range,
    student_batch_detached,
    student_loss_finite,
    student_loss_reaches_the_student,
)
