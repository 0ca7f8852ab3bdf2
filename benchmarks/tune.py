"""Choose `smoke` settings on the validation split: the same number of trials for every method, all of them recorded.

    python -m dfkd_bench.benchmarks.tune --dataset digits --methods nayer,fm --output results

Trial 0 is the method's present setting; the others are drawn from its ``search`` space by a fixed seed. Runs have
seeds from 100 up and are evaluated on the validation split, so that nothing is chosen on test data. The trials go to
``OUTPUT/trials/<data set>.json``; the best one by mean last-epoch accuracy is printed, to be copied into the method's
file by hand. Trials of earlier calls are kept for methods that are not named.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from dfkd_bench import plugins, record
from dfkd_bench.engines.local import default_devices
from dfkd_bench.errors import UserError
from dfkd_bench.plan import carry_out, make_plan
from dfkd_bench.progress import show
from dfkd_bench.run import Place
from dfkd_bench.suite import make_suite, parse_seeds, split_list

FIRST_SEED = 100  # tables report seeds from 0


def draw_trials(search: dict[str, Any], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` different settings: the present ones (nothing changed), then random draws."""
    stream = random.Random(seed)
    trials: list[dict[str, Any]] = [{}]
    while len(trials) < count:
        trial = {name: stream.choice(list(values)) for name, values in search.items()}
        if trial not in trials:
            trials.append(trial)
    return trials


def run_trial(dataset: str, method: str, trial: dict[str, Any], seeds: tuple[int, ...], home: Path) -> dict[str, Any]:
    """One setting, all seeds; its runs' records are working material and stay outside of the results."""
    found = plugins.discover()
    suite = make_suite(
        "trial", f"{method} trial", dataset, [method], controls=(), seeds=seeds, evaluate_on="validation",
        protocol="smoke", settings={f"{method}.{name}": value for name, value in trial.items()},
    )  # fmt: skip
    plan = make_plan(suite, found, home)
    devices, threads = default_devices("auto", None, plan.to_run())
    place = Place(home, threads=threads, workers=len(devices))
    with show(plan, Console(stderr=True), quiet=not sys.stderr.isatty()) as report:
        records = carry_out(plan, found, place, devices, report=report)
    if broken := [item.reason for item in records if item.status != "done"]:
        raise UserError(f"{method} with {trial}: {broken[0]}")  # a bug, not a bad setting: a collapse is `done`
    accuracies = {str(item.job.seed): round(item.last.accuracy, 3) for item in records if item.last}
    reached = list(accuracies.values())
    return {
        "settings": trial,
        "validation_accuracy": accuracies,
        "mean": round(sum(reached) / len(reached), 3),
        "teacher_images": records[0].counters.teacher_images,
        "student_steps": records[0].counters.student_steps,
    }


def main() -> None:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m dfkd_bench.benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--methods", required=True)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--seeds", default=f"{FIRST_SEED}-{FIRST_SEED + 1}")
    parser.add_argument("--output", type=Path, default=Path("results"))
    arguments = parser.parse_args()
    try:
        seeds = parse_seeds(arguments.seeds)
        if min(seeds) < FIRST_SEED:
            raise UserError(f"--seeds {arguments.seeds}: settings are chosen with seeds from {FIRST_SEED} up")
        path = arguments.output / "trials" / f"{record.safe_name(arguments.dataset)}.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        found = plugins.discover()
        for method in split_list(arguments.methods):
            search = dict(found.method(method).search)
            if not search:
                raise UserError(f"method {method} has no `search` space to draw trials from")
            trials = []
            for number, trial in enumerate(draw_trials(search, arguments.trials)):
                trials.append(run_trial(arguments.dataset, method, trial, seeds, arguments.output / "trials" / ".work"))
                print(f"{method} trial {number}: {trials[-1]['mean']:.2f} %  {trial or 'present settings'}", flush=True)
            best = max(trials, key=lambda item: (item["mean"], -item["teacher_images"]))
            print(f"{method}: best {best['mean']:.2f} % with {best['settings'] or 'the present settings'}", flush=True)
            base = {"search": {name: list(values) for name, values in search.items()}, "seeds": list(seeds)}
            known[method] = {**base, "trials": trials, "chosen": trials.index(best), "software": record.software()}
            record.write_text(path, json.dumps(known, indent=1) + "\n")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
