"""Images as files in folders: found, decoded, and read in ImageFolder form."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dfkd_bench.data._arrays import RawData
from dfkd_bench.data._fetch import raw_path
from dfkd_bench.data._reason import reason
from dfkd_bench.errors import UserError

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile as Image

    from dfkd_bench.data._arrays import Images, Part
    from dfkd_bench.data._dataset import DataSet

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MODES = frozenset({"1", "CMYK", "L", "LA", "P", "RGB", "RGBA", "YCbCr"})  # 8 bits a channel


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def images_below(folder: Path) -> list[Path]:
    """All image files of a folder and its folders, in the order of their paths."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted: classes in ImageFolder form."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def decode(path: Path, shape: tuple[int, int, int], resize: bool = False) -> Images:
    """One image file as uint8 [C, H, W].

    ``resize``: the shorter side to 8/7 of H (bilinear), then the centre, as torchvision's Resize(256) and
    CenterCrop(224). Otherwise another shape is a ``UserError``, as are unreadable files.
    """
    import numpy as np
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            refuse_deep_pixels(path, image)
            if not resize and (image.size != (width, height) or (channels == 1 and not is_gray(image.mode))):
                found = (1 if is_gray(image.mode) else 3, image.height, image.width)
                raise UserError(
                    f"{path} has the shape {found}, the first images have {shape} (C, H, W): make them agree"
                )
            pixels = image.convert("L" if channels == 1 else "RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise UserError(f"{path} can't be read as an image ({reason(error)}): replace or remove it") from None
    if resize:
        side, short = height * 8 // 7, min(pixels.size)
        size = (side * pixels.width // short, side * pixels.height // short)
        pixels = pixels.resize(size, Image.Resampling.BILINEAR)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        pixels = pixels.crop((left, top, left + width, top + height))
    array = np.asarray(pixels, np.uint8)
    return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))


def refuse_deep_pixels(path: Path, image: Image) -> None:
    """``UserError``: more than 8 bits a channel, which would be cut off. An image that is open and not decoded yet.

    Pillow has no mode for 16-bit RGB: it calls it RGB, and what it will decode tells.
    """
    raw = [part for tile in image.tile for part in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    deep = next((part for part in raw if isinstance(part, str) and ";16" in part), None)
    if image.mode not in _MODES or deep:
        raise UserError(f"{path} has pixels of mode '{deep or image.mode}': expected 8-bit gray or RGB")


def is_gray(mode: str) -> bool:
    """True for Pillow's modes of one channel, with or without transparency."""
    return mode in {"1", "L", "LA"}


def read_class_folders(
    data: DataSet, root: Path, part: Part, classes: Sequence[str], resize: bool = False, inner: str = ""
) -> RawData:
    """A part in ImageFolder form: one folder a class, whose images may lie in a folder of their own, ``inner``."""
    import numpy as np

    folder = raw_path(data, root, (data.raw.test if part == "test" else data.raw.train)[0])
    strangers = [name for name in class_folders(folder) if name not in set(classes)]
    if strangers:
        place = folder / strangers[0]
        if near := difflib.get_close_matches(strangers[0], classes, n=1):
            alike = unicodedata.normalize("NFC", near[0]) == unicodedata.normalize("NFC", strangers[0])
            how = " (they look alike, but their letters are encoded otherwise)" if alike else ""
            raise UserError(
                f"{place} is not one of the {len(classes)} classes of '{data.name}', the nearest is '{near[0]}'{how}: "
                "make both names one"
            )
        raise UserError(f"{place} is not one of the {len(classes)} classes of '{data.name}': take it out of {folder}")
    files = [(path, label) for label, name in enumerate(classes) for path in _class_files(folder / name / inner)]
    labels = np.array([label for _, label in files], np.int64)
    return RawData.of_files([path for path, _ in files], labels, partial(decode, shape=data.image_shape, resize=resize))


def _class_files(folder: Path) -> list[Path]:
    return image_files(folder) if folder.is_dir() else []
