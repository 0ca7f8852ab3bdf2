"""tiny_imagenet: 200 of ImageNet's classes, in folders."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dfkd_bench import class_names
from dfkd_bench.data._arrays import Part, RawData
from dfkd_bench.data._dataset import DataSet
from dfkd_bench.data._fetch import raw_path
from dfkd_bench.data._image_files import decode, read_class_folders
from dfkd_bench.data._raw import Raw
from dfkd_bench.errors import UserError

_RAW = Raw(
    ("tiny-imagenet-200/train", "tiny-imagenet-200/wnids.txt", "tiny-imagenet-200/words.txt"),
    ("tiny-imagenet-200/val/val_annotations.txt",),
    folders=("tiny_imagenet", "."),
    advice="unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip",
)


def _read(data: DataSet, root: Path, part: Part) -> RawData:
    """``train/<wnid>/images/`` and the published ``val`` part, whose labels are in ``val_annotations.txt``."""
    import numpy as np

    listed = raw_path(data, root, "tiny-imagenet-200/wnids.txt")
    wnids = sorted(listed.read_text(encoding="utf-8").split())
    if len(set(wnids)) != data.num_classes:
        raise UserError(f"{listed} lists {len(set(wnids))} classes instead of {data.num_classes}: get it again")
    if part == "train":
        return read_class_folders(data, root, part, wnids, inner="images")
    annotations = raw_path(data, root, "tiny-imagenet-200/val/val_annotations.txt")
    files, labels = [], []
    for line in annotations.read_text(encoding="utf-8").splitlines():
        file, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0]
        if wnid not in wnids:
            raise UserError(f"{annotations} is damaged: '{line[:60]}' names no class of {listed.name}; get it again")
        files.append(annotations.parent / "images" / file)
        labels.append(wnids.index(wnid))
    return RawData.of_files(files, np.array(labels, np.int64), partial(decode, shape=data.image_shape))


def _names(root: Path) -> tuple[str, ...]:
    """From the data set's own files; without them the shipped list of the same names."""
    words, wnids = (_RAW.find(root, f"tiny-imagenet-200/{file}.txt") for file in ("words", "wnids"))
    if words is None or wnids is None:
        return class_names.shipped_tiny_imagenet()
    return class_names.tiny_imagenet(wnids.parent)


TINY_IMAGENET = DataSet(
    name="tiny_imagenet",
    title="ImageNet, 200 classes at 64x64 RGB, 110,000 images; the published validation part is the test split",
    num_classes=200,
    names=_names,
    image_shape=(3, 64, 64),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    flip_keeps_class=True,
    validation_size=5000,
    sizes=(100_000, 10_000),
    source="Stanford CS231n; ImageNet's terms: non-commercial research and education",
    read=_read,
    raw=_RAW,
    shares_images_with=("imagenet",),
)

DATASETS = {TINY_IMAGENET.name: TINY_IMAGENET}
