"""mnist and fashion_mnist: the IDX format."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from dfkd_bench import class_names
from dfkd_bench.data._arrays import Part, RawData
from dfkd_bench.data._dataset import DataSet
from dfkd_bench.data._fetch import fetch
from dfkd_bench.data._raw import Raw
from dfkd_bench.data._reason import reason
from dfkd_bench.errors import UserError

if TYPE_CHECKING:
    from dfkd_bench.data._arrays import Images

_TRAIN = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
_TEST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")


def _read(data: DataSet, root: Path, part: Part) -> RawData:
    """MNIST's format: two gzipped files, big-endian sizes, bytes."""
    import numpy as np

    image_file, label_file = data.raw.test if part == "test" else data.raw.train
    images = _idx(*fetch(data, root, image_file), dimensions=3)
    labels = _idx(*fetch(data, root, label_file), dimensions=1)
    if images.shape[1:] != data.image_shape[1:] or len(images) != len(labels):
        raise UserError(f"{image_file} and {label_file} don't fit: {images.shape} and {labels.shape}")
    return RawData.of_arrays(images[:, None], labels.astype(np.int64))


def _idx(content: bytes, path: Path, dimensions: int) -> Images:
    import numpy as np

    try:
        content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({reason(error)}): remove it and start again") from None
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)):  # 8: unsigned bytes
        raise UserError(
            f"{path} is not an IDX file of bytes in {dimensions} dimension(s): it starts with {content[:4]!r}"
        )
    shape = np.frombuffer(content, ">u4", dimensions, 4).astype(int) if len(content) >= start else None
    if shape is None or len(content) != start + shape.prod():
        raise UserError(f"{path} is truncated: remove it and start again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


MNIST = DataSet(
    name="mnist",
    title="handwritten digits, 28x28 gray, 10 classes, 70,000 images",
    num_classes=10,
    names=class_names.DIGITS,
    image_shape=(1, 28, 28),
    mean=(0.1307,),
    std=(0.3081,),
    flip_keeps_class=False,
    validation_size=5000,
    sizes=(60_000, 10_000),
    source="LeCun, Cortes and Burges 1998; CC BY-SA 3.0",
    read=_read,
    raw=Raw(
        _TRAIN,
        _TEST,
        folders=("mnist", ".", "MNIST/raw"),
        address="https://ossci-datasets.s3.amazonaws.com/mnist/",
        checksums={
            # as in torchvision.datasets, mnist.py
            "train-images-idx3-ubyte.gz": ("f68b3c2dcbeaaa9fbdd348bbdeb94873",),
            "train-labels-idx1-ubyte.gz": ("d53e105ee54ea40749a09fcbcd1e9432",),
            "t10k-images-idx3-ubyte.gz": ("9fb629c4189551a2d022fa330f9573f3",),
            "t10k-labels-idx1-ubyte.gz": ("ec29112dd5afa0611ce80d1b7f02629c",),
        },
    ),
)

FASHION_MNIST = DataSet(
    name="fashion_mnist",
    title="articles of clothing, 28x28 gray, 10 classes, 70,000 images",
    num_classes=10,
    names=class_names.FASHION_MNIST,
    image_shape=(1, 28, 28),
    mean=(0.2860,),
    std=(0.3530,),
    flip_keeps_class=True,
    validation_size=5000,
    sizes=(60_000, 10_000),
    source="Zalando Research (Xiao, Rasul and Vollgraf 2017); MIT",
    read=_read,
    raw=Raw(
        _TRAIN,
        _TEST,
        folders=("fashion_mnist", ".", "FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
        address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        advice="on Debian and Ubuntu: apt install dataset-fashion-mnist",
        checksums={
            # the first as in torchvision.datasets, mnist.py; the second: Debian's dataset-fashion-mnist
            # 0.0~git20200523, the same streams without name and time in the gzip header (with these put back, the
            # published checksums come out)
            "train-images-idx3-ubyte.gz": ("8d4fb7e6c68d591d4c3dfef9ec88bf0d", "cf8536b0aa1a6ac5fa3f23001093305c"),
            "train-labels-idx1-ubyte.gz": ("25c81989df183df01b3e8a0aad5dffbe", "10bea18fdb374794d4bb42e356e600c9"),
            "t10k-images-idx3-ubyte.gz": ("bef4ecab320f06d8554ea6380940ec79", "f78720b4224f21cce2f2ccf2d7a94c9a"),
            "t10k-labels-idx1-ubyte.gz": ("bb300cfdad3c16e7a12a480ee83cd310", "0d30e22e447f3c33dab9ed536400ac01"),
        },
    ),
)

DATASETS = {data.name: data for data in (MNIST, FASHION_MNIST)}
