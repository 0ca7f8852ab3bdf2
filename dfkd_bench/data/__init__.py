"""Data sets: names, facts, where the raw files come from, and their splits as memory-mapped arrays.

The only package that knows data sets. A data set is prepared once: its raw files are read and verified and every split
is written into files of its own, ``data/<name>/<version>/<split>-{images,labels}.npy`` in the home, with an index
``<split>-index.json``. Later only the files of the split asked for are opened, so that a process that may not see
training data can show that it did not. The published test part is the test split; validation is cut from the training
part, stratified by class, by a fixed seed.

Every file that was read goes through a published checksum or, where there is none (images in folders), through counts,
shapes and the range of labels. Nothing here imports torch, numpy, scikit-learn, scipy or Pillow before it is needed.

Every file of this folder without a leading underscore holds a data set, or several that are read alike, as a dictionary
``DATASETS`` by name, as a plugin's file does; there is no central list.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from dfkd_bench.data._arrays import SPLITS, Arrays, Part, RawData, Split, as_tensor
from dfkd_bench.data._contract import fault
from dfkd_bench.data._dataset import DataSet
from dfkd_bench.data._digest import FolderFacts, folder_facts
from dfkd_bench.data._folder import FOLDER_PREFIX, image_folder, unmeasured_state
from dfkd_bench.data._image_files import IMAGE_SUFFIXES, images_below, refuse_deep_pixels
from dfkd_bench.data._raw import Raw
from dfkd_bench.data._splits import VALIDATION_SEED, stratified
from dfkd_bench.errors import unknown
from dfkd_bench.paths import data_root

__all__ = [
    "FOLDER_PREFIX",
    "IMAGE_SUFFIXES",
    "SPLITS",
    "VALIDATION_SEED",
    "Arrays",
    "DataSet",
    "FolderFacts",
    "Part",
    "Raw",
    "RawData",
    "Split",
    "as_tensor",
    "dataset",
    "dataset_names",
    "fault",
    "folder_facts",
    "images_below",
    "refuse_deep_pixels",
    "same_images",
    "status",
    "stratified",
]


def dataset_names() -> tuple[str, ...]:
    """The built-in data sets: those that need no raw files first, small images first. ``folder:PATH`` comes on top."""
    return tuple(_built_in())


def dataset(name: str, root: Path | None = None, extra: Mapping[str, DataSet] | None = None) -> DataSet:
    """The data set of that name: built in, a plugin's (``extra``), or the user's own images (``folder:PATH``).

    ``folder:PATH`` prepares its training split on first use: the normalisation is measured on it, unless its
    dataset.json says it. ``UserError``: no such data set.
    """
    if name.startswith(FOLDER_PREFIX):
        return replace(image_folder(name), root=root)
    known = {**_built_in(), **(extra or {})}
    if name not in known:
        raise unknown("data set", name, known, f"Your own images: {FOLDER_PREFIX}PATH with train/ and test/")
    return replace(known[name], root=root)


def same_images(of: DataSet, extra: Mapping[str, DataSet] | None = None) -> list[DataSet]:
    """The data set itself and those that say that they share images with it, or of which it says so."""
    known = {**_built_in(), **(extra or {})}
    others = [one for name, one in known.items() if name in of.shares_images_with or of.name in one.shares_images_with]
    return [of, *(replace(one, root=of.root) for one in others)]


def status(name: str, root: Path | None = None, extra: Mapping[str, DataSet] | None = None) -> str:
    """``ready`` (prepared), ``raw files found`` or ``missing: ...`` with what was looked for. Opens no data file."""
    if name.startswith(FOLDER_PREFIX) and (state := unmeasured_state(name)) is not None:
        return state
    found = dataset(name, root, extra)
    if all(path.is_file() for split in found.splits for path in found.prepared_files(split)):
        return "ready"
    where = data_root(root)
    return "raw files found" if found.raw.at_hand(where) else f"missing: {found.raw.looked_for(where)}"


@functools.cache
def _built_in() -> Mapping[str, DataSet]:
    """Name -> data set, from the files of this folder, in the order of ``dataset_names``."""
    homes: dict[str, str] = {}
    found: dict[str, DataSet] = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        for name, data in import_module(f"{__name__}.{path.stem}").DATASETS.items():
            if name in found:
                raise ValueError(f"data set '{name}' is named by both {homes[name]}.py and {path.name}")
            homes[name], found[name] = path.stem, data
    return dict(sorted(found.items(), key=lambda item: (bool(item[1].raw.train), item[1].image_shape[1])))
