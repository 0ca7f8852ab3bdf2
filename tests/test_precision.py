"""bf16 against fp32: which runs are made, what is compared, and when it counts as level. Nothing is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dfkd_bench.benchmarks import precision
from dfkd_bench.job import Job
from dfkd_bench.plan import Plan
from dfkd_bench.record import Counters, MethodFacts, Record, Score
from dfkd_bench.report.statistics import Interval


def made(job: Job, accuracy: float) -> Record:
    return Record(
        job_id=job.id,
        job=job,
        status="done",
        outcome="ok",
        method=MethodFacts(origin="built-in", distribution="", version="", source_sha256=""),
        knowledge="none",
        last=Score(accuracy=accuracy, epoch=1),
        counters=Counters(),
    )


class Runs:
    """Stands for the runner: bf16 costs 0.2 points with even seeds and 0.4 with odd ones."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __call__(self, plan: Plan, *_others: Any) -> list[Record]:
        jobs = [item.job for item in plan.planned]
        self.jobs += jobs
        return [made(job, 90 + job.seed - (job.precision == "bf16") * (0.4 if job.seed % 2 else 0.2)) for job in jobs]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, home: Path) -> Runs:
    runs = Runs()
    monkeypatch.setattr(precision, "carry_out", runs)
    return runs


def call(monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["precision", "--dataset", "digits", "--output", str(output), *options])
    precision.main()
    kept: dict[str, Any] = json.loads((output / "precision" / "digits.json").read_text())
    return kept


def test_every_seed_runs_in_both_precisions_with_one_teacher(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call(monkeypatch, tmp_path, "--methods", "nayer,fm", "--seeds", "0-2")
    assert sorted((job.method, job.seed, job.precision) for job in runs.jobs) == sorted(
        (method, seed, kind) for method in ("nayer", "fm") for seed in (0, 1, 2) for kind in ("fp32", "bf16")
    )
    assert len({job.teacher.model_dump_json() for job in runs.jobs}) == 1


def test_the_difference_is_paired_over_seeds(runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Seeds differ by points, precisions by tenths: only the latter count."""
    kept = call(monkeypatch, tmp_path, "--methods", "fm", "--seeds", "0-19")["fm"]
    assert kept["difference"]["mean"] == pytest.approx(-0.3)
    assert kept["difference"]["half_width"] == pytest.approx(0.048, abs=1e-3)
    assert kept["outcome"] == "level"
    assert kept["accuracy"]["bf16"]["1"] == pytest.approx(90.6)


def test_methods_of_earlier_calls_are_kept(runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    call(monkeypatch, tmp_path, "--methods", "nayer", "--seeds", "0-1")
    assert set(call(monkeypatch, tmp_path, "--methods", "fm", "--seeds", "0-1")) == {"nayer", "fm"}


@pytest.mark.parametrize(
    ("mean", "half", "expected"),
    [
        (0.1, 0.8, "level"),
        (0.3, 0.8, "undecided"),
        (-2.0, 0.5, "not level"),
        (0.0, None, "undecided"),  # one seed
    ],
)
def test_the_rule(mean: float, half: float | None, expected: str) -> None:
    assert precision.outcome(Interval(mean, half, 20), 1.0) == expected


def test_a_line_tells_difference_interval_and_outcome(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, tmp_path, "--methods", "fm", "--seeds", "0-1", "--margin", "2")
    assert capsys.readouterr().out == "fm             bf16 - fp32:  -0.30 ±  1.27 points, n = 2, margin 2: level\n"


def test_a_margin_of_nothing_is_refused(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, tmp_path, "--methods", "fm", "--margin", "0")
    assert ended.value.code == 2
    assert "--margin 0: expected a number of points above 0" in capsys.readouterr().err
    assert runs.jobs == []


def test_one_failed_run_is_an_error_with_its_reason_and_no_gap(
    monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(plan: Plan, *_others: Any) -> list[Record]:
        failed = {"status": "failed", "outcome": None, "last": None, "reason": "out of memory"}
        runs = [made(item.job, 90.0) for item in plan.planned]
        return [run.model_copy(update=failed) if run.job.seed == 1 else run for run in runs]

    monkeypatch.setattr(precision, "carry_out", failing)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, tmp_path, "--methods", "fm", "--seeds", "0-2")
    assert ended.value.code == 2
    assert "fm seed 1 in fp32: out of memory" in capsys.readouterr().err


def test_runs_that_are_under_way_elsewhere_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def elsewhere(plan: Plan, *_others: Any) -> list[Record]:
        jobs = [item.job for item in plan.planned]
        return [made(job, 90.0) for job in jobs if job.precision == "fp32" or job.seed == 0]

    monkeypatch.setattr(precision, "carry_out", elsewhere)
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, "--methods", "fm", "--seeds", "0-1")
    assert "under way elsewhere" in capsys.readouterr().err
