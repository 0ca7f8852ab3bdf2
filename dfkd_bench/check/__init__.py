"""Conformance: small named checks that every method has to pass, built in or not.

Each check is a function ``check(subject)`` whose docstring says in one line what holds; it raises ``Broken`` with one
line that says what doesn't. The checks about behaviour play the runner's loop with a random teacher, a random student
and the method's ``tiny`` settings, so that all of them together take seconds on one core.

A method that breaks a check for a good reason, such as a released behaviour that made published numbers, declares it
in ``quirks``: check name -> reason. That is strict: a declared break that doesn't happen fails, too.

The checks are in files by concern, each with a tuple ``CHECKS`` at its end; ``bench`` plays the loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dfkd_bench.check import declarations, images, real_run, runners_own, settings, student_steps, whole_runs
from dfkd_bench.check.bench import CPU, LARGE, SMALL, Bench, Case, Subject
from dfkd_bench.check.broken import Broken, named, one_line
from dfkd_bench.check.real_run import FAKE
from dfkd_bench.checkpoint import random_state, restore_random_state
from dfkd_bench.method import Method
from dfkd_bench.paths import HOME_VARIABLE

if TYPE_CHECKING:
    from dfkd_bench.plugins import Source

__all__ = [
    "CHECKS",
    "FAKE",
    "LARGE",
    "SMALL",
    "Bench",
    "Broken",
    "Case",
    "Outcome",
    "Subject",
    "check_names",
    "run_checks",
]


@dataclass(frozen=True)
class Outcome:
    """What one check came to. ``detail``: one line, what holds or what broke. ``declared``: it is one of ``quirks``."""

    name: str
    passed: bool
    detail: str
    declared: bool


def check_names() -> tuple[str, ...]:
    """All checks, in the order in which they are run."""
    return tuple(check.__name__ for check in CHECKS)


def run_checks(source: Source, method_class: type[Method]) -> Iterator[Outcome]:
    """Run every check on one method. Nothing a method raises gets out: it becomes a failed outcome."""
    subject = Subject(source, method_class)
    for check in CHECKS:
        yield _outcome(check, subject)


def _outcome(check: Callable[[Subject], None], subject: Subject) -> Outcome:
    name, holds = check.__name__, (check.__doc__ or "").strip()
    reason = subject.method_class.quirks.get(name)
    declared = reason is not None
    try:
        with _undisturbed():
            check(subject)
    except Broken as broken:
        detail = one_line(str(broken))
        return Outcome(
            name, declared, f"declared: {one_line(str(reason))} ({detail})" if declared else detail, declared
        )
    except (Exception, SystemExit) as error:  # a method may raise anything, and call sys.exit
        return Outcome(name, False, named(error, subject.source.path), declared)
    if declared:
        return Outcome(name, False, f"declared quirk did not happen: {holds}", True)
    return Outcome(name, True, holds, False)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Random streams, threads and the home folder are afterwards what they were before."""
    state, threads, place = random_state(CPU), torch.get_num_threads(), os.environ.get(HOME_VARIABLE)
    try:
        yield
    finally:
        restore_random_state(state, CPU)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if place is None:
            os.environ.pop(HOME_VARIABLE, None)
        else:
            os.environ[HOME_VARIABLE] = place


def quirks_known(subject: Subject) -> None:
    """Every quirk names a check and gives a reason."""
    for name, reason in subject.method_class.quirks.items():
        if name not in check_names():
            raise Broken(f"`quirks` names '{name}', which is no check")
        if not reason.strip():
            raise Broken(f"quirk '{name}' gives no reason")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    *settings.CHECKS,
    *declarations.CHECKS,
    quirks_known,
    *images.CHECKS,
    *runners_own.CHECKS,
    *student_steps.CHECKS,
    *whole_runs.CHECKS,
    *real_run.CHECKS,
)
