"""What `run`, `table`, `plot` and `ablate` show of records: tables and figures, on the screen and as files.

Also the two consoles and the form of a warning. Light to import: reports are imported when there is one to print.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.text import Text

from dfkd_bench.errors import UserError

if TYPE_CHECKING:
    from dfkd_bench.ablation_plan import AblationPlan
    from dfkd_bench.record import Record
    from dfkd_bench.report.ablation_table import AblationTable
    from dfkd_bench.report.table import Table
    from dfkd_bench.suite import Suite

Made = TypeVar("Made")


class _Out(Console):
    """Stdout. Who reads only the head of a table (`| head`) has not made anything fail."""

    def on_broken_pipe(self) -> None:
        try:
            super().on_broken_pipe()  # turns stdout away from the pipe, and would end with 1
        except SystemExit:
            raise SystemExit(0) from None


# Redirected output has no width of its own; tables in it should not be folded at 80 signs. Reasons, paths and settings
# are the user's text: brackets in them are no markup, and `:name:` is no picture.
out = _Out(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 140)
err = Console(highlight=False, markup=False, emoji=False, stderr=True, soft_wrap=True)


def plain(text: str) -> None:
    """Text that is laid out already."""
    out.print(text, soft_wrap=True)


def warn(line: str, kind: str = "warning") -> None:
    """A yellow word and a line on stderr."""
    err.print(Text.assemble((f"{kind}:", "yellow"), f" {line}"))


# -- suites ---------------------------------------------------------------------------------------------------------


def results(suite: Suite, records: Sequence[Record], output: Path, verbose: bool, stale: Collection[str] = ()) -> None:
    """Print the table of a run and write it, with its figures; say where things are.

    ``stale``, here and below: job ids of records that other code has made than today's. The table says so.
    """
    from dfkd_bench.record import record_path, write_text
    from dfkd_bench.report import table as tables
    from dfkd_bench.runfolder import log_file, student_file

    built, wrong = _tables(suite, records, stale)
    place = output / "tables" / f"{suite.name}.md"
    if built:  # written before anything is printed: whoever reads the head only (`| head`) has all of it on disk
        write_text(place, "\n".join(tables.to_markdown(item) for item in built))
        write_text(place.with_suffix(".csv"), tables.to_csv(*built))
    for item in built:
        plain(tables.to_text(item, out.width))
    if built:
        drawn, undrawn = figures(suite, records, output)
        wrong = wrong or undrawn
        plain(f"\ntable:   {place} (and .csv)")
        plain(f"figure:  {', '.join(map(str, drawn)) or 'none: no run has a curve'}")
    plain(f"records: {output / 'records'} ({len(records)} of this table)")
    done = [record for record in records if record.status == "done"]
    students = {record.job_id: path for record in done if (path := student_file(record.job_id)).is_file()}
    if students:
        first = next(iter(students.values()))
        pattern = f"{first.parents[1]}/<job id>/{first.name} ({len(students)} of this table; --verbose names them)"
        plain(f"student: {first if len(students) == 1 else pattern}")
    tracebacks = [
        path for record in records if record.status == "failed" and (path := log_file(record.job_id)).is_file()
    ]
    if tracebacks:
        plain(f"failed:  {tracebacks[0]}{f' and {len(tracebacks) - 1} more' if len(tracebacks) > 1 else ''}")
    if verbose:
        for record in records:
            plain(f"  {record_path(output, record.job)}")
            if record.job_id in students:
                plain(f"  {students[record.job_id]}")
    tell(wrong)


def table(suite: Suite, records: Sequence[Record], form: str, stale: Collection[str] = ()) -> None:
    """Print the table, one a pair; as CSV one for all."""
    from dfkd_bench.report import table as tables

    built, wrong = _tables(suite, records, stale)
    if form == "csv" and built:
        plain(tables.to_csv(*built).rstrip())
    else:
        for item in built:
            _print_table(item, form)
    tell(wrong)


def diversity(suite: Suite, records: Sequence[Record], form: str, stale: Collection[str] = ()) -> None:
    """Print how varied the images are, a table a pair; as CSV one for all."""
    from dfkd_bench.report import diversity as measures

    if form == "csv":
        parts, wrong = each_pair(suite, records, lambda _, chosen: measures.to_csv(chosen, order(suite)))
        lines = [*parts[:1], *(part.partition("\n")[2] for part in parts[1:])]  # one heading
        plain("".join(lines).rstrip())
    else:
        built, wrong = each_pair(
            suite,
            records,
            lambda _, chosen: _noted(measures.build(chosen, suite.title, order(suite)), chosen, stale),
        )
        for item in built:
            _print_table(item, form)
    tell(wrong)


def figures(
    suite: Suite, records: Sequence[Record], output: Path, to: Path | None = None
) -> tuple[list[Path], UserError | None]:
    """Draw accuracy against time, one a pair; where the figures are, and what is to be told (``each_pair``)."""
    from dfkd_bench.report.plots import accuracy_against_time

    return each_pair(
        suite,
        [record for record in records if record.status == "done"],
        lambda pair, chosen: accuracy_against_time(
            chosen, figure_path(suite, pair, output, to), suite.title, order(suite)
        ),
    )


def order(suite: Suite) -> list[str]:
    """The rows of its table: controls first."""
    return [*suite.controls, *suite.methods]


def each_pair(
    suite: Suite, records: Sequence[Record], make: Callable[[str, list[Record]], Made]
) -> tuple[list[Made], UserError | None]:
    """A table or a figure of each pair that has records. One that can't be made takes no other with it: the first such
    error comes back, to be told in the end."""
    made: list[Made] = []
    wrong: UserError | None = None
    for pair in suite.pairs:
        chosen = [record for record in records if record.job.pair == pair]
        try:
            made += [make(pair, chosen)] if chosen else []
        except UserError as error:
            wrong = wrong or (UserError(f"{pair}: {error}") if len(suite.pairs) > 1 else error)
    return made, wrong


def tell(wrong: UserError | None) -> None:
    """Raise what ``each_pair`` has kept back."""
    if wrong is not None:
        raise wrong


def figure_path(suite: Suite, pair: str, output: Path, to: Path | None, kind: str = "") -> Path:
    """``to``, or a file named after the suite; with several pairs, each has its own."""
    from dfkd_bench.files import safe_name

    path = to or output / "figures" / f"{suite.name}{kind}.png"
    return path if len(suite.pairs) == 1 else path.with_stem(f"{path.stem}-{safe_name(pair)}")


def _print_table(built: Table, form: str) -> None:
    from dfkd_bench.report import table as tables

    plain(tables.to_text(built, out.width) if form == "text" else tables.FORMATS[form](built))


def _tables(suite: Suite, records: Sequence[Record], stale: Collection[str]) -> tuple[list[Table], UserError | None]:
    from dfkd_bench.report import table as tables

    return each_pair(
        suite, records, lambda _, chosen: _noted(tables.build(chosen, suite.title, order(suite)), chosen, stale)
    )


def _noted(built: Table, records: Sequence[Record], stale: Collection[str]) -> Table:
    """The table with a note on those of its records that are stale."""
    from dfkd_bench.report.layout import stale_notes

    return replace(built, notes=(*built.notes, *stale_notes(records, stale)))


# -- ablations ------------------------------------------------------------------------------------------------------


def ablation_results(
    planned: AblationPlan, records: Sequence[Record], output: Path, stale: Collection[str] = ()
) -> None:
    """Print the table of an ablation with its verdicts and write it, with its figure; say where things are."""
    from dfkd_bench.record import write_text
    from dfkd_bench.report import ablation_table
    from dfkd_bench.report import table as tables

    built = _ablation_table(planned, records, stale)
    place = output / "ablations" / f"{planned.ablation.stem}.md"
    write_text(place, ablation_table.to_markdown(built))
    write_text(place.with_suffix(".csv"), tables.to_csv(built.table))
    write_text(place.with_name(f"{place.stem}-verdicts.csv"), ablation_table.verdicts_csv(built))
    plain(ablation_table.to_text(built, out.width))
    finished = any(record.last is not None for record in records)
    figure = ablation_figure(planned, records, output) if finished else "none: no run has an accuracy"
    plain(f"\ntable:   {place} (and .csv, -verdicts.csv)\nfigure:  {figure}")
    plain(f"records: {output / 'records'} ({len(records)} of this ablation)")


def ablation(planned: AblationPlan, form: str, stale: Collection[str] = ()) -> None:
    """Print the table of the records at hand."""
    from dfkd_bench.report import ablation_table

    built = _ablation_table(planned, planned.plan.records(), stale)
    plain(ablation_table.to_text(built, out.width) if form == "text" else ablation_table.FORMATS[form](built))


def ablation_figure(planned: AblationPlan, records: Sequence[Record], output: Path, to: Path | None = None) -> Path:
    """Draw the rows; where the figure is."""
    from dfkd_bench.report.ablation_figure import draw

    return draw(planned.ablation, planned.results(records), to or output / "figures" / f"{planned.ablation.stem}.png")


def _ablation_table(planned: AblationPlan, records: Sequence[Record], stale: Collection[str]) -> AblationTable:
    from dfkd_bench.report import ablation_table

    built = ablation_table.build(planned.ablation, planned.results(records))
    return replace(built, table=_noted(built.table, records, stale))
