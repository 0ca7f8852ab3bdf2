"""The command line: exit codes, one line for wrong input, and the README's job from the first run to the last table."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from dfkd_bench import cli, data, listing, plan, plugins
from dfkd_bench.errors import UserError
from dfkd_bench.models import build_model
from dfkd_bench.record import Point, Score, read_all
from dfkd_bench.record import write as write_record
from dfkd_bench.run import failed
from dfkd_bench.suite import expand, make_suite

RESULTS = Path(__file__).parents[1] / "results"

FAILING = """
from dfkd_bench.method import Method, MethodConfig, Synthesis

class Failing(Method):
    Config = MethodConfig
    def synthesize(self, student, at):
        raise ZeroDivisionError("no luck")
"""
SLOW = """
import time
import torch
from dfkd_bench.method import Method, MethodConfig, Synthesis

class Slow(Method):
    Config = MethodConfig
    def synthesize(self, student, at):
        time.sleep(0.3)
        return Synthesis(torch.rand(16, *self.task.image_shape))
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def error(self) -> str:
        """Its only line on stderr, of wrong input."""
        assert (self.code, self.out) == (2, "")
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        return self.err


Command = Callable[..., Ended]


@pytest.fixture(scope="module", autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore SIGINT, and so all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """``command("list", "methods")``: the console script in this process, with an empty home and no network."""

    def no_network(address: str) -> NoReturn:
        raise OSError("no network in tests")

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["dfkd-bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        captured = capsys.readouterr()
        return Ended(ended.value.code, captured.out, captured.err)

    monkeypatch.delenv("DFKD_BENCH_DATA", raising=False)
    monkeypatch.delenv("DFKD_BENCH_RESULTS", raising=False)
    monkeypatch.setattr("dfkd_bench.data._fetch._download", no_network)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(home.parent)
    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


DIGITS = ("-m", "nayer", "-d", "digits")

# --- Wrong input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "-m", "nayr", "-d", "digits"), "unknown method 'nayr': did you mean 'nayer'?"),
        (("run", "-m", "nayer", "-d", "digit"), "unknown data set 'digit': did you mean 'digits'?"),
        (("run", "-m", "nayer", "-d", "controls"), "unknown data set 'controls'"),
        (("run", "-m", "nayer", "-d", "lead_method"), "unknown data set 'lead_method'"),
        (("plan", "nayer_noise", "-d", "controls"), "unknown data set 'controls'"),
        (("run", *DIGITS, "--pair", "wrn16_2:wrn16_3"), "unknown model 'wrn16_3': did you mean 'wrn16_"),
        (("run", *DIGITS, "--pair", "wrn16_2"), "expected TEACHER:STUDENT"),
        (("run", "smoke_digit"), "unknown suite 'smoke_digit': did you mean 'smoke_digits'?"),
        (("run", "gone.toml"), "there is no suite file gone.toml"),
        (("run",), "give --methods and --dataset"),
        (("run", "smoke_digits", "-m", "fm"), "leave out --methods"),
        (("run", *DIGITS, "--protocol", "smok"), "unknown protocol 'smok': did you mean 'smoke'?"),
        (("run", *DIGITS, "--split", "train"), "unknown split 'train'"),
        (("run", *DIGITS, "--precision", "fp16"), "unknown precision 'fp16'"),
        (("run", *DIGITS, "--rerun", "fail"), "did you mean 'failed'?"),
        (("run", *DIGITS, "-s", "nayer.generator_step=4"), "did you mean 'generator_steps'?"),
        (("run", *DIGITS, "-s", "nayr.loops=4"), "did you mean 'nayer'?"),
        (("run", *DIGITS, "-s", "nayer.loops"), "expected METHOD.SETTING=VALUE"),
        (("run", *DIGITS, "-s", "nayer.loops=0"), "nayer: loops: Input should be greater than or equal to 1"),
        (("run", *DIGITS, "-s", "nayer.lr=fast"), "nayer: lr: Input should be a valid number"),
        (("run", *DIGITS, "-s", "nayer.encoder=sbrt"), "sbrt"),
        (("plan", *DIGITS, "-s", "nayer.encoder=sbrt"), "nayer: unknown text encoder 'sbrt': did you mean 'sbert'?"),
        (("plan", *DIGITS, "-s", "nayer.encoder="), "nayer: unknown text encoder ''"),
        (("plan", *DIGITS, "-s", "nayer.encoder=onehot:"), "has nothing after the colon"),
        (("plan", *DIGITS, "-s", "nayer.encoder=onehot:4"), "nayer: text encoder 'onehot:4' is too narrow"),
        (("plan", *DIGITS, "-s", "nayer.encoder=file:gone.npy"), "nayer: can't read one matrix [10, d] from gone.npy"),
        (("plan", *DIGITS, "-s", "nayer.prompt={nmae}"), "nayer: unknown field of the prompt 'nmae': did you mean"),
        (("run", *DIGITS, "--init-images", "made"), "takes images to begin with (nayer): leave it out"),
        (("plan", "nayer_noise", "--init-images", "made"), "takes images to begin with (nayer): leave it out"),
        (("ablate", "nayer_noise", "--methods", "fm"), "--methods"),
        (("run", *DIGITS, "--seeds", "2-0"), "did you mean 0-2?"),
        (("run", *DIGITS, "--seeds", "one"), "expected numbers and ranges"),
        (("run", *DIGITS, "--device", "cuda"), "this machine has 0 CUDA devices"),
        (("run", *DIGITS, "--device", "gpu"), "expected auto, cpu, cuda or cuda:N"),
        (("run", *DIGITS, "--workers", "0"), "--workers"),
        (("run", *DIGITS, "--plugin", "gone.py"), "there is no plugin file"),
        (("run", *DIGITS, "--epochs", "3"), "--epochs"),
        (("run", "-m", "nayer", "-d", "folder:gone"), "gone"),
        (("run", "-m", "nayer", "-d", "mnist"), "mnist"),
        (("rum",), "rum"),
        (("list", "method"), "unknown kind 'method': did you mean 'methods'?"),
        (("list", "models", "--data-root", "x"), "--data-root is for `list datasets`"),
        (("describe", "nayr"), "did you mean 'nayer'?"),
        (("describe", "gone.py"), "there is no plugin file"),
        (("check", "gone.py"), "there is no plugin file"),
        (("table", *DIGITS), "there are no records of this suite in dfkd-results with precision fp32 (--device auto,"),
        (("table", *DIGITS, "--precision", "bf16"), "if there are such: --precision fp32"),
        (("table", *DIGITS, "--format", "html"), "unknown format 'html'"),
        (("plot", *DIGITS), "there are no records"),
        (("teacher", "train", "-d", "digits", "--model", "wrn16_3"), "unknown model 'wrn16_3'"),
        (("teacher", "train", "-d", "digits", "-s", "teacher.epoch=3"), "did you mean 'epochs'?"),
        (("teacher", "import", "digits_convnet8.pth"), "there is no file"),
        (("teacher", "verify", "nobody"), "there is no teacher 'nobody'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], words: str, command: Command, home: Path
) -> None:
    assert words in command(*arguments, *(("-q",) if arguments[0] == "run" else ())).error()
    assert not (home.parent / "dfkd-results" / "records").exists()
    assert not (home / "runs").exists()


def test_a_missing_data_set_says_what_was_looked_for_and_where(command: Command, tmp_path: Path) -> None:
    line = command("run", "-q", "-m", "nayer", "-d", "mnist", "--data-root", tmp_path).error()
    assert "train-images-idx3-ubyte.gz" in line
    assert str(tmp_path) in line


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("mine.py", "import no_such_package", "fails to import: ModuleNotFoundError"),
        ("mine.py", "def (:", "fails to import: SyntaxError"),
        ("nayer.py", FAILING, "two methods are called 'nayer': built-in of dfkd-bench and file "),
    ],
)
def test_a_wrong_plugin_is_one_line(name: str, text: str, words: str, command: Command, tmp_path: Path) -> None:
    path = write(tmp_path, name, text)
    line = command("run", *DIGITS, "--plugin", path).error()
    assert words in line
    assert str(path) in line


def test_a_method_that_wants_text_without_saying_which_is_one_line(command: Command, tmp_path: Path) -> None:
    text = FAILING.replace("    Config", "    needs = frozenset({'label_text'})\n    Config")
    path = write(tmp_path, "mine.py", text)
    assert (
        "no settings `encoder` and `prompt`" in command("run", "-m", "mine", "-d", "digits", "--plugin", path).error()
    )


def test_an_output_that_cannot_be_written_is_told_before_the_work(command: Command, tmp_path: Path) -> None:
    blocked = write(tmp_path, "file", "no folder") / "results"
    assert str(blocked) in command("run", "-q", *DIGITS, "-o", blocked).error()


def test_a_home_that_cannot_be_written_is_one_line(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DFKD_BENCH_HOME", str(write(tmp_path, "file", "no folder") / "home"))
    line = command("teacher", "train", "-q", "-d", "digits", "-s", "teacher.epochs=1").error()
    assert "file" in line


def test_a_teacher_for_other_classes_is_refused(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "digits_convnet8.pth"
    torch.save({"state_dict": build_model("convnet8", 100, 1).state_dict()}, path)
    assert "does not fit convnet8 for digits (10 classes)" in command("teacher", "import", path).error()


def test_a_damaged_record_is_named(command: Command, tmp_path: Path) -> None:
    (job,) = re.findall(r"^([0-9a-f]{12}) ", command("plan", *DIGITS, "--no-controls").out, re.MULTILINE)
    path = tmp_path / "dfkd-results" / "records" / "digits" / "nayer" / f"{job}.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    line = command("table", *DIGITS, "--no-controls").error()
    assert f"{path.name} is damaged or no record of schema version 1 (Invalid JSON: EOF while parsing" in line
    assert "delete it to have the run done again" in line
    assert path.read_text() == "{"  # it is left as it is


def test_any_error_of_the_disk_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(plan, "carry_out", full)
    assert "/somewhere: No space left on device" in command("run", "-q", *DIGITS).error()


# --- Stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 3), (signal.SIGINT, 130)])
def test_a_stopped_command_says_that_nothing_is_lost(
    sent: signal.Signals, code: int, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), sent)
        time.sleep(5)

    monkeypatch.setattr(plan, "carry_out", stop)
    ended = command("run", "-q", *DIGITS)
    assert ended.code == code
    assert "nothing is lost, the same command goes on" in ended.err
    assert "Traceback" not in ended.err


def test_runs_of_another_process_are_told_and_leave_the_tables_as_they_are(
    command: Command, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = home.parent / "dfkd-results" / "tables" / "nayer_digits.md"
    table.parent.mkdir(parents=True)
    table.write_text("made before")
    monkeypatch.setattr(plan, "carry_out", lambda *_: [])  # another process holds all of them
    ended = command("run", "-q", *DIGITS, "--no-controls", "--seeds", "0-1", "--device", "cpu")
    assert (ended.code, ended.out) == (3, "")
    assert "2 of 2 runs are under way in another process" in ended.err
    assert table.read_text() == "made before"


def test_only_the_plain_suite_has_its_plain_name(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(plan, "carry_out", lambda *_: [None])
    monkeypatch.setattr(cli.printing, "results", lambda suite, *_: written.append(suite.name))
    monkeypatch.setattr(cli, "_told_stale", lambda *_: frozenset())
    monkeypatch.setattr(cli, "_exit_unless_done", lambda *_: None)
    changes = ["", "--seeds 0-1", "--split validation", "--no-controls", "--pair wrn16_2:wrn16_1"]
    for change in (*changes, "-s nayer.lr=0.1 -s nayer.epochs=4", "-s nayer.epochs=4 -s nayer.lr=0.1"):
        command("run", "-q", *DIGITS, *change.split())
    *names, one, other = [name.removeprefix("nayer_digits") for name in written]
    assert names == ["", "", "-validation", "-no_controls", "-wrn16_2_wrn16_1"]
    assert one == other != ""


def test_a_suites_table_of_another_precision_has_a_name_of_its_own(
    command: Command, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(cli.printing, "results", lambda suite, *_: written.append(suite.name))
    monkeypatch.setattr(cli.printing, "figures", lambda suite, *_: ([written.append(suite.name)], None))
    monkeypatch.setattr(plan, "carry_out", lambda planned, *_: planned.records() or [None])
    monkeypatch.setattr(cli, "_told_stale", lambda *_: frozenset())
    monkeypatch.setattr(cli, "_exit_unless_done", lambda *_: None)
    suite = make_suite("x", "x", "digits", ("nayer",), controls=())
    (job,) = expand(suite, plugins.discover(), data.dataset("digits"), "cpu", "bf16")
    write_record(home.parent / "dfkd-results", failed(job, plugins.discover(), "no luck"))
    for line in ("run -q --precision bf16", "run -q --precision fp32", "plot --precision bf16"):
        command(*line.split(), *DIGITS, "--no-controls", "--device", "cpu")
    assert [name.removeprefix("nayer_digits-no_controls") for name in written] == ["", "-fp32", ""]


def test_windows_is_told_at_once(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    line = command("list", "methods").error()
    assert line == "error: dfkd-bench runs on Linux and macOS: on Windows use it in WSL\n"


@pytest.mark.parametrize("given", ["--output=~/x", "$DFKD_BENCH_RESULTS"])
def test_a_tilde_is_the_users_home(
    given: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    if given.startswith("$"):
        monkeypatch.setenv(given[1:], "~/x")
    options = () if given.startswith("$") else (given,)
    assert f"in {tmp_path}/user/x with" in command("table", *DIGITS, *options).error()
    assert command("encode", "--encoder", "onehot", "-d", "digits", "-q", *options).code == 0
    assert (tmp_path / "user" / "x" / "embeddings").is_dir()
    assert not (tmp_path / "~").exists()


def test_a_tilde_of_nobody_is_one_line(command: Command) -> None:
    assert "no home folder of that user" in command("table", *DIGITS, "--output=~nobody_here/x").error()


def test_a_terminal_of_another_encoding_gets_what_it_can_show(command: Command) -> None:
    """Tables have signs such as a double dagger."""
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-m", "dfkd_bench", "table", "smoke_digits", "-o", str(RESULTS)]
    done = subprocess.run(line, env=environment, capture_output=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "nayer?".encode("latin-1") in done.stdout


STALE = "2 runs of failing were made by other code than today's: `--rerun stale` makes them anew"


@pytest.fixture
def edited(home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """Options of two runs that are done, of a method whose file was changed after the first: nothing is left to do."""
    path = write(home.parent, "failing.py", FAILING)
    found, output = plugins.discover([path]), home.parent / "dfkd-results"
    for job in expand(
        make_suite("x", "x", "digits", ("failing",), controls=(), seeds=(0, 1)), found, data.dataset("digits"), "cpu"
    ):
        point = Point(epoch=0, accuracy=50.0, loss=1.0, seconds=2.0)
        last, facts = Score(accuracy=50.0, epoch=0), {"status": "done", "reason": None, "seconds": {"setup": 2.0}}
        done = failed(job, found, "").model_copy(update={**facts, "curve": (point,), "last": last, "best": last})
        write_record(output, done)
    path.write_text(FAILING.replace("no luck", "other code"))
    monkeypatch.setattr(plan, "carry_out", lambda planned, *_: planned.records())
    return "-m", "failing", "-d", "digits", "--plugin", path, "--no-controls", "--seeds", "0-1", "--device", "cpu"


@pytest.mark.parametrize("name", ["run", "table", "plot"])
def test_records_of_a_method_that_was_edited_since_are_told(
    name: str, edited: tuple[object, ...], command: Command
) -> None:
    ended = command(name, *edited)
    assert ended.code == 0
    assert ended.err.count(STALE) == 1
    assert (" ".join(ended.out.split()).count(STALE) == 1) == (name != "plot")  # among the notes of the table


def test_records_of_todays_code_are_not_told(edited: tuple[object, ...], command: Command, home: Path) -> None:
    (home.parent / "failing.py").write_text(FAILING)
    ended = command("table", *edited)
    assert (ended.code, ended.err) == (0, "")
    assert "other code" not in ended.out


# --- Looking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("methods", ["nayer", "fm", "scratch"]),
        ("datasets", ["digits", "cifar10", "folder:PATH"]),
        ("models", ["wrn40_2", "resnet34"]),
        ("encoders", ["sbert", "clip", "doc2vec"]),
        ("suites", ["smoke_digits", "nayer_cifar10"]),
    ],
)
def test_list(kind: str, names: list[str], command: Command) -> None:
    ended = command("list", kind)
    assert (ended.code, ended.err) == (0, "")
    assert set(names) <= {line.split()[0] for line in ended.out.splitlines() if line}
    assert "``" not in ended.out  # a docstring's markup


def test_every_kind_is_listed_here() -> None:
    assert set(listing.KINDS) == {"methods", "datasets", "models", "encoders", "suites"}


def test_a_broken_package_is_a_warning_only(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = tmp_path / "site" / "their_bad-1.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: their-bad\nVersion: 1\n")
    (facts / "entry_points.txt").write_text("[dfkd_bench.models]\ntheirs = no_such_module:x\n")
    monkeypatch.syspath_prepend(str(facts.parent))
    ended = command("list", "methods")
    assert ended.code == 0
    assert ended.err.startswith("warning: models plugin 'theirs'")
    assert "nayer" in ended.out


def test_an_installed_method_that_is_broken_stops_no_suite(
    command: Command, install: Callable[[str, str, str], None]
) -> None:
    install("their_gone", "", "[dfkd_bench.methods]\ntheirs = no_such_module\n")
    ended = command("plan", "smoke_digits")
    assert ended.code == 0
    assert ended.err.startswith("warning: methods plugin 'theirs' of their-gone")
    assert "theirs" not in ended.out


def test_describe_shows_settings_with_bounds_and_sources(command: Command) -> None:
    ended = command("describe", "nayer")
    assert ended.code == 0
    assert re.search(r"generator_steps +int +40 +>= 1", ended.out)
    assert "2310.00258" in ended.out
    assert "scripts/nayer_100.sh" in ended.out


def test_describe_takes_a_file(command: Command, tmp_path: Path) -> None:
    built_in = Path(str(plugins.discover().source("fm").path))
    assert "meta_lr" in command("describe", built_in).out  # by itself: no clash of names
    ended = command("describe", write(tmp_path, "failing.py", f'"""No luck."""\n{FAILING}'))
    assert (ended.code, ended.out.splitlines()[0]) == (0, "No luck.")


def test_plan_starts_nothing(command: Command, home: Path) -> None:
    ended = command("plan", "smoke_digits")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"(\d+) jobs: \1 new \(protocol smoke, fp32\)", ended.out)
    assert "teacher to be trained first: wrn16_2 on digits (15 epochs)" in ended.out
    assert list(home.parent.iterdir()) == []


def test_a_plan_says_where_each_job_stands_in_the_last_column(command: Command) -> None:
    head, *rows = command("plan", "smoke_digits").out.splitlines()[:5]
    assert head.split()[-1] == "state"
    assert {row[head.index("state") :] for row in rows} == {"new"}


PREPARED = [
    (("-m", "nayer", "-d", "digits"), []),
    (("-m", "fm,nayer", "-d", "cifar10"), [
        "data: cifar10, not at hand: downloaded before the runs",
        "embeddings to be encoded first: clip, prompt 'a image of {name}' (nayer)",
    ]),
    (("-m", "nayer,cae_dfkd", "-d", "digits", "-s", "nayer.prompt=my {name}", "-s", "cae_dfkd.prompt=my {name}"), [
        "embeddings to be encoded first: sbert, prompt 'my {name}' (nayer, cae_dfkd)"
    ]),
    (("-m", "ood_kd", "-d", "digits", "-s", "ood_kd.pool=mnist"), [
        "data: mnist (pool of ood_kd), not at hand: downloaded before the runs"
    ]),
    (("-m", "cmi", "-d", "digits", "--init-images", "gone"), [
        "data: gone (initial_images of cmi): there is no such folder"
    ]),
    (("nayer_noise", "-d", "cifar100", "-s", "nayer.encoder=sbert"), [
        "data: cifar100, not at hand: downloaded before the runs"
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("table", "lines"), PREPARED, ids=lambda value: " ".join(value[:4]))
def test_a_plan_says_what_is_fetched_and_encoded_first(
    table: tuple[str, ...], lines: list[str], command: Command
) -> None:
    out = command("plan", *table).out
    assert [line for line in out.splitlines() if line.startswith(("data:", "embeddings"))] == lines


def test_prepare_gets_the_data_and_runs_nothing(command: Command, home: Path) -> None:
    ended = command("prepare", "-m", "nayer,dfnd", "-d", "digits")
    assert (ended.code, ended.out.splitlines()) == (0, [
        "data set digits: train, validation, test", "teacher to be trained first: wrn16_2", "5 runs are left"
    ])  # fmt: skip
    assert data.status("digits") == "ready"
    assert all(path.is_file() for path in data.dataset("glyphs16").prepared_files("train"))  # dfnd's pool
    assert sorted(path.name for path in home.parent.iterdir()) == [home.name]
    assert not (home / "runs").exists()
    assert not (home / "teachers").exists()


def test_prepare_says_what_can_not_be_had(command: Command) -> None:
    ended = command("prepare", *DIGITS, "-s", "nayer.encoder=file:gone.npy")
    assert ended.code == 2
    assert "can't read one matrix [10, d] from gone.npy" in ended.err


def test_prepare_gets_what_the_rows_of_an_ablation_read(command: Command, home: Path) -> None:
    write(home.parent, "two.toml", ABLATION)
    assert command("prepare", "two.toml", "-d", "digits").out.splitlines()[-1] == "10 runs are left"


ABLATION = """
title = "Two methods"
rows = [{ label = "a", method = "cmi" }, { label = "b", method = "nayer" }]
claims = [{ text = "a is better", source = "a test", compare = [["a", "b"]] }]
"""


@pytest.mark.parametrize("table", [("-m", "cmi,nayer", "-d", "digits"), ("two.toml",)], ids=["suite", "ablation"])
def test_init_images_reach_the_methods_that_take_some(table: tuple[str, ...], command: Command, home: Path) -> None:
    write(home.parent, "two.toml", ABLATION)
    set_by_hand = command("plan", *table, "-s", "cmi.initial_images=made").out
    assert command("plan", *table, "--init-images", "made").out == set_by_hand
    assert command("plan", *table, "--init-images", "other", "-s", "cmi.initial_images=made").out == set_by_hand
    assert command("plan", *table, "--init-images", "other").out != set_by_hand


def test_a_plan_shows_a_reason_as_it_is(command: Command, home: Path) -> None:
    suite = make_suite("x", "x", "digits", ("nayer",), controls=())
    (job,) = expand(suite, plugins.discover(), data.dataset("digits"), "cpu")
    write_record(home.parent / "dfkd-results", failed(job, plugins.discover(), "no images in [/x], [sbert] :dog:"))
    shown = command("plan", *DIGITS, "--no-controls", "--device", "cpu").out
    assert "failed: no images in [/x], [sbert] :dog:" in " ".join(shown.split())


def test_a_dry_run_is_a_plan(command: Command, home: Path) -> None:
    assert command("run", "--dry-run", *DIGITS).out == command("plan", *DIGITS).out
    assert list(home.parent.iterdir()) == []


def test_version(command: Command) -> None:
    assert command("--version").out == f"dfkd-bench {importlib.metadata.version('dfkd-bench')}\n"


def test_doctor_names_what_is_there(command: Command) -> None:
    ended = command("doctor")
    assert ended.code == 0
    assert "teachers: none yet" in ended.out


OWN_DATA = """
import numpy as np
from dfkd_bench.data import DataSet, Raw

def read(data_set, root, part):
    raise AssertionError("nothing is read to look for it")

DATASETS = {"own": DataSet("own", "mine", 2, ("a", "b"), (1, 2, 2), (0.5,), (0.5,), False, 4, "here", read,
                           raw=Raw(("own.bin",), ("own.bin",)))}
"""


@pytest.mark.parametrize("words", [("list", "datasets"), ("doctor",)], ids=lambda words: words[0])
def test_a_plugins_data_set_is_looked_for_in_the_data_root(
    words: tuple[str, ...], command: Command, tmp_path: Path
) -> None:
    plugin = write(tmp_path, "mine.py", OWN_DATA)
    write(tmp_path, "own.bin", "")
    assert re.search("^own .*missing", command(*words, "--plugin", plugin).out, re.MULTILINE)
    shown = command(*words, "--plugin", plugin, "--data-root", tmp_path).out
    assert re.search("^own .*raw files found", shown, re.MULTILINE)


def test_teacher_train_passes_on_that_kernels_are_to_be_deterministic(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("dfkd_bench.teacher_commands.prepare", lambda _, deterministic: asked.append(deterministic))
    monkeypatch.setattr("dfkd_bench.teacher_commands.set_threads", lambda _: None)
    monkeypatch.setattr("dfkd_bench.teachers.train", lambda *_: (_ for _ in ()).throw(UserError("enough")))
    for option in ((), ("--deterministic",)):
        assert "enough" in command("teacher", "train", "-q", "-d", "digits", *option).error()
    assert asked == [False, True]


def test_without_a_command_the_help_is_shown(command: Command) -> None:
    ended = command()
    assert ended.code == 2
    assert "Usage" in ended.out + ended.err


def test_looking_does_not_import_torch(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom dfkd_bench import cli\n"
        "for line in ('--help', 'run --help', 'list methods', 'list datasets', 'list models', 'list suites'):\n"
        "    sys.argv = ['dfkd-bench', *line.split()]\n"
        "    try:\n        cli.main()\n"
        "    except SystemExit as ended:\n        assert ended.code == 0, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_of_a_wrong_method_says_what_fails(command: Command, tmp_path: Path) -> None:
    ended = command("check", write(tmp_path, "failing.py", FAILING))
    assert ended.code == 1
    assert re.search(r"^FAIL +images_shape +.*ZeroDivisionError: no luck", ended.out, re.MULTILINE)
    assert re.search(r"^ok +config_frozen", ended.out, re.MULTILINE)


# --- The README's job -------------------------------------------------------------------------------------------------

TINY = {
    "teacher": {"epochs": 1},
    "nayer": {
        "epochs": 2, "warmup_epochs": 1, "student_steps": 3, "batch_size": 16, "synthesis_batch_size": 12,
        "generator_steps": 2, "warmup_loops": 1, "noisy_width": 8, "generator_width": 4,
    },
    "fm": {
        "epochs": 2, "warmup_epochs": 1, "student_steps": 3, "batch_size": 16, "synthesis_batch_size": 12,
        "generator_steps": 2, "latent_dim": 8, "generator_width": 4,
    },
    "slow": {"epochs": 8, "warmup_epochs": 0, "student_steps": 1, "batch_size": 16},
}  # fmt: skip
ROWS = ("scratch", "real_kd", "noise_kd", "nayer", "fm")


class Place:
    """A folder in which the installed command is run as a user runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.output = folder, folder / "home", folder / "results"
        self.environment = os.environ | {
            "DFKD_BENCH_HOME": str(self.home),
            "DFKD_BENCH_RESULTS": str(self.output),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "Agg",
        }

    def start(self, methods: str, *more: str) -> subprocess.Popen[str]:
        owners = ("teacher", *methods.split(","))
        settings = [f"{owner}.{key}={value}" for owner in owners for key, value in TINY.get(owner, {}).items()]
        options = [part for setting in settings for part in ("-s", setting)]
        return subprocess.Popen(
            [sys.executable, "-m", "dfkd_bench", "run", "--methods", methods, "--dataset", "digits", "--device", "cpu",
             "--pair", "convnet8:convnet8", *options, *more],
            cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip

    def run(self, methods: str, *more: str) -> Ended:
        process = self.start(methods, *more)
        out, err = process.communicate(timeout=200)
        return Ended(process.returncode, out, err)

    def stamps(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.output.glob("records/*/*/*.json")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def finished(place: Place) -> Ended:
    """The README's first command, at a tiny schedule."""
    return place.run("nayer,fm")


def table_of(ended: Ended) -> str:
    return ended.out.partition("\ntable: ")[0]


def test_the_main_job_prints_a_table_with_all_rows(finished: Ended) -> None:
    assert finished.code == 0, finished.err
    assert "Traceback" not in finished.err
    rows = [line.split()[0].rstrip("‡") for line in table_of(finished).splitlines() if line]
    assert [name for name in rows if name in ROWS] == list(ROWS)


def test_the_main_job_leaves_records_table_and_figure(finished: Ended, place: Place) -> None:
    records = list(read_all(place.output))
    assert sorted(record.job.method for record in records) == sorted(ROWS)
    assert {record.status for record in records} == {"done"}
    for name in ("tables/nayer-fm_digits-*.md", "tables/nayer-fm_digits-*.csv", "figures/nayer-fm_digits-*.png"):
        (path,) = place.output.glob(name)  # with settings that are not the plain table's
        assert path.stat().st_size > 0


def test_progress_goes_to_stderr_with_the_time_left(finished: Ended) -> None:
    assert re.search(r"^5/5 .* left\)$", finished.err, re.MULTILINE)


def test_the_same_command_again_runs_nothing_and_prints_the_same(finished: Ended, place: Place) -> None:
    before = place.stamps()
    again = place.run("nayer,fm")
    assert (again.code, again.err) == (0, "")
    assert table_of(again) == table_of(finished)
    assert place.stamps() == before


@dataclass(frozen=True)
class Interrupted:
    """A command that met Ctrl-C, a damaged checkpoint, and then went on."""

    stopped: Ended
    damaged: Ended
    resumed: Ended
    run_id: str


@pytest.fixture(scope="module")
def interrupted(finished: Ended, place: Place) -> Interrupted:
    files = [write(place.folder, f"{name}.py", text) for name, text in (("failing", FAILING), ("slow", SLOW))]
    options = ("failing,slow", "--no-controls", "-q", "--plugin", str(files[0]), "--plugin", str(files[1]))
    process = place.start(*options)
    deadline = time.monotonic() + 100
    states: list[Path] = []
    while not states:
        assert process.poll() is None, process.communicate()
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("no checkpoint in time")
        time.sleep(0.05)
        states = list(place.home.glob("runs/*/checkpoint/state.safetensors"))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the children, too
    out, err = process.communicate(timeout=60)
    content = states[0].read_bytes()
    states[0].write_bytes(b"garbage")
    damaged = place.run(*options)
    states[0].write_bytes(content)
    return Interrupted(Ended(process.returncode, out, err), damaged, place.run(*options), states[0].parts[-3])


def test_ctrl_c_ends_with_130_and_one_line(interrupted: Interrupted) -> None:
    assert interrupted.stopped.code == 130
    assert interrupted.stopped.err.strip() == "stopped: nothing is lost, the same command goes on where this one ended"


def group(leader: int) -> list[str]:
    """The command lines of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(path.name)) == leader:
                found.append((path / "cmdline").read_text())
    return [line for line in found if line]  # none: a process that has ended


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_ctrl_c_while_the_fork_server_imports_torch_is_one_line_and_leaves_nothing(delay: float, place: Place) -> None:
    """The request for a run waits in the server's socket by then."""
    process = place.start("fm", "--no-controls", "--seeds", "8-99")
    assert process.stderr is not None
    assert any("data set" in line for line in iter(process.stderr.readline, ""))  # next the runs are asked for
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.endswith("stopped: nothing is lost, the same command goes on where this one ended\n")
    deadline = time.monotonic() + 30
    while group(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group(process.pid) == []


def test_whoever_reads_the_head_of_a_plan_has_not_made_it_fail(place: Place) -> None:
    line = [sys.executable, "-m", "dfkd_bench", "plan", "smoke_digits", "--seeds", "0-99"]
    pipe, environment = subprocess.PIPE, place.environment
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, cwd=place.folder, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, "")


def test_what_needs_no_server_does_not_wait_for_it(finished: Ended, place: Place) -> None:
    """It imports torch for some seconds, and has the command's output open."""
    process = place.start("fm", "--no-controls", "-q", "-s", "fm.nothing=1")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "unknown setting" in err
    assert group(process.pid) == []


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the command", "to all its processes"])
def test_sigterm_gives_the_runs_back(send: Callable[[int, int], None], interrupted: Interrupted, place: Place) -> None:
    """Else a batch system that starts the command anew elsewhere would find them held for a minute."""
    options = ("slow", "--no-controls", "-q", "--plugin", str(place.folder / "slow.py"), "--seeds", "7")
    before = set(place.home.glob("runs/*/lease"))
    process = place.start(*options)
    deadline = time.monotonic() + 100
    while not (leases := set(place.home.glob("runs/*/lease")) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    send(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert leases
    assert (process.returncode, err.strip()) == (
        3, "stopped early: nothing is lost, the same command goes on where this one ended"
    )  # fmt: skip
    assert [lease for lease in leases if lease.exists()] == []


def test_a_damaged_checkpoint_is_named_and_left_alone(interrupted: Interrupted) -> None:
    assert f"the checkpoint of run {interrupted.run_id} can't be read" in interrupted.damaged.error()


def test_the_same_command_goes_on_after_ctrl_c(interrupted: Interrupted, place: Place) -> None:
    (record,) = [record for record in read_all(place.output) if record.job.method == "slow"]
    assert (record.status, record.resumes) == ("done", 1)
    assert [point.epoch for point in record.curve] == list(range(8))


def test_a_failed_run_is_a_row_and_exit_code_1(interrupted: Interrupted, place: Place) -> None:
    assert interrupted.resumed.code == 1
    assert "failed: ZeroDivisionError: no luck (failing.py:" in interrupted.resumed.out
    assert "log.txt" in interrupted.resumed.out
    (record,) = [record for record in read_all(place.output) if record.job.method == "failing"]
    assert record.status == "failed"


def test_a_resumed_run_goes_on_with_its_metrics_file(interrupted: Interrupted, place: Place) -> None:
    lines = (place.home / "runs" / interrupted.run_id / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(8))
