"""Data sets: real digits, and small files in the real formats of the others."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dfkd_bench import class_names, data
from dfkd_bench.data import DataSet, RawData, _fetch, _folder, _lock, _prepared, dataset, status, stratified
from dfkd_bench.errors import UserError
from dfkd_bench.once import looking_once

RNG = np.random.default_rng(0)
DOWNLOAD = _fetch._download


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(address: str) -> bytes:
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    monkeypatch.setenv("DFKD_BENCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DFKD_BENCH_DATA", raising=False)
    monkeypatch.setattr(_fetch, "_download", no_network)


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a raw file and declare its checksum the published one."""

    def write(folder: Path, name: str, file: str, content: bytes) -> Path:
        monkeypatch.setitem(dataset(name).raw.checksums, file, (hashlib.md5(content).hexdigest(),))
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
        return folder / file

    return write


def idx(array: np.ndarray) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


MNIST_TRAIN = (RNG.integers(0, 256, (40, 28, 28), np.uint8), np.arange(40) % 10)
MNIST_TEST = (RNG.integers(0, 256, (20, 28, 28), np.uint8), np.arange(20)[::-1] % 10)


def small_mnist(publish: Any, folder: Path, root: Path, name: str = "mnist") -> DataSet:
    for prefix, (images, labels) in (("train", MNIST_TRAIN), ("t10k", MNIST_TEST)):
        publish(folder, name, f"{prefix}-images-idx3-ubyte.gz", idx(images))
        publish(folder, name, f"{prefix}-labels-idx1-ubyte.gz", idx(labels))
    return replace(dataset(name, root), sizes=(40, 20), validation_size=10)


def read_toy(found: DataSet, root: Path, part: data.Part) -> RawData:
    labels = np.arange(20 if part == "train" else 10) % 2
    return RawData.of_arrays(
        np.full((len(labels), 1, 2, 2), 7, np.uint8) + labels[:, None, None, None].astype("u1"), labels
    )


TOY = DataSet("toy", "a toy", 2, ("a", "b"), (1, 2, 2), (0.5,), (0.5,), False, 4, "here", read_toy)


# --- Digits and the splits --------------------------------------------------------------------------------------------


def test_digits_have_the_documented_sizes() -> None:
    splits = [dataset("digits").split(split) for split in data.SPLITS]
    assert [part.images.shape for part in splits] == [(1197, 1, 8, 8), (240, 1, 8, 8), (360, 1, 8, 8)]
    assert {(str(part.images.dtype), str(part.labels.dtype)) for part in splits} == {("uint8", "int64")}


def test_digits_splits_are_disjoint_and_complete() -> None:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    source = [(np.rint(v * 255 / 16).astype(np.uint8).tobytes(), int(c)) for v, c in zip(values, labels, strict=True)]
    parts = [dataset("digits").split(split) for split in data.SPLITS]
    found = [(i.tobytes(), int(c)) for part in parts for i, c in zip(part.images, part.labels, strict=True)]
    assert sorted(found) == sorted(source)


def test_digits_split_never_changes() -> None:
    """Records of different machines and versions are compared: the same images must be in the test split."""
    test = dataset("digits").split("test")
    digest = hashlib.sha256(np.asarray(test.images).tobytes() + np.asarray(test.labels).tobytes()).hexdigest()
    assert digest[:16] == "5efeed045f2cc086"


def test_digits_normalisation_is_that_of_the_training_split() -> None:
    digits = dataset("digits")
    images = digits.split("train").images / 255.0
    assert (round(images.mean(), 4), round(images.std(), 4)) == (digits.mean[0], digits.std[0])


def test_altered_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dfkd_bench.data.digits._SHA256", "0" * 64)
    with pytest.raises(UserError, match="reinstall scikit-learn"):
        dataset("digits").split("test")


def test_asking_for_digits_test_prepares_every_split() -> None:
    """They come in one file, which a later process that may not see training data must not open."""
    dataset("digits").split("test")
    assert status("digits") == "ready"


def test_stratified_keeps_the_proportions_of_the_classes() -> None:
    labels = np.repeat([0, 1, 2], [500, 300, 7])[RNG.permutation(807)]
    cut = stratified(labels, 80, seed=0)
    assert np.bincount(labels[cut]).tolist() == [49, 30, 1]  # of 49.6, 29.7, 0.69: largest remainders
    assert len(set(cut.tolist())) == 80


def test_stratified_depends_on_the_seed_only() -> None:
    labels = np.arange(100) % 5
    assert stratified(labels, 20, seed=3).tolist() == stratified(labels, 20, seed=3).tolist()
    assert stratified(labels, 20, seed=3).tolist() != stratified(labels, 20, seed=4).tolist()


def test_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'validation'"):
        TOY.split("valdation")  # type: ignore[arg-type]


def test_names_are_those_of_the_files_without_raw_files_and_small_images_first() -> None:
    expected = "digits glyphs16 glyphs32 mnist fashion_mnist cifar10 cifar100 svhn tiny_imagenet imagenet"
    assert " ".join(data.dataset_names()) == expected


# --- What is opened ---------------------------------------------------------------------------------------------------

OPENED = """
import sys
from dfkd_bench import data
data.dataset_names()
assert not {"torch", "numpy", "PIL", "sklearn"} & set(sys.modules), "imported too early"
import numpy.lib.format
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
data.dataset("digits").split("test")
assert not {"torch", "sklearn"} & set(sys.modules), "imported for a prepared split"
print(*sorted({path for path in opened if sys.argv[1] in path}), sep="\\n")
"""


def python(*arguments: str) -> subprocess.Popen[str]:
    root = str(Path(data.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
        cwd=root,
    )


def test_a_prepared_split_opens_only_its_own_files(tmp_path: Path) -> None:
    digits = dataset("digits")
    digits.split("train")
    process = python("-c", OPENED, str(tmp_path))
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.split() == sorted(str(path) for path in digits.prepared_files("test"))


def test_a_prepared_split_needs_no_raw_files(publish: Any, tmp_path: Path) -> None:
    mnist = small_mnist(publish, tmp_path / "raw", tmp_path / "raw")
    mnist.split("test")
    shutil.rmtree(tmp_path / "raw")
    assert np.array_equal(mnist.split("test").images[:, 0], MNIST_TEST[0])


def test_arrays_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        TOY.split("test").images[0] = 0


def test_a_tensor_of_an_array_that_is_written_to_changes_nobody_elses() -> None:
    """Of a read-only mapping PyTorch would make a tensor, and a write to it would end the process."""
    images = TOY.split("test").images
    before = images.copy()
    for wanted, tensor in ((before, data.as_tensor(images)), (before[2:], data.as_tensor(images[2:].copy()))):
        assert np.array_equal(tensor.numpy(), wanted)
        tensor.add_(1)
        assert not np.array_equal(tensor.numpy(), wanted)
    assert np.array_equal(TOY.split("test").images, before)


# --- MNIST's format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["mnist", ".", "MNIST/raw"])
def test_mnist_is_found_in_each_layout(folder: str, publish: Any, tmp_path: Path) -> None:
    test = small_mnist(publish, tmp_path / folder, tmp_path).split("test")
    assert np.array_equal(test.images[:, 0], MNIST_TEST[0])
    assert np.array_equal(test.labels, MNIST_TEST[1])


def test_mnist_validation_is_cut_from_train(publish: Any, tmp_path: Path) -> None:
    mnist = small_mnist(publish, tmp_path, tmp_path)
    train, validation = mnist.split("train"), mnist.split("validation")
    assert np.bincount(validation.labels).tolist() == [1] * 10
    both = [image.tobytes() for part in (train, validation) for image in part.images]
    assert sorted(both) == sorted(image.tobytes() for image in MNIST_TRAIN[0])


def test_data_variable_names_the_root(publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_mnist(publish, tmp_path / "there", tmp_path)
    monkeypatch.setenv("DFKD_BENCH_DATA", str(tmp_path / "there"))
    assert status("mnist") == "raw files found"


def test_files_of_the_same_name_are_told_apart_by_checksum(publish: Any, tmp_path: Path) -> None:
    """MNIST's files in the root don't hide Fashion-MNIST's in torchvision's folder."""
    fashion = small_mnist(publish, tmp_path / "FashionMNIST" / "raw", tmp_path, "fashion_mnist")
    for file in fashion.raw.test:
        (tmp_path / file).write_bytes(idx(np.zeros((20, 28, 28))))
    assert np.array_equal(fashion.split("test").images[:, 0], MNIST_TEST[0])


def test_wrong_checksum_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(idx(MNIST_TEST[0]))
    with pytest.raises(UserError, match=f"{path} is not the published file of 'mnist'"):
        dataset("mnist", tmp_path).split("test")


def test_another_data_sets_file_in_the_root_is_no_damage(
    publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fashion-MNIST's files lie in the root; MNIST is downloaded beside them."""
    mnist = small_mnist(publish, tmp_path / "kept", tmp_path)
    for file in mnist.raw.test:
        (tmp_path / file).write_bytes(idx(np.zeros((20, 28, 28))))
    monkeypatch.setattr(_fetch, "_download", lambda address: (tmp_path / "kept" / Path(address).name).read_bytes())
    assert np.array_equal(mnist.split("test").images[:, 0], MNIST_TEST[0])


def test_wrong_checksum_in_its_own_folder_is_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    path.parent.mkdir()
    path.write_bytes(b"truncated")
    monkeypatch.setattr(_fetch, "_download", lambda address: pytest.fail(f"asked for {address}"))
    with pytest.raises(UserError, match=f"{path} is not the published file of 'mnist'"):
        dataset("mnist", tmp_path).split("test")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (idx(MNIST_TEST[0])[:-100], "damaged"),
        (b"not gzip", "damaged"),
        (gzip.compress(gzip.decompress(idx(MNIST_TEST[0]))[:-1]), "truncated"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "truncated"),
        (idx(MNIST_TEST[1]), "not an IDX file"),
        (idx(MNIST_TEST[0][:19]), "don't fit"),
    ],
)
def test_damaged_idx_is_refused_and_named(content: bytes, complaint: str, publish: Any, tmp_path: Path) -> None:
    mnist = small_mnist(publish, tmp_path, tmp_path)
    publish(tmp_path, "mnist", "t10k-images-idx3-ubyte.gz", content)
    with pytest.raises(UserError, match=f"t10k-images-idx3-ubyte.gz.*{complaint}"):
        mnist.split("test")


def test_wrong_number_of_images_is_refused(publish: Any, tmp_path: Path) -> None:
    mnist = replace(small_mnist(publish, tmp_path, tmp_path), sizes=(40, 21))
    with pytest.raises(UserError, match="the test part of 'mnist' has 20 images instead of 21"):
        mnist.split("test")


def test_labels_out_of_range_are_refused(publish: Any, tmp_path: Path) -> None:
    mnist = small_mnist(publish, tmp_path, tmp_path)
    publish(tmp_path, "mnist", "t10k-labels-idx1-ubyte.gz", idx(np.arange(20)))
    with pytest.raises(UserError, match="wrong labels: 0 to 19 instead of 0 to 9"):
        mnist.split("test")


# --- Missing raw files and downloads ----------------------------------------------------------------------------------


def test_missing_data_says_what_is_wanted_and_where(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        dataset("mnist", tmp_path).split("test")
    message = str(caught.value)
    assert "\n" not in message
    wanted = [
        "t10k-labels-idx1-ubyte.gz",
        str(tmp_path / "MNIST" / "raw"),
        "--data-root",
        "$DFKD_BENCH_DATA",
        "No route",
    ]
    assert [text for text in wanted if text not in message] == []


def test_missing_fashion_mnist_names_the_package(tmp_path: Path) -> None:
    fashion = dataset("fashion_mnist", tmp_path)
    elsewhere = replace(fashion, raw=replace(fashion.raw, folders=(".",)))  # it may be installed here
    with pytest.raises(UserError, match="apt install dataset-fashion-mnist"):
        elsewhere.split("test")


def test_download_is_verified_and_kept(publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "server"
    mnist = small_mnist(publish, served, tmp_path / "raw")
    monkeypatch.setattr(_fetch, "_download", lambda address: (served / address.rsplit("/", 1)[1]).read_bytes())
    mnist.split("test")
    kept = sorted(path.name for path in (tmp_path / "raw" / "mnist").iterdir())
    assert kept == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


def test_download_fetches_what_is_at_the_address(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    assert DOWNLOAD((tmp_path / "file").as_uri()) == b"content"


def test_failed_download_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    svhn = dataset("svhn", tmp_path)
    nowhere = replace(svhn, raw=replace(svhn.raw, address=f"{tmp_path.as_uri()}/"))
    monkeypatch.setattr(_fetch, "_download", DOWNLOAD)
    with pytest.raises(UserError, match=r"'svhn' is missing: .* failed \(No such file or directory"):
        nowhere.split("test")


def test_wrong_download_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fetch, "_download", lambda address: b"<html>log in first</html>")
    with pytest.raises(UserError, match="wrong md5 checksum"):
        dataset("cifar10", tmp_path).split("test")
    assert list(tmp_path.glob("cifar*")) == []


@pytest.fixture
def plain_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def served_mnist(publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    """Not on disk yet; a download delivers it."""
    served = tmp_path / "server"
    monkeypatch.setattr(_fetch, "_download", lambda address: (served / address.rsplit("/", 1)[1]).read_bytes())
    return small_mnist(publish, served, tmp_path / "raw")


@pytest.mark.usefixtures("plain_umask")
def test_others_may_read_a_download(served_mnist: DataSet, tmp_path: Path) -> None:
    served_mnist.split("test")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "raw" / "mnist").iterdir()}
    assert modes == {0o644}


def test_a_full_disk_leaves_no_part_of_a_download(
    served_mnist: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"can't write .*No space left on device"):
        served_mnist.split("test")
    assert list((tmp_path / "raw" / "mnist").iterdir()) == []


# --- CIFAR ------------------------------------------------------------------------------------------------------------


_Pickler: Any = pickle._Pickler  # type: ignore[attr-defined]


class _Python2Pickler(_Pickler):
    """Strings, and the flags of dtypes, as Python 2 wrote them: the published batches are of its protocol 2."""

    def _save_string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)

    def _save_flag(self, value: bool) -> None:
        self.write(pickle.BININT1 + bytes((value,)))

    dispatch = {**_Pickler.dispatch, str: _save_string, bytes: _save_string, bool: _save_flag}


def batch(images: np.ndarray, labels: np.ndarray, key: str) -> bytes:
    file = io.BytesIO()
    _Python2Pickler(file, 2).dump(
        {"data": images.reshape(len(images), -1), key: labels.tolist(), "filenames": ["x.png"]}
    )
    return file.getvalue().replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n")


def images_of(count: int, side: int = 32) -> np.ndarray:
    return RNG.integers(0, 256, (count, 3, side, side), np.uint8)


def test_cifar10_is_read_from_its_batches(publish: Any, tmp_path: Path) -> None:
    images, labels = images_of(50), np.arange(50) % 10
    for number in range(5):
        rows = slice(10 * number, 10 * number + 10)
        publish(
            tmp_path,
            "cifar10",
            f"cifar-10-batches-py/data_batch_{number + 1}",
            batch(images[rows], labels[rows], "labels"),
        )
    cifar = replace(dataset("cifar10", tmp_path), sizes=(50, 10), validation_size=10)
    cut = stratified(labels, 10, data.VALIDATION_SEED)
    assert np.array_equal(cifar.split("validation").images, images[cut])
    assert np.array_equal(cifar.split("train").labels, np.delete(labels, cut))


def test_cifar100_is_read_from_its_archive_with_fine_labels(publish: Any, tmp_path: Path) -> None:
    images, labels = images_of(6), np.array([0, 99, 5, 5, 17, 3])
    content = publish(tmp_path / "made", "cifar100", "cifar-100-python/test", batch(images, labels, "fine_labels"))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(content, "cifar-100-python/test")
    publish(tmp_path / "raw", "cifar100", "cifar-100-python.tar.gz", packed.getvalue())
    test = replace(dataset("cifar100", tmp_path / "raw"), sizes=(50, 6)).split("test")
    assert np.array_equal(test.images, images)
    assert np.array_equal(test.labels, labels)


def test_damaged_archive_is_refused_and_named(publish: Any, tmp_path: Path) -> None:
    publish(tmp_path, "cifar10", "cifar-10-python.tar.gz", gzip.compress(b"no archive"))
    with pytest.raises(UserError, match=r"cifar-10-python\.tar\.gz is damaged"):
        dataset("cifar10", tmp_path).split("test")


def test_pickle_that_would_run_code_is_refused(publish: Any, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    publish(tmp_path, "cifar10", "cifar-10-batches-py/test_batch", pickle.dumps(Evil(), 2))
    with pytest.raises(UserError, match=r"test_batch is not a batch of 'cifar10' \(it names posix.mkdir\)"):
        dataset("cifar10", tmp_path).split("test")
    assert not (tmp_path / "pwned").exists()


def test_batch_of_another_shape_is_refused(publish: Any, tmp_path: Path) -> None:
    publish(tmp_path, "cifar10", "cifar-10-batches-py/test_batch", batch(images_of(3, 16), np.arange(3), "labels"))
    with pytest.raises(UserError, match=r"\(3, 768\) with 3 labels"):
        dataset("cifar10", tmp_path).split("test")


# --- SVHN -------------------------------------------------------------------------------------------------------------


def test_svhn_is_read_with_ten_as_zero(publish: Any, tmp_path: Path) -> None:
    from scipy.io import savemat

    images, file = images_of(4), io.BytesIO()
    savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": np.array([[10], [1], [9], [10]], np.uint8)})
    publish(tmp_path, "svhn", "test_32x32.mat", file.getvalue())
    test = replace(dataset("svhn", tmp_path), sizes=(1, 4)).split("test")
    assert np.array_equal(test.images, images)
    assert test.labels.tolist() == [0, 1, 9, 0]


def test_damaged_mat_is_refused_and_named(publish: Any, tmp_path: Path) -> None:
    publish(tmp_path, "svhn", "test_32x32.mat", b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(UserError, match=r"test_32x32\.mat is not a file of 'svhn'"):
        dataset("svhn", tmp_path).split("test")


# --- Images in folders ------------------------------------------------------------------------------------------------


def save(path: Path, pixels: np.ndarray) -> Path:
    """uint8 [C, H, W] or [H, W], without loss if the suffix allows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)).save(path)
    return path


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> DataSet:
    """Two of the 200 classes, listed in another order than sorted, as the published list is."""
    folder = tmp_path / "raw" / "tiny-imagenet-200"
    for wnid, shade in (("n02124075", 200), ("n01443537", 100)):
        for number in range(4):
            save(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", np.full((3, 64, 64), shade, np.uint8))
    save(folder / "val" / "images" / "val_0.JPEG", np.full((3, 64, 64), 200, np.uint8))
    save(folder / "val" / "images" / "val_1.JPEG", np.full((64, 64), 100, np.uint8))  # gray ones occur
    (folder / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn02124075\t0\t0\t9\t9\nval_1.JPEG\tn01443537\t1\t1\t9\t9\n"
    )
    (folder / "wnids.txt").write_text("n02124075\nn01443537\n")
    (folder / "words.txt").write_text(
        "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\n"
    )
    return replace(dataset("tiny_imagenet", tmp_path / "raw"), num_classes=2, sizes=(8, 2), validation_size=2)


def test_tiny_imagenet_labels_follow_the_sorted_ids(tiny_imagenet: DataSet) -> None:
    train, test = tiny_imagenet.split("train"), tiny_imagenet.split("test")
    assert np.array_equal(train.labels, train.images[:, 0, 0, 0] == 200)
    assert test.labels.tolist() == [1, 0]
    assert test.images[:, 2, 63, 63].tolist() == [200, 100]


def test_tiny_imagenet_has_its_names_without_its_files(home: Path) -> None:
    names = dataset("tiny_imagenet", home / "nothing").class_names
    assert len(names) == 200
    assert names[:2] == ("goldfish", "european fire salamander")


def test_tiny_imagenet_names_are_kept_with_the_prepared_files(tiny_imagenet: DataSet, tmp_path: Path) -> None:
    before = tiny_imagenet.class_names
    tiny_imagenet.split("test")
    shutil.rmtree(tmp_path / "raw")
    assert before == tiny_imagenet.class_names == ("goldfish", "egyptian cat")


def test_tiny_imagenet_with_too_few_names_is_refused(tiny_imagenet: DataSet, tmp_path: Path) -> None:
    (tmp_path / "raw" / "tiny-imagenet-200" / "wnids.txt").write_text("n02124075\n")
    with pytest.raises(UserError, match="name 1 classes instead of 2"):
        _ = tiny_imagenet.class_names


def test_tiny_imagenet_names_that_are_no_utf8_are_refused(tiny_imagenet: DataSet, tmp_path: Path) -> None:
    words = tmp_path / "raw" / "tiny-imagenet-200" / "words.txt"
    words.write_bytes(b"n01443537\tcaf\xe9\n")
    with pytest.raises(UserError, match=f"{words} can't be read"):
        _ = tiny_imagenet.class_names


def test_tiny_imagenet_annotation_of_an_unknown_class_is_refused(tiny_imagenet: DataSet, tmp_path: Path) -> None:
    path = tmp_path / "raw" / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    path.write_text("val_0.JPEG\tn0212")
    with pytest.raises(UserError, match=r"val_annotations\.txt is damaged: 'val_0\.JPEG"):
        tiny_imagenet.split("test")


def test_truncated_image_is_refused_and_named(tiny_imagenet: DataSet, tmp_path: Path) -> None:
    path = save(tmp_path / "raw" / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG", images_of(1, 64)[0])
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=f"{path} can't be read as an image"):
        tiny_imagenet.split("test")


@pytest.fixture
def imagenet(tmp_path: Path) -> DataSet:
    """The validation part of two classes; no training part."""
    for wnid, shape in (("n01440764", (3, 300, 401)), ("n15075141", (3, 333, 260))):
        save(tmp_path / "imagenet" / "val" / wnid / "ILSVRC2012_val_1.png", RNG.integers(0, 256, shape, np.uint8))
    return replace(dataset("imagenet", tmp_path), num_classes=2, sizes=(2, 2), names=("tench", "toilet tissue"))


def test_imagenet_test_split_needs_no_training_part(imagenet: DataSet) -> None:
    assert imagenet.split("test").labels.tolist() == [0, 1]


def test_imagenet_is_resized_as_torchvision_does(imagenet: DataSet, tmp_path: Path) -> None:
    from torchvision.transforms import CenterCrop, Compose, Resize

    transform = Compose([Resize(256), CenterCrop(224)])
    files = sorted((tmp_path / "imagenet").rglob("*.png"))
    expected = [np.asarray(transform(Image.open(file))).transpose(2, 0, 1) for file in files]
    assert np.array_equal(imagenet.split("test").images, np.stack(expected))


def test_imagenet_with_missing_classes_is_refused(imagenet: DataSet) -> None:
    with pytest.raises(UserError, match="has 2 folders, expected ImageNet's 1000"):
        replace(imagenet, num_classes=1000).split("test")


# --- folder:PATH ------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    for class_name in ("Tea_Cup", "spoon"):
        for number in range(10):
            save(folder / "train" / class_name / f"{number}.png", images_of(1, 6)[0])
        save(folder / "test" / class_name / "0.png", images_of(1, 6)[0])
    return folder


def test_folder_describes_itself(own: Path) -> None:
    found = dataset(f"folder:{own}")
    assert (found.num_classes, found.class_names, found.image_shape) == (2, ("tea cup", "spoon"), (3, 6, 6))
    assert [len(found.split(split).labels) for split in data.SPLITS] == [18, 2, 2]
    assert not found.flip_keeps_class


def test_folder_normalisation_is_measured_on_train(own: Path) -> None:
    found = dataset(f"folder:{own}")
    images = found.split("train").images / 255.0
    assert found.mean == pytest.approx(images.mean((0, 2, 3)).tolist())
    assert found.std == pytest.approx(images.std((0, 2, 3)).tolist())


def test_folder_opens_no_training_image_the_second_time(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataset(f"folder:{own}")
    first.split("test")
    monkeypatch.setattr(Image, "open", lambda path: pytest.fail(f"opened {path}"))
    again = dataset(f"folder:{own}")
    again.split("test")
    assert (again.mean, again.std, again.image_shape) == (first.mean, first.std, first.image_shape)


@pytest.mark.usefixtures("plain_umask")
def test_others_may_read_what_was_measured_of_a_folder(own: Path) -> None:
    facts = dataset(f"folder:{own}").folder / "facts.json"
    assert stat.S_IMODE(facts.stat().st_mode) == 0o644


def test_changed_folder_is_prepared_anew(own: Path) -> None:
    dataset(f"folder:{own}")
    save(own / "train" / "spoon" / "new.png", images_of(1, 6)[0])
    assert sum(len(dataset(f"folder:{own}").split(split).labels) for split in ("train", "validation")) == 21


def test_folder_with_a_replaced_image_is_prepared_anew(own: Path) -> None:
    before = dataset(f"folder:{own}").version
    image = own / "train" / "spoon" / "0.png"  # the same size in bytes: only its time tells
    shutil.copyfile(own / "train" / "spoon" / "1.png", image)
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1000))
    assert dataset(f"folder:{own}").version != before


@pytest.mark.parametrize("part", ["train", "test"])
def test_folder_with_a_new_image_has_another_content(part: str, own: Path) -> None:
    before = dataset(f"folder:{own}").content
    save(own / part / "spoon" / "new.png", images_of(1, 6)[0])
    assert dataset(f"folder:{own}").content != before


def test_folder_with_a_new_class_without_images_has_another_content(own: Path) -> None:
    before = dataset(f"folder:{own}").content
    (own / "train" / "fork").mkdir()
    assert dataset(f"folder:{own}").content != before


def test_copied_folder_has_the_same_content(own: Path, tmp_path: Path) -> None:
    shutil.copytree(own, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times of change
    assert dataset(f"folder:{tmp_path / 'copy'}").content == dataset(f"folder:{own}").content


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_a_name_in_a_folder_need_not_be_utf8(own: Path) -> None:
    before = dataset(f"folder:{own}").content
    image = own / "train" / "spoon" / os.fsdecode(b"caf\xe9.png")
    shutil.copyfile(own / "train" / "spoon" / "0.png", image)
    found = dataset(f"folder:{own}")
    assert sum(len(found.split(split).labels) for split in ("train", "validation")) == 21
    assert found.content != before


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_a_class_folder_whose_name_is_no_utf8_is_refused(own: Path) -> None:
    (own / "train" / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(UserError, match=r"a class folder whose name is no UTF-8, b'caf\\xe9': rename it"):
        dataset(f"folder:{own}")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_folder_in_a_class_folder_hides_no_image(part: str, own: Path) -> None:
    save(own / part / "spoon" / "images" / "other.png", images_of(1, 6)[0])
    found = dataset(f"folder:{own}")
    assert [np.bincount(found.split(split).labels).tolist() for split in data.SPLITS] == [[9, 9], [1, 1], [1, 1]]


def test_a_folder_with_a_long_path_is_prepared(own: Path) -> None:
    deep = own.parent / ("x" * 150) / ("y" * 150)
    deep.parent.mkdir()
    own.rename(deep)
    assert len(dataset(f"folder:{deep}").split("test").labels) == 2


def test_16_bit_colour_is_refused(own: Path) -> None:
    """Pillow can read such a file, and cuts it to 8 bits without a word."""
    path = own / "test" / "spoon" / "0.png"
    path.write_bytes(deep_png(6))
    with pytest.raises(UserError, match=f"{path} has pixels of mode 'RGB;16B': expected 8-bit gray or RGB"):
        dataset(f"folder:{own}").split("test")


def deep_png(side: int) -> bytes:
    """A black square of 16 bits a channel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes(side * (1 + 6 * side)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_a_tilde_of_nobody_is_one_line() -> None:
    with pytest.raises(UserError, match="no home folder of that user"):
        dataset("folder:~nobody_here/images")


def test_folder_is_named_by_its_absolute_path(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    assert dataset("folder:own").name == f"folder:{own}"


def test_content_of_a_folder_is_read_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dataset(f"folder:{own}").content
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert dataset(f"folder:{own}").content == before


@pytest.mark.parametrize("name", data.dataset_names())
def test_the_name_of_a_built_in_data_set_fixes_its_content(name: str) -> None:
    assert dataset(name).content is None


def test_colour_in_the_test_part_of_a_gray_folder_is_refused(tmp_path: Path) -> None:
    for number in range(10):
        save(tmp_path / "train" / "ab"[number % 2] / f"{number}.png", np.full((5, 4), number, np.uint8))
    path = save(tmp_path / "test" / "a" / "0.png", np.zeros((3, 5, 4), np.uint8))
    with pytest.raises(UserError, match=rf"{path} has the shape \(3, 5, 4\), the first images have \(1, 5, 4\)"):
        dataset(f"folder:{tmp_path}").split("test")


def test_folder_of_gray_images_has_one_channel(tmp_path: Path) -> None:
    for number in range(10):
        save(tmp_path / "train" / "ab"[number % 2] / f"{number}.png", np.full((5, 4), number, np.uint8))
    (tmp_path / "test").mkdir()
    found = dataset(f"folder:{tmp_path}")
    assert found.image_shape == (1, 5, 4)
    levels = [image.flat[0] for split in ("train", "validation") for image in found.split(split).images]  # type: ignore[arg-type]
    assert sorted(levels) == [*range(10)]


def test_folder_with_two_sizes_is_refused(own: Path) -> None:
    path = save(own / "train" / "spoon" / "5.png", images_of(1, 7)[0])
    with pytest.raises(UserError, match=rf"{path} has the size \(7, 7\), .* has \(6, 6\)"):
        dataset(f"folder:{own}")


def test_test_image_of_another_size_is_refused(own: Path) -> None:
    path = save(own / "test" / "spoon" / "5.png", images_of(1, 7)[0])
    with pytest.raises(UserError, match=rf"{path} has the shape \(3, 7, 7\), the first images have \(3, 6, 6\)"):
        dataset(f"folder:{own}").split("test")


def test_test_class_without_training_images_is_refused(own: Path) -> None:
    save(own / "test" / "fork" / "0.png", images_of(1, 6)[0])
    with pytest.raises(UserError, match="fork is not one of the 2 classes"):
        dataset(f"folder:{own}").split("test")


def test_folder_without_test_part_is_refused(own: Path) -> None:
    shutil.rmtree(own / "test")
    with pytest.raises(UserError, match=r"test is not a folder: .* needs train/<class>/ and test/<class>/"):
        dataset(f"folder:{own}")


def test_status_of_a_folder(own: Path) -> None:
    name = f"folder:{own}"
    seen = [status(name)]
    dataset(name).split("test")
    seen.append(status(name))
    shutil.rmtree(own / "train")
    assert [*seen, status(name)] == ["raw files found", "ready", f"missing: train and test in {own}"]


def test_a_command_looks_at_a_folder_once(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Path] = []
    contents = _folder._contents
    monkeypatch.setattr(_folder, "_contents", lambda path: listed.append(path) or contents(path))
    with looking_once():
        found = [dataset(f"folder:{own}").version for _ in range(3)]
        assert status(f"folder:{own}") == "raw files found"
    assert len(set(found)) == len(listed) == 1
    with looking_once():  # another command sees what has changed
        save(own / "train" / "spoon" / "new.png", images_of(1, 6)[0])
        assert dataset(f"folder:{own}").version != found[0]


# --- folder:PATH with a dataset.json, and without training images -----------------------------------------------------

STATED = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def state(folder: Path, content: Any) -> None:
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.fixture
def tested(own: Path) -> Path:
    """A folder without training images."""
    shutil.rmtree(own / "train")
    state(own, STATED)
    return own


def test_a_stated_normalisation_comes_before_the_measured_one(own: Path) -> None:
    state(own, STATED)
    found = dataset(f"folder:{own}")
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_stated_normalisation_is_part_of_the_content(own: Path) -> None:
    before = dataset(f"folder:{own}").content
    state(own, STATED)
    assert dataset(f"folder:{own}").content != before


def test_with_a_stated_normalisation_no_training_image_is_prepared(own: Path) -> None:
    state(own, STATED)
    dataset(f"folder:{own}").split("test")
    assert list(dataset(f"folder:{own}").folder.glob("train-*")) == []


def test_a_folder_without_training_images_has_a_test_split(tested: Path) -> None:
    found = dataset(f"folder:{tested}")
    assert (found.class_names, found.image_shape, len(found.split("test").labels)) == (
        ("tea cup", "spoon"),
        (3, 6, 6),
        2,
    )
    assert status(f"folder:{tested}") == "ready"


def test_a_folder_without_training_images_has_no_other_split(tested: Path) -> None:
    with pytest.raises(UserError, match="has a test part only, and no train split"):
        dataset(f"folder:{tested}").split("train")


@pytest.mark.parametrize("content", [None, {"classes": ["Tea_Cup", "spoon"]}])
def test_without_training_images_the_normalisation_must_be_stated(content: Any, tested: Path) -> None:
    (tested / "dataset.json").unlink()
    if content is not None:
        state(tested, content)
    with pytest.raises(UserError, match=r"train is not a folder: .* dataset.json with mean and std"):
        dataset(f"folder:{tested}")


def test_labels_follow_the_stated_classes(tested: Path) -> None:
    state(tested, {**STATED, "classes": ["spoon", "fork", "Tea_Cup"]})
    found = dataset(f"folder:{tested}")
    assert (found.class_names, found.split("test").labels.tolist()) == (("spoon", "fork", "tea cup"), [0, 2])


def test_a_folder_whose_name_is_encoded_otherwise_is_told(tested: Path) -> None:
    """Composed and decomposed letters look the same."""
    composed, decomposed = "gr\u00fcn", "gru\u0308n"
    (tested / "test" / "spoon").rename(tested / "test" / decomposed)
    state(tested, {**STATED, "classes": [composed, "fork", "Tea_Cup"]})
    with pytest.raises(UserError, match="they look alike, but their letters are encoded otherwise"):
        dataset(f"folder:{tested}").split("test")


def test_a_folder_of_no_stated_class_is_refused(tested: Path) -> None:
    state(tested, {**STATED, "classes": ["spoon", "fork"]})
    with pytest.raises(UserError, match="Tea_Cup is not one of the 2 classes"):
        dataset(f"folder:{tested}").split("test")


def test_gray_images_get_as_many_channels_as_there_are_means(tmp_path: Path) -> None:
    for class_name in "ab":
        save(tmp_path / "test" / class_name / "0.png", np.zeros((5, 4), np.uint8))
    state(tmp_path, STATED)
    assert dataset(f"folder:{tmp_path}").split("test").images.shape == (2, 3, 5, 4)


def test_one_mean_for_images_in_colour_is_refused(tested: Path) -> None:
    state(tested, {"mean": [0.5], "std": [0.5]})
    with pytest.raises(UserError, match=r"dataset.json has 1 mean, but .*/Tea_Cup/0.png is in colour: give 3"):
        dataset(f"folder:{tested}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "can't be read as JSON"),
        ("[]", "is no JSON object"),
        ('{"means": [0.5]}', "unknown key .*'means': did you mean 'mean'"),
        ('{"mean": [0.5]}', "needs mean and std"),
        ('{"mean": [0.5], "std": [0.5, 0.5, 0.5]}', "needs mean and std"),
        ('{"mean": [123.7, 116.3, 103.5], "std": [58, 57, 57]}', "mean is .*123.7.* from 0 to 1"),
        ('{"mean": [0.5], "std": [0]}', "std is .* above 0"),
        ('{"mean": 0.5, "std": 0.5}', "expected a list"),
        ('{"classes": ["a"]}', "at least 2 names"),
        ('{"classes": ["a", "b", "a"]}', "'a' is there twice"),
    ],
)
def test_a_wrong_dataset_json_is_one_line(text: str, words: str, own: Path) -> None:
    (own / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        dataset(f"folder:{own}")
    assert "\n" not in str(caught.value)


# --- Names ------------------------------------------------------------------------------------------------------------


def test_misspelt_name_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown data set 'cifar-10': did you mean 'cifar10'\?"):
        dataset("cifar-10")


def test_plugins_add_data_sets(tmp_path: Path) -> None:
    assert len(dataset("toy", tmp_path, {"toy": TOY}).split("train").labels) == 16


@pytest.mark.parametrize("name", [name for name in data.dataset_names() if name != "tiny_imagenet"])
def test_class_names_are_clean_and_distinct(name: str) -> None:
    found = dataset(name)
    assert len(set(found.class_names)) == found.num_classes
    assert [text for text in found.class_names if text != class_names.clean(text)] == []


@pytest.mark.parametrize("name", data.dataset_names())
def test_facts_fit_the_channels(name: str) -> None:
    found = dataset(name)
    assert len(found.mean) == len(found.std) == found.image_shape[0]


@pytest.mark.parametrize(
    ("name", "label", "text"),
    [
        ("cifar10", 9, "truck"),
        ("cifar100", 1, "aquarium fish"),
        ("cifar100", 52, "oak tree"),
        ("cifar100", 99, "worm"),
        ("fashion_mnist", 9, "ankle boot"),
        ("imagenet", 0, "tench"),
        ("imagenet", 264, "cardigan welsh corgi"),
        ("imagenet", 474, "cardigan"),
    ],
)
def test_class_names_stand_at_their_labels(name: str, label: int, text: str) -> None:
    assert dataset(name).class_names[label] == text


def test_checksums_are_those_of_torchvision() -> None:
    from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST

    expected = {f"mnist/{file}": md5 for file, md5 in MNIST.resources}
    expected |= {f"fashion_mnist/{file}": md5 for file, md5 in FashionMNIST.resources}
    for name, cifar in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        expected |= {f"{name}/{cifar.base_folder}/{file}": md5 for file, md5 in cifar.train_list + cifar.test_list}
        expected[f"{name}/{cifar.filename}"] = cifar.tgz_md5
    expected |= {f"svhn/{file}": md5 for _, file, md5 in (SVHN.split_list["train"], SVHN.split_list["test"])}
    declared = {name: dataset(name).raw.checksums.items() for name in data.dataset_names()}
    assert {f"{name}/{file}": md5[0] for name, files in declared.items() for file, md5 in files} == expected


# --- Prepared files ---------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def garble(path: Path) -> None:
    path.write_bytes(b"{")


DAMAGES = [(damage, file) for damage in (truncate, flip_a_bit, Path.unlink) for file in (0, 1)] + [(garble, 2)]


@pytest.mark.parametrize(("damage", "file"), DAMAGES)
def test_damaged_prepared_file_is_named_and_remade(damage: Any, file: int, caplog: pytest.LogCaptureFixture) -> None:
    before = np.array(TOY.split("test").images)
    path = TOY.prepared_files("test")[file]
    damage(path)
    assert np.array_equal(TOY.split("test").images, before)
    assert str(path) in caplog.text


NAMED = replace(TOY, name="named", num_classes=2, names=lambda _root: ("cat", "dog"))


@pytest.mark.parametrize("text", ["[", '{"cat": 0}', "[1, 2]", '["cat"]', "\xff"])
def test_damaged_class_names_are_named_and_found_again(text: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = NAMED.folder / "class_names.json"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(text, encoding="latin-1")
    assert NAMED.class_names == ("cat", "dog")
    assert str(kept) in caplog.text
    assert json.loads(kept.read_text()) == ["cat", "dog"]


def test_damaged_class_names_without_raw_files_are_one_line() -> None:
    def gone(_root: Path) -> tuple[str, ...]:
        raise UserError("data set 'named' is missing")

    NAMED.folder.mkdir(parents=True)
    (NAMED.folder / "class_names.json").write_text("[")
    with pytest.raises(UserError, match=r"class_names\.json is damaged, and can't be made again: data set 'named'"):
        _ = replace(NAMED, names=gone).class_names


def test_large_damaged_file_is_recognised_by_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    TOY.split("test")
    monkeypatch.setattr(_prepared, "HASHED_BYTES", 0)
    truncate(TOY.prepared_files("test")[0])
    assert TOY.split("test").images.shape == (10, 1, 2, 2)


def test_damaged_prepared_file_without_raw_files_is_refused(publish: Any, tmp_path: Path) -> None:
    mnist = small_mnist(publish, tmp_path / "raw", tmp_path / "raw")
    mnist.split("test")
    shutil.rmtree(tmp_path / "raw")
    path = mnist.prepared_files("test")[0]
    truncate(path)
    with pytest.raises(UserError, match=f"{path} is damaged .*, and can't be made again: data set 'mnist' is missing"):
        mnist.split("test")


def test_index_that_lies_about_the_shape_is_recognised(caplog: pytest.LogCaptureFixture) -> None:
    TOY.split("test")
    path = TOY.prepared_files("test")[2]
    index = json.loads(path.read_text())
    index["files"]["images"]["shape"] = [10, 1, 1, 4]
    path.write_text(json.dumps(index))
    TOY.split("test")
    assert "it holds uint8 (10, 1, 2, 2)" in caplog.text


def test_changed_definition_is_prepared_anew() -> None:
    TOY.split("validation")
    assert len(replace(TOY, validation_size=6).split("validation").labels) == 6


def test_another_version_has_files_of_its_own() -> None:
    assert not set(TOY.prepared_files("test")) & set(replace(TOY, version="2").prepared_files("test"))


def test_full_disk_is_one_line_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_prepared, "_write_array", full)
    with pytest.raises(UserError, match=r"can't write the prepared 'toy' .*No space left.*\$DFKD_BENCH_HOME"):
        TOY.split("test")
    assert [path.name for path in TOY.folder.iterdir()] == [".test.lock"]


def test_leftovers_of_a_killed_process_are_removed() -> None:
    (TOY.folder / ".test-killed").mkdir(parents=True)
    TOY.split("test")
    assert not (TOY.folder / ".test-killed").exists()


def test_status_goes_from_missing_to_ready(publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [status("mnist", tmp_path).split(":")[0]]
    mnist = small_mnist(publish, tmp_path, tmp_path)
    seen.append(status("mnist", tmp_path))
    for split in data.SPLITS:
        mnist.split(split)
    assert [*seen, status("mnist", tmp_path)] == ["missing", "raw files found", "ready"]


# --- Several at once --------------------------------------------------------------------------------------------------


def prepare_in_threads(found: DataSet, count: int) -> list[np.ndarray]:
    images: list[np.ndarray] = []
    together = threading.Barrier(count)

    def work() -> None:
        together.wait()
        images.append(np.array(found.split("test").images))

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return images


@pytest.mark.parametrize(("locks", "readings"), [(True, 1), (False, 4)])
def test_preparing_at_once_is_safe(locks: bool, readings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With locks one does the work; without (some network file systems) all do, and nothing breaks."""
    read = []

    def slow(found: DataSet, root: Path, part: data.Part) -> RawData:
        read.append(part)
        time.sleep(0.2)
        return read_toy(found, root, part)

    if not locks:
        monkeypatch.setattr(_lock, "_locked", lambda descriptor: False)
    images = prepare_in_threads(replace(TOY, read=slow), 4)
    assert (len(read), len(images)) == (readings, 4)
    assert all(np.array_equal(image, images[0]) for image in images)


def test_processes_preparing_at_once_agree() -> None:
    code = "from dfkd_bench.data import *; print(dataset('digits').split('train').images.sum())"
    processes = [python("-c", code) for _ in range(2)]
    sums = [process.communicate() for process in processes]
    assert {out.strip() for out, _ in sums} == {str(dataset("digits").split("train").images.sum())}, sums
