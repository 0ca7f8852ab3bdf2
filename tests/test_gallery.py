"""The gallery and the table of diversity, on two tiny runs and on hand-made rows."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_bench import class_names, cli, data, gallery, plugins, teachers
from dfkd_bench.compute import Compute
from dfkd_bench.diversity import KEPT_CLASSES, evenly_spaced
from dfkd_bench.errors import UserError
from dfkd_bench.paths import HOME_VARIABLE
from dfkd_bench.record import Record
from dfkd_bench.report import diversity, table
from dfkd_bench.report.gallery import Block, _head, draw
from dfkd_bench.report.groups import Group, group
from dfkd_bench.run import Place, run
from dfkd_bench.runfolder import IMAGES, kept_images
from dfkd_bench.suite import expand, make_suite

METHODS = ("real_kd", "nayer", "noise_kd")
SETTINGS = {
    "teacher.epochs": 2,
    "nayer.epochs": 2,
    "nayer.warmup_epochs": 1,
    "nayer.student_steps": 2,
    "nayer.batch_size": 16,
    "nayer.synthesis_batch_size": 24,
    "nayer.generator_steps": 2,
    "nayer.warmup_loops": 2,
    "nayer.loops": 2,
    "nayer.noisy_width": 8,
    "nayer.generator_width": 4,
    "nayer.encoder": "random:16",
} | {
    f"{name}.{setting}": value
    for name in ("real_kd", "noise_kd")
    for setting, value in {"epochs": 1, "warmup_epochs": 0, "student_steps": 2, "batch_size": 64}.items()
}


@dataclass(frozen=True)
class Ran:
    """Where the runs are, and their records by method."""

    home: Path
    output: Path
    records: dict[str, Record]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    with pytest.MonkeyPatch.context() as patch:
        home, output = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("results")
        patch.setenv(HOME_VARIABLE, str(home))
        torch.set_num_threads(1)
        dataset = data.dataset("digits")
        suite = make_suite(
            "t", "t", "digits", list(METHODS), pairs=["convnet8:convnet8"], controls=(), settings=SETTINGS
        )
        jobs = expand(suite, plugins.discover(), dataset, "cpu", "fp32")
        teachers.train(dataset, jobs[0].teacher, Compute(torch.device("cpu")))
        yield Ran(home, output, {job.method: run(job, Place(output, device="cpu")) for job in jobs})


@pytest.fixture
def elsewhere(ran: Ran, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the data and the runs' images, to be changed by the test."""
    shutil.copytree(ran.home, tmp_path / "home")
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    return tmp_path / "home" / "runs"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Block]:
    """The rows that the gallery would draw."""
    blocks: list[Block] = []

    def keep(given: Sequence[Block], *_: object) -> None:
        blocks.extend(given)

    monkeypatch.setattr(gallery, "draw", keep)
    return blocks


def rows(ran: Ran) -> tuple[Group, ...]:
    return group(list(ran.records.values()))


# -- From records to rows -------------------------------------------------------------------------------------------


def test_rows_are_real_images_then_what_is_taught_from(ran: Ran, drawn: list[Block]) -> None:
    gallery.gallery(rows(ran), data.dataset("digits"), Path("x.png"))
    assert [block.label for block in drawn] == ["real images", "noise_kd", "nayer"]  # real_kd has none of its own
    assert [block.is_control for block in drawn] == [False, True, False]


def test_the_first_row_has_the_labels_of_the_evaluated_split(ran: Ran, drawn: list[Block]) -> None:
    gallery.gallery(rows(ran), data.dataset("digits"), Path("x.png"))
    test = data.dataset("digits").split("test")
    assert drawn[0].images is not None
    for number, images in drawn[0].images.items():
        assert np.array_equal(images, test.images[np.flatnonzero(test.labels == number)[:4]])


def test_a_method_s_row_has_the_classes_that_the_teacher_names(ran: Ran, drawn: list[Block]) -> None:
    gallery.gallery(rows(ran), data.dataset("digits"), Path("x.png"))
    kept = kept_images(ran.records["nayer"].job_id)
    assert kept is not None
    assert drawn[2].images is not None
    for number, images in drawn[2].images.items():
        assert np.array_equal(images, kept["images"][kept["classes"] == number][:4])


def test_accuracy_and_measures_stand_beside_the_images(ran: Ran, drawn: list[Block]) -> None:
    record = ran.records["nayer"]
    gallery.gallery(rows(ran), data.dataset("digits"), Path("x.png"))
    assert record.last is not None
    assert drawn[2].note == f"{record.last.accuracy:.2f} %"
    assert drawn[2].numbers["within class"] == f"{record.diversity['within']:.2f}"


def test_real_images_have_the_measures_of_the_control_that_learns_from_them(ran: Ran, drawn: list[Block]) -> None:
    gallery.gallery(rows(ran), data.dataset("digits"), Path("x.png"))
    assert drawn[0].numbers["coverage"] == f"{ran.records['real_kd'].diversity['coverage']:.2f}"


def test_images_that_are_not_at_hand_leave_a_row_and_one_line(ran: Ran, elsewhere: Path, drawn: list[Block]) -> None:
    (elsewhere / ran.records["nayer"].job_id / IMAGES).unlink()
    _, advice = gallery.gallery(rows(ran), data.dataset("digits"), Path("x.png"))
    assert [block.images is None for block in drawn] == [False, False, True]
    assert len(advice) == 1
    assert "no images of nayer are at hand" in advice[0]


def test_a_class_is_called_as_its_data_set_writes_it() -> None:
    assert "t shirt/top" in class_names.FASHION_MNIST
    assert _head(class_names.AS_WRITTEN["t shirt/top"]) == ["T-shirt/top"]


def test_a_row_of_failed_runs_is_not_said_to_be_elsewhere(ran: Ran) -> None:
    failed = ran.records["nayer"].model_copy(update={"status": "failed", "last": None, "best": None, "curve": ()})
    assert gallery._advice(group([failed], ())) == "nayer has no finished run: the table says why"


def test_damaged_images_are_one_line_that_names_the_file(home: Path) -> None:
    path = home / "runs" / "0123456789ab" / IMAGES
    path.parent.mkdir(parents=True)
    path.write_bytes(b"garbage of some length")
    with pytest.raises(UserError, match=f"the images of run 0123456789ab can't be read .* delete {path}"):
        gallery._kept("0123456789ab")


def test_without_any_images_there_is_no_figure(ran: Ran, elsewhere: Path, tmp_path: Path) -> None:
    shutil.rmtree(elsewhere)
    with pytest.raises(UserError, match="no images of noise_kd, nayer are at hand") as caught:
        gallery.gallery(rows(ran), data.dataset("digits"), tmp_path / "x.png")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.png").exists()


def test_of_many_classes_twelve_are_shown_that_runs_keep_images_of() -> None:
    shown = gallery._classes(1000)
    assert len(shown) == 12
    assert (shown[0], shown[-1]) == (0, 999)
    assert set(shown) <= set(evenly_spaced(1000, KEPT_CLASSES))


def test_of_ten_classes_all_are_shown() -> None:
    assert gallery._classes(10) == list(range(10))


# -- The drawing ----------------------------------------------------------------------------------------------------


def colour(*channels: int) -> np.ndarray:
    return np.broadcast_to(np.array(channels, np.uint8)[:, None, None], (len(channels), 8, 8))[None]


def where(path: Path, *channels: int) -> tuple[float, float]:
    """Mean row and column of the pixels of a colour, as shares of the figure."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    rows, columns = np.nonzero((abs(pixels - channels) < 3).all(axis=2))
    return rows.mean() / pixels.shape[0], columns.mean() / pixels.shape[1]


def test_rows_go_down_and_classes_to_the_right(tmp_path: Path) -> None:
    first = Block("real images", "", {3: colour(250, 0, 0), 7: colour(0, 250, 0)})
    second = Block("method", "90.00 %", {3: colour(0, 0, 250), 7: colour(250, 250, 0)}, {"within class": "0.90"})
    path = draw([first, second], {3: "three", 7: "seven"}, tmp_path / "x.png", "a title", ["a note"])
    red, green, blue = where(path, 250, 0, 0), where(path, 0, 250, 0), where(path, 0, 0, 250)
    assert red[0] == pytest.approx(green[0], abs=0.01)
    assert red[1] == pytest.approx(blue[1], abs=0.01)
    assert green[1] > red[1] + 0.05
    assert blue[0] > red[0] + 0.05


@pytest.mark.parametrize(("suffix", "shape"), [(".png", (1, 8, 8)), (".svg", (3, 32, 32)), (".pdf", (3, 64, 64))])
def test_gray_and_colour_small_and_large_in_all_formats(suffix: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    names = {number: f"a rather long name, a synonym {number}" for number in range(12)}
    rows = [
        Block("real", "", {0: images}),
        Block("gone", "", None),
        Block("a method with=settings", "1 %", {5: images}),
    ]
    path = draw(rows, names, tmp_path / "folder" / f"x{suffix}")
    assert path.stat().st_size > 5000


def test_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    rows = [Block("real", "", {0: colour(9)}), Block("method", "1 %", {0: colour(200)})]
    first = draw(rows, {0: "zero"}, tmp_path / "a.svg")
    second = draw(rows, {0: "zero"}, tmp_path / "b.svg")
    assert first.read_bytes() == second.read_bytes()


def test_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.txt"):
        draw([Block("real", "", {0: colour(9)})], {0: "zero"}, tmp_path / "x.txt")


def test_the_command_draws_what_the_run_left(ran: Ran, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"{name}={value}" for name, value in SETTINGS.items() if not name.startswith("real_kd")]
    cli.gallery(
        methods="nayer,noise_kd", dataset="digits", pair="convnet8:convnet8", settings=settings, controls=False,
        output=ran.output, device="cpu", precision="fp32",
    )  # fmt: skip
    (path,) = (ran.output / "figures").glob("*-gallery.png")
    assert capsys.readouterr().out.replace("\n", "").endswith(path.name)


ABLATION = """
title = "t"
rows = [{ label = "mine", method = "nayer" }, { label = "its control", method = "noise_kd" }]
[[claims]]
text = "x"
source = "ours"
compare = [["mine", "its control"]]
"""


def test_an_ablation_is_drawn_by_its_rows(ran: Ran, drawn: list[Block], tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(ABLATION)
    settings = [f"{name}={value}" for name, value in SETTINGS.items() if not name.startswith("real_kd")]
    cli.gallery(
        suite=str(tmp_path / "mine.toml"), dataset="digits", pair="convnet8:convnet8", seeds="0", settings=settings,
        output=ran.output, device="cpu", precision="fp32",
    )  # fmt: skip
    assert [block.label for block in drawn] == ["real images", "mine", "its control"]
    assert all(block.images for block in drawn)


# -- The table of diversity -----------------------------------------------------------------------------------------


def seeds(record: Record, *values: dict[str, float | None]) -> list[Record]:
    """Copies of a record with these measures."""
    return [
        record.model_copy(
            update={"job_id": f"{index}", "job": record.job.model_copy(update={"seed": index}), "diversity": measures}
        )
        for index, measures in enumerate(values)
    ]


def measures(within: float, duplicates: float | None = 0.0) -> dict[str, float | None]:
    whole = dict.fromkeys(diversity.MEASURES, 1.0)
    return {**whole, "within": within, "duplicates": duplicates, "images": 2000, "real_images": 360}


def test_the_table_gives_mean_and_interval_over_seeds(ran: Ran) -> None:
    records = seeds(ran.records["nayer"], measures(0.8), measures(0.9))
    text = table.to_text(diversity.build(records, "t"))
    assert "0.85 ± 0.64" in text  # t(0.975, 1) * 0.0707 / sqrt(2)
    assert "over that of 360 real images of the test split" in " ".join(text.split())


def test_a_measure_of_fewer_seeds_says_of_how_many(ran: Ran) -> None:
    records = seeds(ran.records["nayer"], measures(0.8), {**measures(0.9), "between": None})
    text = table.to_text(diversity.build(records, "t"))
    assert re.search(r"1\.00 +\(n = 1\)", text)
    assert gallery._numbers(group(records, ())[0])["between classes"] == "1.00\n(n = 1)"


def test_the_table_of_diversity_fits_a_narrow_terminal(ran: Ran) -> None:
    lines = table.to_text(diversity.build(seeds(ran.records["nayer"], measures(0.8), measures(0.9)), "t"), 60)
    assert max(map(len, lines.splitlines())) <= 60


def test_shares_are_in_percent_and_none_is_a_dash(ran: Ran) -> None:
    (row,) = diversity.build(seeds(ran.records["nayer"], measures(0.8, duplicates=0.125)), "t").rows
    built = diversity.build(seeds(ran.records["nayer"], measures(0.8, duplicates=0.125)), "t")
    none = diversity.build(seeds(ran.records["nayer"], measures(0.8, duplicates=None)), "t")
    column = next(index for index, one in enumerate(built.columns) if one.key == "duplicates")
    assert built.columns[column].lines(row) == ("12.5",)
    assert none.columns[column].lines(row) == ("-",)


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_every_format_prints_every_method(form: str, ran: Ran) -> None:
    printed = table.FORMATS[form](diversity.build(list(ran.records.values()), "t"))
    assert all(name in printed.replace("\\_", "_") for name in METHODS)


def test_the_csv_has_full_means(ran: Ran) -> None:
    lines = diversity.to_csv(seeds(ran.records["nayer"], measures(0.8), measures(0.9)), ()).splitlines()
    found = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert (found["method"], found["n"]) == ("nayer", "2")
    assert float(found["within"]) == pytest.approx(0.85)


def test_records_without_measures_say_what_to_do(ran: Ran) -> None:
    with pytest.raises(UserError, match="older"):
        diversity.build(seeds(ran.records["nayer"], {}), "t")
