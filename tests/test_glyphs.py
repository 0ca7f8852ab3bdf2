"""glyphs16 and glyphs32: what is drawn, that it is always the same, and that the held-out fonts stay out."""

from __future__ import annotations

import hashlib
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import PIL
import pytest

from dfkd_bench import data, glyphs
from dfkd_bench.errors import UserError

NAMES = list(glyphs.CLASSES)
COUNT = len(NAMES)

# Pillow, matplotlib, numpy
CHECKED_WITH = {("13.0.0", "3.11.2", "2.4.6"), ("11.3.0", "3.9.4", "1.26.4")}
SHA256 = {  # of the images of the first two rounds
    (16, "train"): "5b5c020de00787f3061e9d78b596c5c5b5d9d4109873c362841dbc711354c45d",
    (16, "test"): "3189ce530c153ed8f7a1af1c2ff9b053eb8c303c4c182d665fc0624f8aef5cfa",
    (16, "hard_test"): "744138dd048c2eabbf464ac36885b7f6fb17a0dc4e75c6b5be3ac183fb16e11d",
    (32, "train"): "3739b05b1732bf62b03e63c0a8e0da66d2b44976ec3a2c227812e0ed24c97cee",
    (32, "test"): "2d4b8928897846eed65937716f4997c4247664a3dcb7b793031a1e5c4f6935e4",
    (32, "hard_test"): "7613987caf715ca518f8c402bbf2efb1a43df3e0d1685c53157f874badb9ec75",
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The (font, character) of every glyph drawn from now on, in order."""
    seen: list[tuple[str, str]] = []
    original: Callable[[str, str], Any] = glyphs._glyph

    def record(font: str, character: str) -> Any:
        seen.append((font, character))
        return original(font, character)

    monkeypatch.setattr(glyphs, "_glyph", record)
    return seen


# --- Classes ----------------------------------------------------------------------------------------------------------


def test_there_are_the_classes_of_emnist_balanced() -> None:
    assert (COUNT, [len(glyphs.CLASSES[name]) for name in NAMES].count(2)) == (47, 14)


def test_every_character_but_the_small_l_has_one_class() -> None:
    characters = "".join(glyphs.CLASSES.values())
    assert sorted(characters) == sorted(set(string.digits + string.ascii_letters) - {"l"})


@pytest.mark.parametrize(
    ("label", "name"),
    [(7, "digit seven"), (10, "capital letter a"), (12, "letter c"), (36, "small letter a"), (46, "small letter t")],
)
def test_names_stand_at_their_labels(label: int, name: str) -> None:
    assert NAMES[label] == name


def test_an_image_shows_a_character_of_its_class(drawn: list[tuple[str, str]]) -> None:
    _, labels = glyphs.draw(16, "train", 3)
    each = np.array([character for _, character in drawn]).reshape(3, -1)
    targets = each[:, -COUNT:].reshape(-1)  # clutter is drawn before
    wrong = [
        (NAMES[label], str(character))
        for label, character in zip(labels, targets, strict=True)
        if character not in glyphs.CLASSES[NAMES[label]]
    ]
    assert wrong == []


# --- Fonts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("font", [font for family in glyphs.FONTS.values() for font in family])
def test_every_font_draws_every_character_differently(font: str) -> None:
    shapes = {glyphs._glyph(font, character)[0].tobytes() for character in "".join(glyphs.CLASSES.values())}
    assert len(shapes) == 61


def test_a_box_holds_the_ink_of_its_glyph() -> None:
    mask, longest = glyphs._glyph("cmr10", "M")
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    assert 40 < max(right - left, bottom - top) <= longest < 64


def test_no_glyph_is_cut_by_its_canvas() -> None:
    edge = [
        (font, character)
        for family in glyphs.FONTS.values()
        for font in family
        for character in "".join(glyphs.CLASSES.values())
        if (box := glyphs._glyph(font, character)[0].getbbox()) is None or min(box[:2]) < 4 or max(box[2:]) > 124
    ]
    assert edge == []


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_held_out_family_is_in_no_split(part: glyphs.Part, drawn: list[tuple[str, str]]) -> None:
    glyphs.draw(16, part, 4)
    used = {font for font, _ in drawn}
    assert used == {font for family in ("DejaVu", "Computer Modern") for font in glyphs.FONTS[family]}


def test_the_hard_test_set_has_the_held_out_family_only(drawn: list[tuple[str, str]]) -> None:
    glyphs.draw(16, "hard_test", 2)
    assert {font for font, _ in drawn} == set(glyphs.FONTS["STIX"])


def test_a_missing_font_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glyphs._face.cache_clear()
    glyphs._glyph.cache_clear()
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"the font .*\.ttf can't be read .*reinstall matplotlib") as caught:
        glyphs.draw(16, "train", 1)
    assert "\n" not in str(caught.value)


# --- Images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", glyphs.SIDES)
def test_shapes_types_and_labels(side: int) -> None:
    images, labels = glyphs.draw(side, "train", 2)
    assert images.shape == (2 * COUNT, 3, side, side)
    assert (str(images.dtype), str(labels.dtype)) == ("uint8", "int64")
    assert labels.tolist() == [*range(COUNT), *range(COUNT)]


@pytest.mark.parametrize(("side", "part"), SHA256)
def test_images_are_the_same_bits_everywhere(side: int, part: glyphs.Part) -> None:
    versions = (PIL.__version__, matplotlib.__version__, np.__version__)
    if versions not in CHECKED_WITH:
        pytest.skip(f"checksums are known for other versions of Pillow, matplotlib and numpy than {versions}")
    images, _ = glyphs.draw(side, part, 2)
    assert hashlib.sha256(images.tobytes()).hexdigest() == SHA256[side, part]


def test_a_small_draw_is_the_beginning_of_a_large_one() -> None:
    assert np.array_equal(glyphs.draw(16, "train", 1)[0], glyphs.draw(16, "train", 2)[0][:COUNT])


def test_no_image_comes_twice() -> None:
    images = np.concatenate([glyphs.draw(16, part, 5)[0] for part in glyphs.PER_CLASS])
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) == len(images)


def test_both_sides_show_the_same_scenes() -> None:
    small = glyphs.draw(16, "test", 1)[0].astype(float)
    large = glyphs.draw(32, "test", 1)[0].reshape(COUNT, 3, 16, 2, 16, 2).mean((3, 5))
    own = np.abs(small - large).mean((1, 2, 3))
    other = np.abs(small - np.roll(large, 1, 0)).mean((1, 2, 3))
    assert 4 * np.median(own) < np.median(other)


def test_glyphs_are_brighter_or_darker_than_their_background() -> None:
    flat = glyphs._Random(0).bytes(2000, 1)
    colours = glyphs._foreground(glyphs._Random(1), flat)
    contrast = np.abs(glyphs._brightness(colours) - flat[:, 0])
    assert contrast.min() >= 40
    assert (contrast >= glyphs._CONTRAST).mean() > 0.99


def test_glyphs_are_in_the_middle_of_their_images() -> None:
    masks = glyphs._masks(glyphs._Random(0), np.arange(COUNT), glyphs.FONTS["DejaVu"], 32, beside=False)
    rows = (masks * np.arange(32)[:, None]).sum((1, 2)) / masks.sum((1, 2))
    columns = (masks * np.arange(32)).sum((1, 2)) / masks.sum((1, 2))
    assert np.abs(np.stack([rows, columns]) - 15.5).max() < 6


def test_clutter_stays_at_the_border() -> None:
    masks = glyphs._masks(glyphs._Random(0), np.tile(np.arange(COUNT), 4), glyphs.FONTS["DejaVu"], 32, beside=True)
    inside = masks[:, 8:-8, 8:-8].mean((1, 2))
    assert masks.any((1, 2)).mean() > 0.5
    assert inside.mean() < masks.mean() / 4


def test_random_numbers_are_those_of_the_raw_stream() -> None:
    first = int(np.random.PCG64((1, 2)).random_raw())
    assert glyphs._Random(1, 2).uniforms(1)[0] == (first >> 11) / 2**53
    assert glyphs._Random(1, 2).bytes(9)[:8].tolist() == list(first.to_bytes(8, "little"))


def test_smoothing_keeps_flat_images_and_spreads_a_point() -> None:
    point = np.zeros((1, 5, 5), np.int64)
    point[0, 2, 2] = 160
    assert glyphs._smooth(point)[0, 1:4, 1:4].tolist() == [[10, 20, 10], [20, 40, 20], [10, 20, 10]]
    assert (glyphs._smooth(np.full((1, 4, 4), 200)) == 200).all()


def test_affine_maps_are_exact_in_double_precision() -> None:
    maps = glyphs._affine_maps(glyphs._Random(0), np.full(100, 48), beside=False)
    assert np.array_equal(maps * 1024, np.rint(maps * 1024))


@pytest.mark.parametrize(("side", "part", "per_class"), [(8, "train", 1), (16, "validation", 1), (16, "train", 0)])
def test_what_can_not_be_drawn_is_refused(side: int, part: Any, per_class: int) -> None:
    with pytest.raises((ValueError, KeyError)):
        glyphs.draw(side, part, per_class)


# --- As data sets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, home: Path) -> data.DataSet:
    """glyphs16 with 6 images a class for training, one of them for validation, and 2 for the test."""
    monkeypatch.setitem(glyphs.PER_CLASS, "train", 6)
    monkeypatch.setitem(glyphs.PER_CLASS, "test", 2)
    return replace(data.dataset("glyphs16"), sizes=(6 * COUNT, 2 * COUNT), validation_size=COUNT)


@pytest.mark.parametrize(("split", "per_class"), [("train", 5), ("validation", 1), ("test", 2)])
def test_every_split_has_every_class_equally(few: data.DataSet, split: data.Split, per_class: int) -> None:
    assert np.bincount(few.split(split).labels).tolist() == [per_class] * COUNT


def test_the_test_split_is_prepared_alone(few: data.DataSet) -> None:
    few.split("test")
    assert not few.prepared_files("train")[0].exists()


@pytest.mark.parametrize("side", glyphs.SIDES)
def test_normalisation_is_that_of_the_images(side: int) -> None:
    found = data.dataset(f"glyphs{side}")
    images = glyphs.draw(side, "train", 20)[0] / 255.0
    assert images.mean((0, 2, 3)) == pytest.approx(found.mean, abs=0.02)
    assert images.std((0, 2, 3)) == pytest.approx(found.std, abs=0.01)


def test_sizes_are_the_documented_ones() -> None:
    found = data.dataset("glyphs32")
    assert (found.sizes, found.validation_size) == ((47 * 860, 47 * 100), 47 * 60)


def test_the_module_is_light() -> None:
    heavy = "{'numpy', 'PIL', 'matplotlib', 'torch'}"
    code = f"import sys, dfkd_bench.glyphs, dfkd_bench.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
