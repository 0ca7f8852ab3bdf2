"""What a command says while it works."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from dfkd_bench import progress
from dfkd_bench.engines.local import Event
from dfkd_bench.plan import Step


def run_step(index: int, share: float, state: str, epoch: int = 0, reason: str = "") -> Step:
    event = Event(index, state, epoch, 10, reason=reason)  # type: ignore[arg-type]
    return Step("runs", f"run {index}", index, 2, share, event)


def test_the_time_left_is_that_of_the_work_left_not_of_the_runs_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The long run took 80 s; the short one, a fifth of all work, takes 20 more and not 80."""
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    lines = io.StringIO()
    say = progress._Lines(Console(file=lines))
    say(run_step(0, 0.8, "started"))
    now = 80.0
    say(run_step(0, 0.8, "done"))
    assert "1/2  run 0: done  (80 s, about 20 s left)" in lines.getvalue()


def test_a_long_run_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file, where there is no bar: at each tenth of the epochs, but once a minute at most."""
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    lines = io.StringIO()
    say = progress._Lines(Console(file=lines))
    say(run_step(0, 0.8, "started"))
    for epoch, seconds in ((1, 30), (2, 70), (3, 90), (4, 700)):
        now = float(seconds)
        say(run_step(0, 0.8, "running", epoch))
    assert lines.getvalue().splitlines() == ["  run 0: epoch 2/10", "  run 0: epoch 4/10"]


def test_an_epoch_of_many_is_told_after_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    lines = io.StringIO()
    say = progress._Lines(Console(file=lines))
    for epoch, seconds in ((0, 0), (1, 300), (2, 700)):
        now = float(seconds)
        event = Event(0, "running", epoch, 1000)
        say(Step("runs", "run 0", 0, 1, 1.0, event))
    assert lines.getvalue().splitlines() == ["  run 0: epoch 2/1000"]


def test_the_bar_of_all_runs_grows_by_work() -> None:
    bars = progress._bars(Console(file=io.StringIO(), force_terminal=True))
    say = progress._Bars(bars)
    for step in (run_step(0, 0.8, "started"), run_step(0, 0.8, "running", 5), run_step(1, 0.2, "started")):
        say(step)
    assert bars.tasks[0].percentage == pytest.approx(40)
    say(run_step(1, 0.2, "done"))
    assert bars.tasks[0].percentage == pytest.approx(60)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reason_is_printed_as_it_is(terminal: bool) -> None:
    """A bracket that closes nothing is an error as markup, and other brackets vanish."""
    lines = io.StringIO()
    console = Console(file=lines, force_terminal=terminal, width=200)
    say = progress._Bars(progress._bars(console)) if terminal else progress._Lines(console)
    say(run_step(0, 0.5, "failed", reason="ValueError: no images in [/data/x], [sbert, clip] :dog:"))
    assert "ValueError: no images in [/data/x], [sbert, clip] :dog:" in lines.getvalue()


def test_what_is_left_of_a_measurement_is_told_by_its_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building the forms took 90 s before the first repeat ended, each further one takes 5 s."""
    now = iter([0.0, 90.0, 95.0, 100.0, 105.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    file = io.StringIO()
    with progress.show_repeats(Console(file=file)) as report:
        for done in range(1, 5):
            report(done, 4)
    assert file.getvalue().splitlines()[1:] == [
        "repeat 2/4 (95 s, about 10 s left)",
        "repeat 3/4 (100 s, about 5 s left)",
        "repeat 4/4 (105 s, about 0 s left)",
    ]
