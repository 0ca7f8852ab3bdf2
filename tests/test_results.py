"""What is committed under results/ hangs together: records in, tables out, and the README shows the same table."""

from __future__ import annotations

import csv
import hashlib
import re
import shlex
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest

from dfkd_bench import cli, data, plugins, teachers
from dfkd_bench.ablation import RowRecords, read_ablation
from dfkd_bench.ablation_plan import AblationPlan, plan_ablation
from dfkd_bench.benchmarks import cards
from dfkd_bench.job import Job
from dfkd_bench.record import Record, read_all, record_path
from dfkd_bench.report import ablation_table
from dfkd_bench.report import table as tables
from dfkd_bench.suite import expand, read_suite, with_all

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
COMMITTED = sorted(path.stem for path in (RESULTS / "tables").glob("*.md"))
ABLATIONS = sorted(path.stem for path in (RESULTS / "ablations").glob("*.md"))

FOUND = plugins.discover()


def jobs_of(name: str) -> list[Job]:
    suite = read_suite(name)
    return expand(suite, FOUND, data.dataset(suite.dataset), "cpu", "fp32")


def records_of(name: str) -> list[Record]:
    """The committed records of a suite's jobs, whatever precision the machine chose that made them."""
    return cards.records_of(name, RESULTS, FOUND)


def built(name: str) -> tables.Table:
    suite = with_all(read_suite(name), FOUND)
    return tables.build(records_of(name), suite.title, [*suite.controls, *suite.methods])


def test_there_are_committed_tables() -> None:
    assert "smoke_digits" in COMMITTED


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_records_make_the_committed_table(name: str) -> None:
    assert tables.to_markdown(built(name)) == (RESULTS / "tables" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", COMMITTED)
def test_every_cell_of_a_committed_table_has_its_record(name: str) -> None:
    found = {(record.job.method, record.job.seed) for record in records_of(name)}
    assert found == {(job.method, job.seed) for job in jobs_of(name)}


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_figures_are_there(name: str) -> None:
    assert (RESULTS / "figures" / f"{name}.png").is_file()


def ablation_of(stem: str) -> tuple[AblationPlan, list[RowRecords]]:
    """A committed ablation with its records, in the precision that the machine chose that made them."""
    dataset = next(name for name in ("glyphs16", "fashion_mnist", "digits") if stem.endswith(f"_{name}"))
    ablation = read_ablation(stem.removesuffix(f"_{dataset}"), dataset, None, None, None, [])
    plans = [plan_ablation(ablation, FOUND, RESULTS, None, "cpu", precision) for precision in ("fp32", "bf16")]
    planned = max(plans, key=lambda plan: len(plan.plan.records()))
    return planned, list(planned.results(planned.plan.records()))


@pytest.mark.parametrize("stem", ABLATIONS)
def test_committed_records_make_the_committed_ablation(stem: str) -> None:
    planned, results = ablation_of(stem)
    built = ablation_table.build(planned.ablation, results)
    place = RESULTS / "ablations" / stem
    assert ablation_table.to_markdown(built) == place.with_suffix(".md").read_text(encoding="utf-8")
    verdicts = place.with_name(f"{stem}-verdicts.csv").read_text(encoding="utf-8")
    assert ablation_table.verdicts_csv(built) == verdicts


@pytest.mark.parametrize("stem", ABLATIONS)
def test_every_row_of_a_committed_ablation_has_five_seeds_or_a_reason(stem: str) -> None:
    for row in ablation_of(stem)[1]:
        assert row.missing or len(row.records) == 5, row


def test_the_readme_shows_the_committed_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.to_text(built("smoke_digits"), 120) in readme


PAGES = ("README.md", "docs/ablations.md")
INTERVAL = re.compile(r"([+-]?\d+\.\d+)(?: times)?(?: as fast)? \[(-?\d+\.\d+), (-?\d+\.\d+)\]")


def rounded(value: float, like: str) -> float:
    """To as many digits as ``like`` has, halves away from zero."""
    digits = len(like.partition(".")[2])
    return float(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def verdicts() -> Iterator[tuple[float, float, float]]:
    """Advantage, low and high of every comparison, and of the same the other way round."""
    for path in sorted((RESULTS / "ablations").glob("*-verdicts.csv")):
        for line in csv.DictReader(path.read_text(encoding="utf-8").splitlines()):
            if all(line[name] not in ("", "inf", "-inf") for name in ("advantage", "low", "high")):
                mean, low, high = (float(line[name]) for name in ("advantage", "low", "high"))
                yield mean, low, high
                yield -mean, -high, -low


@pytest.mark.parametrize("page", PAGES)
def test_the_intervals_of_a_page_are_those_of_the_verdicts(page: str) -> None:
    """Rounded once, from the full numbers."""
    known = list(verdicts())
    quoted = INTERVAL.findall((ROOT / page).read_text(encoding="utf-8"))
    assert len(quoted) > 5
    strangers = []
    for texts in quoted:
        values = tuple(map(float, texts))
        if not any(tuple(map(rounded, exact, texts)) == values for exact in known):
            strangers.append(texts)
    assert strangers == []


COMMANDS = re.findall(r"^    dfkd-bench ([^#\n]+)", (RESULTS / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_print_a_table(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    cli.app(shlex.split(command), standalone_mode=False)
    assert "last epoch" in capsys.readouterr().out


def test_records_lie_where_their_jobs_say() -> None:
    for record in read_all(RESULTS):
        assert record_path(RESULTS, record.job).is_file()
        assert record.job_id == record.job.id


def test_no_committed_record_of_the_digits_is_stale() -> None:
    """A method's source, or what counts of it, has changed: its records have to be made anew."""
    hashes = {name: source.same_results() for name, source in FOUND.methods.items()}
    facts = {(one.job.method, one.method.source_sha256) for one in read_all(RESULTS) if one.job.dataset == "digits"}
    assert {name for name, source in facts if source not in hashes[name]} == set()


TEACHERS = sorted(RESULTS.glob("teachers/*/*/teacher.json"))


@pytest.mark.parametrize("card", TEACHERS, ids=lambda path: path.parent.name)
def test_a_committed_teacher_has_the_weights_that_its_card_names(card: Path) -> None:
    weights = (card.parent / "weights.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == teachers.read_card(card.parent).sha256


@pytest.mark.parametrize("card", TEACHERS, ids=lambda path: path.parent.name)
def test_a_committed_teacher_is_the_one_of_its_records(card: Path) -> None:
    kept = teachers.read_card(card.parent)
    used = {
        record.teacher.sha256
        for record in read_all(RESULTS)
        if record.teacher and (record.job.dataset, record.job.teacher) == (kept.dataset, kept.spec)
    }
    assert used == {kept.sha256}


def test_committed_records_name_no_folder_of_a_machine() -> None:
    for path in (RESULTS / "records").glob("*/*/*.json"):
        text = path.read_text(encoding="utf-8")
        assert not any(folder in text for folder in ("/home/", "/root/", "/work/", "/tmp/", "/Users/"))


def test_no_committed_run_opened_data_in_its_method() -> None:
    for record in read_all(RESULTS):
        assert not [file.path for file in record.files if file.phase == "method"]
