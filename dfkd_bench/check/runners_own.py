"""Checks that a method leaves alone what is the runner's: teacher, student, seeds, data, the count of its work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from dfkd_bench import run
from dfkd_bench.check.bench import EPOCHS, SCHEDULE, Subject
from dfkd_bench.check.broken import Broken
from dfkd_bench.check.comparing import gradients, hooks, modes, same, state, unchanged
from dfkd_bench.paths import home
from dfkd_bench.watch import FileWatch


def teacher_unchanged(subject: Subject) -> None:
    """The teacher's weights and buffers stay as they are."""
    unchanged(subject, "teacher's", lambda bench: state(bench.teacher))


def teacher_mode_unchanged(subject: Subject) -> None:
    """The teacher stays in eval mode."""
    unchanged(subject, "teacher's", lambda bench: modes(bench.teacher))


def teacher_stays_frozen(subject: Subject) -> None:
    """The teacher's parameters need no gradient and get none."""
    bench = subject.bench()
    before = gradients(bench.teacher)
    bench.play()
    for name, value in gradients(bench.teacher).items():
        if name not in before or not same(before[name], value):
            raise Broken(f"the teacher's {name} was changed")


def student_unchanged_by_synthesis(subject: Subject) -> None:
    """`synthesize` leaves the student's weights, buffers and mode as they are."""
    unchanged(
        subject, "student's", lambda bench: {**state(bench.student), **modes(bench.student)}, calls=("synthesize",)
    )


def no_gradients_left_on_student(subject: Subject) -> None:
    """`synthesize` leaves no gradient on the student."""
    unchanged(subject, "student's", lambda bench: gradients(bench.student), calls=("synthesize",))


def student_trained_by_runner_only(subject: Subject) -> None:
    """The methods of the student's steps leave its weights to the runner's optimiser."""
    unchanged(
        subject,
        "student's",
        lambda bench: {name: value.detach().clone() for name, value in bench.student.named_parameters()},
        calls=("student_batch", "student_loss", "after_student_step"),
    )


def no_hooks_left(subject: Subject) -> None:
    """No hook stays on teacher or student after a call."""
    unchanged(
        subject,
        "",
        lambda bench: {
            f"{owner}'s {name}": count
            for owner, model in (("teacher", bench.teacher), ("student", bench.student))
            for name, count in hooks(model).items()
        },
    )


def seeds_left_alone(subject: Subject) -> None:
    """Neither torch's global stream nor the task's is seeded anew."""
    unchanged(
        subject,
        "seed of",
        lambda bench: {"torch": torch.initial_seed(), "task.rng": bench.task.rng.initial_seed()},
    )


def no_data_file_opened(subject: Subject) -> None:
    """No data file is opened while the method runs."""
    watch = FileWatch([home() / "data"])

    def around(_call: str) -> AbstractContextManager[None]:
        return watch.method()

    bench = subject.bench()
    with watch.on():
        bench.play(around=around)
    opened = [path for path, phase in watch.files if phase == "method"]
    if opened:
        raise Broken(f"the method opened {opened[0]}")


def generation_cost_is_counted(subject: Subject) -> None:
    """`generation_cost` is what the runner counts, and `absorbs` names a whole-number setting that it grows with."""
    bench, method_class, tally, synthesizing = subject.bench(), subject.method_class, run.Tally(), False

    @contextmanager
    def around(call: str) -> Iterator[None]:
        nonlocal synthesizing
        synthesizing = call == "synthesize"
        yield
        synthesizing = False

    run.count_gradient_passes(bench.teacher, tally, lambda: synthesizing)
    bench.play(range(EPOCHS), around)
    said = method_class.generation_cost(bench.config, SCHEDULE, bench.case.num_classes)
    if said != tally.teacher_images:
        raise Broken(
            f"synthesis passed {tally.teacher_images} images through the teacher, `generation_cost` says {said}"
        )
    if not method_class.absorbs:
        if said:
            raise Broken("synthesis uses the teacher's gradient, but `absorbs` names no setting that scales that")
        return
    value = getattr(bench.config, method_class.absorbs, None)
    if not isinstance(value, int):
        raise Broken(f"`absorbs` names '{method_class.absorbs}', which is no whole-number setting")
    more = method_class.Config(**{**bench.config.model_dump(), method_class.absorbs: 2 * value})
    if method_class.generation_cost(more, SCHEDULE, bench.case.num_classes) <= said:
        raise Broken(f"the generation cost doesn't grow with '{method_class.absorbs}'")


CHECKS = (
    teacher_unchanged,
    teacher_mode_unchanged,
    teacher_stays_frozen,
    student_unchanged_by_synthesis,
    no_gradients_left_on_student,
    student_trained_by_runner_only,
    no_hooks_left,
    seeds_left_alone,
    no_data_file_opened,
    generation_cost_is_counted,
)
