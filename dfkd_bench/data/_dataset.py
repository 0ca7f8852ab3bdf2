"""The value ``DataSet``: what is known of a data set, and its splits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dfkd_bench.data._arrays import SPLITS, Arrays, Part, RawData, Split
from dfkd_bench.data._prepared import KINDS, DamagedError, open_split, prepare, prepared_folder
from dfkd_bench.data._raw import Raw
from dfkd_bench.data._splits import parts_of
from dfkd_bench.errors import UserError, unknown
from dfkd_bench.files import write_text
from dfkd_bench.paths import data_root

FIRST_VERSION = "1"
_NO_RAW_FILES = Raw()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSet:
    """One data set. A plugin builds one of these; ``read(data_set, root, part)`` reads and verifies its raw files."""

    name: str
    title: str  # one line for ``dfkd-bench list``
    num_classes: int
    names: tuple[str, ...] | Callable[[Path], tuple[str, ...]]  # class names, or what finds them (given the data root)
    image_shape: tuple[int, int, int]  # C, H, W
    mean: tuple[float, ...]  # per channel, of images in [0, 1]
    std: tuple[float, ...]
    flip_keeps_class: bool  # whether a mirrored image is still of its class (not so for digits and letters)
    validation_size: int  # images cut from the training part
    source: str  # where it comes from, and its licence
    read: Callable[[DataSet, Path, Part], RawData]
    version: str = FIRST_VERSION  # of the preparation: raise it when prepared files would differ
    sizes: tuple[int, int] | None = None  # images in the training part (with validation) and in the test part
    raw: Raw = _NO_RAW_FILES
    one_file: bool = False  # both parts come in one file: all splits are prepared together
    test_only: bool = False  # there is no training part: teachers are imported, and controls on real images impossible
    shares_images_with: tuple[str, ...] = ()  # other data sets' names; saying it on one side is enough
    root: Path | None = None  # ``--data-root``; None: ``$DFKD_BENCH_DATA``, then the home

    @property
    def class_names(self) -> tuple[str, ...]:
        """Clean text, in the order of the labels. ImageNet's import torchvision, Tiny-ImageNet's need its files.

        ``UserError``: there are not as many as classes, or those that were kept are damaged and the raw files are not
        there to find them again.
        """
        if not callable(self.names):
            return self.names
        kept = self.folder / "class_names.json"
        if not kept.is_file():
            return self._found_names()
        try:
            known = json.loads(kept.read_text(encoding="utf-8"))
        except ValueError:
            known = None
        if isinstance(known, list) and len(known) == self.num_classes and all(isinstance(one, str) for one in known):
            return tuple(known)
        log.warning("%s is damaged: it is made again", kept)
        try:
            names = self._found_names()
        except UserError as error:
            raise UserError(f"{kept} is damaged, and can't be made again: {error}") from None
        write_text(kept, json.dumps(names))
        return names

    def _found_names(self) -> tuple[str, ...]:
        assert callable(self.names)
        names = self.names(data_root(self.root))
        if len(names) != self.num_classes:
            raise UserError(
                f"the files of '{self.name}' in {data_root(self.root)} name {len(names)} classes instead of "
                f"{self.num_classes}: get them again"
            )
        return names

    @property
    def content(self) -> str | None:
        """What tells its images from others of the same name, for jobs and teachers; None: the name alone does."""
        return None if self.version == FIRST_VERSION else self.version

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that it has."""
        return ("test",) if self.test_only else SPLITS

    @property
    def folder(self) -> Path:
        """Where the prepared files are."""
        return prepared_folder(self.name, self.version)

    def prepared_files(self, split: Split) -> tuple[Path, ...]:
        """The only files that a prepared split opens: images, labels, index."""
        return (*(self.folder / f"{split}-{kind}.npy" for kind in KINDS), self.folder / f"{split}-index.json")

    def own_folders(self, root: Path | None = None) -> tuple[Path, ...]:
        """Folders that hold nothing but this data set, raw or prepared. ``root``: as for ``split``."""
        return (*self.raw.own_folders(data_root(root if root is not None else self.root)), self.folder)

    def split(self, split: Split, root: Path | None = None) -> Arrays:
        """Images and labels of one split; prepares it first if that was not done yet.

        ``root``: where raw files are looked for, in place of the data set's own. ``UserError``: raw files are missing
        or damaged, or there is no room; a damaged prepared file is remade, with a warning that names it.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if split not in self.splits:
            raise UserError(f"'{self.name}' has a test part only, and no {split} split")
        damage = ""
        try:
            arrays = open_split(self, split)
        except DamagedError as error:
            arrays, damage = None, str(error)
        if arrays is not None:
            return arrays
        if damage:
            log.warning("%s: it is made again", damage)
        try:
            for part in parts_of(self, split):
                prepare(self, part, data_root(root if root is not None else self.root))
        except UserError as error:
            raise UserError(f"{damage}, and can't be made again: {error}") if damage else error from None
        try:
            arrays = open_split(self, split)
        except DamagedError as error:
            raise UserError(f"{error}, although it was just written: check the disk") from None
        if arrays is None:
            raise UserError(f"{self.folder} was removed while '{self.name}' was being prepared: start again")
        return arrays
