"""Checks of whole runs: repeated, resumed, on other tasks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from dfkd_bench.check.bench import EPOCHS, LARGE, SMALL, Case, Subject
from dfkd_bench.check.broken import Broken, named
from dfkd_bench.check.comparing import same_traces
from dfkd_bench.checkpoint import load_tree, save_tree


def same_seed_same_bits(subject: Subject) -> None:
    """Two runs with one seed are equal bit for bit."""
    same_traces(subject.bench().play(), subject.bench().play(), "of two runs with one seed")


def state_can_be_saved(subject: Subject) -> None:
    """Every attribute can be saved, or is named in `transient`."""
    bench = subject.bench()
    bench.play()
    with tempfile.TemporaryDirectory() as folder:
        try:
            save_tree(Path(folder, "state"), bench.build().state_dict())
        except TypeError as error:
            raise Broken(str(error)) from None
    unknown = sorted(subject.method_class.transient - vars(bench.build()).keys())
    if unknown:
        raise Broken(f"`transient` names attributes that aren't there: {', '.join(unknown)}")


def resumed_run_is_the_same(subject: Subject) -> None:
    """Saved and loaded into a fresh method, in the warm-up or after it, a run goes on bit for bit."""
    for done in (1, 2):
        bench, fresh = subject.bench(), subject.bench()
        bench.play(range(done))
        with tempfile.TemporaryDirectory() as folder:
            save_tree(Path(folder, "state"), bench.saved())
            saved = load_tree(Path(folder, "state"))
        uninterrupted = bench.play(range(done, EPOCHS))
        fresh.restore(saved)
        resumed = fresh.play(range(done, EPOCHS))
        same_traces(uninterrupted, resumed, f"after a resume at epoch {done} (state neither saved nor transient?)")


def works_with_many_classes(subject: Subject) -> None:
    """It works with more classes than a synthesis has images."""
    bench = subject.bench()
    first = bench.play((0,)).syntheses[0].images
    images = 0 if first is None else first.shape[0]
    case = bench.case
    _works(subject, Case(max(20, images + 1), case.image_shape, case.teacher))


def works_at_8x8_grey(subject: Subject) -> None:
    """It works with 8x8 grey images, or says by `unsupported` why not."""
    _works(subject, SMALL)


def works_at_32x32_colour(subject: Subject) -> None:
    """It works with 32x32 colour images and a wide ResNet, or says by `unsupported` why not."""
    _works(subject, LARGE)


def _works(subject: Subject, case: Case) -> None:
    bench = subject.bench(case)
    if bench.unsupported() is not None:
        return
    try:
        played = bench.play()
    except Exception as error:
        raise Broken(
            f"{case.num_classes} classes, images {list(case.image_shape)}: {named(error, subject.source.path)}"
        ) from error
    for name, value in played.trace:
        if not torch.isfinite(value).all():
            raise Broken(f"{case.num_classes} classes, images {list(case.image_shape)}: {name} not finite")


CHECKS = (
    same_seed_same_bits,
    state_can_be_saved,
    resumed_run_is_the_same,
    works_with_many_classes,
    works_at_8x8_grey,
    works_at_32x32_colour,
)
