"""The table of diversity: how varied each method's images are, in pixels and in the teacher's features."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from dfkd_bench.diversity import NEAR, NEIGHBOURS
from dfkd_bench.errors import UserError
from dfkd_bench.record import Record
from dfkd_bench.report.groups import Group, group
from dfkd_bench.report.layout import Column, Row, Table
from dfkd_bench.report.statistics import interval

MEASURES = (
    "within",
    "between",
    "within_raw",
    "between_raw",
    "density",
    "coverage",
    "class_balance",
    "unanswered",
    "duplicates",
    "near_duplicates",
    "images",
    "real_images",
)
"""Keys of ``Record.diversity``, in the order of the CSV's columns."""


def build(records: Sequence[Record], title: str, method_order: Sequence[str] = ()) -> Table:
    """Lay the measures of ``records`` out, a row a method as in the table of accuracies, controls first.

    Raises:
        UserError: no record has measures, or records that can't be compared.
    """
    groups = group(records, method_order)
    found = {one.label: values(one) for one in groups}
    if not any(measured["images"] for measured in found.values()):
        raise UserError(
            "no record here has measures of diversity: the runs are older than these; "
            "run them again with --output to a new folder"
        )
    rows = tuple(Row(one.label, "control" if one.is_control else "method", None, None) for one in groups)
    return Table(title, _columns(found), rows, tuple(_notes(groups, found)), (), {})


def to_csv(records: Sequence[Record], method_order: Sequence[str] = ()) -> str:
    """For machines: a line a row, means over seeds; empty where there is no number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["protocol", "dataset", "teacher", "student", "method", "n", *MEASURES])
    for one in group(records, method_order):
        job, found = one.records[0].job, values(one)
        means = [fmean(found[name]) if found[name] else None for name in MEASURES]
        facts = [job.protocol, job.dataset, job.teacher.model, job.student, one.label]
        writer.writerow([*facts, len(found["images"]), *means])
    return out.getvalue()


def values(one: Group) -> dict[str, list[float]]:
    """Measure -> its values, one a seed that has it."""
    return {name: [value for run in one.scored if (value := run.diversity.get(name)) is not None] for name in MEASURES}


def _columns(found: Mapping[str, Mapping[str, Sequence[float]]]) -> tuple[Column, ...]:
    def column(name: str, heading: str, over: str = "", digits: int = 2, scale: float = 1) -> Column:
        def lines(row: Row) -> tuple[str]:
            seeds = [scale * value for value in found[row.label][name]]
            if not seeds:
                return ("-",)
            mean = interval(seeds)
            spread = "" if mean.half_width is None or not over else f" ± {mean.half_width:.{digits}f}"
            fewer = f" (n = {mean.n})" if mean.n < len(found[row.label]["images"]) else ""
            return (f"{mean.mean:,.{digits}f}{spread}{fewer}",)

        return Column(name, heading, lines, over)

    distance, features = "distance / real", "teacher's features"
    return (
        Column("method", "method", lambda row: (row.label,), decimal=False),
        column("within", "within", distance),
        column("between", "between", distance),
        column("density", "density", features),
        column("coverage", "coverage", features),
        column("class_balance", "balance"),
        column("unanswered", "unnamed", digits=0),
        column("duplicates", "equal %", digits=1, scale=100),
        column("near_duplicates", "near %", digits=1, scale=100),
        column("images", "images", digits=0),
        Column("n", "n", lambda row: (str(len(found[row.label]["images"])),)),
    )


def _notes(groups: Sequence[Group], found: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[str]:
    job = groups[0].records[0].job
    real = max(value for measured in found.values() for value in measured["real_images"])
    yield f"protocol {job.protocol}; data set {job.dataset}; teacher:student {job.pair}"
    yield "images: as the student gets them at the end of the run, without the data set's augmentation"
    yield (
        "distance within and between the classes that the teacher names: mean over pairs, in its penultimate features, "
        f"over that of {real:,.0f} real images of the {job.evaluate_on} split; 1: as diverse as these"
    )
    yield (
        f"density, coverage (Naeem et al., ICML 2020, k = {NEIGHBOURS}): how many neighbourhoods of real images an "
        "image lies in, over k; share of these neighbourhoods that hold an image"
    )
    yield (
        "balance: entropy of the teacher's mean answer, 1 is uniform; unnamed: classes that are never its answer; "
        f"equal, near: images with a double, or one within {NEAR:g} by root mean square of pixels in [0, 1]"
    )
    yield "means over n seeds, or as many as have a number, ± half-width of the Student-t 95 % interval"
