"""What the runner lends: pools and first images, in the shape of the task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dfkd_bench import data, lend
from dfkd_bench.errors import UserError

CPU = torch.device("cpu")


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
