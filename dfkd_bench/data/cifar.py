"""cifar10 and cifar100: pickled batches."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd_bench import class_names
from dfkd_bench.data._arrays import Part, RawData
from dfkd_bench.data._dataset import DataSet
from dfkd_bench.data._fetch import fetch, is_published
from dfkd_bench.data._raw import Raw
from dfkd_bench.data._reason import reason
from dfkd_bench.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def _read(data: DataSet, root: Path, part: Part) -> RawData:
    """Pickled batches, as files or in the published archive: ``data`` [n, 3072] and ``labels`` or ``fine_labels``."""
    import numpy as np

    images, labels = [], []
    for content, path in _batches(data, root, data.raw.test if part == "test" else data.raw.train):
        try:
            batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
            pixels = batch["data"]
            fine = np.asarray(batch["fine_labels" if "fine_labels" in batch else "labels"], np.int64)
            if pixels.dtype != np.uint8 or pixels.shape != (len(fine), int(np.prod(data.image_shape))):
                raise ValueError(f"{pixels.dtype} {pixels.shape} with {len(fine)} labels")
        except Exception as error:  # a damaged pickle can raise nearly everything
            raise UserError(f"{path} is not a batch of '{data.name}' ({reason(error)}): get it again") from None
        images.append(pixels.reshape(-1, *data.image_shape))
        labels.append(fine)
    return RawData.of_arrays(np.concatenate(images), np.concatenate(labels))


def _batches(data: DataSet, root: Path, files: tuple[str, ...]) -> list[tuple[bytes, Path]]:
    if all(data.raw.find(root, file) for file in files):
        return [fetch(data, root, file) for file in files]
    content, path = fetch(data, root, data.raw.archive)
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for file in files:
                member = archive.extractfile(file)
                found.append((member.read() if member else b"", path / file))
    except (tarfile.TarError, OSError, EOFError, KeyError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({reason(error)}): remove it and start again") from None
    for file, (member_content, member_path) in zip(files, found, strict=True):
        if not is_published(data, file, member_content):
            raise UserError(f"{member_path} is not the published file: its md5 checksum is wrong")
    return found


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain values and numpy arrays; a pickle that names anything else is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name == "_reconstruct":
            return super().find_class("numpy._core.multiarray", name)  # where numpy has it since 1.26
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if (module, name) == ("numpy", "ndarray"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _dtype(code: str, align: int = 0, copy: int = 0) -> np.dtype:
    """Old pickles give the flags as integers, of which numpy 2.4.0 to 2.4.4 warn (numpy/numpy#31177)."""
    import numpy as np

    return np.dtype(code, align=bool(align), copy=bool(copy))


CIFAR10 = DataSet(
    name="cifar10",
    title="photographs of animals and vehicles, 32x32 RGB, 10 classes, 60,000 images",
    num_classes=10,
    names=class_names.CIFAR10,
    image_shape=(3, 32, 32),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),  # too small, and what the field's pretrained teachers expect
    flip_keeps_class=True,
    validation_size=5000,
    sizes=(50_000, 10_000),
    source="Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html; no licence stated",
    read=_read,
    raw=Raw(
        tuple(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
        ("cifar-10-batches-py/test_batch",),
        folders=("cifar10", "."),
        archive="cifar-10-python.tar.gz",
        address="https://www.cs.toronto.edu/~kriz/",
        checksums={
            # as in torchvision.datasets, cifar.py
            "cifar-10-python.tar.gz": ("c58f30108f718f92721af3b95e74349a",),
            "cifar-10-batches-py/data_batch_1": ("c99cafc152244af753f735de768cd75f",),
            "cifar-10-batches-py/data_batch_2": ("d4bba439e000b95fd0a9bffe97cbabec",),
            "cifar-10-batches-py/data_batch_3": ("54ebc095f3ab1f0389bbae665268c751",),
            "cifar-10-batches-py/data_batch_4": ("634d18415352ddfa80567beed471001a",),
            "cifar-10-batches-py/data_batch_5": ("482c414d41f54cd18b22e5b47cb7c3cb",),
            "cifar-10-batches-py/test_batch": ("40351d587109b95175f43aff81a1287e",),
        },
    ),
)

CIFAR100 = DataSet(
    name="cifar100",
    title="photographs, 32x32 RGB, 100 fine classes, 60,000 images",
    num_classes=100,
    names=class_names.CIFAR100,
    image_shape=(3, 32, 32),
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
    flip_keeps_class=True,
    validation_size=5000,
    sizes=(50_000, 10_000),
    source="Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html; no licence stated",
    read=_read,
    raw=Raw(
        ("cifar-100-python/train",),
        ("cifar-100-python/test",),
        folders=("cifar100", "."),
        archive="cifar-100-python.tar.gz",
        address="https://www.cs.toronto.edu/~kriz/",
        checksums={
            # as in torchvision.datasets, cifar.py
            "cifar-100-python.tar.gz": ("eb9058c3a382ffc7106e4002c42a8d85",),
            "cifar-100-python/train": ("16019d7e3df5f24257cddd939b257f8d",),
            "cifar-100-python/test": ("f0ef6b0ae62326f3e7ffdfab6717acfc",),
        },
    ),
)

DATASETS = {data.name: data for data in (CIFAR10, CIFAR100)}
