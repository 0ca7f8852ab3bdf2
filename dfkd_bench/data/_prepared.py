"""Prepared files: every split's arrays and index in the home, opened and checked, and written once."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfkd_bench.data._arrays import SPLITS, Arrays, RawData
from dfkd_bench.data._lock import own_folder
from dfkd_bench.data._reason import reason
from dfkd_bench.data._splits import VALIDATION_SEED, stratified
from dfkd_bench.errors import UserError
from dfkd_bench.files import safe_name
from dfkd_bench.paths import HOME_VARIABLE, home

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dfkd_bench.data._arrays import Part, Split
    from dfkd_bench.data._dataset import DataSet

KINDS = ("images", "labels")
HASHED_BYTES = 64 * 2**20  # larger prepared files are checked by shape, type and size, not by their checksum

log = logging.getLogger(__name__)


class DamagedError(Exception):
    """A prepared file that isn't what its index says. The message starts with its path."""


def prepared_folder(name: str, version: str) -> Path:
    """Where the prepared files of a data set are, as a folder's name that any file system takes."""
    return home() / "data" / safe_name(name) / version


def open_split(data: DataSet, split: Split) -> Arrays | None:
    """The prepared split, or None if there is none. ``DamagedError``: there is one, and it is not to be used."""
    import numpy as np

    *arrays, index_file = data.prepared_files(split)
    if not index_file.is_file():
        return None
    try:
        index = json.loads(index_file.read_bytes())
        expected = [index["files"][kind] for kind in KINDS]
        made_for = index["made_for"]
    except (ValueError, KeyError, TypeError):
        raise DamagedError(f"{index_file} is damaged") from None
    if made_for != _made_for(data):
        raise DamagedError(f"{index_file} is of another definition of '{data.name}'")
    opened = []
    for path, facts in zip(arrays, expected, strict=True):
        try:
            size = path.stat().st_size
            if size != facts["bytes"]:
                raise DamagedError(f"{path} is damaged (it has {size} bytes instead of {facts['bytes']})")
            if size <= HASHED_BYTES and hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
                raise DamagedError(f"{path} is damaged (its checksum is wrong)")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{path} can't be read ({reason(error)})") from None
        if [*array.shape] != facts["shape"] or str(array.dtype) != facts["dtype"]:
            raise DamagedError(f"{path} is damaged (it holds {array.dtype} {array.shape})")
        opened.append(array)
    return Arrays(*opened)


def prepare(data: DataSet, part: Part, root: Path) -> None:
    """Read a part and write its splits. Whoever comes second waits for the first and uses what was made."""
    import numpy as np

    with own_folder(data.folder, part) as folder:
        if _is_whole(data, part):
            return
        log.info("preparing %s (%s part) in %s", data.name, part, data.folder)
        raw = _read(data, root, part)
        _verify(data, part, raw)
        rows = np.arange(len(raw.labels))
        names = data.names(root) if callable(data.names) else None
        try:
            splits: dict[Split, NDArray[np.int64]] = {"test": rows}
            if part == "train":
                cut = stratified(raw.labels, data.validation_size, VALIDATION_SEED)
                splits = {"train": np.delete(rows, cut), "validation": cut}
            if names is not None:
                (folder / "class_names.json").write_text(json.dumps(names), encoding="utf-8")
                os.replace(folder / "class_names.json", data.folder / "class_names.json")
            for split, chosen in splits.items():
                _write_split(data, split, raw, chosen, folder)
        except ValueError as error:
            raise UserError(f"the {part} part of '{data.name}' is not what it says it is: {reason(error)}") from error
        except OSError as error:
            need = len(rows) * int(np.prod(data.image_shape)) / 1e9
            raise UserError(
                f"can't write the prepared '{data.name}' into {data.folder} ({reason(error)}): it needs "
                f"{need:.2g} GB, name a folder with room by ${HOME_VARIABLE}"
            ) from None


def _read(data: DataSet, root: Path, part: Part) -> RawData:
    """The part as its reader finds it. A plugin's reader may raise or return anything: a line, not a crash."""
    import numpy as np

    try:
        raw: object = data.read(data, root, part)
    except (UserError, OSError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"the {part} part of '{data.name}' can't be read: {what}") from error
    if not isinstance(raw, RawData):
        raise UserError(f"read() of '{data.name}' returns a {type(raw).__name__}: expected a dfkd_bench.data.RawData")
    if not isinstance(raw.labels, np.ndarray) or raw.labels.ndim != 1 or raw.labels.dtype.kind not in "iu":
        raise UserError(f"read() of '{data.name}' returns labels that are no whole numbers [n] in a NumPy array")
    return raw


def _made_for(data: DataSet) -> list[Any]:
    """What prepared files depend on, beside the version: a plugin may change it and forget the version."""
    return [data.num_classes, list(data.image_shape), data.validation_size]


def _is_whole(data: DataSet, part: Part) -> bool:
    try:
        return all(open_split(data, split) for split in SPLITS if (split == "test") == (part == "test"))
    except DamagedError:
        return False


def _verify(data: DataSet, part: Part, raw: RawData) -> None:
    labels = raw.labels
    if data.sizes is not None and len(labels) != data.sizes[part == "test"]:
        raise UserError(
            f"the {part} part of '{data.name}' has {len(labels):,} images instead of {data.sizes[part == 'test']:,}: "
            "get it again from its source"
        )
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= data.num_classes:
        found = f"{labels.min()} to {labels.max()}" if len(labels) else "none"
        raise UserError(
            f"the {part} part of '{data.name}' has wrong labels: {found} instead of 0 to {data.num_classes - 1}"
        )


def _write_split(data: DataSet, split: Split, raw: RawData, rows: NDArray[np.int64], folder: Path) -> None:
    """Write into ``folder`` and move into place, the index last: a split without an index doesn't exist.

    An old index stays until it is replaced: whoever reads in between finds new files of the same content, or files that
    don't fit the index and so are not used.
    """
    images, labels, index = (folder / path.name for path in data.prepared_files(split))
    chosen = raw.labels[rows]
    files = {
        "images": _write_array(images, raw.blocks(rows), (len(rows), *data.image_shape), "uint8"),
        "labels": _write_array(labels, [chosen], (len(rows),), "int64"),
    }
    index.write_text(json.dumps({"made_for": _made_for(data), "files": files}, indent=1) + "\n", encoding="utf-8")
    for path in (images, labels, index):
        os.replace(path, data.folder / path.name)


def _write_array(path: Path, blocks: Iterable[NDArray], shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """An .npy file, written block by block (ImageNet is 200 GB; a full disk is an error here, not a crash)."""
    import numpy as np

    start = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(start, {"descr": descr, "fortran_order": False, "shape": shape})
    digest, rows = hashlib.sha256(start.getvalue()), 0
    with path.open("wb") as file:
        file.write(start.getvalue())
        for block in blocks:
            if block.shape[1:] != shape[1:] or block.dtype != dtype:
                raise ValueError(f"read {block.dtype} {block.shape[1:]} instead of {dtype} {shape[1:]}")
            content = np.ascontiguousarray(block).tobytes()
            digest.update(content)
            file.write(content)
            rows += len(block)
    if rows != shape[0]:
        raise ValueError(f"read {rows} rows instead of {shape[0]}")
    return {"shape": list(shape), "dtype": dtype, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
