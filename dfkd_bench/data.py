"""Data sets: names, facts, where the raw files come from, and their splits as memory-mapped arrays.

The only file that knows data sets. A data set is prepared once: its raw files are read and verified and every split is
written into files of its own, ``data/<name>/<version>/<split>-{images,labels}.npy`` in the home, with an index
``<split>-index.json``. Later only the files of the split asked for are opened, so that a process that may not see
training data can show that it did not. The published test part is the test split; validation is cut from the training
part, stratified by class, by a fixed seed.

Every file that was read goes through a published checksum or, where there is none (images in folders), through counts,
shapes and the range of labels. Nothing here imports torch, numpy, scikit-learn, scipy or Pillow before it is needed.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from dfkd_bench import class_names, glyphs
from dfkd_bench.errors import UserError, unknown
from dfkd_bench.paths import DATA_VARIABLE, HOME_VARIABLE, data_root, home

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Images = NDArray[np.uint8]  # [n, C, H, W]
    Labels = NDArray[np.int64]  # [n]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Part = Literal["train", "test"]
"""What is published. The splits ``train`` and ``validation`` come from the part ``train``."""

VALIDATION_SEED = 1
TEST_SEED = 2  # for data sets that come in one part
FOLDER_PREFIX = "folder:"
BLOCK = 256  # images that are decoded and written at a time
HASHED_BYTES = 64 * 2**20  # larger prepared files are checked by shape, type and size, not by their checksum

CHECKSUMS: dict[str, tuple[str, ...]] = {
    # md5 of the published files, as in torchvision.datasets (mnist.py, cifar.py, svhn.py)
    "mnist/train-images-idx3-ubyte.gz": ("f68b3c2dcbeaaa9fbdd348bbdeb94873",),
    "mnist/train-labels-idx1-ubyte.gz": ("d53e105ee54ea40749a09fcbcd1e9432",),
    "mnist/t10k-images-idx3-ubyte.gz": ("9fb629c4189551a2d022fa330f9573f3",),
    "mnist/t10k-labels-idx1-ubyte.gz": ("ec29112dd5afa0611ce80d1b7f02629c",),
    # the second of each pair: Debian's dataset-fashion-mnist 0.0~git20200523, the same streams without name and time in
    # the gzip header (with these put back, the published checksums come out)
    "fashion_mnist/train-images-idx3-ubyte.gz": (
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "cf8536b0aa1a6ac5fa3f23001093305c",
    ),
    "fashion_mnist/train-labels-idx1-ubyte.gz": (
        "25c81989df183df01b3e8a0aad5dffbe",
        "10bea18fdb374794d4bb42e356e600c9",
    ),
    "fashion_mnist/t10k-images-idx3-ubyte.gz": ("bef4ecab320f06d8554ea6380940ec79", "f78720b4224f21cce2f2ccf2d7a94c9a"),
    "fashion_mnist/t10k-labels-idx1-ubyte.gz": ("bb300cfdad3c16e7a12a480ee83cd310", "0d30e22e447f3c33dab9ed536400ac01"),
    "cifar10/cifar-10-python.tar.gz": ("c58f30108f718f92721af3b95e74349a",),
    "cifar10/cifar-10-batches-py/data_batch_1": ("c99cafc152244af753f735de768cd75f",),
    "cifar10/cifar-10-batches-py/data_batch_2": ("d4bba439e000b95fd0a9bffe97cbabec",),
    "cifar10/cifar-10-batches-py/data_batch_3": ("54ebc095f3ab1f0389bbae665268c751",),
    "cifar10/cifar-10-batches-py/data_batch_4": ("634d18415352ddfa80567beed471001a",),
    "cifar10/cifar-10-batches-py/data_batch_5": ("482c414d41f54cd18b22e5b47cb7c3cb",),
    "cifar10/cifar-10-batches-py/test_batch": ("40351d587109b95175f43aff81a1287e",),
    "cifar100/cifar-100-python.tar.gz": ("eb9058c3a382ffc7106e4002c42a8d85",),
    "cifar100/cifar-100-python/train": ("16019d7e3df5f24257cddd939b257f8d",),
    "cifar100/cifar-100-python/test": ("f0ef6b0ae62326f3e7ffdfab6717acfc",),
    "svhn/train_32x32.mat": ("e26dedcc434d2e4c54c9b2d4a06d8373",),
    "svhn/test_32x32.mat": ("eb5a983be6a315427106f1b164d9cef3",),
    # sha256 of all images and labels as bytes, taken from scikit-learn 1.9
    "digits": ("87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826",),
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Arrays:
    """One split, memory-mapped and read-only: copy before giving it to torch."""

    images: Images  # uint8 [n, C, H, W]
    labels: Labels  # int64 [n], in the order of the source (often sorted by class)


@dataclass(frozen=True, eq=False)
class RawData:
    """A part as a reader found it: all labels, and images that are decoded when they are written."""

    labels: Labels  # int64 [n]
    blocks: Callable[[NDArray[np.int64]], Iterator[Images]]  # row numbers -> uint8 [b, C, H, W], block after block

    @classmethod
    def of_arrays(cls, images: Images, labels: Labels) -> RawData:
        """From arrays: uint8 [n, C, H, W] and int64 [n]."""

        def blocks(rows: NDArray[np.int64]) -> Iterator[Images]:
            for start in range(0, len(rows), BLOCK):
                yield images[rows[start : start + BLOCK]]

        return cls(labels, blocks)

    @classmethod
    def of_files(cls, files: Sequence[Path], labels: Labels, decode: Callable[[Path], Images]) -> RawData:
        """From image files, decoded by several threads; ``decode`` returns uint8 [C, H, W]."""

        def blocks(rows: NDArray[np.int64]) -> Iterator[Images]:
            from concurrent.futures import ThreadPoolExecutor

            import numpy as np

            with ThreadPoolExecutor() as threads:
                for start in range(0, len(rows), BLOCK):
                    yield np.stack(list(threads.map(decode, [files[row] for row in rows[start : start + BLOCK]])))

        return cls(labels, blocks)


@dataclass(frozen=True)
class Raw:
    """Which raw files a data set wants and where they are looked for."""

    train: tuple[str, ...] = ()  # files or folders, relative to one of ``folders``
    test: tuple[str, ...] = ()
    folders: tuple[str, ...] = (".",)  # below the data root; absolute ones as they are
    archive: str = ""  # a tar.gz that holds all of them
    address: str = ""  # where the files (or the archive) are downloaded from; empty: by hand
    advice: str = ""  # what else the user can do

    def candidates(self, root: Path, file: str) -> list[Path]:
        """Every path at which ``file`` may be, in the order of search."""
        return [root / folder / file for folder in self.folders]

    def find(self, root: Path, file: str) -> Path | None:
        """The first of them that exists."""
        return next((path for path in self.candidates(root, file) if path.exists()), None)

    def at_hand(self, root: Path) -> bool:
        """True if all files, or the archive, exist. Looks at names only."""
        if self.archive and self.find(root, self.archive):
            return True
        return all(self.find(root, file) for file in self.train + self.test)

    def looked_for(self, root: Path) -> str:
        """One line: the files and the folders they were looked for in."""
        wanted = ", ".join(dict.fromkeys(self.train + self.test))
        either = f"{self.archive} or " if self.archive else ""
        folders = ", ".join(str((root / folder).resolve()) for folder in self.folders)
        return f"{either}{wanted} in one of the folders {folders}"


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
    version: str = "1"  # of the preparation: raise it when prepared files would differ
    sizes: tuple[int, int] | None = None  # images in the training part (with validation) and in the test part
    raw: Raw = Raw()
    one_file: bool = False  # both parts come in one file: all splits are prepared together
    root: Path | None = None  # ``--data-root``; None: ``$DFKD_BENCH_DATA``, then the home

    @property
    def class_names(self) -> tuple[str, ...]:
        """Clean text, in the order of the labels. ImageNet's import torchvision, Tiny-ImageNet's need its files."""
        if not callable(self.names):
            return self.names
        kept = self.folder / "class_names.json"
        if kept.is_file():
            return tuple(json.loads(kept.read_text(encoding="utf-8")))
        return self.names(data_root(self.root))

    @property
    def folder(self) -> Path:
        """Where the prepared files are."""
        return home() / "data" / _folder_name(self.name) / self.version

    def prepared_files(self, split: Split) -> tuple[Path, ...]:
        """The only files that a prepared split opens: images, labels, index."""
        return (*(self.folder / f"{split}-{kind}.npy" for kind in _KINDS), self.folder / f"{split}-index.json")

    def split(self, split: Split, root: Path | None = None) -> Arrays:
        """Images and labels of one split; prepares it first if that was not done yet.

        ``root``: where raw files are looked for, in place of the data set's own. ``UserError``: raw files are missing
        or damaged, or there is no room; a damaged prepared file is remade, with a warning that names it.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        damage = ""
        try:
            arrays = _open(self, split)
        except _DamagedError as error:
            arrays, damage = None, str(error)
        if arrays is not None:
            return arrays
        if damage:
            log.warning("%s: it is made again", damage)
        try:
            for part in _parts(self, split):
                _prepare(self, part, data_root(root if root is not None else self.root))
        except UserError as error:
            raise UserError(f"{damage}, and can't be made again: {error}") if damage else error from None
        try:
            arrays = _open(self, split)
        except _DamagedError as error:
            raise UserError(f"{error}, although it was just written: check the disk") from None
        if arrays is None:
            raise UserError(f"{self.folder} was removed while '{self.name}' was being prepared: start again")
        return arrays


def dataset_names() -> tuple[str, ...]:
    """The built-in data sets; ``folder:PATH`` comes on top."""
    return tuple(_BUILT_IN)


def dataset(name: str, root: Path | None = None, extra: Mapping[str, DataSet] | None = None) -> DataSet:
    """The data set of that name: built in, a plugin's (``extra``), or the user's own images (``folder:PATH``).

    ``folder:PATH`` prepares its training split on first use: the normalisation is measured on it. ``UserError``: no
    such data set.
    """
    if name.startswith(FOLDER_PREFIX):
        return replace(_image_folder(name), root=root)
    known = {**_BUILT_IN, **(extra or {})}
    if name not in known:
        raise unknown("data set", name, known, f"Your own images: {FOLDER_PREFIX}PATH with train/ and test/")
    return replace(known[name], root=root)


def status(name: str, root: Path | None = None, extra: Mapping[str, DataSet] | None = None) -> str:
    """``ready`` (prepared), ``raw files found`` or ``missing: ...`` with what was looked for. Opens no data file."""
    if name.startswith(FOLDER_PREFIX):
        path = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
        if any(not (path / part).is_dir() for part in get_args(Part)):
            return f"missing: train and test in {path.resolve()}"
        if _folder_facts(_folder_cache(name, path)) is None:
            return "raw files found"
    found = dataset(name, root, extra)
    if all(path.is_file() for split in SPLITS for path in found.prepared_files(split)):
        return "ready"
    where = data_root(root)
    return "raw files found" if found.raw.at_hand(where) else f"missing: {found.raw.looked_for(where)}"


# --- Splits -----------------------------------------------------------------------------------------------------------


def stratified(labels: Labels, size: int, seed: int) -> NDArray[np.int64]:
    """``size`` row numbers, sorted, with the classes in the proportions of ``labels`` (by largest remainders).

    The same for every version of numpy: the streams of its bit generators, unlike those of its samplers, are fixed.
    """
    import numpy as np

    if not 0 < size < len(labels):
        raise ValueError(f"can't cut {size} of {len(labels)} images")
    counts = np.bincount(labels)
    quotas, rest = np.divmod(counts * size, len(labels))
    quotas[np.argsort(-rest, kind="stable")[: size - quotas.sum()]] += 1
    order = np.lexsort((np.random.PCG64(seed).random_raw(len(labels)), labels))  # by class, shuffled within
    rank = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels[order]]
    return np.sort(order[rank < quotas[labels[order]]])


def _parts(data: DataSet, split: Split) -> tuple[Part, ...]:
    if data.one_file:
        return get_args(Part)
    return ("test",) if split == "test" else ("train",)


# --- Prepared files ---------------------------------------------------------------------------------------------------

_KINDS = ("images", "labels")


class _DamagedError(Exception):
    """A prepared file that isn't what its index says. The message starts with its path."""


def _folder_name(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in name)


def _made_for(data: DataSet) -> list[Any]:
    """What prepared files depend on, beside the version: a plugin may change it and forget the version."""
    return [data.num_classes, list(data.image_shape), data.validation_size]


def _open(data: DataSet, split: Split) -> Arrays | None:
    """The prepared split, or None if there is none. ``_DamagedError``: there is one, and it is not to be used."""
    import numpy as np

    *arrays, index_file = data.prepared_files(split)
    if not index_file.is_file():
        return None
    try:
        index = json.loads(index_file.read_bytes())
        expected = [index["files"][kind] for kind in _KINDS]
        made_for = index["made_for"]
    except (ValueError, KeyError, TypeError):
        raise _DamagedError(f"{index_file} is damaged") from None
    if made_for != _made_for(data):
        raise _DamagedError(f"{index_file} is of another definition of '{data.name}'")
    opened = []
    for path, facts in zip(arrays, expected, strict=True):
        try:
            size = path.stat().st_size
            if size != facts["bytes"]:
                raise _DamagedError(f"{path} is damaged (it has {size} bytes instead of {facts['bytes']})")
            if size <= HASHED_BYTES and hashlib.sha256(path.read_bytes()).hexdigest() != facts["sha256"]:
                raise _DamagedError(f"{path} is damaged (its checksum is wrong)")
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _DamagedError(f"{path} can't be read ({_reason(error)})") from None
        if [*array.shape] != facts["shape"] or str(array.dtype) != facts["dtype"]:
            raise _DamagedError(f"{path} is damaged (it holds {array.dtype} {array.shape})")
        opened.append(array)
    return Arrays(*opened)


def _prepare(data: DataSet, part: Part, root: Path) -> None:
    """Read a part and write its splits. Whoever comes second waits for the first and uses what was made."""
    import numpy as np

    with _own_folder(data.folder, part) as folder:
        if _is_whole(data, part):
            return
        log.info("preparing %s (%s part) in %s", data.name, part, data.folder)
        raw = data.read(data, root, part)
        _verify(data, part, raw)
        rows = np.arange(len(raw.labels))
        if part == "test":
            splits: dict[Split, NDArray[np.int64]] = {"test": rows}
        else:
            cut = stratified(raw.labels, data.validation_size, VALIDATION_SEED)
            splits = {"train": np.delete(rows, cut), "validation": cut}
        names = data.names(root) if callable(data.names) else None
        try:
            if names is not None:
                (folder / "class_names.json").write_text(json.dumps(names), encoding="utf-8")
                os.replace(folder / "class_names.json", data.folder / "class_names.json")
            for split, chosen in splits.items():
                _write_split(data, split, raw, chosen, folder)
        except OSError as error:
            need = len(rows) * int(np.prod(data.image_shape)) / 1e9
            raise UserError(
                f"can't write the prepared '{data.name}' into {data.folder} ({_reason(error)}): it needs "
                f"{need:.2g} GB, name a folder with room by ${HOME_VARIABLE}"
            ) from None


def _is_whole(data: DataSet, part: Part) -> bool:
    try:
        return all(_open(data, split) for split in SPLITS if (split == "test") == (part == "test"))
    except _DamagedError:
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


@contextmanager
def _own_folder(folder: Path, part: Part) -> Iterator[Path]:
    """A temporary folder inside ``folder``, with the lock on preparing ``part`` held if the platform has locks.

    The lock saves double work. It isn't needed for safety: files are moved into place whole, and all makers make the
    same ones.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f".{part}.lock").open("ab")
    except OSError as error:
        raise UserError(
            f"can't write into {folder} ({_reason(error)}): name another folder by ${HOME_VARIABLE}"
        ) from None
    with lock:
        if _locked(lock.fileno()):
            for left in folder.glob(f".{part}-*"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{part}-") as temporary:
            yield Path(temporary)


def _locked(descriptor: int) -> bool:
    """Wait for an exclusive lock, which ends with the process. False where there are none."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return False
    return True


def _reason(error: BaseException) -> str:
    """An error in one line, without the path that the caller names anyway."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


# --- Raw files --------------------------------------------------------------------------------------------------------


def _missing(data: DataSet, root: Path, why: str = "") -> UserError:
    advice = "".join(f"; {text}" for text in (data.raw.advice, why) if text)
    return UserError(
        f"data set '{data.name}' is missing: wanted {data.raw.looked_for(root)}: put it there or name its folder by "
        f"--data-root DIR or ${DATA_VARIABLE}{advice}"
    )


def _is_published(data: DataSet, file: str, content: bytes) -> bool:
    return hashlib.md5(content, usedforsecurity=False).hexdigest() in CHECKSUMS[f"{data.name}/{file}"]


def _fetch(data: DataSet, root: Path, file: str) -> tuple[bytes, Path]:
    """The verified content of a raw file and its path: on disk, else downloaded into the data root."""
    damaged = None
    for path in data.raw.candidates(root, file):
        if path.is_file():
            content = path.read_bytes()
            if _is_published(data, file, content):
                return content, path
            damaged = damaged or path  # MNIST and Fashion-MNIST have files of the same names: another may be right
    if damaged:
        raise UserError(
            f"{damaged} is not the published file of '{data.name}' (its md5 checksum is wrong; it may be truncated): "
            "remove it and start again"
        )
    target = data.raw.candidates(root, file)[0]
    try:
        content = _download(data.raw.address + file)
    except (OSError, http.client.HTTPException) as error:
        raise _missing(data, root, f"the download of {data.raw.address}{file} failed ({_reason(error)})") from None
    if not _is_published(data, file, content):
        raise _missing(data, root, f"what {data.raw.address}{file} delivers has a wrong md5 checksum")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as temporary:
            temporary.write(content)
        os.replace(temporary.name, target)
    except OSError as error:
        raise UserError(f"can't write {target} ({_reason(error)}): name another folder by --data-root DIR") from None
    return content, target


def _download(address: str) -> bytes:
    log.info("downloading %s", address)
    with urllib.request.urlopen(address, timeout=30) as answer:
        return cast(bytes, answer.read())


def _read_digits(data: DataSet, root: Path, part: Part) -> RawData:
    """scikit-learn's own copy, values 0 to 16 spread over 0 to 255. The test part is cut here: it has none."""
    import numpy as np
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    content = values.astype(np.uint8).tobytes() + labels.astype(np.uint8).tobytes()
    if hashlib.sha256(content).hexdigest() not in CHECKSUMS["digits"]:
        raise UserError("the digits of the installed scikit-learn are not the published ones: reinstall scikit-learn")
    images = np.rint(values * (255 / 16)).astype(np.uint8).reshape(-1, *data.image_shape)
    labels = labels.astype(np.int64)
    test = stratified(labels, _DIGITS_TEST, TEST_SEED)
    rows = test if part == "test" else np.delete(np.arange(len(labels)), test)
    return RawData.of_arrays(images[rows], labels[rows])


def _read_glyphs(data: DataSet, root: Path, part: Part) -> RawData:
    """Drawn here: there are no raw files."""
    return RawData.of_arrays(*glyphs.draw(data.image_shape[1], part))


def _read_idx(data: DataSet, root: Path, part: Part) -> RawData:
    """MNIST's format: two gzipped files, big-endian sizes, bytes."""
    import numpy as np

    image_file, label_file = data.raw.test if part == "test" else data.raw.train
    images = _idx(*_fetch(data, root, image_file), dimensions=3)
    labels = _idx(*_fetch(data, root, label_file), dimensions=1)
    if images.shape[1:] != data.image_shape[1:] or len(images) != len(labels):
        raise UserError(f"{image_file} and {label_file} don't fit: {images.shape} and {labels.shape}")
    return RawData.of_arrays(images[:, None], labels.astype(np.int64))


def _idx(content: bytes, path: Path, dimensions: int) -> Images:
    import numpy as np

    try:
        content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({_reason(error)}): remove it and start again") from None
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, 8, dimensions)):  # 8: unsigned bytes
        raise UserError(
            f"{path} is not an IDX file of bytes in {dimensions} dimension(s): it starts with {content[:4]!r}"
        )
    shape = np.frombuffer(content, ">u4", dimensions, 4).astype(int) if len(content) >= start else None
    if shape is None or len(content) != start + shape.prod():
        raise UserError(f"{path} is truncated: remove it and start again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_cifar(data: DataSet, root: Path, part: Part) -> RawData:
    """Pickled batches, as files or in the published archive: ``data`` [n, 3072] and ``labels`` or ``fine_labels``."""
    import numpy as np

    images, labels = [], []
    for content, path in _cifar_files(data, root, data.raw.test if part == "test" else data.raw.train):
        try:
            batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
            pixels = batch["data"]
            fine = np.asarray(batch["fine_labels" if "fine_labels" in batch else "labels"], np.int64)
            if pixels.dtype != np.uint8 or pixels.shape != (len(fine), int(np.prod(data.image_shape))):
                raise ValueError(f"{pixels.dtype} {pixels.shape} with {len(fine)} labels")
        except Exception as error:  # a damaged pickle can raise nearly everything
            raise UserError(f"{path} is not a batch of '{data.name}' ({_reason(error)}): get it again") from None
        images.append(pixels.reshape(-1, *data.image_shape))
        labels.append(fine)
    return RawData.of_arrays(np.concatenate(images), np.concatenate(labels))


def _cifar_files(data: DataSet, root: Path, files: tuple[str, ...]) -> list[tuple[bytes, Path]]:
    if all(data.raw.find(root, file) for file in files):
        return [_fetch(data, root, file) for file in files]
    content, path = _fetch(data, root, data.raw.archive)
    found = []
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for file in files:
                member = archive.extractfile(file)
                found.append((member.read() if member else b"", path / file))
    except (tarfile.TarError, OSError, EOFError, KeyError, zlib.error) as error:
        raise UserError(f"{path} is damaged ({_reason(error)}): remove it and start again") from None
    for file, (member_content, member_path) in zip(files, found, strict=True):
        if not _is_published(data, file, member_content):
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


def _read_svhn(data: DataSet, root: Path, part: Part) -> RawData:
    """Cropped digits, MATLAB's format: ``X`` [32, 32, 3, n] and ``y`` [n, 1], where 10 stands for the digit 0."""
    import numpy as np
    from scipy.io import loadmat

    content, path = _fetch(data, root, (data.raw.test if part == "test" else data.raw.train)[0])
    try:
        arrays = loadmat(io.BytesIO(content), variable_names=("X", "y"))
        images, labels = arrays["X"].transpose(3, 2, 0, 1), arrays["y"].reshape(-1).astype(np.int64)
        if images.dtype != np.uint8 or images.shape != (len(labels), *data.image_shape):
            raise ValueError(f"{images.dtype} {images.shape} with {len(labels)} labels")
    except Exception as error:  # scipy's reader has no error of its own
        raise UserError(f"{path} is not a file of '{data.name}' ({_reason(error)}): get it again") from None
    return RawData.of_arrays(images, labels % 10)


# --- Images in folders ------------------------------------------------------------------------------------------------

_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MODES = frozenset({"1", "CMYK", "L", "LA", "P", "RGB", "RGBA", "YCbCr"})  # 8 bits a channel


def _files(folder: Path) -> list[Path]:
    """The image files of a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)


def _folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted: classes in ImageFolder form."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _decode(path: Path, shape: tuple[int, int, int], resize: bool = False) -> Images:
    """One image file as uint8 [C, H, W].

    ``resize``: the shorter side to 8/7 of H (bilinear), then the centre, as torchvision's Resize(256) and
    CenterCrop(224). Otherwise another shape is a ``UserError``, as are unreadable files.
    """
    import numpy as np
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(path) as image:
            if image.mode not in _MODES:
                raise UserError(f"{path} has pixels of mode '{image.mode}': expected 8-bit gray or RGB")
            if not resize and (image.size != (width, height) or (channels == 1 and not _is_gray(image.mode))):
                found = (1 if _is_gray(image.mode) else 3, image.height, image.width)
                raise UserError(
                    f"{path} has the shape {found}, the first images have {shape} (C, H, W): make them agree"
                )
            pixels = image.convert("L" if channels == 1 else "RGB")
    except UserError:
        raise
    except Exception as error:  # Pillow's readers raise many kinds for damaged files
        raise UserError(f"{path} can't be read as an image ({_reason(error)}): replace or remove it") from None
    if resize:
        side, short = height * 8 // 7, min(pixels.size)
        size = (side * pixels.width // short, side * pixels.height // short)
        pixels = pixels.resize(size, Image.Resampling.BILINEAR)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        pixels = pixels.crop((left, top, left + width, top + height))
    array = np.asarray(pixels, np.uint8)
    return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))


def _is_gray(mode: str) -> bool:
    return mode in {"1", "L", "LA"}


def _found(data: DataSet, root: Path, file: str) -> Path:
    path = data.raw.find(root, file)
    if path is None:
        raise _missing(data, root)
    return path


def _read_class_folders(data: DataSet, root: Path, part: Part, classes: Sequence[str], resize: bool = False) -> RawData:
    """A part in ImageFolder form: one folder a class."""
    import numpy as np

    folder = _found(data, root, (data.raw.test if part == "test" else data.raw.train)[0])
    strangers = [name for name in _folders(folder) if name not in set(classes)]
    if strangers:
        raise UserError(f"{folder / strangers[0]} is not one of the {len(classes)} classes of '{data.name}': remove it")
    files = [(path, label) for label, name in enumerate(classes) for path in _class_files(folder / name)]
    labels = np.array([label for _, label in files], np.int64)
    return RawData.of_files(
        [path for path, _ in files], labels, partial(_decode, shape=data.image_shape, resize=resize)
    )


def _class_files(folder: Path) -> list[Path]:
    inner = folder / "images"  # Tiny-ImageNet's layout
    return _files(inner if inner.is_dir() else folder) if folder.is_dir() else []


def _read_imagenet(data: DataSet, root: Path, part: Part) -> RawData:
    """``train/<wnid>/`` and ``val/<wnid>/``; each part is read without the other."""
    folder = _found(data, root, (data.raw.test if part == "test" else data.raw.train)[0])
    wnids = _folders(folder)
    first_and_last = (wnids[0], wnids[-1]) if wnids else ()
    if len(wnids) != data.num_classes or first_and_last != ("n01440764", "n15075141"):
        raise UserError(
            f"{folder} has {len(wnids)} folders, expected ImageNet's {data.num_classes} from n01440764 to n15075141: "
            "sort the images into one folder a WordNet id"
        )
    return _read_class_folders(data, root, part, wnids, resize=True)


def _imagenet_names(root: Path) -> tuple[str, ...]:
    return class_names.imagenet()


def _read_tiny_imagenet(data: DataSet, root: Path, part: Part) -> RawData:
    """``train/<wnid>/images/`` and the published ``val`` part, whose labels are in ``val_annotations.txt``."""
    import numpy as np

    listed = _found(data, root, "tiny-imagenet-200/wnids.txt")
    wnids = sorted(listed.read_text(encoding="utf-8").split())
    if len(set(wnids)) != data.num_classes:
        raise UserError(f"{listed} lists {len(set(wnids))} classes instead of {data.num_classes}: get it again")
    if part == "train":
        return _read_class_folders(data, root, part, wnids)
    annotations = _found(data, root, "tiny-imagenet-200/val/val_annotations.txt")
    files, labels = [], []
    for line in annotations.read_text(encoding="utf-8").splitlines():
        file, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0]
        if wnid not in wnids:
            raise UserError(f"{annotations} is damaged: '{line[:60]}' names no class of {listed.name}; get it again")
        files.append(annotations.parent / "images" / file)
        labels.append(wnids.index(wnid))
    return RawData.of_files(files, np.array(labels, np.int64), partial(_decode, shape=data.image_shape))


def _tiny_imagenet_names(root: Path) -> tuple[str, ...]:
    """From the data set's own files; without them the shipped list of the same names."""
    data = _BUILT_IN["tiny_imagenet"]
    try:
        _found(data, root, "tiny-imagenet-200/words.txt")
        wnids = _found(data, root, "tiny-imagenet-200/wnids.txt")
    except UserError:
        return class_names.shipped_tiny_imagenet()
    return class_names.tiny_imagenet(wnids.parent)


# --- folder:PATH ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FolderCache:
    """Where a folder's prepared files go: the version is a digest of all names, sizes and times of change."""

    name: str
    version: str

    @property
    def facts_file(self) -> Path:
        return home() / "data" / _folder_name(self.name) / self.version / "facts.json"


def _folder_cache(name: str, path: Path) -> _FolderCache:
    digest = hashlib.sha256(str(path.resolve()).encode())
    for part in get_args(Part):
        for class_name in _folders(path / part):
            for file in _files(path / part / class_name):
                facts = file.stat()
                digest.update(f"{part}/{class_name}/{file.name}\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return _FolderCache(name, f"1-{digest.hexdigest()[:16]}")


def _folder_facts(cache: _FolderCache) -> dict[str, Any] | None:
    """Image shape, mean and standard deviation, if they were measured."""
    try:
        facts = json.loads(cache.facts_file.read_bytes())
        return {key: tuple(facts[key]) for key in ("image_shape", "mean", "std")}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _image_folder(name: str) -> DataSet:
    """The user's own images: PATH/train/<class>/ and PATH/test/<class>/.

    The classes are the sorted names of the folders in train/; all images have one size; they are gray if all training
    images are; a tenth of them is the validation split. Nothing is known of flips, so they are not done.
    """
    path = Path(name.removeprefix(FOLDER_PREFIX)).expanduser()
    for part in get_args(Part):
        if not (path / part).is_dir():
            raise UserError(
                f"{path / part} is not a folder: '{name}' needs train/<class>/ and test/<class>/ with images"
            )
    classes = _folders(path / "train")
    files = [file for class_name in classes for file in _files(path / "train" / class_name)]
    if len(classes) < 2 or len(files) < 10:
        raise UserError(
            f"{path / 'train'} has {len(classes)} class folders with {len(files)} images: expected at least 2 and 10"
        )
    cache = _folder_cache(name, path)
    facts = _folder_facts(cache)
    unmeasured = DataSet(
        name=name,
        title=f"{len(classes)} classes of images in {path}",
        num_classes=len(classes),
        names=tuple(class_names.clean(class_name) for class_name in classes),
        image_shape=facts["image_shape"] if facts else _common_shape(files),
        mean=(),
        std=(),
        flip_keeps_class=False,
        validation_size=len(files) // 10,
        source="the user's own",
        read=_read_image_folder,
        version=cache.version,
        raw=Raw(("train",), ("test",), folders=(str(path.resolve()),)),
    )
    if facts is None:
        facts = {"image_shape": unmeasured.image_shape, **_measured(unmeasured.split("train").images)}
        with tempfile.NamedTemporaryFile("w", dir=unmeasured.folder, delete=False, encoding="utf-8") as file:
            json.dump(facts, file)
        os.replace(file.name, cache.facts_file)
    return replace(unmeasured, mean=tuple(facts["mean"]), std=tuple(facts["std"]))


def _read_image_folder(data: DataSet, root: Path, part: Part) -> RawData:
    return _read_class_folders(data, root, part, _folders(_found(data, root, "train")))


def _common_shape(files: Sequence[Path]) -> tuple[int, int, int]:
    """C, H, W of all images; one channel if all are gray. Reads headers only."""
    from PIL import Image

    first: tuple[int, int] | None = None
    gray = True
    for file in files:
        try:
            with Image.open(file) as image:
                size, mode = (image.height, image.width), image.mode
        except Exception as error:  # see _decode
            raise UserError(f"{file} can't be read as an image ({_reason(error)}): replace or remove it") from None
        first = first or size
        if size != first:
            raise UserError(f"{file} has the size {size}, {files[0]} has {first} (H, W): make them agree")
        gray = gray and _is_gray(mode)
    height, width = first or (0, 0)
    return (1 if gray else 3, height, width)


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


# --- The built-in data sets -------------------------------------------------------------------------------------------

_IDX_TRAIN = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
_IDX_TEST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")
_HALF = (0.5, 0.5, 0.5)
_DIGITS_TEST = 360
_GLYPHS = DataSet(
    name="glyphs16",
    title="letters and digits drawn in colour, 16x16 RGB, 47 classes, 45,120 images; needs no download",
    num_classes=len(glyphs.CLASSES),
    names=tuple(glyphs.CLASSES),
    image_shape=(3, 16, 16),
    mean=(0.4968, 0.4969, 0.4961),  # of the training split, measured
    std=(0.2767, 0.2758, 0.2776),
    flip_keeps_class=False,
    validation_size=60 * len(glyphs.CLASSES),
    sizes=(glyphs.PER_CLASS["train"] * len(glyphs.CLASSES), glyphs.PER_CLASS["test"] * len(glyphs.CLASSES)),
    source="drawn from the DejaVu and Computer Modern fonts that come with matplotlib, see docs/glyphs.md",
    read=_read_glyphs,
)

_BUILT_IN: dict[str, DataSet] = {
    data.name: data
    for data in (
        DataSet(
            name="digits",
            title="handwritten digits, 8x8 gray, 10 classes, 1,797 images; comes with scikit-learn",
            num_classes=10,
            names=class_names.DIGITS,
            image_shape=(1, 8, 8),
            mean=(0.3057,),  # of the training split, measured
            std=(0.3764,),
            flip_keeps_class=False,
            validation_size=240,
            sizes=(1797 - _DIGITS_TEST, _DIGITS_TEST),
            source="UCI, Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), test part; CC BY 4.0",
            read=_read_digits,
            one_file=True,
        ),
        _GLYPHS,
        replace(
            _GLYPHS,
            name="glyphs32",
            title=_GLYPHS.title.replace("16x16", "32x32"),
            image_shape=(3, 32, 32),
            mean=(0.4969, 0.4970, 0.4961),
            std=(0.2836, 0.2865, 0.2838),
        ),
        DataSet(
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
            read=_read_idx,
            raw=Raw(
                _IDX_TRAIN,
                _IDX_TEST,
                folders=("mnist", ".", "MNIST/raw"),
                address="https://ossci-datasets.s3.amazonaws.com/mnist/",
            ),
        ),
        DataSet(
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
            read=_read_idx,
            raw=Raw(
                _IDX_TRAIN,
                _IDX_TEST,
                folders=("fashion_mnist", ".", "FashionMNIST/raw", "/usr/share/datasets/fashion-mnist"),
                address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                advice="on Debian and Ubuntu: apt install dataset-fashion-mnist",
            ),
        ),
        DataSet(
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
            read=_read_cifar,
            raw=Raw(
                tuple(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
                ("cifar-10-batches-py/test_batch",),
                folders=("cifar10", "."),
                archive="cifar-10-python.tar.gz",
                address="https://www.cs.toronto.edu/~kriz/",
            ),
        ),
        DataSet(
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
            read=_read_cifar,
            raw=Raw(
                ("cifar-100-python/train",),
                ("cifar-100-python/test",),
                folders=("cifar100", "."),
                archive="cifar-100-python.tar.gz",
                address="https://www.cs.toronto.edu/~kriz/",
            ),
        ),
        DataSet(
            name="svhn",
            title="house numbers, cropped digits, 32x32 RGB, 10 classes, 99,289 images (without the extra part)",
            num_classes=10,
            names=class_names.DIGITS,
            image_shape=(3, 32, 32),
            mean=_HALF,
            std=_HALF,
            flip_keeps_class=False,
            validation_size=5000,
            sizes=(73_257, 26_032),
            source="Netzer et al. 2011, http://ufldl.stanford.edu/housenumbers/; non-commercial use only",
            read=_read_svhn,
            raw=Raw(
                ("train_32x32.mat",),
                ("test_32x32.mat",),
                folders=("svhn", "."),
                address="http://ufldl.stanford.edu/housenumbers/",
            ),
        ),
        DataSet(
            name="tiny_imagenet",
            title="ImageNet, 200 classes at 64x64 RGB, 110,000 images; the published validation part is the test split",
            num_classes=200,
            names=_tiny_imagenet_names,
            image_shape=(3, 64, 64),
            mean=_HALF,
            std=_HALF,
            flip_keeps_class=True,
            validation_size=5000,
            sizes=(100_000, 10_000),
            source="Stanford CS231n; ImageNet's terms: non-commercial research and education",
            read=_read_tiny_imagenet,
            raw=Raw(
                ("tiny-imagenet-200/train", "tiny-imagenet-200/wnids.txt", "tiny-imagenet-200/words.txt"),
                ("tiny-imagenet-200/val/val_annotations.txt",),
                folders=("tiny_imagenet", "."),
                advice="unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            ),
        ),
        DataSet(
            name="imagenet",
            title="ImageNet-1k at 224x224 RGB, 1,000 classes; the published validation part is the test split",
            num_classes=1000,
            names=_imagenet_names,
            image_shape=(3, 224, 224),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            flip_keeps_class=True,
            validation_size=10_000,
            sizes=(1_281_167, 50_000),
            source="ILSVRC 2012, https://image-net.org; non-commercial research and education",
            read=_read_imagenet,
            raw=Raw(
                ("train",),
                ("val",),
                folders=("imagenet", "."),
                advice="get it from https://image-net.org and sort it into one folder a WordNet id",
            ),
        ),
    )
}
