"""digits: the handwritten digits that come with scikit-learn."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dfkd_bench import class_names
from dfkd_bench.data._arrays import Part, RawData
from dfkd_bench.data._dataset import DataSet
from dfkd_bench.data._splits import TEST_SEED, stratified
from dfkd_bench.errors import UserError

_TEST_SIZE = 360
_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"
"""Of all images and labels as bytes, taken from scikit-learn 1.9."""


def _read(data: DataSet, root: Path, part: Part) -> RawData:
    """scikit-learn's own copy, values 0 to 16 spread over 0 to 255. The test part is cut here: it has none."""
    import numpy as np
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    content = values.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()
    if hashlib.sha256(content).hexdigest() != _SHA256:
        raise UserError("the digits of the installed scikit-learn are not the published ones: reinstall scikit-learn")
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, *data.image_shape)
    labels = labels.astype(np.int64)
    test = stratified(labels, _TEST_SIZE, TEST_SEED)
    rows = test if part == "test" else np.delete(np.arange(len(labels)), test)
    return RawData.of_arrays(images[rows], labels[rows])


DIGITS = DataSet(
    name="digits",
    title="handwritten digits, 8x8 gray, 10 classes, 1,797 images; comes with scikit-learn",
    num_classes=10,
    names=class_names.DIGITS,
    image_shape=(1, 8, 8),
    mean=(0.3057,),  # of the training split, measured
    std=(0.3764,),
    flip_keeps_class=False,
    validation_size=240,
    sizes=(1797 - _TEST_SIZE, _TEST_SIZE),
    source="UCI, Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), test part; CC BY 4.0",
    read=_read,
    one_file=True,
)

DATASETS = {DIGITS.name: DIGITS}
