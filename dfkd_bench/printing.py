"""What `run`, `table`, `plot` and `ablate` show of records: tables and figures, on the screen and as files.

Also the two consoles and the form of a warning. Light to import: reports are imported when there is one to print.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from dfkd_bench.errors import unknown

if TYPE_CHECKING:
    from dfkd_bench.ablation_plan import AblationPlan
    from dfkd_bench.record import Record
    from dfkd_bench.report.table import Table
    from dfkd_bench.suite import Suite

# Redirected output has no width of its own; tables in it should not be folded at 80 signs. Reasons, paths and settings
# are the user's text: brackets in them are no markup, and `:name:` is no picture.
out = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 140)
err = Console(highlight=False, markup=False, emoji=False, stderr=True, soft_wrap=True)


def plain(text: str) -> None:
    """Text that is laid out already."""
    out.print(text, soft_wrap=True)


def warn(line: str, kind: str = "warning") -> None:
    """A yellow word and a line on stderr."""
    err.print(Text.assemble((f"{kind}:", "yellow"), f" {line}"))


# -- suites ---------------------------------------------------------------------------------------------------------


def results(suite: Suite, records: Sequence[Record], output: Path, verbose: bool) -> None:
    """Print the table of a run and write it, with its figures; say where things are."""
    from dfkd_bench.record import record_path, write_text
    from dfkd_bench.report import table as tables

    built = _tables(suite, records)
    for item in built:
        plain(tables.to_text(item, out.width))
    place = output / "tables" / f"{suite.name}.md"
    write_text(place, "\n".join(tables.to_markdown(item) for item in built))
    csv = place.with_suffix(".csv")
    write_text(csv, tables.to_csv(*built))
    drawn = ", ".join(map(str, figures(suite, records, output)))
    plain(f"\ntable:   {place} (and .csv)\nfigure:  {drawn or 'none: no run has a curve'}")
    plain(f"records: {output / 'records'} ({len(records)} of this table)")
    if verbose:
        for record in records:
            plain(f"  {record_path(output, record.job)}")


def table(suite: Suite, records: Sequence[Record], form: str) -> None:
    """Print the table, one a pair."""
    for built in _tables(suite, records):
        _print_table(built, form)


def diversity(suite: Suite, records: Sequence[Record], form: str) -> None:
    """Print how varied the images are, a table a pair."""
    from dfkd_bench.report import diversity as measures

    for chosen in by_pair(suite, records).values():
        if form == "csv":
            plain(measures.to_csv(chosen, order(suite)))
        else:
            _print_table(measures.build(chosen, suite.title, order(suite)), form)


def figures(suite: Suite, records: Sequence[Record], output: Path, to: Path | None = None) -> list[Path]:
    """Draw accuracy against time, one a pair; where the figures are."""
    from dfkd_bench.report.plots import accuracy_against_time

    paths = []
    done = [record for record in records if record.status == "done"]
    for pair, chosen in by_pair(suite, done).items():
        path = figure_path(suite, pair, output, to)
        accuracy_against_time(chosen, path, suite.title, order(suite))
        paths.append(path)
    return paths


def order(suite: Suite) -> list[str]:
    """The rows of its table: controls first."""
    return [*suite.controls, *suite.methods]


def by_pair(suite: Suite, records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each pair that has some; a table and a figure each."""
    by_pair = {pair: [record for record in records if record.job.pair == pair] for pair in suite.pairs}
    return {pair: chosen for pair, chosen in by_pair.items() if chosen}


def figure_path(suite: Suite, pair: str, output: Path, to: Path | None, kind: str = "") -> Path:
    """``to``, or a file named after the suite; with several pairs, each has its own."""
    from dfkd_bench.record import safe_name

    path = to or output / "figures" / f"{suite.name}{kind}.png"
    return path if len(suite.pairs) == 1 else path.with_stem(f"{path.stem}-{safe_name(pair)}")


def _print_table(built: Table, form: str) -> None:
    from dfkd_bench.report import table as tables

    plain(tables.to_text(built, out.width) if form == "text" else tables.FORMATS[form](built))


def _tables(suite: Suite, records: Sequence[Record]) -> list[Table]:
    from dfkd_bench.report import table as tables

    return [tables.build(chosen, suite.title, order(suite)) for chosen in by_pair(suite, records).values()]


# -- ablations ------------------------------------------------------------------------------------------------------


def ablation_results(planned: AblationPlan, records: Sequence[Record], output: Path) -> None:
    """Print the table of an ablation with its verdicts and write it, with its figure; say where things are."""
    from dfkd_bench.record import write_text
    from dfkd_bench.report import ablation_table
    from dfkd_bench.report import table as tables

    built = ablation_table.build(planned.ablation, planned.results(records))
    plain(ablation_table.to_text(built, out.width))
    place = output / "ablations" / f"{planned.ablation.stem}.md"
    write_text(place, ablation_table.to_markdown(built))
    write_text(place.with_suffix(".csv"), tables.to_csv(built.table))
    write_text(place.with_name(f"{place.stem}-verdicts.csv"), ablation_table.verdicts_csv(built))
    finished = any(record.last is not None for record in records)
    figure = ablation_figure(planned, records, output) if finished else "none: no run has an accuracy"
    plain(f"\ntable:   {place} (and .csv, -verdicts.csv)\nfigure:  {figure}")
    plain(f"records: {output / 'records'} ({len(records)} of this ablation)")


def ablation(planned: AblationPlan, form: str) -> None:
    """Print the table of the records at hand."""
    from dfkd_bench.report import ablation_table

    if form not in ablation_table.FORMATS:
        raise unknown("format of an ablation", form, ablation_table.FORMATS)
    built = ablation_table.build(planned.ablation, planned.results(planned.plan.records()))
    plain(ablation_table.to_text(built, out.width) if form == "text" else ablation_table.FORMATS[form](built))


def ablation_figure(planned: AblationPlan, records: Sequence[Record], output: Path, to: Path | None = None) -> Path:
    """Draw the rows; where the figure is."""
    from dfkd_bench.report.ablation_figure import draw

    return draw(planned.ablation, planned.results(records), to or output / "figures" / f"{planned.ablation.stem}.png")
