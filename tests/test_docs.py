"""The pages: links lead somewhere, and every method has a card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dfkd_bench import data, plugins

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "results" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_project_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_method_has_a_card() -> None:
    cards = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "methods").glob("*.md"))
    names = [name for name, source in plugins.discover().methods.items() if source.kind == "built-in"]
    missing = [
        name for name in names if not (ROOT / "docs" / "methods" / f"{name}.md").exists() and f"`{name}`" not in cards
    ]
    assert missing == []


def test_the_index_of_methods_has_them_all() -> None:
    page = (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    names = [name for name, source in plugins.discover().methods.items() if source.kind == "built-in"]
    assert [name for name in names if f"[{name}]" not in page and f"`{name}`" not in page] == []


def test_every_data_set_is_on_the_page() -> None:
    page = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    assert [name for name in data.dataset_names() if name not in page] == []
