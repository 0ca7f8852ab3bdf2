from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkd_bench.watch import FileWatch


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.npy", "b.png", "data_batch_1", "train-images-idx3-ubyte", "weird.xyz", "notes.py"):
        (folder / name).write_bytes(b"0123")
    return folder


def names(watch: FileWatch) -> list[tuple[str, str]]:
    return [(Path(path).name, phase) for path, phase in watch.files]


def test_files_are_listed_with_the_phase_they_were_opened_in(data: Path) -> None:
    watch = FileWatch(roots=[])
    with watch.on():
        (data / "a.npy").read_bytes()
        with watch.method():
            (data / "b.png").read_bytes()
        (data / "data_batch_1").read_bytes()
    assert names(watch) == [("a.npy", "runner"), ("b.png", "method"), ("data_batch_1", "runner")]


@pytest.mark.parametrize(
    ("name", "is_data"),
    [
        ("x.npz", True),
        ("x.PNG", True),
        ("x.jpeg", True),
        ("x.pth", True),
        ("x.safetensors", True),
        ("x.csv", True),
        ("t10k-images-idx3-ubyte", True),
        ("t10k-images-idx3-ubyte.gz", True),
        ("test_batch", True),
        ("x.py", False),
        ("x.so", False),
        ("x.json", False),
        ("x.ttf", False),
        ("batch", False),
    ],
)
def test_what_counts_as_data_by_its_name(name: str, is_data: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    watch = FileWatch(roots=[])
    with watch.on():
        (tmp_path / name).read_bytes()
    assert bool(watch.files) is is_data


def test_below_a_root_every_file_counts(data: Path) -> None:
    watch = FileWatch(roots=[data])
    with watch.on():
        (data / "weird.xyz").read_bytes()
    assert names(watch) == [("weird.xyz", "runner")]


def test_a_root_may_be_a_file(data: Path) -> None:
    watch = FileWatch(roots=[data / "weird.xyz"])
    with watch.on():
        (data / "weird.xyz").read_bytes()
        (data / "notes.py").read_bytes()
    assert names(watch) == [("weird.xyz", "runner")]


def test_a_folder_beside_a_root_with_a_longer_name_does_not_count(data: Path) -> None:
    beside = data.with_name("data2")
    beside.mkdir()
    (beside / "weird.xyz").write_bytes(b"")
    watch = FileWatch(roots=[data])
    with watch.on():
        (beside / "weird.xyz").read_bytes()
    assert watch.files == []


def test_the_runs_own_folders_do_not_count(data: Path) -> None:
    watch = FileWatch(roots=[data.parent], ignored=[data])
    with watch.on():
        (data / "a.npy").read_bytes()
    assert watch.files == []


def test_a_root_behind_a_link_is_a_root(data: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(data)
    watch = FileWatch(roots=[link])
    with watch.on():
        (link / "weird.xyz").read_bytes()
    assert names(watch) == [("weird.xyz", "runner")]


def test_an_own_folder_behind_a_link_does_not_count(data: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(data)
    watch = FileWatch(roots=[], ignored=[link])
    with watch.on():
        (link / "a.npy").read_bytes()
    assert watch.files == []


def test_writing_is_not_reading(tmp_path: Path) -> None:
    watch = FileWatch(roots=[tmp_path])
    with watch.on():
        (tmp_path / "new.npy").write_bytes(b"")
    assert watch.files == []


def test_relative_paths_are_made_absolute(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    watch = FileWatch(roots=[])
    with watch.on(), open("a.npy", "rb"):
        pass
    assert watch.files == [(str(data / "a.npy"), "runner")]


def test_files_opened_by_libraries_and_by_descriptor_are_seen(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.zeros(2))
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.pt")
    (tmp_path / "raw.bin").write_bytes(b"0")
    watch = FileWatch(roots=[])
    with watch.on(), watch.method():
        np.load(tmp_path / "array.npy")
        torch.load(tmp_path / "weights.pt", weights_only=True)
        handle = os.open(tmp_path / "raw.bin", os.O_RDONLY)
        os.fdopen(handle, "rb").close()  # a descriptor, no path: nothing more to see
    assert names(watch) == [("array.npy", "method"), ("weights.pt", "method"), ("raw.bin", "method")]


def test_what_the_runner_opens_for_a_method_is_the_runners(data: Path) -> None:
    watch = FileWatch(roots=[])
    with watch.on(), watch.method():
        with watch.runner():
            (data / "a.npy").read_bytes()
        (data / "b.png").read_bytes()
    assert names(watch) == [("a.npy", "runner"), ("b.png", "method")]


def test_a_folder_that_the_runner_lends_is_one_entry_and_what_the_method_opens_there_is_not(data: Path) -> None:
    watch = FileWatch(roots=[])
    with watch.on():
        with watch.lending(data):
            (data / "a.npy").read_bytes()
            (data / "b.png").read_bytes()
            with watch.method():
                (data / "b.png").read_bytes()
        (data / "data_batch_1").read_bytes()
    assert names(watch) == [("data", "runner"), ("b.png", "method"), ("data_batch_1", "runner")]


def test_a_file_opened_twice_is_listed_once_a_phase(data: Path) -> None:
    watch = FileWatch(roots=[])
    with watch.on():
        for _ in range(2):
            (data / "a.npy").read_bytes()
        with watch.method():
            (data / "a.npy").read_bytes()
    assert names(watch) == [("a.npy", "runner"), ("a.npy", "method")]


def test_nothing_is_seen_when_it_is_off(data: Path) -> None:
    watch = FileWatch(roots=[data])
    with watch.on():
        pass
    (data / "a.npy").read_bytes()
    assert watch.files == []


def test_only_the_watch_that_is_on_sees_something(data: Path) -> None:
    first, second = FileWatch(roots=[]), FileWatch(roots=[])
    with first.on():
        (data / "a.npy").read_bytes()
    with second.on():
        (data / "b.png").read_bytes()
    assert (names(first), names(second)) == ([("a.npy", "runner")], [("b.png", "runner")])


def test_an_error_ends_the_methods_phase_and_the_watch(data: Path) -> None:
    watch = FileWatch(roots=[])

    def fail() -> None:
        with watch.on(), watch.method():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    (data / "b.png").read_bytes()
    with watch.on():
        (data / "a.npy").read_bytes()
    assert names(watch) == [("a.npy", "runner")]


def test_what_was_seen_before_an_interruption_comes_first(data: Path) -> None:
    watch = FileWatch(roots=[])
    with watch.on():
        (data / "a.npy").read_bytes()
        watch.recall([("/old/x.npy", "method")])
    assert names(watch) == [("x.npy", "method"), ("a.npy", "runner")]
