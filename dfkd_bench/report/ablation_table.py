"""The table of an ablation: its rows with published values, then a verdict for each claim. Values in, strings out."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import fmean

from dfkd_bench.ablation import OF_ONE_RUN, Ablation, Claim, Measure, Reference, RowRecords
from dfkd_bench.errors import UserError, unknown
from dfkd_bench.record import Record
from dfkd_bench.report import table as tables
from dfkd_bench.report.groups import require_comparable
from dfkd_bench.report.layout import (
    CONCURRENT,
    TIMES_NOTE,
    UNCONFIRMED,
    Cited,
    Column,
    Row,
    Table,
    shortened,
    slowed_note,
)
from dfkd_bench.report.published import rows as published_rows
from dfkd_bench.report.verdicts import RULE, Comparison, Effect, Finding, judge, level_in, machines, measured, scored

UNITS: Mapping[Measure, str] = {
    "accuracy": "%",
    "accuracy_at_equal_seconds": "%",
    "diversity": "of real images",
    "coverage": "of real images",
    "near_duplicates": "% of images",
    "epochs": "epochs",
    "seconds": "s",
    "noisy_layer_bytes": "MB",
}
_NAMES: Mapping[Measure, str] = {
    "accuracy": "last-epoch accuracy",
    "accuracy_at_equal_seconds": "accuracy when the shorter of the two runs ends",
    "diversity": "diversity within classes",
    "coverage": "coverage of the real images",
    "near_duplicates": "share of images that have a near-duplicate",
    "epochs": "student epochs",
    "seconds": "seconds",
    "noisy_layer_bytes": "memory of the noisy layers",
}
_COLUMNS = ("n", "synthesis", "total", "images", "memory")
_REASON_LENGTH = 200
ACCURACY = "top1_acc"
"""As ``benchmarks/published.csv`` calls it."""
SCALES: Mapping[Measure, float] = {"near_duplicates": 100.0, "noisy_layer_bytes": 1e-6}
"""From the records' units to ``UNITS``; 1 for all others."""


@dataclass(frozen=True)
class AblationTable:
    """Rows as a table, and what is printed below it. ``citations``: for each finding its published values."""

    table: Table
    findings: tuple[Finding, ...]
    citations: tuple[tuple[str, ...], ...]


def build(ablation: Ablation, results: Sequence[RowRecords]) -> AblationTable:
    """Lay an ablation out: the teacher, its rows in their order (those that were not run with the reason), verdicts.

    Raises:
        UserError: no record at hand, records that can't be compared, or a published value that is not in the CSV.
    """
    records = list({record.job_id: record for item in results for record in item.records}.values())
    if not records:
        raise UserError(f"there are no records of this ablation: `dfkd-bench ablate {ablation.name}` makes them")
    require_comparable(records)
    references = _References()
    parts = [tables.build(item.records, "") if item.records else None for item in results]
    first = next(part for part in parts if part is not None)
    rows = [row for row in first.rows if row.section == "teacher"][:1]
    rows = [replace(row, published=()) for row in rows]
    rows += [_row(item, part, references, len(ablation.seeds)) for item, part in zip(results, parts, strict=True)]
    extra = tuple(_measure_columns(ablation, results))
    citations = tuple(tuple(references.in_words(claim.published)) for claim in ablation.claims)
    columns = {column.key: column for column in first.columns}
    cited = [Column("published", "published", _published)] if any(row.published for row in rows) else []
    label = replace(columns["method"], name="row")
    table = Table(
        title=ablation.title,
        columns=(label, columns["last"], *extra, *cited, *(columns[key] for key in _COLUMNS)),
        rows=tuple(rows),
        notes=tuple(_notes(ablation, results, records, rows)),
        references=references.texts(),
        facts=first.facts,
    )
    return AblationTable(table, tuple(judge(claim, results) for claim in ablation.claims), citations)


def to_text(built: AblationTable, width: int | None = None) -> str:
    """The table, then the claims with their numbers and verdicts, then the rule in one line.

    Args:
        built: what to print.
        width: characters a line, at least 60; None: ``table.WIDTH``.
    """
    limit = width or tables.WIDTH
    lines = ["", "claims"]
    for number, (finding, cited) in enumerate(zip(built.findings, built.citations, strict=True), 1):
        lines += ["", *_wrapped(f"{number}. {finding.claim.text}", limit, "   ")]
        for text in _claim_lines(finding, cited):
            lines += _wrapped(text, limit, "     ", "   ")
        lines += [f"   VERDICT: {finding.outcome}{_at_this_n(finding)}"]
    lines += ["", *_wrapped(RULE, limit, "  ")]
    return tables.to_text(built.table, width) + "\n".join(lines) + "\n"


def to_markdown(built: AblationTable) -> str:
    """A GitHub table, then the claims as a numbered list."""
    lines = ["", "**Claims**", ""]
    for number, (finding, cited) in enumerate(zip(built.findings, built.citations, strict=True), 1):
        verdict = f"**{finding.outcome}{_at_this_n(finding)}**"
        lines.append(f"{number}. {_markdown(finding.claim.text)} {verdict}")
        lines += [f"   - {_markdown(text)}" for text in _claim_lines(finding, cited)]
    return tables.to_markdown(built.table) + "\n".join([*lines, "", _markdown(RULE)]) + "\n"


def to_latex(built: AblationTable) -> str:
    """A ``table`` environment that needs the package booktabs only, then the claims as a list and the rule."""
    lines = ["", r"\paragraph{Claims}", r"\begin{itemize}"]
    for finding, cited in zip(built.findings, built.citations, strict=True):
        verdict = rf"\textbf{{{tables.latex(finding.outcome + _at_this_n(finding))}}}"
        lines += [rf"\item{{}} {tables.latex(finding.claim.text)} {verdict}", r"  \begin{itemize}"]
        # The braces: a text that begins with a bracket would be an option of \item.
        lines += [rf"  \item{{}} {tables.latex(text)}" for text in _claim_lines(finding, cited)]
        lines += [r"  \end{itemize}"]
    return tables.to_latex(built.table) + "\n".join([*lines, r"\end{itemize}", tables.latex(RULE)]) + "\n"


def to_csv(built: AblationTable) -> str:
    """The rows for machines, an empty line, and the comparisons (``verdicts_csv``)."""
    return tables.to_csv(built.table) + "\n" + verdicts_csv(built)


def verdicts_csv(built: AblationTable) -> str:
    """A line a comparison, full precision, in the units of the records; empty where there is no number."""
    lines = [
        {
            **built.table.facts,
            "claim": finding.claim.text,
            "source": finding.claim.source,
            "published": "; ".join(cited),
            "test": describe_test(finding.claim),
            "a": one.a,
            "b": one.b,
            "mean_a": one.mean_a,
            "mean_b": one.mean_b,
            "advantage": one.effect and one.effect.mean,
            "low": one.effect and one.effect.low,
            "high": one.effect and one.effect.high,
            "n": one.effect.n if one.effect else 0,
            "comparison": one.outcome,
            "verdict": finding.outcome,
            "remarks": "; ".join(one.remarks),
        }
        for finding, cited in zip(built.findings, built.citations, strict=True)
        for one in finding.comparisons
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


FORMATS: Mapping[str, Callable[[AblationTable], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "csv": to_csv,
    "latex": to_latex,
}
"""The names that the command line offers: those of ``table.FORMATS``."""


def describe_test(claim: Claim) -> str:
    """What is tested, in words: ``a better than b by more than 0 points of last-epoch accuracy``."""
    what = _NAMES[claim.measure]
    if claim.level == "weaker":
        what += " to the lower of both last accuracies"
    elif claim.level is not None:
        what += f" to {claim.level:g} % of the teacher's accuracy"
    if claim.time_within is not None:
        what += f", where total seconds differ by a factor of {claim.time_within:g} at most"
    if claim.factor is not None:
        return f"a better than b by a factor of more than {claim.factor:g} in {what}"
    unit = {"accuracy": "points ", "accuracy_at_equal_seconds": "points "}.get(claim.measure, "")
    unit = "point " if unit and abs(claim.margin) == 1 else unit
    unit = {"near_duplicates": "% of images ", "noisy_layer_bytes": "MB "}.get(claim.measure, unit)
    amount = f"{abs(claim.margin) * SCALES.get(claim.measure, 1.0):g} {unit}".strip()
    if claim.kind == "equal":
        return f"a and b equal within {amount} in {what}"
    if claim.margin < 0:
        return f"a not worse than b by {amount} or more in {what}"
    return f"a better than b by more than {amount} in {what}"


# Rows


def _row(item: RowRecords, part: Table | None, references: _References, seeds: int) -> Row:
    published = references.cite(item.row.published)
    if part is None:
        remark = f"not run: {shortened(item.missing, _REASON_LENGTH)}" if item.missing else "not run yet"
        return Row(item.row.label, "method", None, None, published, remarks=(remark,))
    row = part.rows[-1]
    remarks = list(row.remarks)
    if len(item.records) < seeds:
        why = f": {shortened(item.missing, _REASON_LENGTH)}" if item.missing else ""
        remarks.append(f"{len(item.records)} of {seeds} seeds were run{why}")
    return replace(row, label=item.row.label, section="method", published=published, remarks=tuple(remarks))


def _published(row: Row) -> tuple[str, ...]:
    return tuple(
        " ".join(filter(None, (f"{one.value:g}", one.unit, f"[{one.reference}]"))) for one in row.published
    ) or ("-",)


def _measure_columns(ablation: Ablation, results: Sequence[RowRecords]) -> Iterable[Column]:
    """A column for each measure that a claim is about and that a run has by itself, and for those asked for."""
    of_claims = [
        (claim.measure, claim.level if isinstance(claim.level, float) else None)
        for claim in ablation.claims
        if claim.measure in (*OF_ONE_RUN, "epochs") and claim.level != "weaker"
    ]
    for measure, level in dict.fromkeys([*of_claims, *((measure, None) for measure in ablation.columns)]):
        if measure == "seconds" and level is None:  # is in the table
            continue
        cells = {item.row.label: mean_of(measure, level, item) for item in results}
        name = {"noisy_layer_bytes": "noisy MB", "near_duplicates": "near doubles %"}.get(measure, measure)
        over = "" if level is None else f"to {level:g} % of teacher"
        yield Column(measure, name, _cell(measure, cells), over)


def mean_of(measure: Measure, level: float | None, item: RowRecords) -> tuple[float, bool] | None:
    """A row's mean in a measure, and whether a run in it never reached the level; None without a value."""
    found = [
        value
        for record in scored(item).values()
        if (value := measured(record, measure, level_in(record, level))) is not None
    ]
    return (fmean(one.value for one in found), any(one.censored for one in found)) if found else None


def _cell(measure: Measure, cells: Mapping[str, tuple[float, bool] | None]) -> Callable[[Row], tuple[str]]:
    def lines(row: Row) -> tuple[str]:
        found = cells.get(row.label)
        if found is None:
            return ("-",)
        return (f"{'>' if found[1] else ''}{number(measure, found[0])}",)

    return lines


def number(measure: Measure, value: float) -> str:
    """A value in the unit of ``UNITS``."""
    shown = value * SCALES.get(measure, 1.0)
    return f"{shown:,.1f}" if measure in ("epochs", "seconds", "near_duplicates") else f"{shown:,.2f}"


def _notes(
    ablation: Ablation, results: Sequence[RowRecords], records: Sequence[Record], rows: Sequence[Row]
) -> Iterable[str]:
    job = records[0].job
    yield (
        f"protocol {job.protocol}, version {job.protocol_version}; data set {job.dataset}; teacher:student {job.pair}; "
        f"evaluated on {job.evaluate_on}; seeds {', '.join(map(str, ablation.seeds))}, paired across rows"
    )
    teacher = next((record.teacher for record in records if record.teacher), None)
    if teacher is not None:
        yield f"teacher: {teacher.percent}, sha256 {teacher.sha256[:12]}, {teacher.origin}"
    known = sorted(set().union(*(machines(record) for record in records if record.hardware)))
    yield f"hardware: {'; '.join(known)}"
    yield "last epoch: mean ± half-width of the Student-t 95 % interval over n seeds, none at n = 1"
    yield TIMES_NOTE
    measures = {*(claim.measure for claim in ablation.claims), *ablation.columns}
    if "noisy_layer_bytes" in measures:
        yield "noisy MB: parameters of the noisy layers; gradients and Adam's state take three times as much again"
    if "diversity" in measures:
        yield "diversity: mean distance of images within classes, in the teacher's features, over that of real images"
    if "coverage" in measures:
        yield (
            "coverage: share of held-out real images that have a made one nearer than their 5th nearest real one, "
            "in the teacher's features"
        )
    if "near_duplicates" in measures:
        yield "near doubles: images with another one within 5 of 255 steps (root mean square over pixels)"
    yield from ablation.notes
    if any(one.published for one in rows) or any(claim.published for claim in ablation.claims):
        yield "published values are of other data sets, pairs or schedules: compare directions, not sizes"
    marks = "".join(row.marks for row in rows)
    if UNCONFIRMED in marks:
        yield f"{UNCONFIRMED} details not confirmed: parts of the method are our reading of it"
    if CONCURRENT in marks:
        yield f"{CONCURRENT} made by several concurrent workers: times are not comparable with exclusive runs"
    if len(known) > 1:
        yield "times come from different hardware and are not comparable"
    yield from slowed_note({one.row.label: one.records for one in results})
    sources: dict[str, set[str]] = {}
    for record in records:
        sources.setdefault(record.job.method, set()).add(record.method.source_sha256)
    changed = [method for method, hashes in sources.items() if len(hashes) > 1]
    if changed:
        yield f"the method's code changed between the runs of {', '.join(changed)}"


# Claims


def _claim_lines(finding: Finding, cited: Sequence[str]) -> Iterable[str]:
    claim = finding.claim
    yield f"source: {claim.source}"
    if cited:
        yield f"published: {'; '.join(cited)}"
    yield f"test: {describe_test(claim)}"
    for one in finding.comparisons:
        yield f"{_comparison(claim, one)}: {one.outcome}"
        yield from (f"({remark})" for remark in one.remarks)


def _comparison(claim: Claim, one: Comparison) -> str:
    """``sbert (98.67) against onehot (98.10 %): advantage +0.57 [+0.12, +1.02], n = 5``."""
    if one.effect is None or one.mean_a is None or one.mean_b is None:
        return f"{one.a} against {one.b}"
    a, b = number(claim.measure, one.mean_a), number(claim.measure, one.mean_b)
    advantage = f"advantage {_effect(claim, one.effect)}, n = {one.effect.n}"
    return f"{one.a} ({a}) against {one.b} ({b} {UNITS[claim.measure]}): {advantage}"


def _effect(claim: Claim, effect: Effect) -> str:
    def shown(value: float) -> str:
        if abs(value) == inf:
            return "inf" if value > 0 else "-inf"
        if claim.factor is not None:
            return f"{value:,.2f}"
        return f"{value * SCALES.get(claim.measure, 1.0):+,.2f}"

    times = " times" if claim.factor is not None else ""
    if effect.low is None or effect.high is None:
        return shown(effect.mean) + times
    return f"{shown(effect.mean)}{times} [{shown(effect.low)}, {shown(effect.high)}]"


def _at_this_n(finding: Finding) -> str:
    return " at this n" if finding.outcome == "undecided" and any(one.effect for one in finding.comparisons) else ""


# Published values


def require_published(ablation: Ablation) -> None:
    """Look all references up: told before the runs, since the table is built after them.

    Raises:
        UserError: one of them is not in the CSV.
    """
    of_rows = [reference for row in ablation.rows for reference in row.published]
    for reference in (*of_rows, *(reference for claim in ablation.claims for reference in claim.published)):
        try:
            _found(reference)
        except UserError as error:
            raise UserError(f"ablation {ablation.name}: {error}") from None


class _References:
    """Numbers sources in the order in which rows and claims cite them."""

    def __init__(self) -> None:
        self._details: dict[str, list[str]] = {}

    def cite(self, references: Iterable[Reference]) -> tuple[Cited, ...]:
        return tuple(
            Cited(
                float(row["value"]), self._number(row), "" if row["metric"] == ACCURACY else row["unit"] or _words(row)
            )
            for one in references
            for row in _found(one)
        )

    def in_words(self, references: Iterable[Reference]) -> Iterable[str]:
        for one in references:
            for row in _found(one):
                yield f"{_value(row)} [{self._number(row)}]"

    def texts(self) -> tuple[str, ...]:
        return tuple(f"{'; '.join(details)}: {source}" for source, details in self._details.items())

    def _number(self, row: Mapping[str, str]) -> int:
        source = f"{row['source']} [{row['confidence']}]"
        details = self._details.setdefault(source, [])
        if _value(row) not in details:
            details.append(_value(row))
        return list(self._details).index(source) + 1


def _found(reference: Reference) -> list[dict[str, str]]:
    rows = [row for row in published_rows() if row["table_id"] == reference.table]
    if not rows:
        raise unknown("published table", reference.table, {row["table_id"] for row in published_rows()})
    found = [
        row
        for row in rows
        if row["method"] == reference.method
        and reference.metric in (None, row["metric"])
        and reference.pair in (None, _pair(row))
    ]
    if not found:
        name = " ".join(filter(None, (reference.method, reference.metric, reference.pair)))
        known = {" ".join(filter(None, (row["method"], row["metric"], reference.pair and _pair(row)))) for row in rows}
        raise unknown(f"value in published table {reference.table}", name, known)
    return found


def _pair(row: Mapping[str, str]) -> str:
    return f"{row['teacher']}:{row['student']}" if row["teacher"] else ""


def _words(row: Mapping[str, str]) -> str:
    """A metric other than accuracy."""
    return "" if row["metric"] == ACCURACY else row["metric"].replace("_", " ")


def _value(row: Mapping[str, str]) -> str:
    """``93.72 % (NAYER prompt P3 (label index); cifar10; wrn40_2:wrn16_2)``."""
    epochs = f"{row['epochs']} epochs" if row["epochs"] else ""
    cell = "; ".join(filter(None, (row["method"], row["dataset"].strip("()"), _pair(row), epochs)))
    return " ".join(filter(None, (row["value"], row["unit"], _words(row), f"({cell})")))


def _wrapped(text: str, width: int, rest: str, first: str = "") -> list[str]:
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _markdown(text: str) -> str:
    return text.replace("*", "\\*").replace("<", "\\<").replace("[", "\\[").replace("]", "\\]")
