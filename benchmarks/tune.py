"""Choose `smoke` settings on the validation split: the same number of trials for every method, all of them recorded.

    python -m dfkd_bench.benchmarks.tune --dataset digits --methods nayer,fm --output results

Trial 0 is the method's present setting; the others are drawn from the rest of its ``search`` space by a fixed seed.
Runs have seeds from 100 up and are evaluated on the validation split, so that nothing is chosen on test data. All
trials get the first seed; the ``--finalists`` best of each method get the other seeds, too, and only they can be
chosen. The trials go to ``OUTPUT/trials/<data set>.json``; the best one by mean last-epoch accuracy is printed, to be
copied into the method's file by hand. Trials of earlier calls are kept for methods that are not named. Runs are kept
below ``OUTPUT/trials/.work``, so that a call that was stopped goes on where it was. A method in a file of its own is
named with ``--plugin FILE``.

With ``--protocol equal`` only the learning rate is chosen, from the values of ``benchmarks/equal.toml``, the same for
all methods; the trials go to ``OUTPUT/trials/<data set>_equal.json``, the winners into the methods' ``equal_lr``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from dfkd_bench import data, equal, plugins, record, teachers
from dfkd_bench.engines.local import default_devices
from dfkd_bench.errors import UserError
from dfkd_bench.files import safe_name
from dfkd_bench.plan import Plan, carry_out, make_plan
from dfkd_bench.plugins import Plugins
from dfkd_bench.progress import show
from dfkd_bench.record import Record
from dfkd_bench.run import Place
from dfkd_bench.suite import ALL, all_methods, expand, make_suite, parse_seeds, split_list

FIRST_SEED = 100  # tables report seeds from 0


def draw_trials(
    search: Mapping[str, Sequence[Any]], present: Mapping[str, Any], count: int, seed: str = ""
) -> list[dict[str, Any]]:
    """``count`` different settings, or as many as there are: the present ones (nothing changed), then random draws.

    ``present``: their values of the settings in ``search``, which are not drawn a second time. ``seed``: the data set
    and the method, so that a second data set doesn't try again what the first one has.
    """
    stream = random.Random(seed)
    drawn_anyway = all(present[name] in values for name, values in search.items())
    count = min(count, 1 + math.prod(len(values) for values in search.values()) - drawn_anyway)
    trials: list[dict[str, Any]] = [{}]
    while len(trials) < count:
        trial = {name: stream.choice(list(values)) for name, values in search.items()}
        if trial not in trials and trial != present:
            trials.append(trial)
    return trials


def present_settings(dataset: str, protocol: str, method: str, names: Iterable[str], found: Plugins) -> dict[str, Any]:
    """What the settings ``names``, the student's schedule included, are before anything is tried."""
    suite = make_suite("present", "present", dataset, [method], controls=(), protocol=protocol)
    job = expand(suite, found, data.dataset(dataset, extra=found.datasets), "cpu", "fp32")[0]
    values = {**job.schedule.model_dump(mode="json"), **job.config}
    return {name: values[name] for name in names}


@dataclass(frozen=True)
class Trial:
    """One setting of one method and the runs made with it."""

    method: str
    settings: dict[str, Any]
    records: tuple[Record, ...] = ()

    @property
    def mean(self) -> float:
        """Mean last-epoch validation accuracy [%] over the runs that reached an end."""
        reached = [item.last.accuracy for item in self.records if item.last]
        return sum(reached) / len(reached)

    def order(self) -> tuple[float, int]:
        """Accuracy first; of equals the one that passed fewer images through the teacher."""
        return self.mean, -self.records[0].counters.teacher_images

    def as_json(self) -> dict[str, Any]:
        """What is kept of it."""
        first = self.records[0].counters
        return {
            "settings": self.settings,
            "validation_accuracy": {str(run.job.seed): round(run.last.accuracy, 3) for run in self.records if run.last},
            "mean": round(self.mean, 3),
            "teacher_images": first.teacher_images,
            "student_steps": first.student_steps,
        }


def run_trials(
    dataset: str, protocol: str, trials: Sequence[Trial], seeds: tuple[int, ...], home: Path, found: Plugins
) -> list[Trial]:
    """All trials as one plan, so that every worker is busy; returns them with the new runs added."""
    if not trials or not seeds:
        return list(trials)
    plans = [
        make_plan(
            make_suite(
                "trials", f"{trial.method} trial", dataset, [trial.method], controls=(), seeds=seeds,
                evaluate_on="validation", protocol=protocol,
                settings={f"{trial.method}.{name}": value for name, value in trial.settings.items()}
                | {"teacher.include_validation": False},
            ), found, home,
        )
        for trial in trials
    ]  # fmt: skip
    planned = {item.job.id: item for plan in plans for item in plan.planned}
    whole = Plan(plans[0].suite, tuple(planned.values()), ())
    devices, threads = default_devices("auto", None, whole.to_run(("failed", "stale")))
    place = Place(home, plugin_files=found.files, threads=threads, workers=len(devices))
    with show(whole, Console(stderr=True)) as report:
        made = {item.job_id: item for item in carry_out(whole, found, place, devices, ("failed", "stale"), report)}
    if any(item.job.id not in made for item in whole.planned):
        raise UserError(f"{dataset}: some of the trials are under way elsewhere; call this again when they are over")
    done = []
    for trial, plan in zip(trials, plans, strict=True):
        runs = [made[item.job.id] for item in plan.planned]
        if broken := [run.reason for run in runs if run.status != "done"]:  # a bug, no bad setting: those are `done`
            raise UserError(f"{trial.method} with {trial.settings}: {broken[0]}")
        done.append(replace(trial, records=(*trial.records, *runs)))
    return done


def tune(
    dataset: str,
    protocol: str,
    methods: Sequence[str],
    count: int,
    finalists: int,
    seeds: tuple[int, ...],
    output: Path,
    found: Plugins,
) -> dict[str, Any]:
    """Trials of all ``methods``; returns what is kept of them, by method."""
    home = output / "trials" / ".work"
    teachers.take_along(output, home)
    searches = {method: dict(found.method(method).search) for method in methods}
    if protocol == "equal":
        searches = {method: {"lr": equal.budget(dataset).lr} for method in methods}
    for method, search in searches.items():
        if not search:
            raise UserError(f"method {method} has no `search` space to draw trials from")
    if protocol == "equal":
        trials = [Trial(method, {"lr": value}) for method in methods for value in searches[method]["lr"]]
    else:
        trials = [
            Trial(method, drawn)
            for method, search in searches.items()
            for drawn in draw_trials(
                search, present_settings(dataset, protocol, method, search, found), count, f"{dataset}/{method}"
            )
        ]
    trials = run_trials(dataset, protocol, trials, seeds[:1], home, found)
    rank = {
        id(trial): place
        for method in methods
        for place, trial in enumerate(
            sorted((item for item in trials if item.method == method), key=Trial.order, reverse=True)
        )
    }
    final = run_trials(
        dataset, protocol, [item for item in trials if rank[id(item)] < finalists], seeds[1:], home, found
    )
    by_setting = {(item.method, json.dumps(item.settings)): item for item in [*trials, *final]}
    kept = {}
    for method, search in searches.items():
        own = [item for (name, _), item in by_setting.items() if name == method]
        for number, trial in enumerate(own):
            print(f"{method} trial {number}: {trial.mean:.2f} %, {len(trial.records)} seeds  {trial.settings}")
        best = max((item for item in own if len(item.records) == len(seeds)), key=Trial.order)
        print(f"{method}: best {best.mean:.2f} % with {best.settings or 'the present settings'}", flush=True)
        kept[method] = {
            "search": {name: list(values) for name, values in search.items()},
            "seeds": list(seeds),
            "finalists": finalists,
            "trials": [item.as_json() for item in own],
            "chosen": own.index(best),
            "software": record.software(),
        }
    return kept


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m dfkd_bench.benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True, help="data set, or folder:PATH")
    parser.add_argument("--methods", required=True, help="comma list, or all")
    parser.add_argument("--plugin", type=Path, action="append", default=[], help="a Python file; can be repeated")
    parser.add_argument(
        "--protocol", choices=["smoke", "equal"], default="smoke", help="smoke: settings; equal: learning rates"
    )
    parser.add_argument("--trials", type=int, default=8, help="settings that are tried, a method; default: 8")
    parser.add_argument("--finalists", type=int, default=2, help="trials that run with all seeds; default: 2")
    parser.add_argument(
        "--seeds", default=f"{FIRST_SEED}-{FIRST_SEED + 1}", help="the first for all; default: %(default)s"
    )
    parser.add_argument("--output", type=Path, default=Path("results"), help="default: %(default)s; trials/ is in it")
    arguments = parser.parse_args()
    try:
        for name, value in (("trials", arguments.trials), ("finalists", arguments.finalists)):
            if value < 1:
                raise UserError(f"--{name} {value}: expected 1 or more")
        seeds = parse_seeds(arguments.seeds)
        if min(seeds) < FIRST_SEED:
            raise UserError(f"--seeds {arguments.seeds}: settings are chosen with seeds from {FIRST_SEED} up")
        dataset, protocol, found = arguments.dataset, arguments.protocol, plugins.discover(arguments.plugin)
        for line in found.broken.values():
            print(f"warning: {line}", file=sys.stderr)
        suffix = "_equal" if protocol == "equal" else ""
        path = arguments.output / "trials" / f"{safe_name(dataset)}{suffix}.json"
        methods, finalists = split_list(arguments.methods), min(arguments.finalists, arguments.trials)
        if methods == (ALL,):
            methods = all_methods(found, protocol, dataset)
        new = tune(dataset, protocol, methods, arguments.trials, finalists, seeds, arguments.output, found)
        known = json.loads(path.read_text()) if path.is_file() else {}
        record.write_text(path, json.dumps({**known, **new}, indent=1) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
