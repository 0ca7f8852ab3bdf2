"""Protocol `equal`: what is equal is measured by the runner's counters, not read off the settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dfkd_bench import data, equal, plugins, teachers
from dfkd_bench.compute import Compute
from dfkd_bench.errors import UserError
from dfkd_bench.job import Job
from dfkd_bench.method import Schedule
from dfkd_bench.paths import HOME_VARIABLE
from dfkd_bench.record import Record
from dfkd_bench.run import Place, run
from dfkd_bench.suite import expand, make_suite

PAIR = "convnet8:convnet8"
SMALL = equal.Budget(
    settings="smoke", epochs=2, student_steps=3, batch_size=32, teacher_images=4_000,
    lr=(0.05, 0.1, 0.2), lr_min=0, momentum=0.9, weight_decay=1e-4,
)  # fmt: skip
GENERATING = tuple(name for name in plugins.discover().methods if plugins.discover().method(name).absorbs)
CONTROLS = ("scratch", "real_kd", "noise_kd")
# What TA-DFKD passes through the teacher depends on how many images it keeps; its budget is that of keeping all.
DEPENDS_ON_IMAGES = {"ta_dfkd"}
# MB-DFKD has nothing to replay until the first batch is stored, at the end of its first epoch.
STARTS_WITHOUT_REPLAY = {"mb_dfkd"}


@pytest.fixture(autouse=True)
def _small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equal, "budget", lambda dataset: SMALL)


def jobs(methods: tuple[str, ...], **settings: object) -> dict[str, Job]:
    """The jobs of a suite in protocol `equal` on digits."""
    values = {key.replace("__", "."): value for key, value in settings.items()}
    suite = make_suite("t", "t", "digits", methods, "equal", (PAIR,), (), (0,), {"teacher.epochs": 1, **values})
    return {job.method: job for job in expand(suite, plugins.discover(), data.dataset("digits"), "cpu", "fp32")}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Record]]:
    """A run of every method that generates, and of the controls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME_VARIABLE, str(tmp_path_factory.mktemp("home")))
        patch.setattr(equal, "budget", lambda dataset: SMALL)
        planned = jobs((*GENERATING, *CONTROLS))
        dataset = data.dataset("digits")
        teachers.train(dataset, next(iter(planned.values())).teacher, Compute(torch.device("cpu")))
        place = Place(tmp_path_factory.mktemp("out"), device="cpu")
        yield {name: run(job, place) for name, job in planned.items()}


@pytest.mark.parametrize("name", [*GENERATING, *CONTROLS])
def test_every_method_gets_the_same_student_training(measured: dict[str, Record], name: str) -> None:
    counted = measured[name].counters
    assert counted.student_steps == 6
    if name in STARTS_WITHOUT_REPLAY:
        assert 0.9 * 6 * 32 < counted.student_images < 6 * 32
    else:
        assert counted.student_images == 6 * 32


@pytest.mark.parametrize("name", GENERATING)
def test_every_method_spends_its_generation_budget_and_no_more(measured: dict[str, Record], name: str) -> None:
    spent = measured[name].counters.teacher_images
    assert spent <= SMALL.teacher_images
    if name not in DEPENDS_ON_IMAGES:
        assert spent >= 0.9 * SMALL.teacher_images


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_generate_nothing(measured: dict[str, Record], name: str) -> None:
    assert measured[name].counters.teacher_images == 0


def test_optimiser_and_schedule_are_the_same_but_for_warm_up_and_rounds() -> None:
    own = {"epochs", "warmup_epochs", "rounds_per_epoch", "student_steps", "batch_size", "pool_cap", "lr"}
    shared = {job.schedule.model_dump_json(exclude=own) for job in jobs((*GENERATING, *CONTROLS)).values()}
    assert len(shared) == 1


def test_learning_rates_are_of_the_budgets() -> None:
    """Each method's own one, chosen on validation from the same values."""
    rates = {job.schedule.lr for job in jobs((*GENERATING, *CONTROLS)).values()}
    assert rates <= set(equal.budget("digits").lr)


def test_a_method_keeps_its_rhythm() -> None:
    given = SMALL.model_copy(update={"epochs": 100, "student_steps": 400})
    rounds = equal.student_schedule(
        Schedule(epochs=10, rounds_per_epoch=36, student_steps=10, batch_size=8, lr=1), given, 0.1
    )
    assert (rounds.rounds_per_epoch, rounds.student_steps) == (40, 10)


def test_warm_up_epochs_keep_their_share_and_come_on_top() -> None:
    given = SMALL.model_copy(update={"epochs": 100})
    schedule = equal.student_schedule(
        Schedule(epochs=240, warmup_epochs=40, student_steps=5, batch_size=8, lr=1), given, 0.1
    )
    assert (schedule.epochs, schedule.warmup_epochs) == (120, 20)


def test_a_run_that_spends_more_than_its_budget_fails(home: Path, tmp_path: Path) -> None:
    job = jobs(("dafl",))["dafl"].model_copy(update={"generation_cap": 100})
    teachers.train(data.dataset("digits"), job.teacher, Compute(torch.device("cpu")))
    record = run(job, Place(tmp_path, device="cpu"))
    assert record.status == "failed"
    assert "protocol equal allows 100" in str(record.reason)


def test_a_setting_beyond_the_budget_is_refused() -> None:
    with pytest.raises(UserError, match=r"nayer would pass .* protocol equal allows 4,000"):
        jobs(("nayer",), nayer__generator_steps=5000)


def test_the_shared_schedule_cannot_be_changed_for_one_method() -> None:
    with pytest.raises(UserError, match="protocol equal gives every method the same"):
        jobs(("nayer",), nayer__batch_size=64)


def test_the_learning_rate_is_the_methods_own() -> None:
    assert jobs(("nayer",), nayer__lr=0.2)["nayer"].schedule.lr == 0.2


def test_a_method_gets_what_its_authors_describe() -> None:
    assert jobs(("kakr",))["kakr"].config["meta"] == "intended"
