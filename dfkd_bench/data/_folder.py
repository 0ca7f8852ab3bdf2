"""``folder:PATH``: the user's own images, measured on first use."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dfkd_bench import class_names
from dfkd_bench.data._arrays import BLOCK, Part, RawData
from dfkd_bench.data._dataset import DataSet
from dfkd_bench.data._digest import digest_of, kept_digest
from dfkd_bench.data._fetch import raw_path
from dfkd_bench.data._image_files import class_folders, image_files, is_gray, read_class_folders, refuse_deep_pixels
from dfkd_bench.data._prepared import prepared_folder
from dfkd_bench.data._raw import Raw
from dfkd_bench.data._reason import reason
from dfkd_bench.data._stated import FILE as STATED_FILE
from dfkd_bench.data._stated import Stated, stated
from dfkd_bench.errors import UserError
from dfkd_bench.files import write_text
from dfkd_bench.once import is_kept, once
from dfkd_bench.paths import expanded, home

if TYPE_CHECKING:
    from dfkd_bench.data._arrays import Images

FOLDER_PREFIX = "folder:"


def image_folder(name: str) -> DataSet:
    """The user's own images: PATH/train/<class>/ and PATH/test/<class>/, and what PATH/dataset.json says of them.

    Where it says nothing, the classes are the sorted names of the folders in train/, and mean and standard deviation
    are measured there. All images have one size; they are gray if all training images are; a tenth of them is the
    validation split. Nothing is known of flips, so they are not done.

    With a normalisation in dataset.json train/ may be missing: then all that is said here of training images is taken
    from test/, and no teacher can be trained. ``UserError``: a folder is missing, or there are too few images.
    """
    path = expanded(name.removeprefix(FOLDER_PREFIX))
    return once(_key(path), lambda: _image_folder(name, path))


def _key(path: Path) -> tuple[str, Path, Path]:
    """What a folder's data set is kept under while a command runs."""
    return ("image folder", path.resolve(), home())


def _image_folder(name: str, path: Path) -> DataSet:
    known = stated(path)
    test_only = known.mean is not None and not (path / "train").exists()
    for part in ("test",) if test_only else get_args(Part):
        if not (path / part).is_dir():
            raise UserError(
                f"{path / part} is not a folder: '{name}' needs train/<class>/ and test/<class>/ with images; without "
                "training images, test/ and a dataset.json with mean and std (docs/own_teacher.md)"
            )
    folder, least = path / ("test" if test_only else "train"), 1 if test_only else 10
    classes = _classes(path, known)
    for class_name in classes:
        if class_name != class_name.encode(errors="replace").decode():
            raise UserError(
                f"{folder} has a class folder whose name is no UTF-8, {os.fsencode(class_name)!r}: rename it"
            )
    files = [file for class_name in classes for file in _images(folder / class_name)]
    if len(classes) < 2 or len(files) < least:
        raise UserError(
            f"{folder} has {len(classes)} class folders with {len(files)} images: expected at least 2 and {least}"
        )
    path = path.resolve()  # another working directory has another folder of the same relative name
    name = f"{FOLDER_PREFIX}{path}"
    version = _version(digest_of(path, _contents(path)))
    facts_file = _facts_file(name, version)
    facts = _facts(facts_file)
    unmeasured = DataSet(
        name=name,
        title=f"{len(classes)} classes of images in {path}",
        num_classes=len(classes),
        names=tuple(class_names.clean(class_name) for class_name in classes),
        image_shape=facts["image_shape"] if facts else _common_shape(files, known),
        mean=(),
        std=(),
        flip_keeps_class=False,
        validation_size=0 if test_only else len(files) // 10,
        source="the user's own",
        read=_read,
        version=version,
        raw=Raw(() if test_only else ("train",), ("test",), folders=(str(path),)),
        test_only=test_only,
    )
    if facts is None:
        facts = {"image_shape": unmeasured.image_shape, "mean": known.mean, "std": known.std}
        if known.mean is None:
            facts |= _measured(unmeasured.split("train").images)
        write_text(facts_file, json.dumps(facts))
    return replace(unmeasured, mean=tuple(facts["mean"]), std=tuple(facts["std"]))


def unmeasured_state(name: str) -> str | None:
    """The state of a folder that was not measured yet, as ``status`` gives it; None: it was. Opens no image."""
    path = expanded(name.removeprefix(FOLDER_PREFIX)).resolve()
    if is_kept(_key(path)):
        return None
    wanted = ("test",) if (path / STATED_FILE).is_file() else get_args(Part)
    if any(not (path / part).is_dir() for part in wanted):
        return f"missing: {' and '.join(wanted)} in {path}"
    digest = kept_digest(path, _contents(path))
    measured = digest is not None and _facts(_facts_file(f"{FOLDER_PREFIX}{path}", _version(digest))) is not None
    return None if measured else "raw files found"


def _classes(path: Path, known: Stated) -> tuple[str, ...]:
    """Names of the classes' folders, in the order of the labels."""
    if known.classes is not None:
        return known.classes
    train = path / "train"
    return tuple(class_folders(train if train.is_dir() else path / "test"))


def _images(folder: Path) -> list[Path]:
    """The images of a class; one that dataset.json names may have none."""
    return image_files(folder) if folder.is_dir() else []


def _contents(path: Path) -> list[Path]:
    """The folders of the classes and their images, and dataset.json: what decides the data set."""
    found = []
    for part in get_args(Part):
        for class_name in class_folders(path / part) if (path / part).is_dir() else []:
            found += [path / part / class_name, *image_files(path / part / class_name)]
    return [*found, path / STATED_FILE] if (path / STATED_FILE).is_file() else found


def _version(digest: str) -> str:
    return f"1-{digest[:16]}"


def _facts_file(name: str, version: str) -> Path:
    """Where shape, mean and standard deviation are kept."""
    return prepared_folder(name, version) / "facts.json"


def _facts(file: Path) -> dict[str, Any] | None:
    """Image shape, mean and standard deviation, if they were measured."""
    try:
        facts = json.loads(file.read_bytes())
        return {key: tuple(facts[key]) for key in ("image_shape", "mean", "std")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(data: DataSet, root: Path, part: Part) -> RawData:
    path = raw_path(data, root, "test").parent
    return read_class_folders(data, root, part, _classes(path, stated(path)))


def _common_shape(files: Sequence[Path], known: Stated) -> tuple[int, int, int]:
    """C, H, W of all images; as many channels as the stated mean has, else one if all are gray. Reads headers only."""
    from PIL import Image

    first: tuple[int, int] | None = None
    coloured: Path | None = None
    for file in files:
        try:
            with Image.open(file) as image:
                refuse_deep_pixels(file, image)
                size, mode = (image.height, image.width), image.mode
        except UserError:
            raise
        except Exception as error:  # see decode
            raise UserError(f"{file} can't be read as an image ({reason(error)}): replace or remove it") from None
        first = first or size
        if size != first:
            raise UserError(f"{file} has the size {size}, {files[0]} has {first} (H, W): make them agree")
        coloured = coloured or (None if is_gray(mode) else file)
    channels = (3 if coloured else 1) if known.mean is None else len(known.mean)
    if channels == 1 and coloured:
        raise UserError(
            f"{files[0].parents[2] / STATED_FILE} has 1 mean, but {coloured} is in colour: give 3, or make it gray"
        )
    height, width = first or (0, 0)
    return (channels, height, width)


def _measured(images: Images) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each channel of [0, 1] images; exact sums of whole numbers, block by block."""
    import numpy as np

    channels, count = images.shape[1], images.size // images.shape[1]
    total, squares = np.zeros(channels, np.int64), np.zeros(channels, np.int64)
    for start in range(0, len(images), BLOCK):
        block = images[start : start + BLOCK].astype(np.int64)
        total += block.sum((0, 2, 3))
        squares += (block**2).sum((0, 2, 3))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1.0))  # a channel that never varies: one of 255 levels
    return {"mean": tuple((mean / 255).tolist()), "std": tuple((std / 255).tolist())}
