"""`dfkd-bench encode`, plugins' encoders, and runs that need no text model."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console, RenderableType
from safetensors import safe_open

from dfkd_bench import cli, data, encode_command, plugins, text
from dfkd_bench.encode_command import batch_normalized, distances, mean_pairwise, place_names, project, same_rows
from dfkd_bench.errors import UserError

CIFAR10 = data.dataset("cifar10").class_names
LABELS = "Königspinguin, Adult\n\n red fox \ncrane\ncrane\ncosts $5 {index}\n"

VOWELS = """
from dfkd_bench.encoders import TextEncoder

class Vowels(TextEncoder):
    calls = 0

    def encode(self, texts):
        import numpy as np
        Vowels.calls += 1
        return np.array([[text.count(vowel) for vowel in "aeiou"] for text in texts]), "1"

class Short(TextEncoder):
    def encode(self, texts):
        return [[1.0, 2.0]], "1"

class Failing(TextEncoder):
    def encode(self, texts):
        raise RuntimeError("no luck\\ntoday")

ENCODERS = {"vowels": Vowels, "short": Short, "failing": Failing, "none": 7}
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``code, out, err = command("--dataset", "cifar10")`` in an empty folder, with an empty home."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dfkd-bench", "encode", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    monkeypatch.delenv("DFKD_BENCH_RESULTS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text(LABELS, encoding="utf-8")
    return path


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "vowels_plugin.py"
    path.write_text(VOWELS)
    return path


def printed(part: RenderableType) -> str:
    console = Console(width=140, file=io.StringIO())
    console.print(part)
    return console.file.getvalue()


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_distances_are_euclidean() -> None:
    np.testing.assert_allclose(
        distances(np.array([[0, 0], [3, 4], [3, 0]], np.float32)), [[0, 5, 3], [5, 0, 4], [3, 4, 0]]
    )


def test_the_mean_distance_counts_different_rows_only() -> None:
    assert mean_pairwise(np.array([[0, 0], [3, 4], [3, 0]], np.float32)) == pytest.approx(4)


def test_batch_normalized_is_what_torch_makes_of_it() -> None:
    import torch

    matrix = np.array([[0, 1, 2], [3, -1, 0.5], [1, 1, -2], [0.5, 2, 1]], np.float32)
    expected = torch.nn.BatchNorm1d(3)(torch.from_numpy(matrix)).detach().numpy()
    np.testing.assert_allclose(batch_normalized(matrix), expected, atol=1e-5)


def test_a_projection_of_a_plane_keeps_all_distances() -> None:
    rng = np.random.default_rng(0)
    plane, _ = np.linalg.qr(rng.normal(size=(30, 2)))
    flat = rng.normal(size=(8, 2)) * (3, 1)
    matrix = (flat @ plane.T + 5).astype(np.float32)
    points, shares = project(matrix)
    np.testing.assert_allclose(distances(points.astype(np.float32)), distances(matrix), atol=1e-4)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] > shares[1]


def test_same_rows_are_grouped() -> None:
    assert same_rows(np.array([[1, 2], [0, 0], [1, 2], [3, 3], [0, 0]], np.float32)) == [[0, 2], [1, 4]]


def test_names_in_the_figure_do_not_cover_each_other() -> None:
    points = np.array([[100, 100], [110, 101], [120, 99], [101, 92]], float)
    places = [place for place in place_names(points, [8, 8, 8, 8], 6) if place]
    assert len(places) == 4
    boxes = [
        (x + dx, y + dy - 3.3, x + dx + 26.4, y + dy + 3.3) for (x, y), (dx, dy) in zip(points, places, strict=True)
    ]
    for index, (left, bottom, right, top) in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert left >= other[2] or right <= other[0] or bottom >= other[3] or top <= other[1]


def test_a_name_without_room_is_left_out() -> None:
    places = place_names(np.full((30, 2), 100.0), [8] * 30, 6)
    assert places[0] is not None
    assert places[-1] is None


# --- The command ------------------------------------------------------------------------------------------------------


def test_a_shipped_matrix_is_written_and_described(command: Command, tmp_path: Path) -> None:
    code, out, err = command("--encoder", "sbert", "--dataset", "cifar10", "--prompt", "a photo of a {name}")
    assert (code, err) == (0, "")
    (matrix,) = (tmp_path / "dfkd-results" / "embeddings").glob("cifar10-sbert-*.safetensors")
    assert matrix.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "10 x 384" in out
    rows = text.load("cifar10", CIFAR10, "sbert", "P2").matrix
    apart = [distances(matrix)[np.triu_indices(10, 1)].mean() for matrix in (rows, batch_normalized(rows))]
    assert "norms          1 to 1, mean 1" in out
    assert f"mean distance  {apart[0]:.4g} before BatchNorm, {apart[1]:.4g} after" in out
    (row,) = [line for line in out.splitlines() if line.split()[1:2] == ["automobile"]]
    assert row.split()[2] == "truck"


@pytest.mark.parametrize("suffix", [".safetensors", ".npy"])
def test_what_is_written_can_be_given_to_a_run(command: Command, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine{suffix}"
    code, *_ = command("--dataset", "cifar10", "--prompt", "P2", "-o", path, "--quiet")
    assert code == 0
    written = text.load("cifar10", CIFAR10, f"file:{path}", "P2").matrix
    np.testing.assert_array_equal(written, text.load("cifar10", CIFAR10, "sbert", "P2").matrix, strict=True)


def test_a_safetensors_file_says_what_it_is_of(command: Command, labels: Path, tmp_path: Path) -> None:
    command("--encoder", "random:4", "--labels", labels, "-o", tmp_path / "mine.safetensors", "--quiet")
    with safe_open(tmp_path / "mine.safetensors", framework="numpy") as file:
        facts = file.metadata()
    names = ["Königspinguin, Adult", "red fox", "crane", "crane", "costs $5 {index}"]
    assert (facts["encoder"], facts["revision"]) == ("random", "seed 0")
    assert json.loads(facts["class_names"]) == names


def test_quiet_prints_the_paths_only(command: Command, tmp_path: Path) -> None:
    assert command("-d", "cifar10", "-o", "a.npy", "-q") == (0, "matrix: a.npy\nfigure: a.png\n", "")


def test_many_classes_are_listed_in_full_only_when_asked() -> None:
    encoded = encode_command.encode("sbert", "P2", "cifar100", None)
    short, full = (printed(encode_command.describe(encoded, everything)) for everything in (False, True))
    assert full.count("\n") - short.count("\n") == 100 - encode_command.SHORT - 1
    assert "--verbose shows all" in short


def test_classes_with_equal_rows_are_named(command: Command, labels: Path, plugin: Path) -> None:
    _, out, _ = command("--labels", labels, "--encoder", "vowels", "--plugin", plugin)
    assert "crane (2) = crane (3)" in out


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
@pytest.mark.parametrize("option", ["--figure", "--to"])
def test_the_figure_can_have_a_place_and_form_of_its_own(
    option: str, command: Command, suffix: str, labels: Path
) -> None:
    figure = labels.with_suffix(suffix)
    code, *_ = command("--labels", labels, "--encoder", "onehot", option, figure)
    assert code == 0
    assert figure.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to encode: expected either --dataset NAME or --labels FILE"),
        (["-d", "cifar10", "--labels", "x.txt"], "nothing to encode: expected either"),
        (["--labels", "gone.txt"], "can't read labels from gone.txt (No such file or directory)"),
        (["-d", "cifra10"], "unknown data set 'cifra10': did you mean 'cifar10'?"),
        (["-d", "cifar10", "-o", "a.csv"], "can't write a matrix to 'a.csv'"),
        (["-d", "cifar10", "--figure", "a.gif"], "can't draw 'a.gif'"),
        (["-d", "cifar10", "--prompt", "a {nmae}"], "unknown field of the prompt 'nmae': did you mean 'name'?"),
        (["-d", "cifar10", "--encoder", "srbet"], "unknown text encoder 'srbet': did you mean 'sbert'?"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str, command: Command) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"one\n\n", b"\xff\xfe\n"])
def test_a_file_without_two_names_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"expected .*one"):
        encode_command.read_labels(path)


# --- Plugins ----------------------------------------------------------------------------------------------------------


def test_a_plugins_encoder_is_asked_once(command: Command, plugin: Path, labels: Path) -> None:
    for _ in range(2):
        code, out, err = command("--encoder", "vowels", "--labels", labels, "--plugin", plugin)
        assert (code, err) == (0, "")
    assert "5 x 5" in out
    assert plugins.discover([plugin]).encoders["vowels"].calls == 1


def test_the_pages_encoder_is_asked_anew_once_its_weights_are_others(home: Path, tmp_path: Path) -> None:
    """The rows change with the code, as an author's would; what `weights()` returns says so."""
    page = (Path(__file__).parents[1] / "docs" / "text_encoders.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    wide = example.replace('"aeiou"', '"aeiouy"')

    def columns(name: str, source: str) -> int:
        (tmp_path / f"{name}.py").write_text(source)
        found = plugins.discover([tmp_path / f"{name}.py"])
        return text.ensure("", ("sky", "sea"), "vowels", "{name}", found.encoders).matrix.shape[1]

    assert [columns("first", example), columns("forgotten", wide)] == [5, 5]
    assert columns("raised", wide.replace("version 1", "version 2")) == 6


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ("short", "can't have the text model 'short' (it gives [1, 2], expected finite numbers [5, d])"),
        ("failing", "can't have the text model 'failing' (no luck)"),
        (
            "none",
            "text encoder 'none' of a plugin is no encoder: expected a subclass of dfkd_bench.encoders.TextEncoder",
        ),
        ("vowel", "unknown text encoder 'vowel': did you mean 'vowels'?"),
    ],
)
def test_a_wrong_plugin_is_one_line(encoder: str, message: str, command: Command, plugin: Path, labels: Path) -> None:
    code, _, err = command("--encoder", encoder, "--labels", labels, "--plugin", plugin)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


# --- Runs -------------------------------------------------------------------------------------------------------------

RUN = """
import sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("sentence_transformers", "transformers", "open_clip", "gensim"):
            raise AssertionError(f"{name} was imported in a run")

sys.meta_path.insert(0, Refuse())

import torch
from dfkd_bench import data, plugins, teachers
from dfkd_bench.compute import Compute
from dfkd_bench.run import Place, run
from dfkd_bench.suite import expand, make_suite

torch.set_num_threads(1)
own = {"epochs": 2, "warmup_epochs": 1, "student_steps": 1, "batch_size": 8, "synthesis_batch_size": 10,
       "generator_steps": 1, "warmup_loops": 1, "loops": 1, "noisy_width": 8, "generator_width": 4}
settings = {"teacher.epochs": 1, **{f"nayer.{name}": value for name, value in own.items()}}
for encoder, prompt in (("sbert", "an own {name}"), ("doc2vec", "P1")):
    settings |= {"nayer.encoder": encoder, "nayer.prompt": prompt}
    suite = make_suite("t", "t", "digits", ["nayer"], pairs=["convnet8:convnet8"], controls=(), settings=settings)
    (job,) = expand(suite, plugins.discover(), data.dataset("digits"), "cpu", "fp32")
    if not teachers.is_at_hand(data.dataset("digits"), job.teacher):
        teachers.train(data.dataset("digits"), job.teacher, Compute(torch.device("cpu")))
    record = run(job, Place(Path(sys.argv[1]), device="cpu"))
    print(record.status, record.embeddings["encoder"], record.embeddings["prompt"])
"""


def test_a_run_imports_no_text_model(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One reads what the package ships, the other what was encoded before."""
    from dfkd_bench.encoders.sbert import Sbert

    monkeypatch.setattr(Sbert, "encode", lambda self, texts: (np.eye(len(texts), 6, dtype=np.float32), "made up"))
    text.ensure("digits", data.dataset("digits").class_names, "sbert", "an own {name}")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )  # from elsewhere: in a checkout its sources would be imported in place of the installed package
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["done sbert an own {name}", "done doc2vec {name}"]
