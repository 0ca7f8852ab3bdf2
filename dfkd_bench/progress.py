"""Progress on the terminal: bars with an ETA where there is one, plain lines where the output is a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

if TYPE_CHECKING:
    from dfkd_bench.engines.local import Event
    from dfkd_bench.plan import Plan, Step
    from dfkd_bench.teachers import TrainingProgress


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),  # names and reasons are the user's: brackets are no markup
        BarColumn(bar_width=28),
        TextColumn("{task.fields[note]}", justify="right"),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
        transient=True,
    )


@contextmanager
def show(plan: Plan, console: Console, quiet: bool = False) -> Iterator[Callable[[Step], None]]:
    """What ``carry_out`` reports to."""
    if quiet:
        yield lambda step: None
    elif console.is_terminal:
        with _bars(console) as bars:
            yield _Bars(bars)
    else:
        yield _Lines(console)


class _Bars:
    """One bar for all runs together, one for each thing that is going on."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._all: dict[str, TaskID] = {}
        self._running: dict[tuple[str, int], TaskID] = {}
        self._finished: dict[tuple[str, int], float] = {}  # part of each task, 0 to 1
        self._work: dict[tuple[str, int], float] = {}  # the same as a part of the stage's work

    def __call__(self, step: Step) -> None:
        if step.event is None:
            self._bars.console.print(Text(_doing(step)))
            return
        if step.stage not in self._all:
            name = "all runs" if step.stage == "runs" else "teachers"
            self._all[step.stage] = self._bars.add_task(name, total=1.0, note=f"0/{step.count}")
        key = (step.stage, step.index)
        event = step.event
        if event.state == "started" and key in self._running:  # a process that was killed is started once more
            self._bars.update(self._running[key], note="starting again")
        elif event.state == "started":
            self._running[key] = self._bars.add_task(step.label, total=None, note="starting")
        elif event.state == "running" and event.epochs:
            accuracy = f"  {event.accuracy:5.1f} %" if event.accuracy is not None else ""
            self._bars.update(
                self._running[key],
                total=event.epochs,
                completed=event.epoch,
                note=f"epoch {event.epoch}/{event.epochs}{accuracy}",
            )
            self._finished[key] = event.epoch / event.epochs
        else:
            self._finished[key] = 1.0
            if key in self._running:
                self._bars.remove_task(self._running.pop(key))
            if event.reason:
                self._bars.console.print(Text.assemble((f"{step.label} failed:", "red"), f" {event.reason}"))
        self._work[key] = self._finished.get(key, 0.0) * step.share
        done = sum(work for (stage, _), work in self._work.items() if stage == step.stage)
        finished = sum(part == 1.0 for (stage, _), part in self._finished.items() if stage == step.stage)
        self._bars.update(self._all[step.stage], completed=done, note=f"{finished}/{step.count}")


_SELDOM, _AT_LEAST = 60.0, 600.0
"""Seconds between two lines of a task that goes on: no sooner, and no later if an epoch ends."""


class _Lines:
    """One line a finished task, with what is left; of a long one also where it is, about ten in all."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began: dict[str, float] = {}
        self._done: dict[str, int] = {}
        self._work: dict[str, float] = {}  # part of the stage's work that is done
        self._accuracy: dict[tuple[str, int], float] = {}
        self._told: dict[tuple[str, int], tuple[float, int]] = {}  # when a task's last line was, and its tenth then

    def __call__(self, step: Step) -> None:
        event = step.event
        if event is None:
            self._console.print(Text(_doing(step)))
            return
        began = self._began.setdefault(step.stage, time.monotonic())
        if event.accuracy is not None:
            self._accuracy[(step.stage, step.index)] = event.accuracy
        if event.state not in ("done", "failed", "busy"):
            self._going_on(step, event)
            return
        done = self._done[step.stage] = self._done.get(step.stage, 0) + 1
        work = self._work[step.stage] = self._work.get(step.stage, 0.0) + step.share
        elapsed = time.monotonic() - began
        left = elapsed / work * max(0.0, 1 - work)
        accuracy = self._accuracy.get((step.stage, step.index))
        result = event.reason or (f"{accuracy:.2f} %" if accuracy is not None else event.state)
        spent = f"({elapsed:.0f} s, about {left:.0f} s left)"
        self._console.print(Text(f"{done}/{step.count}  {step.label}: {result}  {spent}"))

    def _going_on(self, step: Step, event: Event) -> None:
        key, now = (step.stage, step.index), time.monotonic()
        tenth = 10 * event.epoch // event.epochs if event.epochs else 0
        last, before = self._told.setdefault(key, (now, 0))
        if event.state != "running" or now - last < _SELDOM or (tenth == before and now - last < _AT_LEAST):
            return
        self._told[key] = (now, tenth)
        accuracy = f", {event.accuracy:.1f} %" if event.accuracy is not None else ""
        self._console.print(Text(f"  {step.label}: epoch {event.epoch}/{event.epochs}{accuracy}"))


def _doing(step: Step) -> str:
    return {"data": f"data set {step.label}", "embeddings": f"label-text embeddings: {step.label}"}[step.stage]


@contextmanager
def show_repeats(console: Console, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """What a measurement reports to: repeats done, and of how many. What is left is told by the repeats alone."""
    start = time.monotonic()
    first: list[float] = []  # the end of the first repeat: before it the forms were built and warmed up

    def line(done: int, count: int) -> None:
        now = time.monotonic()
        first[:] = first or [now]
        if done == count or done % max(1, count // 5) == 0:
            left = (now - first[0]) / max(1, done - 1) * (count - done)
            about = f", about {left:.0f} s left" if done > 1 else ""
            console.print(f"repeat {done}/{count} ({now - start:.0f} s{about})")

    if quiet:
        yield lambda done, count: None
    elif not console.is_terminal:
        yield line
    else:
        with _bars(console) as bars:
            task = bars.add_task("repeats", total=None, note="starting")
            yield lambda done, count: bars.update(task, total=count, completed=done, note=f"{done}/{count}")


@contextmanager
def show_teacher(console: Console, quiet: bool = False) -> Iterator[Callable[[TrainingProgress], None]]:
    """What a teacher's training reports to."""
    if quiet:
        yield lambda progress: None
        return
    if not console.is_terminal:
        start = time.monotonic()

        def line(progress: TrainingProgress) -> None:
            if progress.epoch == progress.epochs or progress.epoch % max(1, progress.epochs // 10) == 0:
                elapsed = time.monotonic() - start
                left = elapsed / progress.epoch * (progress.epochs - progress.epoch)
                console.print(
                    f"epoch {progress.epoch}/{progress.epochs}, loss {progress.loss:.4f} "
                    f"({elapsed:.0f} s, about {left:.0f} s left)"
                )

        yield line
        return
    with _bars(console) as bars:
        task = bars.add_task("teacher", total=None, note="starting")
        yield lambda progress: bars.update(
            task,
            total=progress.epochs,
            completed=progress.epoch,
            note=f"epoch {progress.epoch}/{progress.epochs}  loss {progress.loss:.4f}",
        )
