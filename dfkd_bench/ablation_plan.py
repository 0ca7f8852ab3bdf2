"""What an ablation still needs: one plan of all its rows, so that every worker is busy, and their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dfkd_bench import data, needs, text
from dfkd_bench.ablation import Ablation, Row, RowRecords, axis_value, row_suite
from dfkd_bench.data import DataSet
from dfkd_bench.errors import UserError, unknown
from dfkd_bench.job import Job
from dfkd_bench.plan import Plan, Planned, make_plan
from dfkd_bench.plugins import Plugins
from dfkd_bench.record import Record
from dfkd_bench.report.ablation_table import require_published


@dataclass(frozen=True)
class PlannedRow:
    """A row with its jobs in the order of the seeds.

    ``missing``: why what is left of them can't run; "": it can. It is the same on every machine, since tables show it.
    ``trouble``: what went wrong when it was tried to change that, which is about this machine.
    """

    row: Row
    planned: tuple[Planned, ...]
    missing: str = ""
    trouble: str = ""


@dataclass(frozen=True)
class AblationPlan:
    """``plan``: the jobs of all rows that can run, or have run, each once, seed by seed."""

    ablation: Ablation
    plan: Plan
    rows: tuple[PlannedRow, ...]

    def results(self, records: Sequence[Record]) -> tuple[RowRecords, ...]:
        """``records`` by row; a job that two rows share is in both."""
        by_id = {record.job_id: record for record in records}
        return tuple(
            RowRecords(
                row=item.row,
                records=tuple(by_id[one.job.id] for one in item.planned if one.job.id in by_id),
                missing=item.missing,
            )
            for item in self.rows
        )


def plan_ablation(
    ablation: Ablation,
    found: Plugins,
    output: Path,
    data_root: Path | None = None,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    rerun: Sequence[str] = (),
    encode: bool = False,
) -> AblationPlan:
    """Look at what is there. A row without its label-text embeddings is left out, with the reason.

    Args:
        ablation: rows and claims.
        found: methods, data sets and models.
        output: where records are.
        data_root: where raw data sets are; None: the default.
        device: as for ``suite.expand``.
        precision: likewise.
        rerun: states of jobs that are to be done again, as for ``Plan.to_run``.
        encode: try to make embeddings that are not at hand; else nothing is started.

    Raises:
        UserError: a wrong name or setting in a row, which it names, an axis that no row has a number for, or a
            published value that is not in the CSV.
    """
    require_published(ablation)
    dataset = data.dataset(ablation.dataset, data_root, found.datasets)
    plans = []
    for row in ablation.rows:
        try:
            suite = row_suite(ablation, row, found, dataset, device, precision)
            plans.append(make_plan(suite, found, output, data_root, device, precision))
        except UserError as error:
            raise UserError(f"ablation {ablation.name}, row '{row.label}': {error}") from None
    _axis_is_a_number(ablation, [plan.planned[0].job for plan in plans])
    rows = tuple(
        PlannedRow(row, plan.planned, *_why_not(plan, found, dataset, rerun, encode))
        for row, plan in zip(ablation.rows, plans, strict=True)
    )
    return AblationPlan(ablation, _merged(plans, rows, rerun), rows)


def _axis_is_a_number(ablation: Ablation, jobs: Sequence[Job]) -> None:
    """Told before the work: the figure is drawn after all runs."""
    axis = ablation.axis
    if axis is None or any(axis_value(job, axis) is not None for job in jobs):
        return
    known = {
        name for job in jobs for name in (*job.config, *job.schedule.model_dump()) if axis_value(job, name) is not None
    }
    raise unknown(f"axis of ablation {ablation.name}", axis, known, "It is a setting that is a number")


def _merged(plans: Sequence[Plan], rows: Sequence[PlannedRow], rerun: Sequence[str]) -> Plan:
    """One plan: each job once, without those that can't run, and the teachers that the others need."""
    both = list(zip(plans, rows, strict=True))
    impossible = {job.id for plan, item in both if item.missing for job in plan.to_run(rerun)}
    jobs = {one.job.id: one for item in rows for one in item.planned if one.job.id not in impossible}
    teachers = {
        spec.model_dump_json(): spec for plan, item in both if not item.missing for spec in plan.missing_teachers
    }
    planned = sorted(jobs.values(), key=lambda one: one.job.seed)  # the first seed of all rows comes first
    return Plan(plans[0].suite, tuple(planned), tuple(teachers.values()))


def _why_not(plan: Plan, found: Plugins, dataset: DataSet, rerun: Sequence[str], encode: bool) -> tuple[str, str]:
    """Why the jobs that are left can't run, that is which label-text embeddings are not at hand, and what went wrong
    when they were to be made."""
    texts = needs.label_texts(plan.to_run(rerun), found)
    if not texts:
        return "", ""
    wanted = (dataset.name, dataset.class_names, texts[0].encoder, texts[0].prompt, found.encoders)  # one for all seeds
    trouble = ""
    if encode:
        try:
            text.ensure(*wanted)
        except UserError as error:
            trouble = str(error)
    try:
        text.load(*wanted)
    except UserError as error:
        return str(error), trouble
    return "", ""
