"""How long runs take beside each other, told before they start: for the order of runs and the time left."""

from __future__ import annotations

from collections.abc import Sequence

from dfkd_bench.job import Job
from dfkd_bench.plugins import Plugins

GRADIENT = 2
"""An image that synthesis passes through the teacher with gradient costs about as much as two rows of a student batch.
By the records all data-free methods then do 2,000 to 4,000 rows a second on digits and 2,000 to 12,000 on glyphs16:
rough, but enough for an order."""


def expected_work(job: Job, found: Plugins, num_classes: int) -> float:
    """The work of a run, in rows of student batches."""
    method = found.method(job.method)
    generated = method.generation_cost(method.Config(**job.config), job.schedule, num_classes)
    return GRADIENT * generated + job.schedule.total_student_steps * job.schedule.batch_size


def longest_first(jobs: Sequence[Job], found: Plugins, num_classes: int) -> tuple[list[Job], list[float]]:
    """``jobs`` seed by seed, the longest first, and the share of each in the work of all (sums to 1).

    Seed by seed: a command that is stopped leaves whole comparisons. The longest first: the last runs are short ones,
    so that none of several devices is idle for long at the end.
    """
    work = {job.id: expected_work(job, found, num_classes) for job in jobs}
    ordered = sorted(jobs, key=lambda job: (job.seed, -work[job.id]))
    total = sum(work.values())
    return ordered, [work[job.id] / total for job in ordered]
