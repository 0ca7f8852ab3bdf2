"""What the runner lends: pools and first images, in the shape of the task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_bench import data, lend, plugins
from dfkd_bench.data import DataSet
from dfkd_bench.errors import UserError
from dfkd_bench.job import TeacherSpec
from dfkd_bench.plan import get_ready, make_plan
from dfkd_bench.suite import expand, make_suite, read_suite, suite_names, with_all

CPU = torch.device("cpu")
FOUND = plugins.discover()


def test_fitting_keeps_images_that_fit() -> None:
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    assert lend.fit(images, (1, 8, 8)) is images


def test_gray_becomes_three_equal_channels() -> None:
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    fitted = lend.fit(images, (3, 8, 8))
    assert torch.equal(fitted, images.expand(-1, 3, -1, -1))


def test_colour_becomes_luma() -> None:
    red = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    red[:, 0] = 255
    assert lend.fit(red, (1, 4, 4)).unique().tolist() == [round(0.299 * 255)]


def test_halving_the_side_averages() -> None:
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., :4] = 200
    fitted = lend.fit(image, (1, 4, 4))
    assert fitted[0, 0, 0, 0] == 200
    assert fitted[0, 0, 0, 3] == 0


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, value in (("b.png", 20), ("a.png", 10), ("sub/c.jpg", 30)):
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / name, quality=100)
    images = lend.pool(f"folder:{tmp_path}", data.dataset("digits"), None, CPU)
    assert images.float().mean((1, 2, 3)).tolist() == pytest.approx([10, 20, 30], abs=1)


def test_a_folder_is_decoded_once_and_mapped_from_then_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("b.png", 20), ("a.png", 10)):
        Image.fromarray(np.full((16, 12), value, np.uint8)).save(tmp_path / name)
    first = lend.folder_images(tmp_path, (3, 8, 8), resize=True)
    monkeypatch.setattr(lend, "_decoded", None)
    assert torch.equal(lend.folder_images(tmp_path, (3, 8, 8), resize=True), first)
    monkeypatch.undo()
    Image.fromarray(np.full((8, 8), 30, np.uint8)).save(tmp_path / "a.png")
    assert lend.folder_images(tmp_path, (3, 8, 8), resize=True)[:, 0, 0, 0].tolist() == [30, 20]


def test_an_empty_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images"):
        lend.folder_images(tmp_path, (1, 8, 8))


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nowhere$"):
        lend.folder_images(tmp_path / "nowhere", (1, 8, 8))


def test_first_images_have_the_size_of_the_data_sets(tmp_path: Path) -> None:
    """They were made for the teacher: another size says that the folder is the wrong one."""
    Image.fromarray(np.zeros((16, 12), np.uint8)).save(tmp_path / "large.png")
    with pytest.raises(UserError, match=r"large\.png is 12 pixels wide and 16 high, .* 8 and 8"):
        lend.folder_images(tmp_path, (1, 8, 8))


def test_a_pool_may_have_any_size(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((16, 12), np.uint8)).save(tmp_path / "large.png")
    assert lend.pool(f"folder:{tmp_path}", data.dataset("digits"), None, CPU).shape == (1, 1, 8, 8)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.png"):
        lend.folder_images(tmp_path, (1, 8, 8))


def test_the_teachers_own_data_set_is_no_pool() -> None:
    with pytest.raises(UserError, match="own data set"):
        lend.pool("digits", data.dataset("digits"), None, CPU)


@pytest.mark.parametrize(
    ("own", "pool"),
    [("glyphs16", "glyphs32"), ("glyphs32", "glyphs16"), ("tiny_imagenet", "imagenet"), ("imagenet", "tiny_imagenet")],
)
def test_a_data_set_with_the_teachers_images_is_no_pool(own: str, pool: str) -> None:
    with pytest.raises(UserError, match=f"pool '{pool}' has images of {own}, the teacher's own data set"):
        lend.known_pool(pool, data.dataset(own), None)


@pytest.mark.parametrize("own", ["tiny_imagenet", "imagenet"])
@pytest.mark.parametrize("inside", [".", "tiny-imagenet-200", "tiny-imagenet-200/val/images"])
def test_a_folder_with_the_teachers_images_is_no_pool(own: str, inside: str, tmp_path: Path) -> None:
    images = tmp_path / "tiny-imagenet-200/val/images"
    images.mkdir(parents=True)
    (images / "val_0.JPEG").touch()
    with pytest.raises(UserError, match=f"has images of {own}, .* belongs to tiny_imagenet"):
        lend.known_pool(f"folder:{tmp_path / inside}", data.dataset(own), tmp_path)


@pytest.mark.parametrize("inside", [".", "tiny-imagenet-200", "tiny-imagenet-200/val/images"])
def test_first_images_are_never_the_teachers_own(inside: str, tmp_path: Path) -> None:
    images = tmp_path / "tiny-imagenet-200/val/images"
    images.mkdir(parents=True)
    (images / "val_0.JPEG").touch()
    with pytest.raises(UserError, match=r"initial_images .* has images of tiny_imagenet, the teacher's own data set"):
        lend.initial_images(str(tmp_path / inside), data.dataset("tiny_imagenet"), tmp_path)


def test_first_images_from_the_teachers_own_folder_are_refused_before_the_runs(home: Path, tmp_path: Path) -> None:
    for number in range(20):
        place = tmp_path / "mine" / ("train", "test")[number % 2] / "ab"[number // 10]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(place / f"{number}.png")
    name, settings = f"folder:{tmp_path / 'mine'}", {"cmi.initial_images": str(tmp_path / "mine" / "train")}
    suite = make_suite("t", "t", name, ["cmi"], "smoke", ["convnet8:convnet8"], (), settings=settings)
    plan = make_plan(suite, FOUND, tmp_path, device="cpu")
    with pytest.raises(UserError, match=r"cmi: initial_images .* has images of folder:.*, the teacher's own data set"):
        get_ready(plan, FOUND)


def test_a_folder_beside_the_teachers_images_is_a_pool(tmp_path: Path) -> None:
    (tmp_path / "tiny-imagenet-200").mkdir()
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "0.png").touch()
    pool = lend.known_pool(f"folder:{tmp_path / 'flowers'}", data.dataset("tiny_imagenet"), tmp_path)
    assert pool == tmp_path / "flowers"


@pytest.mark.parametrize("name", suite_names())
def test_the_pools_of_every_built_in_suite_can_be_lent(name: str) -> None:
    suite = with_all(read_suite(name), FOUND)
    dataset = data.dataset(suite.dataset)
    borrowers = tuple(name for name in (*suite.controls, *suite.methods) if "unlabelled" in FOUND.method(name).needs)
    fewer = suite.model_copy(update={"methods": borrowers, "controls": (), "seeds": (0,)})
    pools = {job.config["pool"] for job in expand(fewer, FOUND, dataset, "cpu", "fp32")}
    assert all(isinstance(lend.known_pool(pool, dataset, None), DataSet) for pool in pools)


@pytest.mark.parametrize("suffix", sorted(data.IMAGE_SUFFIXES))
def test_a_pool_may_have_any_kind_of_image_that_a_data_set_may_have(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"image{suffix}")
    assert len(lend.folder_images(tmp_path, (1, 8, 8))) == 1


def test_pixels_of_more_than_8_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match=r"deep\.tif has pixels of mode 'I;16': expected 8-bit"):
        lend.folder_images(tmp_path, (1, 8, 8))


@pytest.mark.parametrize(("evaluate_on", "images"), [("test", 1437), ("validation", 1197)])
def test_controls_of_an_imported_teacher_never_train_on_what_they_are_evaluated_on(
    evaluate_on: data.Split, images: int
) -> None:
    imported = TeacherSpec(model="convnet8", recipe=None, sha256="ab")
    lent = lend.training_data(data.dataset("digits"), imported, evaluate_on, None, CPU)
    assert len(lent.labels) == images
