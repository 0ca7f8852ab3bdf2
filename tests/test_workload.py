"""Which runs are started first, and what part of the work each is."""

from __future__ import annotations

import pytest

from dfkd_bench import data, plugins
from dfkd_bench.job import Job
from dfkd_bench.plugins import Plugins
from dfkd_bench.suite import expand, make_suite
from dfkd_bench.workload import expected_work, longest_first

CLASSES = 10


@pytest.fixture(scope="module")
def found() -> Plugins:
    return plugins.discover()


@pytest.fixture(scope="module")
def jobs(found: Plugins) -> list[Job]:
    """In a table's order: fm, nayer, scratch, with two seeds each."""
    suite = make_suite("t", "t", "digits", ["fm", "nayer"], controls=("scratch",), seeds=(0, 1))
    return expand(suite, found, data.dataset("digits"), "cpu", "fp32")


def test_seed_by_seed_the_longest_run_is_started_first(jobs: list[Job], found: Plugins) -> None:
    ordered, _ = longest_first(jobs, found, CLASSES)
    assert [(job.seed, job.method) for job in ordered] == [
        (seed, method) for seed in (0, 1) for method in ("nayer", "fm", "scratch")
    ]


def test_shares_are_those_of_the_work_and_add_up_to_one(jobs: list[Job], found: Plugins) -> None:
    ordered, shares = longest_first(jobs, found, CLASSES)
    assert sum(shares) == pytest.approx(1)
    work = [expected_work(job, found, CLASSES) for job in ordered]
    assert [share * sum(work) for share in shares] == pytest.approx(work)


def test_a_run_without_synthesis_is_its_student_batches(jobs: list[Job], found: Plugins) -> None:
    scratch = next(job for job in jobs if job.method == "scratch")
    assert expected_work(scratch, found, CLASSES) == 240 * 128


def test_generated_images_count_twice(jobs: list[Job], found: Plugins) -> None:
    nayer = next(job for job in jobs if job.method == "nayer")
    made = (2 * 4 + 8 * 2) * nayer.config["generator_steps"] * nayer.config["synthesis_batch_size"]
    assert expected_work(nayer, found, CLASSES) == 240 * 128 + 2 * made


def test_no_job_is_no_work(found: Plugins) -> None:
    assert longest_first([], found, CLASSES) == ([], [])
