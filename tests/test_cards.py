"""The results in the cards of the methods are those of the committed records and trials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfkd_bench import plugins
from dfkd_bench.benchmarks import cards
from dfkd_bench.errors import UserError

ROOT = Path(__file__).parents[1]
RESULTS, CARDS = ROOT / "results", ROOT / "docs" / "methods"
FOUND = plugins.discover()
WITH_RESULTS = sorted(path.stem for path in CARDS.glob("*.md") if cards.BEGIN in path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tables() -> cards.Tables:
    return cards.tables_of(RESULTS, FOUND)


@pytest.mark.parametrize("method", WITH_RESULTS)
def test_a_card_has_the_results_of_the_records(method: str, tables: cards.Tables) -> None:
    page = (CARDS / f"{method}.md").read_text(encoding="utf-8")
    assert cards.with_results(page, method, RESULTS, tables) == page


def test_every_method_of_the_main_table_has_results_in_its_card(tables: cards.Tables) -> None:
    methods = {one.job.method for one in tables["smoke_digits"]}
    assert methods - set(WITH_RESULTS) == {"ood_kd"}  # has no card of its own


def test_a_page_without_marks_stays_as_it_is() -> None:
    assert cards.with_results("# A card", "nayer", RESULTS, {}) == "# A card"


def test_a_page_with_one_mark_is_refused() -> None:
    with pytest.raises(UserError, match=r"the card of nayer has one of the marks"):
        cards.with_results(f"# A card\n{cards.BEGIN}\ntext", "nayer", RESULTS, {})


def test_outside_of_a_checkout_it_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["cards"])
    with pytest.raises(SystemExit) as ended:
        cards.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: there is no folder results here: call this in the root of a checkout\n"


def test_what_stands_around_the_marks_stays() -> None:
    page = f"before\n{cards.BEGIN}\nold\n{cards.END}\nafter"
    new = cards.with_results(page, "none_such", RESULTS, {})
    assert new == f"before\n{cards.BEGIN}\n{cards.HEAD}{cards.END}\nafter"


def test_the_chosen_trial_is_bold(tmp_path: Path) -> None:
    accuracies = [{"100": 50.0, "101": 70.0}, {"100": 61.238}]
    trials = [{"validation_accuracy": accuracy, "student_steps": 600} for accuracy in accuracies]
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "digits.json").write_text(
        json.dumps({"mine": {"seeds": [100, 101], "chosen": 1, "trials": trials}})
    )
    assert cards._trials("mine", "digits", 600, tmp_path) == "50.00, **61.24**"
    assert cards._trials("mine", "digits", 240, tmp_path) == "50.00, **61.24** (600 steps)"


def test_equal_budgets_have_trials_of_their_own(tmp_path: Path) -> None:
    trials = [{"validation_accuracy": {"100": 70.0}, "student_steps": 600}]
    (tmp_path / "trials").mkdir()
    file = tmp_path / "trials" / "digits_equal.json"
    file.write_text(json.dumps({"mine": {"seeds": [100], "chosen": 0, "trials": trials}}))
    assert cards._trials("mine", "digits", 600, tmp_path, equal=True) == "**70.00**"
    assert cards._trials("mine", "digits", 600, tmp_path) == "-"


def test_without_trials_there_is_a_dash(tmp_path: Path) -> None:
    assert cards._trials("mine", "digits", 240, tmp_path) == "-"
