"""The pages: links lead somewhere, and every method has a card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dfkd_bench import cli, data, plugins

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


COMMANDS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: part for part in COMMANDS.split("\n## ")}


def commands() -> dict[str, Any]:
    """The commands by name, as their sections on the page are called."""
    found: dict[str, Any] = {}
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        parts = getattr(command, "commands", None)
        found |= {f"{name} {part}": one for part, one in parts.items()} if parts else {name: command}
    return found


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_option_is_in_the_section_of_its_command(name: str) -> None:
    shared = [text for title, text in SECTIONS.items() if title.startswith("Which table") and name in words(title)]
    section = "".join([SECTIONS[name], *shared])
    options = [option.opts for option in commands()[name].params if option.param_type_name == "option"]
    assert [names for names in options if not any(is_in(one, section) for one in names)] == []


@pytest.mark.parametrize("name", sorted(commands()))
def test_an_options_names_stand_in_one_line(name: str) -> None:
    """In any section: most say "as above"."""
    options = [option.opts for option in commands()[name].params if option.param_type_name == "option"]
    lines = COMMANDS.splitlines()
    assert [names for names in options if not any(all(is_in(one, line) for one in names) for line in lines)] == []


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def is_in(option: str, text: str) -> bool:
    return re.search(rf"`{option}[` ]", text) is not None


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_command_for_developers_is_on_the_page(path: Path) -> None:
    assert f"`python -m dfkd_bench.benchmarks.{path.stem}`" in COMMANDS
