"""svhn: cropped house numbers in MATLAB's format."""

from __future__ import annotations

import io
from pathlib import Path

from dfkd_bench import class_names
from dfkd_bench.data._arrays import Part, RawData
from dfkd_bench.data._dataset import DataSet
from dfkd_bench.data._fetch import fetch
from dfkd_bench.data._raw import Raw
from dfkd_bench.data._reason import reason
from dfkd_bench.errors import UserError


def _read(data: DataSet, root: Path, part: Part) -> RawData:
    """Cropped digits, MATLAB's format: ``X`` [32, 32, 3, n] and ``y`` [n, 1], where 10 stands for the digit 0."""
    import numpy as np
    from scipy.io import loadmat

    content, path = fetch(data, root, (data.raw.test if part == "test" else data.raw.train)[0])
    try:
        arrays = loadmat(io.BytesIO(content), variable_names=("X", "y"))
        images, labels = arrays["X"].transpose(3, 2, 0, 1), arrays["y"].reshape(-1).astype(np.int64)
        if images.dtype != np.uint8 or images.shape != (len(labels), *data.image_shape):
            raise ValueError(f"{images.dtype} {images.shape} with {len(labels)} labels")
    except Exception as error:  # scipy's reader has no error of its own
        raise UserError(f"{path} is not a file of '{data.name}' ({reason(error)}): get it again") from None
    return RawData.of_arrays(images, labels % 10)


SVHN = DataSet(
    name="svhn",
    title="house numbers, cropped digits, 32x32 RGB, 10 classes, 99,289 images (without the extra part)",
    num_classes=10,
    names=class_names.DIGITS,
    image_shape=(3, 32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    flip_keeps_class=False,
    validation_size=5000,
    sizes=(73_257, 26_032),
    source="Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers/; non-commercial use only",
    read=_read,
    raw=Raw(
        ("train_32x32.mat",),
        ("test_32x32.mat",),
        folders=("svhn", "."),
        address="http://ufldl.stanford.edu/housenumbers/",
        checksums={
            # as in torchvision.datasets, svhn.py
            "train_32x32.mat": ("e26dedcc434d2e4c54c9b2d4a06d8373",),
            "test_32x32.mat": ("eb5a983be6a315427106f1b164d9cef3",),
        },
    ),
)

DATASETS = {SVHN.name: SVHN}
