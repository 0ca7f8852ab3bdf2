"""Methods that are known and not built: listed with the reason, and named by the error of a run that asks for one."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dfkd_bench import cli, listing, plugins
from dfkd_bench.errors import UserError

FOUND = plugins.discover()
KEYS = {"title", "year", "venue", "link", "reason"}
PLUGIN = '''"""A method that somebody has built at last."""

import torch

from dfkd_bench.method import Method, Synthesis


class Own(Method):
    def synthesize(self, student, at):
        return Synthesis(torch.zeros(2, *self.task.image_shape))
'''


def shown(found: plugins.Plugins) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=200).print(listing.methods(found))
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize("name", sorted(plugins.unavailable()))
def test_every_entry_is_complete_and_not_built(name: str) -> None:
    facts = plugins.unavailable()[name]
    assert set(facts) == KEYS
    assert isinstance(facts["year"], int)
    assert facts["link"].startswith("https://")
    assert "\n" not in facts["reason"]
    assert name not in FOUND.methods


@pytest.mark.parametrize("name", ["ssd_kd", "SSD-KD", "odsd"])
def test_a_run_says_in_one_line_why_it_cannot(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dfkd-bench", "run", "-m", name, "-d", "digits", "-o", str(tmp_path / "out")])
    monkeypatch.setenv("DFKD_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    written = capsys.readouterr()
    assert ended.value.code == 2
    assert written.out == ""
    reason = plugins.unavailable()[name.lower().replace("-", "_")]["reason"]
    assert written.err == f"error: method '{name}' is known, but not available: {reason}\n"
    assert list(tmp_path.iterdir()) == []


def test_other_names_are_unknown_as_ever() -> None:
    with pytest.raises(UserError, match="unknown method 'nayr': did you mean 'nayer'"):
        FOUND.source("nayr")


def test_the_list_has_a_second_table_below_the_first() -> None:
    lines = shown(FOUND)
    at = lines.index("Not available")
    below = {line.split()[0] for line in lines[at + 1 :] if line and not line.startswith(" ")}
    above = {line.split()[0] for line in lines[:at] if line and not line.startswith(" ")}
    assert below == {"method", *plugins.unavailable()}
    assert {"method", *FOUND.methods} <= above


def test_the_columns_of_the_list_are_aligned() -> None:
    lines = shown(FOUND)
    table = lines[lines.index("Not available") + 1 :]
    start = table[0].index("venue")
    assert all(table[row][start - 1] == " " != table[row][start] for row, line in enumerate(table) if line[:1].strip())


def test_the_list_says_why_and_where() -> None:
    text = " ".join(" ".join(shown(FOUND)).split())
    assert "arxiv.org/abs/2406.07876" in text
    assert "README and no code" in text


def test_a_plugin_that_has_it_is_listed_above_only(tmp_path: Path) -> None:
    path = tmp_path / "kd3.py"
    path.write_text(PLUGIN)
    found = plugins.discover([path])
    assert found.source("kd3").kind == "file"
    assert [line.split()[:2] for line in shown(found) if line.startswith("kd3")] == [["kd3", "(file)"]]
