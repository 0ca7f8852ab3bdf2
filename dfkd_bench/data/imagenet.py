"""imagenet: ImageNet-1k, sorted into one folder a WordNet id."""

from __future__ import annotations

from pathlib import Path

from dfkd_bench import class_names
from dfkd_bench.data._arrays import Part, RawData
from dfkd_bench.data._dataset import DataSet
from dfkd_bench.data._fetch import raw_path
from dfkd_bench.data._image_files import class_folders, read_class_folders
from dfkd_bench.data._raw import Raw
from dfkd_bench.errors import UserError


def _read(data: DataSet, root: Path, part: Part) -> RawData:
    """``train/<wnid>/`` and ``val/<wnid>/``; each part is read without the other."""
    folder = raw_path(data, root, (data.raw.test if part == "test" else data.raw.train)[0])
    wnids = class_folders(folder)
    first_and_last = (wnids[0], wnids[-1]) if wnids else ()
    if len(wnids) != data.num_classes or first_and_last != ("n01440764", "n15075141"):
        raise UserError(
            f"{folder} has {len(wnids)} folders, expected ImageNet's {data.num_classes} from n01440764 to n15075141: "
            "sort the images into one folder a WordNet id"
        )
    return read_class_folders(data, root, part, wnids, resize=True)


def _names(root: Path) -> tuple[str, ...]:
    return class_names.imagenet()


IMAGENET = DataSet(
    name="imagenet",
    title="ImageNet-1k at 224x224 RGB, 1,000 classes; the published validation part is the test split",
    num_classes=1000,
    names=_names,
    image_shape=(3, 224, 224),
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    flip_keeps_class=True,
    validation_size=10_000,
    sizes=(1_281_167, 50_000),
    source="ILSVRC 2012, https://image-net.org; non-commercial research and education",
    read=_read,
    raw=Raw(
        ("train",),
        ("val",),
        folders=("imagenet", "."),
        advice="get it from https://image-net.org and sort it into one folder a WordNet id",
    ),
)

DATASETS = {IMAGENET.name: IMAGENET}
