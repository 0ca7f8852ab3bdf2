"""Results in the cards of the methods, made of the committed records and trials alone.

    python -m dfkd_bench.benchmarks.cards                    # in the root of a checkout

Each page of ``docs/methods`` that has the two marks below gets, between them, one row for each built-in suite that has
a table in ``results/tables`` and records of the method that the page is called after.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from dfkd_bench import plugins, record
from dfkd_bench.errors import UserError
from dfkd_bench.files import safe_name
from dfkd_bench.job import Precision
from dfkd_bench.plan import make_plan
from dfkd_bench.plugins import Plugins
from dfkd_bench.record import Record
from dfkd_bench.report.layout import accuracy
from dfkd_bench.report.statistics import interval
from dfkd_bench.suite import is_ablation, read_suite, read_toml, suite_names

BEGIN = "<!-- results: made by python -m dfkd_bench.benchmarks.cards -->"
END = "<!-- end of results -->"
NOISE = "noise_kd"
"""The control that a method has to be above."""

HEAD = """\
Last epoch on the test split: mean and half-width of the Student-t 95 % interval over seeds, then seed by seed. Seconds
of a run; images that pass through the teacher with gradient in synthesis; [coverage and
within](../protocols.md#diversity) of the images that the student gets. Trials: validation split, seed 100, the chosen
setting in bold, and their student steps where the suite has others
([rule](../protocols.md#nothing-is-tuned-on-test-data)).

| suite | trials [%] | last epoch [%] | seeds [%] | KD with noise [%] | seconds | images | coverage | within |
|---|---|---|---|---|---|---|---|---|
"""


Tables = Mapping[str, Sequence[Record]]
"""Suite -> its records."""


def suites_with_a_table(output: Path) -> list[str]:
    """Built-in suites whose whole table lies in ``output``."""
    return [
        name
        for name in suite_names()
        if (output / "tables" / f"{name}.md").is_file() and not is_ablation(read_toml(name)[1])
    ]


def records_of(name: str, output: Path, found: Plugins) -> list[Record]:
    """The records of a suite as its table shows them, in the precision of the machine that made them."""
    suite = read_suite(name)
    precisions: tuple[Precision, ...] = get_args(Precision)
    plans = [make_plan(suite, found, output, None, "cpu", precision) for precision in precisions]
    return max((plan.records() for plan in plans), key=len)


def tables_of(output: Path, found: Plugins) -> Tables:
    """The records of all suites whose table lies in ``output``: read once, for the cards of all methods."""
    return {name: records_of(name, output, found) for name in suites_with_a_table(output)}


def rows(method: str, output: Path, tables: Tables) -> Iterator[str]:
    """The lines of a method's table."""
    for name, everything in tables.items():
        own, noise = (_done(everything, which) for which in (method, NOISE))
        if own:
            job, steps = own[0].job, own[0].counters.student_steps
            yield _row(name, own, noise, _trials(method, job.dataset, steps, output, job.protocol == "equal"))


def _done(records: Sequence[Record], method: str) -> list[Record]:
    chosen = [one for one in records if one.job.method == method and one.last is not None]
    return sorted(chosen, key=lambda one: one.job.seed)


def _row(suite: str, own: Sequence[Record], noise: Sequence[Record], trials: str) -> str:
    values = _accuracies(own)
    cells = [
        f"[{suite}](../../results/tables/{suite}.md)",
        trials,
        accuracy(interval(values)),
        ", ".join(f"{value:.2f}" for value in values),
        accuracy(interval(_accuracies(noise))) if noise else "-",
        f"{fmean(one.total_seconds for one in own):.1f}",
        f"{fmean(one.counters.teacher_images for one in own):,.0f}",
        *(_mean(own, measure) for measure in ("coverage", "within")),
    ]
    return f"| {' | '.join(cells)} |"


def _accuracies(records: Sequence[Record]) -> list[float]:
    return [one.last.accuracy for one in records if one.last is not None]


def _mean(records: Sequence[Record], measure: str) -> str:
    """The mean of one measure of diversity, for people; "-" where it was not measured."""
    values = [value for one in records if (value := one.diversity.get(measure)) is not None]
    return f"{fmean(values):.2f}" if values else "-"


def _trials(method: str, dataset: str, steps: int, output: Path, equal: bool = False) -> str:
    """The validation accuracies of a method's trials with the first seed; the chosen one is bold.

    ``steps``: student steps of the suite; those of the trials are told where they are others. ``equal``: the trials of
    learning rates under protocol `equal`.
    """
    file = output / "trials" / f"{safe_name(dataset)}{'_equal' if equal else ''}.json"
    kept: dict[str, Any] = json.loads(file.read_text()).get(method, {}) if file.is_file() else {}
    if not kept:
        return "-"
    first = str(kept["seeds"][0])
    values = [f"{trial['validation_accuracy'][first]:.2f}" for trial in kept["trials"]]
    values[kept["chosen"]] = f"**{values[kept['chosen']]}**"
    of_trials = kept["trials"][kept["chosen"]]["student_steps"]
    return ", ".join(values) + (f" ({of_trials:,} steps)" if of_trials != steps else "")


def with_results(page: str, method: str, output: Path, tables: Tables) -> str:
    """``page`` with the table of ``method`` between the marks. ``output`` has the trials.

    Raises:
        UserError: only one of the marks is there.
    """
    if BEGIN not in page and END not in page:
        return page
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"the card of {method} has one of the marks, and not both: {BEGIN} and {END}")
    table = "".join(f"{row}\n" for row in rows(method, output, tables))
    return f"{before}{BEGIN}\n{HEAD}{table}{END}{after}"


def main() -> None:
    """The command of the module's docstring."""
    argparse.ArgumentParser(
        prog="python -m dfkd_bench.benchmarks.cards", description=(__doc__ or "").split("\n")[0]
    ).parse_args()
    output, pages = Path("results"), Path("docs/methods")
    try:
        for folder in (output, pages):
            if not folder.is_dir():
                raise UserError(f"there is no folder {folder} here: call this in the root of a checkout")
        tables = tables_of(output, plugins.discover())
        for path in sorted(pages.glob("*.md")):
            page = path.read_text(encoding="utf-8")
            new = with_results(page, path.stem, output, tables)
            if new != page:
                record.write_text(path, new)
                print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
