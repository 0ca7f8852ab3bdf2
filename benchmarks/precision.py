"""Does bf16 cost accuracy? The same seeds in fp32 and in bf16, and the interval of the paired difference.

    python -m dfkd_bench.benchmarks.precision --dataset digits --methods nayer,fm --seeds 0-19 --margin 1

Each method runs with its present settings, with every seed twice; all else is the same, the teacher included. The rule
is that of the ablations: level if the Student-t 95 % interval of bf16 - fp32 [points of last-epoch accuracy] lies
inside of -margin to margin, not level if it lies outside, else undecided at this n. The accuracies of every seed and
the outcome go to ``OUTPUT/precision/<data set>.json``; methods of earlier calls are kept. Runs are kept below
``OUTPUT/precision/.work``, so that a call that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console

from dfkd_bench import plugins, record, teachers
from dfkd_bench.engines.local import default_devices
from dfkd_bench.errors import UserError
from dfkd_bench.files import safe_name
from dfkd_bench.job import Precision
from dfkd_bench.plan import carry_out, make_plan
from dfkd_bench.plugins import Plugins
from dfkd_bench.progress import show
from dfkd_bench.record import Record
from dfkd_bench.report.statistics import Interval, paired_difference
from dfkd_bench.report.verdicts import Effect, decide
from dfkd_bench.run import Place
from dfkd_bench.suite import make_suite, parse_seeds, split_list

Outcome = Literal["level", "not level", "undecided"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def outcome(difference: Interval, margin: float) -> Outcome:
    """Whether ``difference`` is nothing, within ``margin`` points."""
    half = difference.half_width
    low, high = (None, None) if half is None else (difference.mean - half, difference.mean + half)
    decided = decide("equal", Effect(difference.mean, low, high, difference.n), margin)
    names: dict[str, Outcome] = {"supported": "level", "not supported": "not level", "undecided": "undecided"}
    return names[decided]


def run_both(
    dataset: str, methods: Sequence[str], seeds: tuple[int, ...], home: Path, found: Plugins
) -> dict[Precision, list[Record]]:
    """All runs in fp32, then all in bf16: a plan has one precision."""
    suite = make_suite("precision", "bf16 against fp32", dataset, list(methods), controls=(), seeds=seeds)
    made: dict[Precision, list[Record]] = {}
    for precision in PRECISIONS:
        plan = make_plan(suite, found, home, precision=precision)
        again = ("failed", "stale")
        devices, threads = default_devices("auto", None, plan.to_run(again))
        place = Place(home, threads=threads, workers=len(devices))
        with show(plan, Console(stderr=True)) as report:
            made[precision] = carry_out(plan, found, place, devices, again, report)
    return made


def compared(made: Mapping[Precision, Sequence[Record]], method: str, margin: float) -> dict[str, Any]:
    """What is kept of one method. ``UserError``: a run failed, or is under way elsewhere; no seed is left out."""
    own = {precision: [run for run in runs if run.job.method == method] for precision, runs in made.items()}
    for precision, runs in own.items():
        if broken := next((run for run in runs if run.status != "done"), None):
            raise UserError(f"{method} seed {broken.job.seed} in {precision}: {broken.reason}")
    accuracy = {
        precision: {run.job.seed: run.last.accuracy for run in runs if run.last} for precision, runs in own.items()
    }
    if not accuracy["bf16"] or accuracy["bf16"].keys() != accuracy["fp32"].keys():
        raise UserError(f"{method}: some of its runs are under way elsewhere; call this again when they are over")
    difference = paired_difference(accuracy["bf16"], accuracy["fp32"])
    first = own["bf16"][0]
    return {
        "pair": first.job.pair,
        "evaluated_on": first.job.evaluate_on,
        "accuracy": {
            name: {str(seed): round(value, 4) for seed, value in sorted(values.items())}
            for name, values in accuracy.items()
        },
        "difference": {"mean": difference.mean, "half_width": difference.half_width, "n": difference.n},
        "margin": margin,
        "outcome": outcome(difference, margin),
        "hardware": first.hardware,
        "software": record.software(),
    }


def line(method: str, kept: Mapping[str, Any]) -> str:
    """One row of what is printed."""
    difference = kept["difference"]
    half = "" if difference["half_width"] is None else f" ± {difference['half_width']:5.2f}"
    return (
        f"{method:14} bf16 - fp32: {difference['mean']:+6.2f}{half} points, n = {difference['n']}, "
        f"margin {kept['margin']:g}: {kept['outcome']}"
    )


def main() -> None:
    """The command of the module's docstring."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dfkd_bench.benchmarks.precision", description=summary)
    parser.add_argument("--dataset", required=True, help="data set, or folder:PATH")
    parser.add_argument("--methods", required=True, help="comma list")
    parser.add_argument("--seeds", default="0-19", help="default: %(default)s")
    parser.add_argument("--margin", type=float, default=1.0, help="points of accuracy; default: 1")
    parser.add_argument("--output", type=Path, default=Path("results"), help="default: %(default)s")
    arguments = parser.parse_args()
    try:
        if arguments.margin <= 0:
            raise UserError(f"--margin {arguments.margin:g}: expected a number of points above 0")
        methods, folder = split_list(arguments.methods), arguments.output / "precision"
        seeds = parse_seeds(arguments.seeds)
        teachers.take_along(arguments.output, folder / ".work")
        made = run_both(arguments.dataset, methods, seeds, folder / ".work", plugins.discover())
        new = {method: compared(made, method, arguments.margin) for method in methods}
        for method in methods:
            print(line(method, new[method]))
        path = folder / f"{safe_name(arguments.dataset)}.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        record.write_text(path, json.dumps({**known, **new}, indent=1) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
