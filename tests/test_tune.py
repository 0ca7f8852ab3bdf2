"""Choosing settings on validation: which trials are drawn, which get a second seed, which one wins. Nothing is run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dfkd_bench.benchmarks import tune
from dfkd_bench.job import Job
from dfkd_bench.plan import Plan
from dfkd_bench.record import Counters, MethodFacts, Record, Score
from dfkd_bench.run import Place

SEARCH = {"generator_steps": (10, 20, 30), "loops": (1, 2), "lr": (0.05, 0.1, 0.2)}
PRESENT = {"generator_steps": 20, "loops": 1, "lr": 0.1}


def made(job: Job, accuracy: float) -> Record:
    return Record(
        job_id=job.id,
        job=job,
        status="done",
        outcome="ok",
        method=MethodFacts(origin="built-in", distribution="", version="", source_sha256=""),
        knowledge="none",
        last=Score(accuracy=accuracy, epoch=1),
        counters=Counters(teacher_images=100 * int(job.config["generator_steps"]), student_steps=600),
    )


class Runs:
    """Stands for the runner: more generator steps are better, seed 101 is always a point worse."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.place = Place(Path())

    def __call__(self, plan: Plan, _found: Any, place: Place, *_others: Any) -> list[Record]:
        jobs = [item.job for item in plan.planned]
        self.place = place
        self.jobs += jobs
        return [made(job, job.config["generator_steps"] - (job.seed == 101)) for job in jobs]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, home: Path) -> Runs:
    runs = Runs()
    monkeypatch.setattr(tune, "carry_out", runs)
    return runs


def call(monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> dict[str, Any]:
    words = ["tune", "--dataset", "digits", "--methods", "nayer", "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", words)
    tune.main()
    (written,) = (output / "trials").glob("*.json")
    kept: dict[str, Any] = json.loads(written.read_text())
    return kept


def test_another_data_set_tries_something_else() -> None:
    drawn = [tune.draw_trials(SEARCH, PRESENT, 4, seed) for seed in ("digits/fm", "glyphs16/fm")]
    assert drawn[0][1:] != drawn[1][1:]


def test_the_first_trial_is_the_present_setting() -> None:
    assert tune.draw_trials(SEARCH, PRESENT, 4)[0] == {}


def test_trials_differ_and_are_the_same_at_every_call() -> None:
    drawn = tune.draw_trials(SEARCH, PRESENT, 8)
    assert drawn == tune.draw_trials(SEARCH, PRESENT, 8)
    assert all(drawn.count(trial) == 1 for trial in drawn)


def test_a_small_space_is_drawn_to_its_end_and_no_further() -> None:
    assert tune.draw_trials({"lr": (0.1,)}, {"lr": 0.5}, 8) == [{}, {"lr": 0.1}]


def test_the_present_setting_is_not_tried_again() -> None:
    drawn = tune.draw_trials(SEARCH, PRESENT, 1000)
    assert len(drawn) == 3 * 2 * 3
    assert PRESENT not in drawn


@pytest.mark.parametrize("method", ["nayer", "spaceshipnet"])
def test_no_two_trials_of_a_method_are_the_same_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Runs, method: str
) -> None:
    call(monkeypatch, tmp_path, "--methods", method, "--trials", "20", "--finalists", "1", "--seeds", "100")
    assert len({job.id for job in runs.jobs}) == len(runs.jobs) == 20


def test_present_settings_are_the_methods_own_and_its_schedules() -> None:
    found = tune.plugins.discover()
    own = found.method("nayer").smoke["digits"]
    present = tune.present_settings("digits", "smoke", "nayer", ["generator_steps", "lr", "onehot"], found)
    assert present == {
        "generator_steps": own.config["generator_steps"],
        "lr": own.schedule.lr,
        "onehot": found.method("nayer").Config(**own.config).onehot,
    }


def test_every_trial_gets_the_first_seed_and_the_finalists_the_second(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Runs
) -> None:
    kept = call(monkeypatch, tmp_path, "--trials", "5", "--finalists", "2")["nayer"]["trials"]
    seeds = sorted(len(trial["validation_accuracy"]) for trial in kept)
    assert seeds == [1, 1, 1, 2, 2]


def test_runs_see_the_validation_split_and_seeds_from_100(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Runs
) -> None:
    call(monkeypatch, tmp_path, "--trials", "3")
    assert {(job.evaluate_on, job.seed) for job in runs.jobs} == {("validation", 100), ("validation", 101)}


def test_the_best_mean_of_a_finalist_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Runs) -> None:
    kept = call(monkeypatch, tmp_path, "--trials", "8", "--finalists", "3")["nayer"]
    chosen = kept["trials"][kept["chosen"]]
    assert len(chosen["validation_accuracy"]) == 2
    assert chosen["mean"] == max(trial["mean"] for trial in kept["trials"] if len(trial["validation_accuracy"]) == 2)


def test_of_equals_the_cheaper_is_chosen() -> None:
    (job,) = tune.make_plan(
        tune.make_suite("t", "t", "digits", ["nayer"], controls=()), tune.plugins.discover(), Path("nowhere")
    ).planned
    cheap = tune.Trial("nayer", {}, (made(job.job.model_copy(update={"config": {"generator_steps": 1}}), 90.0),))
    dear = tune.Trial("nayer", {}, (made(job.job.model_copy(update={"config": {"generator_steps": 2}}), 90.0),))
    assert cheap.order() > dear.order()


def test_protocol_equal_chooses_among_the_budgets_learning_rates(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Runs
) -> None:
    kept = call(monkeypatch, tmp_path, "--protocol", "equal")["nayer"]
    assert [trial["settings"] for trial in kept["trials"]] == [{"lr": 0.05}, {"lr": 0.1}, {"lr": 0.2}]
    assert {job.protocol for job in runs.jobs} == {"equal"}


def test_no_teacher_of_a_trial_has_seen_validation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Runs) -> None:
    call(monkeypatch, tmp_path, "--protocol", "equal", "--dataset", "cifar10")
    assert {job.teacher.recipe and job.teacher.recipe.include_validation for job in runs.jobs} == {False}


PLUGIN = """
from dfkd_bench.method import Method, MethodConfig, Synthesis

class Config(MethodConfig):
    generator_steps: int = 1

class Mine(Method):
    Config = Config
    def synthesize(self, student, at):
        return Synthesis(None)

Mine.search = {"generator_steps": (1, 2, 3)}
"""


def test_a_method_of_a_file_is_tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Runs) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    kept = call(monkeypatch, tmp_path, "--methods", "mine", "--plugin", str(file), "--seeds", "100")
    assert kept["mine"]["trials"][kept["mine"]["chosen"]]["settings"] == {"generator_steps": 3}
    assert runs.place.plugin_files == (file,)  # the processes of the runs find it, too


def test_trials_of_other_methods_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: Runs) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "digits.json").write_text('{"fm": {"trials": []}}')
    assert set(call(monkeypatch, tmp_path, "--trials", "3")) == {"fm", "nayer"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--seeds", "0"), "settings are chosen with seeds from 100 up"),
        (("--methods", "real_kd"), "real_kd has no `search` space"),
        (("--methods", "nayr"), "did you mean 'nayer'"),
        (("--trials", "0"), "--trials 0: expected 1 or more"),
        (("--finalists", "0"), "--finalists 0: expected 1 or more"),
        (("--finalists", "-1"), "--finalists -1: expected 1 or more"),
    ],
)
def test_wrong_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    runs: Runs,
    options: Sequence[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, tmp_path, *options)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said
    assert said.count("\n") == 1
    assert runs.jobs == []


def test_a_trial_that_another_process_holds_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "carry_out", lambda plan, *_: [made(item.job, 50.0) for item in plan.planned[1:]])
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, tmp_path, "--trials", "3")
    assert ended.value.code == 2
    line = "error: digits: some of the trials are under way elsewhere; call this again when they are over\n"
    assert capsys.readouterr().err == line


def test_a_run_that_failed_is_no_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(plan: Plan, *_others: Any) -> list[Record]:
        update = {"status": "failed", "reason": "no luck", "last": None}
        return [made(item.job, 0).model_copy(update=update) for item in plan.planned]

    monkeypatch.setattr(tune, "carry_out", broken)
    with pytest.raises(SystemExit):
        call(monkeypatch, tmp_path, "--trials", "3")
    assert "no luck" in capsys.readouterr().err
