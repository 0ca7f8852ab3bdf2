"""Ablations: files and options to jobs, records to numbers, numbers to verdicts, and what is printed of them."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from dfkd_bench import ablation_plan, cli, data, plugins, record
from dfkd_bench.ablation import (
    Ablation,
    Claim,
    Measure,
    Reference,
    Row,
    RowRecords,
    names_ablation,
    read_ablation,
    row_suite,
)
from dfkd_bench.errors import UserError
from dfkd_bench.job import Job, TeacherSpec
from dfkd_bench.method import Schedule
from dfkd_bench.plan import Plan
from dfkd_bench.record import Counters, MethodFacts, Point, Record, Score, TeacherFacts
from dfkd_bench.report import ablation_figure, ablation_table
from dfkd_bench.report import table as tables
from dfkd_bench.report.plots import Panel, dots
from dfkd_bench.report.verdicts import Comparison, Effect, decide, judge, measured, overall
from dfkd_bench.run import Place
from dfkd_bench.suite import ablation_names, expand, make_suite, read_suite, suite_names

FOUND = plugins.discover()
GOLDEN = Path(__file__).parent / "data" / "ablation.txt"
SEED = 4.302653 / 3**0.5  # half-width of three values of deviation 1: t(0.975, 2) from a printed table


def run(
    encoder: str,
    seed: int,
    accuracy: float | None = 90.0,
    *,
    method: str = "nayer",
    curve: Sequence[float] | None = None,
    seconds: float = 40.0,
    noisy: float | None = 4e6,
    **changed: Any,
) -> Record:
    """A record of a made-up run: ``curve`` (or four epochs up to ``accuracy``) after two of warm-up, evenly in time."""
    job = Job(
        method=method,
        config={"encoder": encoder, "generator_steps": changed.pop("steps", 20)},
        schedule=Schedule(epochs=6, warmup_epochs=2, student_steps=10, batch_size=64, lr=0.1),
        dataset="digits",
        teacher=TeacherSpec(model="convnet16"),
        student="convnet8",
        seed=seed,
        protocol="smoke",
    )
    points = [] if accuracy is None else [accuracy - 30, accuracy - 10, accuracy - 1, accuracy]
    points = list(points if curve is None else curve)
    facts: dict[str, Any] = {
        "job_id": job.id,
        "job": job,
        "status": "done",
        "outcome": "ok",
        "method": MethodFacts(origin="built-in", distribution="dfkd-bench", version="0", source_sha256="ab" * 32),
        "knowledge": "none",
        "teacher": TeacherFacts(model="convnet16", accuracy=100.0, sha256="5f" * 32, origin="trained here"),
        "curve": tuple(
            Point(epoch=index + 2, accuracy=value, loss=1.0, seconds=seconds * (index + 1) / len(points))
            for index, value in enumerate(points)
        ),
        "last": Score(accuracy=points[-1], epoch=5) if points else None,
        "best": Score(accuracy=max(points), epoch=5) if points else None,
        "seconds": {"synthesis": 0.75 * seconds, "distillation": 0.25 * seconds, "evaluation": 9.0},
        "counters": Counters(images_made=800),
        "peak_memory": 2**28,
        "scalars": {"noisy_layer_bytes": noisy} if noisy is not None else {},
        "diversity": {"within": 0.5, "coverage": 0.5},
        "hardware": {"device": "cpu", "cpu": "Example CPU", "threads": 1, "workers": 1},
    }
    return Record(**(facts | changed))


def row(label: str, records: Sequence[Record] = (), missing: str = "", **fields: Any) -> RowRecords:
    return RowRecords(Row(label=label, **{"method": "nayer"} | fields), tuple(records), missing)


def accuracies(label: str, values: Sequence[float], **fields: Any) -> RowRecords:
    """A row of one run a seed, from seed 0 up."""
    return row(label, [run(label, seed, value, **fields) for seed, value in enumerate(values)])


def curves(label: str, values: Sequence[Sequence[float]], **fields: Any) -> RowRecords:
    return row(label, [run(label, seed, curve=curve, **fields) for seed, curve in enumerate(values)])


def claim(**fields: Any) -> Claim:
    return Claim(**{"text": "a is better", "source": "ours", "compare": (("a", "b"),)} | fields)


def compare(a: RowRecords, b: RowRecords, **fields: Any) -> Comparison:
    (comparison,) = judge(claim(**fields), [a, b]).comparisons
    return comparison


# --- The rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "low", "high", "margin", "outcome"),
    [
        ("better", 0.1, 0.9, 0.0, "supported"),
        ("better", -0.1, 0.9, 0.0, "undecided"),
        ("better", 0.0, 0.9, 0.0, "undecided"),  # it must lie above, not at it
        ("better", -0.9, 0.0, 0.0, "not supported"),
        ("better", 0.0, 0.0, 0.0, "not supported"),
        ("better", 0.1, 0.9, 0.5, "undecided"),
        ("better", 0.1, 0.5, 0.5, "not supported"),
        ("better", 0.6, 0.9, 0.5, "supported"),
        ("better", -0.9, 0.2, -1.0, "supported"),  # not worse by a point
        ("better", -1.2, 0.2, -1.0, "undecided"),
        ("better", 0.1, inf, 0.0, "supported"),
        ("better", -inf, 0.9, 0.0, "undecided"),
        ("equal", -0.9, 0.9, 1.0, "supported"),
        ("equal", 0.2, 0.9, 1.0, "supported"),  # a difference for certain, but a small one
        ("equal", -0.9, 1.0, 1.0, "undecided"),
        ("equal", -1.0, 0.9, 1.0, "undecided"),
        ("equal", -5.0, 5.0, 1.0, "undecided"),
        ("equal", 1.0, 5.0, 1.0, "not supported"),
        ("equal", -5.0, -1.0, 1.0, "not supported"),
        ("equal", -inf, 0.9, 1.0, "undecided"),
    ],
)
def test_the_rule(kind: Literal["better", "equal"], low: float, high: float, margin: float, outcome: str) -> None:
    assert decide(kind, Effect((low + high) / 2, low, high, 5), margin) == outcome


@pytest.mark.parametrize("effect", [Effect(50.0, None, None, 1), None])
@pytest.mark.parametrize("kind", ["better", "equal"])
def test_one_seed_or_none_decides_nothing(kind: Literal["better", "equal"], effect: Effect | None) -> None:
    assert decide(kind, effect, 1.0) == "undecided"


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (["supported", "supported"], "supported"),
        (["supported", "undecided"], "undecided"),
        (["undecided", "not supported", "supported"], "not supported"),
    ],
)
def test_a_claim_holds_if_all_its_comparisons_do(outcomes: Any, verdict: str) -> None:
    assert overall(outcomes) == verdict


# --- From records to the rule -----------------------------------------------------------------------------------------


def test_accuracies_are_compared_seed_by_seed() -> None:
    found = compare(accuracies("a", (95, 80, 65)), accuracies("b", (92, 78, 64)))  # differences 3, 2, 1
    assert found.effect is not None
    assert (found.mean_a, found.mean_b, found.effect.mean, found.effect.n) == (80, 78, 2, 3)
    assert (found.effect.low, found.effect.high) == pytest.approx((2 - SEED, 2 + SEED), rel=1e-6)
    assert found.outcome == "undecided"


def test_only_common_seeds_count() -> None:
    a = accuracies("a", (95, 80, 65))
    found = compare(a, row("b", [run("b", 1, 78), run("b", 2, 64), run("b", 7, 0)]))
    assert found.effect is not None
    assert (found.effect.mean, found.effect.n) == (1.5, 2)


def test_a_difference_that_is_sure_supports_a_claim_and_refutes_its_opposite() -> None:
    a, b = accuracies("a", (95, 94, 96)), accuracies("b", (90, 89.5, 90.5))
    assert compare(a, b).outcome == "supported"
    assert compare(a, b, compare=(("b", "a"),)).outcome == "not supported"
    assert compare(a, b, kind="equal", margin=1.0).outcome == "not supported"


def test_rows_within_the_margin_are_equal() -> None:
    found = compare(accuracies("a", (95, 94, 96)), accuracies("b", (95.1, 94, 95.9)), kind="equal", margin=1.0)
    assert found.outcome == "supported"


def test_a_failed_run_is_no_value() -> None:
    broken = [run("b", seed, None, status="failed", outcome=None, reason="no luck") for seed in range(3)]
    found = compare(accuracies("a", (95, 94, 96)), row("b", broken))
    assert (found.effect, found.outcome, found.remarks) == (None, "undecided", ("b has no finished run",))


def test_rows_without_a_common_seed_decide_nothing() -> None:
    found = compare(row("a", [run("a", 0)]), row("b", [run("b", 1)]))
    assert (found.effect, found.outcome, found.remarks) == (None, "undecided", ("no seed is in both",))


def test_a_collapsed_student_counts_and_is_told() -> None:
    b = row("b", [run("b", 0, 90), run("b", 1, 10, outcome="collapsed")])
    found = compare(accuracies("a", (91, 91)), b)
    assert found.mean_b == 50
    assert "b (seed 1)" in found.remarks[0]


# Epochs and seconds to a level; of the made-up teacher's 100 %


def test_epochs_are_counted_from_the_first_in_which_the_student_was_trained() -> None:
    a = curves("a", [(50, 95, 96, 97)] * 2)
    b = curves("b", [(10, 60, 94.9, 95)] * 2)
    found = compare(a, b, measure="epochs", level=95.0)
    assert found.effect is not None
    assert (found.mean_a, found.mean_b, found.effect.mean) == (2, 4, 2)
    assert found.outcome == "supported"  # less is better


def test_seconds_to_a_level() -> None:
    a = curves("a", [(50, 95, 96, 97)] * 2, seconds=40.0)
    b = curves("b", [(50, 95, 96, 97)] * 2, seconds=80.0)
    found = compare(a, b, measure="seconds", level=90.0)
    assert (found.mean_a, found.mean_b) == (20, 40)


def test_rows_that_other_work_slowed_are_named() -> None:
    chosen, rows = example()
    slow = row("b, twice", [run("b", seed, 90.0, processor_seconds=1.0) for seed in range(3)])
    update = {"rows": (*chosen.rows, slow.row)}
    built = ablation_table.build(chosen.model_copy(update=update), [*rows, slow])
    assert "other work had the processor during runs of 'b, twice': their seconds are too long" in built.table.notes


def test_seconds_without_a_level_are_those_of_the_whole_run() -> None:
    found = compare(accuracies("a", (90, 90), seconds=30.0), accuracies("b", (90, 90), seconds=50.0), measure="seconds")
    assert (found.mean_a, found.mean_b) == (30, 50)


def test_times_of_a_run_that_other_work_slowed_decide_nothing() -> None:
    a = accuracies("a", (90, 90), seconds=30.0, processor_seconds=29.0)
    b = accuracies("b", (90, 90), seconds=50.0, processor_seconds=40.0)
    found = compare(a, b, measure="seconds")
    assert (found.outcome, found.remarks) == ("undecided", ("undecided, since other work slowed runs of b",))
    assert compare(a, b, margin=-1.0).outcome == "supported"


def test_a_level_of_a_teacher_of_unknown_accuracy_is_not_recorded() -> None:
    unknown = TeacherFacts(model="convnet16", accuracy=None, sha256="5f" * 32, origin="imported")
    a, b = (curves(name, [(50, 95)] * 2, teacher=unknown) for name in "ab")
    assert compare(a, b, measure="epochs", level=95.0).effect is None


def test_the_weaker_level_is_what_both_reach() -> None:
    a = curves("a", [(50, 70, 80, 90)] * 2)
    b = curves("b", [(10, 20, 30, 70)] * 2)
    found = compare(a, b, measure="epochs", level="weaker")
    assert (found.mean_a, found.mean_b, found.remarks) == (2, 4, ())


def test_a_factor_is_the_ratio_of_costs() -> None:
    a, b = curves("a", [(95, 96), (95, 96), (10, 95)]), curves("b", [(10, 95), (10, 95), (10, 95)])
    found = compare(a, b, measure="epochs", level=95.0, factor=1.0)
    assert found.effect is not None
    assert found.effect.mean == pytest.approx(2 ** (2 / 3))  # ratios 2, 2, 1
    assert found.outcome == "undecided"


@pytest.mark.parametrize(("factor", "outcome"), [(5.0, "supported"), (11.0, "not supported")])
def test_a_factor_must_be_exceeded(factor: float, outcome: str) -> None:
    a, b = accuracies("a", (90, 90), noisy=4e6), accuracies("b", (90, 90), noisy=40e6)
    assert compare(a, b, measure="noisy_layer_bytes", factor=factor).outcome == outcome


def test_a_ratio_to_nothing_is_no_number() -> None:
    a, b = accuracies("a", (90, 90), noisy=0), accuracies("b", (90, 90))
    assert compare(a, b, measure="noisy_layer_bytes", factor=1.0).remarks == ("a ratio needs values above 0",)


def test_a_record_without_the_measure_says_so() -> None:
    a, b = accuracies("a", (90, 90), noisy=None), accuracies("b", (90, 90))
    assert compare(a, b, measure="noisy_layer_bytes").remarks == ("the records have no noisy_layer_bytes",)


def test_a_run_that_never_reaches_the_level_counts_with_its_end_and_leaves_the_interval_open() -> None:
    reached, never = [(95, 96, 97, 98)] * 3, [(10, 20, 30, 40)] * 3
    late = compare(curves("a", reached), curves("b", never), measure="epochs", level=95.0)
    assert late.effect is not None
    assert (late.mean_b, late.effect.low, late.effect.high) == (4, 3, inf)
    assert late.outcome == "supported"  # b takes even longer
    assert late.remarks == ("level never reached, counted with the run's end: b (seed 0, 1, 2)",)
    early = compare(curves("a", never), curves("b", reached), measure="epochs", level=95.0)
    assert early.effect is not None
    assert (early.effect.low, early.effect.high, early.outcome) == (-inf, -3, "not supported")


def test_a_short_run_that_never_reaches_the_level_is_not_called_fast() -> None:
    never, reached = (
        curves("a", [(10, 20, 30, 40)] * 3, seconds=20.0),
        curves("b", [(10, 20, 30, 95)] * 3, seconds=90.0),
    )
    assert compare(never, reached, measure="seconds", level=95.0).outcome == "undecided"


def test_accuracy_at_equal_seconds_is_read_when_the_shorter_run_ends() -> None:
    a = curves("a", [(50, 60, 80, 90)] * 2, seconds=80.0)  # epochs end at 20, 40, 60, 80 s
    b = curves("b", [(30, 40, 50, 70)] * 2, seconds=50.0)
    found = compare(a, b, measure="accuracy_at_equal_seconds")
    assert (found.mean_a, found.mean_b) == (60, 70)


def test_before_its_first_epoch_a_run_has_no_student() -> None:
    a = curves("a", [(90, 91)] * 2, seconds=200.0)
    found = compare(a, curves("b", [(30, 40)] * 2, seconds=50.0), measure="accuracy_at_equal_seconds")
    assert found.mean_a == 0


@pytest.mark.parametrize(("seconds", "outcome"), [(43.0, "supported"), (45.0, "undecided")])
def test_equal_time_is_a_condition(seconds: float, outcome: str) -> None:
    a, b = accuracies("a", (95, 95), seconds=seconds), accuracies("b", (90, 90), seconds=40.0)
    found = compare(a, b, time_within=1.1)
    assert found.outcome == outcome
    assert any("times are not equal: 45.0 and 40.0 s" in remark for remark in found.remarks) == (seconds == 45)


def test_times_of_different_machines_decide_nothing() -> None:
    busy = {"device": "cpu", "cpu": "Example CPU", "threads": 1, "workers": 2}
    a, b = accuracies("a", (90, 90), seconds=1.0, hardware=busy), accuracies("b", (90, 90))
    assert compare(a, b, measure="seconds").outcome == "undecided"
    assert compare(a, b, kind="equal", margin=1.0).outcome == "supported"


def test_times_that_two_machines_made_decide_nothing() -> None:
    """Also if both runs are of the same two."""
    other = {"device": "cpu", "cpu": "Another CPU", "threads": 1, "workers": 1}
    a, b = (accuracies(label, (90, 90), seconds=s, earlier_hardware=(other,)) for label, s in (("a", 1.0), ("b", 9.0)))
    found = compare(a, b, measure="seconds")
    assert found.outcome == "undecided"
    assert any("different machines" in remark for remark in found.remarks)
    assert compare(a, b, kind="equal", margin=1.0).outcome == "supported"


# --- Files ------------------------------------------------------------------------------------------------------------

ROWS = 'title = "t"\nrows = [{ label = "x", method = "nayer" }, { label = "y", method = "fm" }]\n'
CLAIM = '[[claims]]\ntext = "x is better"\nsource = "ours"\ncompare = [["x", "y"]]\n'


def toml(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ROWS, "ablation mine: claims: Field required"),
        ("seed = 1\n" + ROWS + CLAIM, "unknown key of ablation mine 'seed': did you mean 'seeds'"),
        (ROWS.replace('label = "x"', 'lable = "x"'), "'lable': did you mean 'label'"),
        (ROWS + CLAIM + "marginn = 1.0\n", "unknown key in claims of ablation mine 'marginn': did you mean 'margin'"),
        (ROWS + CLAIM.replace('"x", "y"', '"x", "yy"'), "unknown row in claim 'x is better' of ablation mine: 'yy'"),
        (ROWS.replace('"y"', '"x"') + CLAIM, "two rows are called 'x'"),
        (ROWS + CLAIM + 'kind = "equal"\n', "kind equal needs a margin above 0"),
        (ROWS + CLAIM + 'kind = "worse"\n', "'better' or 'equal'"),
        (ROWS + CLAIM + 'measure = "speed"\n', "claims.0.measure"),
        (ROWS + CLAIM + 'measure = "epochs"\n', "measure epochs needs a level"),
        (ROWS + CLAIM + "level = 95\n", "measure accuracy has no level"),
        (ROWS + CLAIM + 'measure = "epochs"\nlevel = 950\n', "percent of the teacher's accuracy"),
        (ROWS + CLAIM + "factor = 2.0\n", "factor is for epochs, seconds, noisy_layer_bytes"),
        (ROWS + CLAIM + 'measure = "near_duplicates"\nfactor = 2.0\n', "factor is for epochs, seconds"),
        ('columns = ["epochs"]\n' + ROWS + CLAIM, "epochs is no column by itself: diversity, coverage"),
        (ROWS + CLAIM.replace('[["x", "y"]]', "[]"), "compare"),
        (ROWS + CLAIM.replace('[["x", "y"]]', '[["x"]]'), "compare"),
        ('title = "t"\nrows = []\n' + CLAIM, "rows"),
        ('title = "t"\nrows = 3\n' + CLAIM, "ablation mine: rows: Input should be"),
        ("claims = 3\n" + ROWS, "ablation mine: claims: Input should be"),
        ('seeds = "2-0"\n' + ROWS + CLAIM, "did you mean 0-2"),
        ("rows = [", "suite mine"),
    ],
)
def test_a_wrong_file_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_ablation(toml(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"settings": ["nayr.epochs=3"]}, "did you mean 'nayer'"),
        ({"seeds": "a"}, "expected numbers and ranges"),
        ({"protocol": "smok"}, "did you mean 'smoke'"),
        ({"evaluate_on": "train"}, "unknown split 'train'"),
    ],
)
def test_a_wrong_option_is_one_line(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_ablation("nayer_noise", **options)


def test_a_suite_is_no_ablation_and_an_ablation_is_no_suite() -> None:
    with pytest.raises(UserError, match="`dfkd-bench run smoke_digits`"):
        read_ablation("smoke_digits")
    with pytest.raises(UserError, match="`dfkd-bench ablate nayer_noise`"):
        read_suite("nayer_noise")


def test_names_of_suites_and_ablations_are_apart() -> None:
    assert "nayer_cifar10" in suite_names()
    assert "nayer_encoders" in ablation_names()
    assert not set(suite_names()) & set(ablation_names())
    assert (names_ablation("nayer_encoders"), names_ablation("smoke_digits"), names_ablation(None)) == (
        True,
        False,
        False,
    )


def test_a_wrong_name_gets_the_nearest_one() -> None:
    with pytest.raises(UserError, match="unknown suite 'nayer_encoder': did you mean 'nayer_encoders'"):
        read_ablation("nayer_encoder")


# --- Jobs -------------------------------------------------------------------------------------------------------------


def jobs_of(chosen: Ablation, label: str) -> list[Job]:
    dataset = data.dataset(chosen.dataset)
    (wanted,) = (one for one in chosen.rows if one.label == label)
    return expand(row_suite(chosen, wanted, FOUND, dataset, "cpu", "fp32"), FOUND, dataset, "cpu", "fp32")


@pytest.mark.parametrize("name", ablation_names())
def test_every_shipped_ablation_becomes_jobs_on_digits(name: str, home: Path) -> None:
    chosen = read_ablation(name)
    ids = {label: [job.id for job in jobs_of(chosen, label)] for label in (one.label for one in chosen.rows)}
    assert all(len(found) == 5 for found in ids.values())
    compared = [tuple(ids[label]) for one in chosen.claims for pair in one.compare for label in pair]
    assert all(a != b for a, b in zip(compared[::2], compared[1::2], strict=True))  # nothing against itself


@pytest.mark.parametrize("name", ablation_names())
def test_published_values_of_shipped_ablations_are_in_the_csv(name: str) -> None:
    chosen = read_ablation(name)
    cited = [reference for one in chosen.rows for reference in one.published]
    cited += [reference for one in chosen.claims for reference in one.published]
    references = ablation_table._References()
    assert all(list(references.in_words([reference])) for reference in cited)


@pytest.mark.parametrize("name", ["nayer_noise", "nayer_k_to_1", "nayer_memory", "nayer_batchnorm", "nayer_speed"])
def test_the_unchanged_row_is_the_job_of_the_main_table(name: str, home: Path) -> None:
    chosen = read_ablation(name, seeds="0")
    main = make_suite("main", "main", "digits", ["nayer"], controls=())
    dataset = data.dataset("digits")
    assert jobs_of(chosen, chosen.rows[0].label) == expand(main, FOUND, dataset, "cpu", "fp32")


def test_a_share_of_the_pool_is_a_share_of_the_images_made(home: Path) -> None:
    (job,) = jobs_of(read_ablation("nayer_memory", seeds="0"), "10 %")
    assert job.schedule.pool_cap == 240  # (2 * 4 + 8 * 2) * 100 = 2,400 images


def test_a_share_needs_a_pool(tmp_path: Path, home: Path) -> None:
    text = ROWS.replace('method = "fm"', 'method = "scratch", pool_share = 0.5')
    with pytest.raises(UserError, match="pool_share is for methods that keep a pool; scratch makes no images"):
        jobs_of(read_ablation(toml(tmp_path, text + CLAIM)), "y")


def test_null_stands_for_none(home: Path) -> None:
    (job,) = jobs_of(read_ablation("nayer_reinit", seeds="0"), "kept, whole life")
    assert (job.config["generator_life"], job.config["reinitialize"]) == (None, False)


def test_settings_of_the_command_line_reach_all_rows_but_do_not_undo_what_a_row_is_about(home: Path) -> None:
    chosen = read_ablation(
        "nayer_steps", seeds="0", settings=["nayer.epochs=4", "nayer.generator_steps=1", "teacher.epochs=2"]
    )
    (job,) = jobs_of(chosen, "nayer, 5 steps")
    assert (job.schedule.epochs, job.config["generator_steps"]) == (4, 5)
    assert job.teacher.recipe is not None
    assert jobs_of(chosen, "fm, 5 steps")[0].schedule.epochs == 10
    assert job.teacher.recipe.epochs == 2


def test_another_data_set_brings_its_own_defaults(home: Path) -> None:
    chosen = read_ablation("nayer_noise", dataset="cifar100")
    assert (chosen.protocol, chosen.pair, chosen.stem) == ("paper", "wrn40_2:wrn16_1", "nayer_noise_cifar100")
    assert jobs_of(chosen, "noisy layers")[0].schedule.epochs == 120


# --- The plan ---------------------------------------------------------------------------------------------------------


def planned(chosen: Ablation, output: Path) -> ablation_plan.AblationPlan:
    return ablation_plan.plan_ablation(chosen, FOUND, output, device="cpu", precision="fp32")


@pytest.mark.parametrize("axis", ["generator_step", "prompt"])
def test_an_axis_that_is_no_number_in_any_row_is_told_before_the_runs(axis: str, tmp_path: Path, home: Path) -> None:
    chosen = read_ablation("nayer_steps", seeds="0").model_copy(update={"axis": axis})
    with pytest.raises(UserError, match=rf"unknown axis of ablation nayer_steps '{axis}':.* Known: .*generator_steps"):
        planned(chosen, tmp_path)


@pytest.mark.parametrize("part", ["rows", "claims"])
def test_a_published_value_that_is_not_in_the_csv_is_told_before_the_runs(
    part: str, tmp_path: Path, home: Path
) -> None:
    chosen = read_ablation("nayer_batchnorm", seeds="0")
    first, *others = getattr(chosen, part)
    wrong = first.model_copy(update={"published": (Reference(table="nowhere", method="NAYER"),)})
    with pytest.raises(UserError, match="ablation nayer_batchnorm: unknown published table 'nowhere'"):
        planned(chosen.model_copy(update={part: (wrong, *others)}), tmp_path)


def test_an_axis_may_be_of_the_schedule(tmp_path: Path, home: Path) -> None:
    chosen = read_ablation("nayer_steps", seeds="0").model_copy(update={"axis": "lr"})
    planned(chosen, tmp_path)
    rows = [row("a", [run("x", seed, 80.0 + seed) for seed in (0, 1)])]
    assert ablation_figure._curves(rows, "lr") == {"nayer": {0.1: [80, 81]}}


def test_every_measure_that_a_run_has_by_itself_can_be_drawn() -> None:
    accuracies = {"accuracy", "accuracy_at_equal_seconds"}
    assert set(ablation_figure._LABELS) == set(get_args(Measure)) - accuracies


def test_a_job_that_two_rows_share_is_planned_once(tmp_path: Path, home: Path) -> None:
    plan = planned(read_ablation("nayer_fm_time", seeds="0-1"), tmp_path)
    assert len(plan.rows) == 6
    assert len(plan.plan.planned) == 2 * 4  # nayer is nayer with 20 steps, fm is fm with 20 steps
    assert [one.job.seed for one in plan.plan.planned] == [0] * 4 + [1] * 4


def test_a_row_without_its_embeddings_is_left_out_and_says_why(tmp_path: Path, home: Path) -> None:
    plan = planned(read_ablation("nayer_encoders", seeds="0"), tmp_path)
    (missing,) = (item for item in plan.rows if item.row.label == "clip, 512")
    assert "CLIP's weights" in missing.missing
    assert missing.planned[0].job.id not in {one.job.id for one in plan.plan.planned}


def test_the_reason_in_a_table_is_the_same_whether_encoding_was_tried(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object) -> None:
        raise UserError("no connection")

    monkeypatch.setattr("dfkd_bench.text.ensure", offline)
    chosen = read_ablation("nayer_encoders", seeds="0")
    tried = ablation_plan.plan_ablation(chosen, FOUND, tmp_path, device="cpu", precision="fp32", encode=True)
    before, after = (next(item for item in plan.rows if item.missing) for plan in (planned(chosen, tmp_path), tried))
    assert (before.missing, before.trouble) == (after.missing, "")
    assert after.trouble == "no connection"


def test_a_row_that_reads_no_text_needs_no_embeddings(tmp_path: Path, home: Path) -> None:
    plan = planned(read_ablation("nayer_encoders", seeds="0", settings=["nayer.encoder=clip"]), tmp_path)
    assert next(item for item in plan.rows if item.row.label == "noise, 384").missing == ""


def test_records_at_hand_are_shown_without_the_embeddings(tmp_path: Path, home: Path) -> None:
    chosen = read_ablation("nayer_encoders", seeds="0")
    job = jobs_of(chosen, "clip, 512")[0]
    kept = run("clip", 0).model_copy(update={"job": job, "job_id": job.id})
    record.write(tmp_path, kept)
    plan = planned(chosen, tmp_path)
    (clip,) = (item for item in plan.results(plan.plan.records()) if item.row.label == "clip, 512")
    assert (clip.records, clip.missing) == ((kept,), "")
    again = ablation_plan.plan_ablation(chosen, FOUND, tmp_path, None, "cpu", "fp32", rerun=("stale",))
    assert job.id not in {one.job.id for one in again.plan.planned}  # it can't be made anew


def test_a_wrong_setting_names_its_row(tmp_path: Path, home: Path) -> None:
    text = ROWS.replace('method = "fm"', 'method = "fm", settings = { generator_step = 2 }') + CLAIM
    with pytest.raises(UserError, match="ablation mine, row 'y': unknown setting of fm 'generator_step': did you mean"):
        planned(read_ablation(toml(tmp_path, text)), tmp_path)


# --- What is printed --------------------------------------------------------------------------------------------------


def example() -> tuple[Ablation, list[RowRecords]]:
    """Three rows, one of which was not run, and a claim of each outcome."""
    bn = "NAYER_BN(notes)"
    rows = [
        row("a", [run("a", seed, value) for seed, value in enumerate((95.0, 94.0, 96.0))],
            published=(Reference(table=bn, method="NAYER with BatchNorm in noisy layer"),)),
        row("b", [run("b", seed, value, noisy=4e7) for seed, value in enumerate((90.0, 89.5, 90.5))],
            published=(Reference(table=bn, method="NAYER without BatchNorm in noisy layer"),)),
        row("c", missing="its text encoder is not at hand"),
    ]  # fmt: skip
    gain = Reference(table="NAYER_noise_source", method="noisy layer minus (concat or sum)")
    claims = (
        claim(text="A is better than b.", source="the authors", published=(gain,)),
        claim(text="A is as good as b.", kind="equal", margin=1.0),
        claim(text="A is better than c.", compare=(("a", "c"),)),
        claim(text="A is sooner at 95 %.", measure="epochs", level=95.0),
        claim(text="A takes less memory.", measure="noisy_layer_bytes", factor=5.0),
    )
    chosen = read_ablation("nayer_batchnorm", seeds="0-2", pair="convnet16:convnet8")
    update = {"title": "Example", "rows": tuple(item.row for item in rows), "claims": claims}
    return chosen.model_copy(update=update), rows


@pytest.fixture
def built() -> ablation_table.AblationTable:
    return ablation_table.build(*example())


def test_the_table_is_the_committed_one(built: ablation_table.AblationTable) -> None:
    assert ablation_table.to_text(built, 120) == GOLDEN.read_text(encoding="utf-8")


def test_a_column_without_any_published_value_is_left_out() -> None:
    chosen, rows = example()
    bare = [replace(item, row=item.row.model_copy(update={"published": ()})) for item in rows]
    keys = [[column.key for column in ablation_table.build(chosen, given).table.columns] for given in (rows, bare)]
    assert [("published" in one) for one in keys] == [True, False]


def test_markdown_has_every_verdict_and_the_rule(built: ablation_table.AblationTable) -> None:
    text = ablation_table.to_markdown(built)
    assert "1. A is better than b. **supported**" in text
    assert "2. A is as good as b. **not supported**" in text
    assert "3. A is better than c. **undecided**" in text
    assert text.rstrip().splitlines()[-1].startswith("rule: ")


def test_latex_is_a_table_and_a_list_of_claims(built: ablation_table.AblationTable) -> None:
    table, _, claims = ablation_table.to_latex(built).partition("\\end{table}")
    assert r"a & 95.00 & ${}\pm2.48$ & \textgreater{}3.7 & 4.00 & 93.48\textsuperscript{1} & 3 &" in table
    assert r"\item{} A is as good as b. \textbf{not supported}" in claims
    assert r"  \item{} a (95.00) against b (90.00 \%): advantage +5.00 [+3.76, +6.24], n = 3: supported" in claims
    assert claims.count(r"\begin{itemize}") == claims.count(r"\end{itemize}") == 1 + len(built.findings)
    assert claims.rstrip().splitlines()[-1].startswith("rule: ")


def test_claims_are_escaped_in_latex() -> None:
    chosen, rows = example()
    claims = (claim(text="50 % & more_noise", source="R&D {1}"),)
    text = ablation_table.to_latex(ablation_table.build(chosen.model_copy(update={"claims": claims}), rows))
    assert r"\item{} 50 \% \& more\_noise \textbf{" in text
    assert r"\item{} source: R\&D \{1\}" in text


def test_a_published_values_unit_is_escaped_in_latex() -> None:
    chosen, rows = example()
    share = Reference(table="SHARE", method="x")
    with pytest.MonkeyPatch.context() as patch:
        found = {"value": "3", "metric": "share", "unit": "%", "source": "s", "confidence": "c", "method": "x"}
        row_of = {**dict.fromkeys(("teacher", "student", "epochs", "dataset"), ""), "table_id": "SHARE", **found}
        patch.setattr(ablation_table, "published_rows", lambda: [row_of])
        bare = [replace(item, row=item.row.model_copy(update={"published": (share,)})) for item in rows]
        built = ablation_table.build(chosen.model_copy(update={"claims": ()}), bare)
    assert r"3 \%\textsuperscript{1}" in ablation_table.to_latex(built)


def test_an_ablation_has_the_formats_of_a_table() -> None:
    assert list(ablation_table.FORMATS) == list(tables.FORMATS)


def test_comparisons_as_csv_have_full_precision_and_bytes(built: ablation_table.AblationTable) -> None:
    lines = list(csv.DictReader(io.StringIO(ablation_table.verdicts_csv(built))))
    assert [line["verdict"] for line in lines] == ["supported", "not supported", "undecided", "undecided", "supported"]
    assert lines[0]["dataset"] == "digits"
    assert float(lines[0]["low"]) == pytest.approx(5 - SEED / 2, rel=1e-6)
    assert (lines[4]["mean_b"], lines[2]["n"]) == ("40000000.0", "0")


def test_a_column_may_be_asked_for_without_a_claim_about_it() -> None:
    chosen, rows = example()
    asked = chosen.model_copy(update={"claims": chosen.claims[:1], "columns": ("noisy_layer_bytes",)})
    text = ablation_table.to_text(ablation_table.build(asked, rows))
    assert "noisy MB" in text
    assert "40.00" in text
    assert "noisy MB: parameters of the noisy layers" in text


def test_an_ablations_notes_stand_below_its_table() -> None:
    chosen, rows = example()
    noted = chosen.model_copy(update={"notes": ("budgets are ours",)})
    assert "budgets are ours" in ablation_table.build(noted, rows).table.notes


def test_fewer_near_duplicates_are_better_and_are_shown_in_percent() -> None:
    a = accuracies("a", (90, 90), diversity={"near_duplicates": 0.02})
    b = accuracies("b", (90, 90), diversity={"near_duplicates": 0.42})
    found = judge(claim(measure="near_duplicates"), [a, b])
    assert found.outcome == "supported"
    (line,) = (text for text in ablation_table._claim_lines(found, ()) if "against" in text)
    assert line.startswith("a (2.0) against b (42.0 % of images): advantage +40.00 [+40.00, +40.00], n = 2")


def test_published_values_that_are_no_accuracies_have_their_unit() -> None:
    chosen, rows = example()
    hours = Reference(table="NAYER_FIG_acc_vs_time", method="CMI", metric="gpu_hours_training")
    cited = [replace(rows[0], row=rows[0].row.model_copy(update={"published": (hours,)})), *rows[1:]]
    assert "23.99 h [1]" in ablation_table.to_text(ablation_table.build(chosen, cited))


def test_published_values_of_one_pair() -> None:
    one = Reference(table="FAST_README_cifar10", method="Fast-5", metric="top1_acc", pair="wrn40_2:wrn16_2")
    assert [row["value"] for row in ablation_table._found(one)] == ["91.96"]


def test_an_unknown_pair_of_published_values_is_one_line() -> None:
    wrong = Reference(table="FAST_README_cifar10", method="Fast-5", metric="top1_acc", pair="wrn40_2:wrn16_3")
    with pytest.raises(UserError, match="did you mean 'Fast-5 top1_acc wrn40_2:wrn16_2'"):
        ablation_table._found(wrong)


def test_a_published_value_that_is_not_in_the_csv_is_one_line() -> None:
    chosen, rows = example()
    wrong = chosen.claims[0].model_copy(update={"published": (Reference(table="NAYER_BNN", method="x"),)})
    with pytest.raises(UserError, match="unknown published table 'NAYER_BNN'"):
        ablation_table.build(chosen.model_copy(update={"claims": (wrong,)}), rows)


def test_without_any_record_there_is_no_table() -> None:
    chosen, rows = example()
    with pytest.raises(UserError, match="`dfkd-bench ablate nayer_batchnorm` makes them"):
        ablation_table.build(chosen, [RowRecords(item.row, ()) for item in rows])


def test_seeds_that_are_not_there_are_told() -> None:
    chosen, rows = example()
    text = ablation_table.to_text(ablation_table.build(chosen.model_copy(update={"seeds": (0, 1, 2, 3, 4)}), rows))
    assert "3 of 5 seeds were run" in text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "a better than b by more than 0 points in last-epoch accuracy"),
        ({"margin": -1.0}, "a not worse than b by 1 point or more in last-epoch accuracy"),
        ({"kind": "equal", "margin": 1.5}, "a and b equal within 1.5 points in last-epoch accuracy"),
        ({"measure": "seconds", "level": "weaker", "factor": 5}, "a factor of more than 5 in seconds to the lower of"),
        ({"measure": "epochs", "level": 95}, "by more than 0 in student epochs to 95 % of the teacher's accuracy"),
        ({"time_within": 1.1}, "where total seconds differ by a factor of 1.1 at most"),
    ],
)  # fmt: skip
def test_a_test_in_words(fields: dict[str, Any], words: str) -> None:
    assert words in ablation_table.describe_test(claim(**fields))


def test_a_figure_of_rows(tmp_path: Path) -> None:
    path = ablation_figure.draw(*example(), tmp_path / "rows.svg")
    text = path.read_text(encoding="utf-8")
    assert text.count("no value") == 3  # row c, in each of three panels


def test_a_figure_of_rows_says_of_what_it_is_and_what_is_drawn(tmp_path: Path) -> None:
    text = ablation_figure.draw(*example(), tmp_path / "rows.svg").read_text(encoding="utf-8")
    assert "<!-- digits, convnet16:convnet8, n = 3 -->" in text
    assert "<!-- bars: 95 % interval, dots: seeds -->" in text


def panels_of(rows: list[RowRecords], *claims: Claim, columns: tuple[Measure, ...] = ()) -> dict[str, list[float]]:
    """What the figure draws beside accuracies: the first row's values by label."""
    chosen = example()[0].model_copy(update={"claims": claims, "columns": columns})
    return {panel.xlabel: list(panel.values["a"]) for panel in ablation_figure._panels(chosen, rows)}


def test_a_level_that_depends_on_another_run_is_in_no_figure() -> None:
    rows = [curves(name, [(50, 95)] * 2, seconds=40.0) for name in "ab"]
    claims = [claim(measure=measure, level="weaker") for measure in ("epochs", "seconds")]
    assert panels_of(rows, *claims) == {}
    assert panels_of(rows, *claims, columns=("seconds",)) == {"seconds of the whole run": [40, 40]}


def test_a_figure_says_that_runs_never_reach_a_level() -> None:
    rows = [curves("a", [(50, 95, 96), (40, 50, 60)]), curves("b", [(10, 20, 30)] * 2)]
    low, high = (claim(measure="epochs", level=level) for level in (40.0, 95.0))
    assert panels_of(rows, low) == {"epochs to 40 % of teacher\n[or to the end]": [1, 1]}
    assert panels_of([*rows[1:], curves("a", [(40, 50, 60)])], high) == {}
    assert panels_of(rows[:1], low) == {"epochs to 40 % of teacher": [1, 1]}


def test_epochs_are_counted_to_a_level_only() -> None:
    assert measured(run("a", 0, 90.0), "epochs") is None


def test_a_title_is_as_wide_as_its_figure(tmp_path: Path) -> None:
    panel = Panel("accuracy", {"a": [90.0]})
    path = dots(["a"], [panel], tmp_path / "x.svg", "NAYER: epochs to a level with label text and with one-hot input")
    assert "<!-- input -->" in path.read_text(encoding="utf-8")  # on a second line


def test_a_figure_of_a_sweep(tmp_path: Path) -> None:
    rows = [
        row(
            f"{name}, {steps}",
            [run("x", seed, 80 + steps + seed, method=name, steps=steps) for seed in (0, 1)],
            method=name,
        )
        for name in ("nayer", "fm")
        for steps in (2, 5)
    ]
    curves_ = ablation_figure._curves(rows, "generator_steps")
    assert curves_ == {"nayer": {2: [82, 83], 5: [85, 86]}, "fm": {2: [82, 83], 5: [85, 86]}}
    path = ablation_figure.draw(read_ablation("nayer_steps"), rows, tmp_path / "sweep.png")
    assert path.stat().st_size > 5000


def test_rows_of_a_sweep_that_differ_otherwise_are_other_curves() -> None:
    rows = [
        row(f"{encoder}, {steps}", [run(encoder, seed, value + seed, steps=steps) for seed in (0, 1)])
        for encoder, steps, value in (("sbert", 2, 80.0), ("sbert", 5, 85.0), ("onehot", 5, 60.0))
    ]
    curves_ = ablation_figure._curves(rows, "generator_steps")
    assert curves_ == {"nayer, encoder sbert": {2: [80, 81], 5: [85, 86]}, "nayer, encoder onehot": {5: [60, 61]}}


def test_a_long_name_of_a_row_is_folded(tmp_path: Path) -> None:
    name = "a setting whose name is much longer than others are"
    text = dots([name, "b"], [Panel("accuracy", {name: [90.0]})], tmp_path / "x.svg").read_text(encoding="utf-8")
    assert "<!-- longer than others are -->" in text


def test_nothing_to_draw_is_one_line(tmp_path: Path) -> None:
    chosen, rows = example()
    with pytest.raises(UserError, match="nothing to draw"):
        ablation_figure.draw(chosen, [RowRecords(item.row, ()) for item in rows], tmp_path / "x.png")


def test_a_figure_has_a_suffix_that_can_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"can't draw 'x\.gif'"):
        ablation_figure.draw(*example(), tmp_path / "x.gif")


# --- The command line -------------------------------------------------------------------------------------------------

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dfkd-bench", *map(str, arguments)])
        monkeypatch.setattr("signal.signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    monkeypatch.chdir(home.parent)
    monkeypatch.delenv("DFKD_BENCH_RESULTS", raising=False)
    return call


@pytest.mark.parametrize("line", [("ablate", "nayer_memory", "--dry-run"), ("plan", "nayer_memory")])
def test_a_dry_run_shows_rows_and_starts_nothing(line: tuple[str, ...], command: Command, home: Path) -> None:
    code, shown, _ = command(*line, "--seeds", "0-1", "--device", "cpu")
    assert code == 0
    assert any(
        words.startswith("10 %") and "pool_cap=240" in words and "2 new" in words for words in shown.splitlines()
    )
    assert "12 jobs, shared ones once: 12 new" in shown
    assert not home.exists()
    assert not (home.parent / "dfkd-results").exists()


def test_ablations_are_listed_with_their_command(command: Command) -> None:
    _, shown, _ = command("list", "suites")
    kinds = {words.split()[0]: words.split()[1] for words in shown.splitlines() if len(words.split()) > 1}
    assert (kinds["nayer_encoders"], kinds["nayer_cifar10"]) == ("ablate", "run")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("ablate", "nayer_nois"), "did you mean 'nayer_noise'"),
        (("ablate", "smoke_digits"), "smoke_digits is a suite and no ablation"),
        (("run", "nayer_noise"), "`dfkd-bench ablate nayer_noise` runs it"),
        (("table", "nayer_noise", "-m", "fm"), "leave out --methods"),
        (("table", "nayer_noise", "--diversity"), "--diversity is for suites, and nayer_noise is an ablation"),
        (("table", "nayer_noise", "--no-controls"), "nayer_noise has no controls: leave out --no-controls"),
        (("table", "nayer_noise"), "there are no records of this ablation in"),
        (("plot", "nayer_noise"), "`dfkd-bench ablate nayer_noise` with the same options makes them; for bf16, if"),
        (("ablate", "nayer_noise", "--rerun", "all"), "unknown value of --rerun 'all'"),
        (("ablate", "nayer_noise", "-d", "digit"), "did you mean 'digits'"),
    ],
)
def test_wrong_input_is_one_line(line: tuple[str, ...], words: str, command: Command) -> None:
    code, shown, error = command(*line)
    assert (code, shown, error.count("\n")) == (2, "", 1)
    assert words in error


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """In place of the engine: jobs that are left get a made-up record at once; the ids of those of each call."""
    calls: list[list[str]] = []

    def carry_out(plan: Plan, found: Any, place: Place, *_: Any) -> list[Record]:
        calls.append([job.id for job in plan.to_run()])
        for job in plan.to_run():
            made = run("x", job.seed, 90.0 + job.config["noisy_batchnorm"] + job.seed)
            record.write(place.output, made.model_copy(update={"job": job, "job_id": job.id}))
        return [record.read(record.record_path(place.output, item.job)) for item in plan.planned]

    monkeypatch.setattr("dfkd_bench.plan.carry_out", carry_out)
    return calls


def test_ablate_prints_and_leaves_files_and_runs_nothing_twice(
    command: Command, done: list[list[str]], home: Path
) -> None:
    line = ("nayer_batchnorm", "--seeds", "0-2", "--device", "cpu")
    code, shown, _ = command("ablate", *line)
    assert code == 0
    assert "advantage +1.00 [+1.00, +1.00], n = 3: supported" in shown
    results, stem = home.parent / "dfkd-results", "nayer_batchnorm_digits"
    files = {str(path.relative_to(results)) for path in results.rglob(f"{stem}*")}
    assert files == {f"figures/{stem}.png", *(f"ablations/{stem}{end}" for end in (".md", ".csv", "-verdicts.csv"))}
    assert command("ablate", *line)[1] == shown
    assert [len(ids) for ids in done] == [6, 0]
    assert r"\end{table}" in command("table", *line, "-f", "latex")[1]
    assert command("table", *line)[1].strip() == shown.partition("\n\ntable: ")[0].strip()


def test_an_ablation_with_other_settings_has_files_of_its_own(
    command: Command, done: list[list[str]], home: Path
) -> None:
    command("ablate", "nayer_batchnorm", "--seeds", "0", "--device", "cpu", "--split", "validation")
    tables = home.parent / "dfkd-results" / "ablations"
    assert {path.name for path in tables.glob("*.md")} == {"nayer_batchnorm_digits-validation.md"}


def test_a_table_of_another_precision_is_not_overwritten(command: Command, done: list[list[str]], home: Path) -> None:
    line = ("ablate", "nayer_batchnorm", "--seeds", "0", "--device", "cpu")
    table = home.parent / "dfkd-results" / "ablations" / "nayer_batchnorm_digits.md"
    command(*line, "--precision", "bf16")
    before = table.read_bytes()
    table.write_bytes(before + b"first")
    for _ in range(2):  # now without its records, now with them
        assert "nayer_batchnorm_digits-fp32.md" in command(*line, "--precision", "fp32")[1]
    assert table.read_bytes() == before + b"first"


def test_what_is_added_to_records_of_one_precision_has_the_plain_name(
    command: Command, done: list[list[str]], home: Path
) -> None:
    line = ("ablate", "nayer_batchnorm", "--device", "cpu", "--precision")
    command(*line, "bf16", "--seeds", "0-1")
    command(*line, "fp32", "--seeds", "0")
    assert "nayer_batchnorm_digits.md" in command(*line, "bf16", "--seeds", "0-2")[1]


@pytest.mark.parametrize("name", ["ablate", "table", "plot"])
def test_records_of_other_code_are_told(name: str, command: Command, done: list[list[str]]) -> None:
    line = ("nayer_batchnorm", "--seeds", "0-2", "--device", "cpu")
    command("ablate", *line)
    told = "6 runs of nayer were made by other code than today's: `--rerun stale` makes them anew"
    _, shown, warned = command(name, *line)
    assert warned.count(told) == 1
    assert (" ".join(shown.split()).count(told) == 1) == (name != "plot")


def test_a_row_that_cannot_run_is_a_warning_and_stays_in_the_table(
    command: Command, done: list[list[str]], home: Path, tmp_path: Path
) -> None:
    rows = ROWS.replace('method = "fm"', 'method = "nayer", settings = { encoder = "file:gone.npy" }')
    code, shown, warned = command("ablate", toml(tmp_path, rows + CLAIM), "--seeds", "0")
    assert code == 0
    assert len(done[0]) == 1
    assert "row 'y' is left out" in warned
    assert "not run: " in shown
    assert "y has no finished run" in shown
