"""Records in, tables and plots out, end to end against committed files, and the rules in between."""

from __future__ import annotations

import csv
import io
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest

from dfkd_bench import printing
from dfkd_bench import record as records_module
from dfkd_bench.errors import UserError
from dfkd_bench.job import Job, ProtocolName, TeacherSpec
from dfkd_bench.method import Schedule
from dfkd_bench.record import Counters, MethodFacts, Point, Record, Score, TeacherFacts
from dfkd_bench.report.groups import group
from dfkd_bench.report.layout import Column, Row, shortened
from dfkd_bench.report.plots import accuracy_against_time, band
from dfkd_bench.report.published import NAMES, distinct, published
from dfkd_bench.report.statistics import interval, paired_difference
from dfkd_bench.report.table import Table, build, to_csv, to_latex, to_markdown, to_text
from dfkd_bench.suite import make_suite

DATA = Path(__file__).parent / "data"
TITLE = "Data-free distillation on digits"
ORDER = ("nayer", "fm", "deepinv")

if find_spec("dfkd_bench.benchmarks") is None:  # a checkout that is not installed: the wheel maps the folder
    import benchmarks

    sys.modules["dfkd_bench.benchmarks"] = benchmarks


def run(
    method: str,
    seed: int,
    accuracy: float | None = 90.0,
    *,
    status: Literal["done", "failed", "unsupported"] = "done",
    config: dict[str, Any] | None = None,
    dataset: str = "digits",
    pair: str = "lenet5:lenet5_half",
    protocol: Literal["paper", "smoke"] = "smoke",
    synthesis: float = 4.0,
    distillation: float = 2.5,
    **changed: Any,
) -> Record:
    """A record of a made-up run: 10 epochs after the warm-up, accuracy rising to ``accuracy`` (None: no curve)."""
    teacher, student = pair.split(":")
    job = Job(
        method=method,
        config={"temperature": 20.0} if config is None else config,
        schedule=Schedule(epochs=12, warmup_epochs=2, student_steps=40, batch_size=64, lr=0.1),
        dataset=dataset,
        teacher=TeacherSpec(model=teacher),
        student=student,
        seed=seed,
        protocol=protocol,
        source="smoke settings",
    )
    of_the_job = set(Job.model_fields) - {"teacher"}
    job = job.model_copy(update={name: changed.pop(name) for name in list(changed) if name in of_the_job})
    seconds = {"setup": 0.1, "synthesis": synthesis, "sampling": 0.25, "distillation": distillation, "evaluation": 9.0}
    timed = sum(seconds.values()) - 9.0
    scored: dict[str, Any] = {}
    if accuracy is not None:
        scores = [accuracy - (accuracy - 10) * 0.5**epoch for epoch in range(1, 11)]
        scores[-2:] = [accuracy + 0.5, accuracy]
        scored = {
            "curve": tuple(
                Point(epoch=index + 2, accuracy=score, loss=1 / (1 + index), seconds=timed * (index + 1) / 10)
                for index, score in enumerate(scores)
            ),
            "last": Score(accuracy=accuracy, epoch=11),
            "best": Score(accuracy=accuracy + 0.5, epoch=10),
            "outcome": "ok",
        }
    facts: dict[str, Any] = {
        "job_id": job.id,
        "job": job,
        "status": status,
        "method": MethodFacts(origin="built-in", distribution="dfkd-bench", version="0.1.0", source_sha256="ab" * 32),
        "knowledge": {
            "nayer": "class names and a text encoder",
            "scratch": "the training data and labels",
            "real_kd": "the training data",
        }.get(method, "none"),
        "teacher": TeacherFacts(model=teacher, accuracy=98.3333, sha256="5f" * 32, origin="trained here, seed 0"),
        "seconds": seconds,
        "counters": Counters(images_made=0 if method in ("scratch", "real_kd", "noise_kd") else 1280),
        "peak_memory": 412 * 2**20 + seed,
        "hardware": {"device": "cpu", "cpu": "Example CPU", "cores": 2, "threads": 2, "workers": 1},
        **scored,
        **changed,
    }
    return Record(**facts)


def unconfirmed(record: Record) -> Record:
    return record.model_copy(update={"method": record.method.model_copy(update={"confirmed": False})})


def fixture_records() -> list[Record]:
    """What tests/data/records holds."""
    controls = [
        run("scratch", seed, accuracy, synthesis=0.0, distillation=1.75)
        for seed, accuracy in enumerate((95.5, 96.25, 95.75))
    ]
    controls += [run("real_kd", seed, accuracy, synthesis=0.0) for seed, accuracy in enumerate((97.0, 97.5, 96.75))]
    noise: dict[str, Any] = {"synthesis": 0.0, "config": {"temperature": 20.0, "noise": "uniform"}}
    controls += [run("noise_kd", seed, accuracy, **noise) for seed, accuracy in enumerate((41.0, 52.5))]
    controls.append(run("noise_kd", 2, 10.0, outcome="collapsed", reason="one class for all images", **noise))
    nayer = [
        run("nayer", seed, accuracy, config={"temperature": 20.0, "generator_steps": steps}, synthesis=steps / 4)
        for steps, accuracies in ((40, (93.25, 94.0, 93.0)), (2, (88.5, 84.25, 86.0)))
        for seed, accuracy in enumerate(accuracies)
    ]
    fm = [unconfirmed(run("fm", seed, accuracy)) for seed, accuracy in enumerate((91.75, 92.0))]
    fm.append(run("fm", 2, None, status="failed", reason="RuntimeError: out of memory\nlong traceback"))
    workers = {"device": "cpu", "cpu": "Example CPU", "cores": 2, "threads": 2, "workers": 2}
    deepinv = [run("deepinv", 0, 61.5, hardware=workers, synthesis=123.0)]
    unsupported = [
        run("cmi", seed, None, status="unsupported", reason="the teacher has no BatchNorm") for seed in range(3)
    ]
    return controls + nayer + fm + deepinv + unsupported


def cifar10(*found: Record) -> Table:
    return build(found, "CIFAR-10", ("nayer", "fm"))


def cifar_run(method: str, seed: int = 0, accuracy: float = 89.0, **changed: Any) -> Record:
    return run(method, seed, accuracy, dataset="cifar10", pair="wrn40_2:wrn16_1", protocol="paper", **changed)


def row(table: Table, label: str) -> Row:
    return next(row for row in table.rows if row.label == label)


@pytest.fixture(scope="module")
def digits() -> Table:
    return build(list(records_module.read_all(DATA)), TITLE, ORDER)


# End to end


def test_committed_records_are_those_of_the_factory() -> None:
    committed = {record.job_id: record for record in records_module.read_all(DATA)}
    assert committed == {record.job_id: record for record in fixture_records()}


@pytest.mark.parametrize(
    ("name", "render"),
    [("digits.txt", lambda table: to_text(table, 120)), ("digits.md", to_markdown), ("digits.tex", to_latex)],
)
def test_committed_records_give_the_committed_table(name: str, render: Any, digits: Table) -> None:
    assert render(digits) == (DATA / name).read_text(encoding="utf-8")


def test_order_of_records_does_not_matter() -> None:
    assert to_text(build(fixture_records()[::-1], TITLE, ORDER), 120) == (DATA / "digits.txt").read_text("utf-8")


# Statistics: t(0.975, 1) = 12.7062, t(0.975, 2) = 4.302653, t(0.975, 4) = 2.776445 from printed tables


@pytest.mark.parametrize(
    ("values", "mean", "half_width"),
    [
        ([1.0, 2.0, 3.0], 2.0, 4.302653 / 3**0.5),
        ([90.0, 92.0], 91.0, 12.706205),  # s = sqrt(2), divided by sqrt(2)
        ([93.1, 93.4, 92.8, 93.9, 93.3], 93.3, 2.776445 * 0.406202 / 5**0.5),
        ([5.0, 5.0, 5.0], 5.0, 0.0),
    ],
)
def test_interval_of_golden_values(values: list[float], mean: float, half_width: float) -> None:
    found = interval(values)
    assert found.n == len(values)
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(half_width, rel=1e-5)


def test_one_value_has_no_interval() -> None:
    assert interval([93.0]).half_width is None


def test_no_value_has_no_mean() -> None:
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_paired_difference_takes_common_seeds_only() -> None:
    found = paired_difference({0: 91.0, 1: 95.0, 7: 0.0}, {0: 90.0, 1: 93.0, 8: 99.0})
    # Differences 1 and 2: s = sqrt(0.5), so the half-width is t / 2.
    assert (found.mean, found.n) == (1.5, 2)
    assert found.half_width == pytest.approx(6.353102)


def test_paired_difference_without_a_common_seed() -> None:
    with pytest.raises(ValueError, match="seed that both have"):
        paired_difference({0: 1.0}, {1: 1.0})


# Published numbers


def values(method: str, dataset: str, teacher: str, student: str) -> set[tuple[str, float]]:
    return {(value.variant, value.value) for value in published(method, dataset, teacher, student)}


def test_published_values_of_fm_name_their_variants() -> None:
    assert values("fm", "cifar10", "wrn40_2", "wrn16_1") == {
        ("", 89.29),
        ("Fast-2", 88.36),
        ("Fast-5", 88.90),
        ("Fast-10", 89.29),
        ("FM10", 89.29),
    }


def test_published_values_of_nayer_say_how_sure_they_are() -> None:
    found = {value.variant: value for value in published("nayer", "cifar100", "wrn40_2", "wrn16_2")}
    assert (found["NAYER_300"].value, found["NAYER_300"].epochs) == (71.72, "300")
    assert found["NAYER_300"].confidence == "figure-measured(pair-inferred)"


@pytest.mark.parametrize("method", ["teacher", "scratch", "real_kd", "dafl", "zskt", "deepinv", "dfq", "cmi"])
def test_published_values_are_found_under_our_names(method: str) -> None:
    assert published(method, "cifar10", "wrn40_2", "wrn16_1")


@pytest.mark.parametrize("method", ["dfad", "dfnd"])
def test_published_values_of_one_pair_are_found(method: str) -> None:
    assert published(method, "cifar100", "resnet34", "resnet18")


def test_published_values_of_imagenet_are_of_its_form_of_the_models() -> None:
    assert published("fm", "imagenet", "resnet50_imagenet", "resnet18_imagenet")


def test_numbers_of_the_test_images_do_not_stand_beside_validation() -> None:
    assert row(cifar10(cifar_run("fm", evaluate_on="validation")), "fm").published == ()


def test_both_versions_of_a_baseline_are_shown() -> None:
    assert {value.value for value in distinct(published("zskt", "cifar100", "wrn40_2", "wrn16_2"))} == {28.44, 54.59}


def test_a_measured_marker_gives_way_to_a_printed_number() -> None:
    shown = {value.value for value in distinct(published("cmi", "cifar100", "wrn40_2", "wrn16_2"))}
    assert 68.75 in shown
    assert 68.76 not in shown  # read off a figure, good to +-0.05


def test_users_reruns_are_not_published_values() -> None:
    assert 62.5 not in {value.value for value in published("dafl", "cifar100", "resnet34", "resnet18")}


@pytest.mark.parametrize(
    "cell",
    [
        ("nayer", "digits", "lenet5", "lenet5_half"),
        ("fm", "cifar10", "wrn16_1", "wrn40_2"),
        ("nobody", "cifar10", "wrn40_2", "wrn16_1"),
        ("fm", "imagenet", "resnet50", "resnet18"),  # the form for small images
    ],
)
def test_cells_without_published_values(cell: tuple[str, str, str, str]) -> None:
    assert published(*cell) == ()


def test_other_metrics_are_not_accuracies() -> None:
    hours = published("fm", "cifar10", "wrn40_2", "wrn16_1", metric="gpu_hours_data_synthesis")
    assert {value.value for value in hours if value.variant == "Fast-5"} == {0.08}


def test_every_mapped_name_is_in_the_csv_once() -> None:
    text = (Path(__file__).parents[1] / "benchmarks" / "published.csv").read_text(encoding="utf-8")
    known = {line["method"] for line in csv.DictReader(io.StringIO(text))}
    mapped = [name for names in NAMES.values() for name in names]
    assert set(mapped) <= known
    assert len(mapped) == len(set(mapped))


def test_a_cell_cites_its_sources() -> None:
    table = cifar10(cifar_run("fm"))
    cited = {one.value: table.references[one.reference - 1] for one in row(table, "fm").published}
    assert cited[88.36].startswith("88.36 Fast-2, 200 (+20 warm-up) epochs; 88.90 Fast-5, ")
    assert ": github zju-vipa/Fast-Datafree@0dcecbc README.md" in cited[88.36]
    assert cited.keys() == {88.36, 88.9, 89.29}


def test_a_doubtful_number_says_so() -> None:
    table = cifar10(cifar_run("real_kd"))
    (cited,) = row(table, "real_kd").published
    assert "misprint" in table.references[cited.reference - 1]


# Rows


def test_methods_follow_the_teacher_and_the_controls_in_the_given_order(digits: Table) -> None:
    names = [row.label.split()[0] for row in digits.rows]
    assert names == ["teacher", "scratch", "real_kd", "noise_kd", "nayer", "nayer", "fm", "deepinv", "cmi"]


def test_rows_of_one_method_are_labelled_by_what_differs(digits: Table) -> None:
    labels = [row.label for row in digits.rows if row.label.startswith("nayer")]
    assert labels == ["nayer generator_steps=2", "nayer generator_steps=40"]


def test_a_schedule_setting_with_the_name_of_a_config_setting_is_told_apart() -> None:
    schedules = [Schedule(epochs=12, student_steps=40, batch_size=size, lr=0.1) for size in (64, 128)]
    found = [cifar_run("nayer", config={"batch_size": 8}, schedule=schedule) for schedule in schedules]
    labels = [one.label for one in group(found)]
    assert labels == ["nayer schedule.batch_size=64", "nayer schedule.batch_size=128"]


def test_origin_of_settings_does_not_split_a_row() -> None:
    table = cifar10(cifar_run("fm", 0, origin="code"), cifar_run("fm", 1, origin="ours"))
    assert row(table, "fm").n == 2


def test_failed_run_is_a_remark_with_its_reason(digits: Table) -> None:
    assert row(digits, "fm").remarks == ("2 of 3 seeds; seed 2 failed: RuntimeError: out of memory",)


def test_unsupported_method_is_a_row_without_numbers(digits: Table) -> None:
    found = row(digits, "cmi")
    assert found.remarks == ("unsupported: the teacher has no BatchNorm (seeds 0, 1, 2)",)
    assert (found.n, found.last, found.seconds, found.memory) == (0, None, None, None)


def test_collapsed_student_counts_in_the_mean(digits: Table) -> None:
    found = row(digits, "noise_kd")
    assert found.last is not None
    assert found.last.mean == pytest.approx((41.0 + 52.5 + 10.0) / 3)
    assert found.remarks[0].startswith("1 of 3 students collapsed: one class for all images (seed 2")


def test_a_finished_run_without_accuracy_is_named() -> None:
    table = cifar10(cifar_run("fm", 0), cifar_run("fm", 1).model_copy(update={"last": None, "reason": "NaN"}))
    assert row(table, "fm").remarks == ("1 of 2 seeds; seed 1 has no accuracy: NaN",)


def test_total_time_holds_the_setup_and_no_evaluation(digits: Table) -> None:
    seconds = row(digits, "deepinv").seconds
    assert seconds == pytest.approx({"synthesis": 123.0, "sampling": 0.25, "distillation": 2.5, "total": 125.85})


def test_all_failed_without_a_teacher_is_still_a_table() -> None:
    failed = run("nayer", 0, None, status="failed", reason="no teacher", teacher=None)
    assert [one.label for one in build([failed], TITLE).rows] == ["nayer"]


UNKNOWN = TeacherFacts(model="lenet5", accuracy=None, sha256="5f" * 32, origin="imported")


def test_a_teacher_of_unknown_accuracy_has_a_dash() -> None:
    lines = to_text(build([run("fm", 0, teacher=UNKNOWN)], TITLE)).splitlines()
    assert next(line for line in lines if line.startswith("teacher ")).split()[1] == "-"


# Notes


def noted(table: Table, start: str) -> str:
    return next((note for note in table.notes if note.startswith(start)), "")


def test_smoke_says_that_it_is_not_comparable(digits: Table) -> None:
    assert "not comparable with published numbers" in noted(digits, "protocol smoke, version 1")


def test_the_number_of_common_seeds_is_said_once_where_all_have_the_same() -> None:
    found = [cifar_run(method, seed, 90.0) for method in ("nayer", "fm", "cmi") for seed in (0, 1)]
    note = noted(cifar10(*found), "difference to nayer")
    assert note == (
        "difference to nayer over common seeds, n = 2 [points]: fm +0.00 ± 0.00, cmi +0.00 ± 0.00; "
        "each interval is for one difference, not for all of them at once"
    )


def test_one_thread_is_one_thread() -> None:
    hardware = {"cpu": "Example CPU", "cores": 2, "threads": 1}
    assert (
        noted(cifar10(cifar_run("fm", hardware=hardware)), "hardware")
        == "hardware: Example CPU, 2 cores, 1 thread a run"
    )


def test_a_long_reason_is_not_cut_within_a_command() -> None:
    assert shortened("there is none: `make it so` makes one", 26) == "there is none: ..."
    assert shortened("there is none: `make it so` makes one", 33) == "there is none: `make it so` ..."


def test_differences_are_paired_over_common_seeds(digits: Table) -> None:
    note = noted(digits, "difference to nayer generator_steps=2")
    assert "fm +5.50 ± 28.59 (n = 2)" in note  # 91.75 - 88.5 and 92 - 84.25: s = 3.18198, t = 12.7062
    assert "deepinv" not in note


def test_origin_is_given_for_every_method() -> None:
    table = cifar10(cifar_run("fm", origin="code", source="fast_cifar.sh"), cifar_run("nayer", source=""))
    assert noted(table, "origin of the settings") == "origin of the settings: ours (nayer), code, fast_cifar.sh (fm)"


def test_unconfirmed_and_concurrent_are_marked(digits: Table) -> None:
    assert (row(digits, "fm").marks, row(digits, "deepinv").marks, row(digits, "cmi").marks) == ("†", "‡", "")
    assert noted(digits, "‡").endswith("times are not comparable with exclusive runs")


def test_different_hardware_is_noted() -> None:
    table = cifar10(cifar_run("fm"), cifar_run("nayer", hardware={"gpu": "Example GPU", "workers": 1}))
    assert noted(table, "times come from different hardware")


def test_a_run_that_two_machines_made_is_noted() -> None:
    """Its seconds are of neither, and no other run need be of another machine for that."""
    other: dict[str, Any] = {"device": "cpu", "cpu": "Another CPU", "cores": 2, "threads": 2, "workers": 2}
    table = cifar10(*(cifar_run(name, earlier_hardware=(other,)) for name in ("fm", "nayer")))
    assert noted(table, "times come from different hardware")
    assert noted(table, "hardware").startswith("hardware: Another CPU, 2 cores, 2 threads a run; Example CPU, 2 cores")
    assert row(table, "fm").marks == "‡"


def test_students_that_got_more_images_are_named() -> None:
    counts = {"fm": 1000, "nayer": 1000, "cmi": 2000, "dafl": 1010}
    runs = [cifar_run(name).model_copy(update={"counters": Counters(student_images=n)}) for name, n in counts.items()]
    note = noted(cifar10(*runs), "images that the student was taught with")
    assert note == "images that the student was taught with, all steps together: 1,000; times that: cmi 2.00"


def test_students_with_equally_many_images_need_no_line() -> None:
    runs = [cifar_run(name).model_copy(update={"counters": Counters(student_images=5)}) for name in ("fm", "nayer")]
    assert not any(note.startswith("images that the student") for note in cifar10(*runs).notes)


def test_runs_of_several_commits_are_noted() -> None:
    runs = [
        cifar_run(name).model_copy(update={"git": {"commit": commit * 40, "dirty": False}})
        for name, commit in (("fm", "a"), ("nayer", "b"))
    ]
    assert noted(cifar10(*runs), "runs were made at several commits (aaaaaaa, bbbbbbb)")


@pytest.mark.parametrize(("processor", "slowed"), [(None, False), (9.5, False), (8.9, True)])
def test_runs_that_other_work_slowed_are_named(processor: float | None, slowed: bool) -> None:
    changes = {"seconds": {"synthesis": 10.0}, "processor_seconds": processor}
    table = cifar10(cifar_run("fm").model_copy(update=changes))
    assert ("other work had the processor during runs of fm: their seconds are too long" in table.notes) == slowed


def test_changed_code_is_noted() -> None:
    other = MethodFacts(origin="built-in", distribution="dfkd-bench", version="0.1.0", source_sha256="00" * 32)
    table = cifar10(cifar_run("fm", 0), cifar_run("fm", 1).model_copy(update={"method": other}))
    assert noted(table, "the method's code changed between the runs of fm")


def test_the_code_of_a_failed_run_is_no_change() -> None:
    other = MethodFacts(origin="built-in", distribution="dfkd-bench", version="0.1.0", source_sha256="00" * 32)
    failed = run("fm", 1, None, status="failed", reason="no luck").model_copy(update={"method": other})
    table = build([run("fm", 0), failed], TITLE)
    assert not any("code changed" in note for note in table.notes)


def test_validation_is_never_called_test() -> None:
    table = cifar10(cifar_run("fm", evaluate_on="validation"))
    assert "test" not in to_text(table).split("[1]")[0].replace("Student-t", "")


def test_every_protocol_is_explained() -> None:
    for name in get_args(ProtocolName):
        assert noted(build([run("fm", 0, protocol=name)], TITLE), f"protocol {name}, version 1: ")


# Refusals


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (run("fm", 0, protocol="paper"), "protocols"),
        (run("fm", 0, protocol_version=2), "protocol versions"),
        (run("fm", 0, dataset="mnist"), "data sets"),
        (run("fm", 0, pair="lenet5:other"), "pairs"),
        (run("fm", 0, evaluate_on="validation"), "evaluated splits"),
        (
            run("fm", 0, teacher=TeacherFacts(model="lenet5", accuracy=97.0, sha256="6a" * 32, origin="imported")),
            "teachers",
        ),
    ],
)
def test_mixing_is_refused_in_one_line(other: Record, kind: str) -> None:
    with pytest.raises(UserError, match=f"can't mix {kind}") as caught:
        build([run("nayer", 0), other], TITLE)
    assert "\n" not in str(caught.value)


def test_a_run_given_twice_is_refused() -> None:
    with pytest.raises(UserError, match="given 2 times"):
        build([run("fm", 0), run("fm", 0)], TITLE)


def test_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="no records"):
        build([], TITLE)


# Renderers


@pytest.mark.parametrize("width", [80, 100, 120])
def test_text_fits_its_width(width: int) -> None:
    table = cifar10(*(cifar_run(method, seed) for method in ("fm", "nayer", "cmi") for seed in (0, 1)))
    assert max(len(line) for line in to_text(table, width).splitlines()) <= width


def test_numbers_align_at_the_decimal_point() -> None:
    found = [cifar_run("fm", 0, 9.5), cifar_run("nayer", 0, 90.0), cifar_run("nayer", 1, 91.0)]
    lines = [line for line in to_text(cifar10(*found)).splitlines() if line.startswith(("teacher", "fm", "nayer"))]
    assert len({line.index(".") for line in lines}) == 1


def test_a_heading_over_columns_stands_over_no_others() -> None:
    def column(key: str, over: str = "") -> Column:
        return Column(key, key, lambda row: ("1.0",), over)

    columns = (column("a"), column("b", "a heading that is longer"), column("c"), column("d", "short"))
    text = to_text(Table(TITLE, columns, (Row("x", "method", None, None),), (), (), {}))
    over, names = text.splitlines()[2:4]
    for name, heading in (("b", "a heading that is longer"), ("d", "short")):
        assert over.index(heading) <= names.index(name) <= over.index(heading) + len(heading)


def test_latex_rows_may_begin_with_a_bracket() -> None:
    """Behind ``\\midrule`` it would be an option of that."""
    lines = to_latex(build([run("fm", 0), run("[x]", 0)], TITLE)).splitlines()
    assert any(line.startswith("{}[x]") for line in lines)
    assert not any(line.startswith(("[", "*")) for line in lines)


def test_what_a_narrow_text_leaves_out_is_said(digits: Table) -> None:
    text = to_text(digits, 100)
    assert "left out to fit the width: sampling, images, MiB" in text
    assert "outside knowledge: the training data and labels (teacher, scratch); the training data (" in text


def test_csv_holds_numbers_in_full_and_the_shared_facts(digits: Table) -> None:
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO(to_csv(digits)))}
    assert float(lines["scratch"]["last"]) == pytest.approx(287.5 / 3)
    assert (lines["deepinv"]["last_half_width"], lines["cmi"]["last"], lines["teacher"]["n"]) == ("", "", "")
    assert {line["protocol"] for line in lines.values()} == {"smoke"}


def test_latex_is_escaped() -> None:
    table = build([run("my_method", 0, None, status="failed", reason="50% of {a}\\b & #1 ~x^2 <$>")], "R&D_1")
    text = to_latex(table)
    assert r"\caption{R\&D\_1}" in text
    assert r"50\% of \{a\}\textbackslash{}b \& \#1 \textasciitilde{}x\textasciicircum{}2" in text
    assert r"\textless{}\$\textgreater{}" in text


def test_latex_rows_have_as_many_cells_as_columns(digits: Table) -> None:
    lines = to_latex(digits).splitlines()
    spec = next(line for line in lines if line.startswith(r"\begin{tabular}"))
    count = len(spec.removeprefix(r"\begin{tabular}").replace("@{}", "").strip("{}"))
    body = [line for line in lines[lines.index(r"\midrule") :] if line.endswith(r" \\")]
    assert {line.replace(r"\&", "").count("&") + 1 for line in body} == {count}


def test_markdown_keeps_bars_in_their_cell() -> None:
    table = build([run("nayer", 0, config={"prompt": "a|b"}), run("nayer", 0, config={"prompt": "c"})], TITLE)
    assert r"| nayer prompt=a\|b |" in to_markdown(table)


def test_several_tables_make_one_csv_with_one_heading(digits: Table) -> None:
    both = list(csv.DictReader(io.StringIO(to_csv(digits, cifar10(cifar_run("fm"))))))
    assert [line["method"] for line in both[-2:]] == ["teacher", "fm"]
    assert {line["dataset"] for line in both} == {"digits", "cifar10"}


# Several pairs

TWO_PAIRS = make_suite("t", TITLE, "digits", ["fm"], "smoke", ["lenet5:lenet5_half", "lenet5:other"], ())


@pytest.mark.parametrize("show", [printing.table, printing.diversity])
def test_several_pairs_are_printed_as_one_csv(show: Any, capsys: pytest.CaptureFixture[str]) -> None:
    show(TWO_PAIRS, [run("fm", 0, pair=pair) for pair in TWO_PAIRS.pairs], "csv")
    lines = capsys.readouterr().out.splitlines()
    assert [line["student"] for line in csv.DictReader(lines) if line["method"] == "fm"] == ["lenet5_half", "other"]
    assert "" not in lines


def test_a_pair_that_cannot_be_compared_takes_no_other_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    mixed = [run("fm", seed, pair="lenet5:lenet5_half", protocol_version=seed + 1) for seed in (0, 1)]
    with pytest.raises(UserError, match="lenet5:lenet5_half: one report can't mix protocol versions"):
        printing.table(TWO_PAIRS, [*mixed, run("fm", 0, pair="lenet5:other")], "text")
    assert "teacher:student lenet5:other" in capsys.readouterr().out


# Plots


def test_a_run_that_stopped_early_keeps_its_last_accuracy() -> None:
    whole, stopped = run("fm", 0, 90.0), run("fm", 1, 90.0)
    stopped = stopped.model_copy(update={"curve": stopped.curve[:3]})
    found = band([whole, stopped])
    assert found.seconds == tuple(point.seconds for point in whole.curve)
    assert (found.low[-1], found.high[-1]) == (stopped.curve[2].accuracy, 90.0)


def test_a_teacher_of_unknown_accuracy_has_no_line(tmp_path: Path) -> None:
    path = accuracy_against_time([run("fm", 0, teacher=UNKNOWN)], tmp_path / "curve.svg", TITLE)
    assert "teacher" not in path.read_text()


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_is_written(suffix: str, tmp_path: Path) -> None:
    path = accuracy_against_time(fixture_records(), tmp_path / "new" / f"curve.{suffix}", TITLE, ORDER)
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")


def test_plot_shows_every_method_in_its_own_colour(tmp_path: Path) -> None:
    from matplotlib.image import imread

    path = accuracy_against_time(fixture_records(), tmp_path / "curve.png", TITLE, ORDER)
    pixels = (np.asarray(imread(path))[:, :, :3] * 255).round().astype(int)
    assert pixels.shape[:2] == (580, 700)  # 3.5 x 2.9 inches at 200 dpi
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73), (0xCC, 0x79, 0xA7)):
        assert (np.abs(pixels - colour).max(axis=2) < 3).sum() > 50


def test_the_same_records_give_the_same_figure(tmp_path: Path) -> None:
    first, second = (accuracy_against_time(fixture_records(), tmp_path / name) for name in ("a.svg", "b.svg"))
    assert first.read_bytes() == second.read_bytes()


def test_a_figure_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of a job array end together, and all of them write the same figure."""
    from matplotlib.figure import Figure

    def stopped(_self: Figure, target: Any, **_: Any) -> None:
        if isinstance(target, Path):
            target.write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "a.png"
    path.write_bytes(b"an earlier one")
    monkeypatch.setattr(Figure, "savefig", stopped)
    with pytest.raises(KeyboardInterrupt):
        accuracy_against_time(fixture_records(), path)
    assert path.read_bytes() == b"an earlier one"


def test_a_dollar_sign_begins_no_formula(tmp_path: Path) -> None:
    found = [run("fm", 0, config={"prompt": rf"${prompt}\nothing$"}) for prompt in "ab"]
    path = accuracy_against_time(found, tmp_path / "curve.svg", r"$\nothing$")
    assert path.stat().st_size > 1000


def test_a_long_title_of_a_plot_is_folded(tmp_path: Path) -> None:
    title = "digits: spaceshipnet, pre_dfkd, cae_dfkd, mb_dfkd, ta_dfkd, deepinv"
    text = accuracy_against_time([run("fm", 0)], tmp_path / "curve.svg", title).read_text(encoding="utf-8")
    assert "<!-- ta_dfkd, deepinv -->" in text


def test_a_plot_says_what_its_bands_and_times_are(tmp_path: Path) -> None:
    found = [run("fm", seed, 90.0 + seed, synthesis=599) for seed in (0, 1)]  # and other phases: above ten minutes
    text = accuracy_against_time(found, tmp_path / "curve.svg").read_text(encoding="utf-8")
    assert "<!-- bands: lowest to highest seed -->" in text
    assert "time without evaluation [minutes]" in text
    short = accuracy_against_time([run("fm", 0, synthesis=590)], tmp_path / "short.svg").read_text(encoding="utf-8")
    assert "time without evaluation [seconds]" in short
    assert "lowest to highest" not in short


def test_plot_refuses_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a name that ends in"):
        accuracy_against_time(fixture_records(), tmp_path / "curve.doc")


def test_plot_without_a_curve_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to draw"):
        accuracy_against_time([run("fm", 0, None, status="failed")], tmp_path / "curve.png")
