from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn

from dfkd_bench import lease, runfolder
from dfkd_bench.checkpoint import (
    QUICK,
    WORTH,
    Pace,
    load_tree,
    random_state,
    restore_random_state,
    save_tree,
    seed_everything,
)
from dfkd_bench.errors import UserError
from dfkd_bench.job import Job, TeacherSpec
from dfkd_bench.lease import Busy, is_stale
from dfkd_bench.method import Schedule
from dfkd_bench.pool import Pool
from dfkd_bench.runfolder import RunFolder

CPU = torch.device("cpu")


def there_and_back(tree: Any, folder: Path) -> Any:
    save_tree(folder / "tree.safetensors", tree)
    return load_tree(folder / "tree.safetensors")


# -- Trees ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tree",
    [
        {},
        [],
        None,
        3,
        "text",
        {"a": 1, "b": None, "c": True, "d": 1e-300, "e": "ä\n"},
        {0: "integer", 12: {"inner": [1, 2, {3: ()}]}},
        {"0": "a string", "tuple": (1, (2.5, "x"), [False]), "list": [[], {}, ()]},
        {"infinite": float("inf"), "big": 2**70},
    ],
    ids=str,
)
def test_plain_values_come_back_with_their_types(tree: Any, tmp_path: Path) -> None:
    assert repr(there_and_back(tree, tmp_path)) == repr(tree)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).view(2, 3),
        torch.tensor(2.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.randn(3).bfloat16(),
        torch.arange(5, dtype=torch.uint8),
        torch.arange(12).view(3, 4).t(),
        torch.arange(3).expand(2, 3),
    ],
    ids=lambda tensor: f"{tensor.dtype}-{tuple(tensor.shape)}",
)
def test_tensors_come_back_bit_by_bit(tensor: Tensor, tmp_path: Path) -> None:
    (back,) = there_and_back([tensor], tmp_path)
    assert back.dtype == tensor.dtype
    assert torch.equal(back, tensor)


def test_tensors_that_share_memory_and_parameters_are_saved(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.arange(4.0))
    back = there_and_back({"whole": weight, "part": weight[1:], "again": weight}, tmp_path)
    assert {name: values.tolist() for name, values in back.items()} == {
        "whole": [0, 1, 2, 3],
        "part": [1, 2, 3],
        "again": [0, 1, 2, 3],
    }


def test_channels_last_tensors_keep_their_layout(tmp_path: Path) -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    (back,) = there_and_back([tensor], tmp_path)
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


def test_what_has_no_plain_form_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a \w*Path can't be saved"):
        save_tree(tmp_path / "tree", {"path": tmp_path})


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_goes_on_as_if_it_had_not_been_interrupted(optimizer: str, tmp_path: Path) -> None:
    """Channels-last and with fused optimisers, as in a run: there the layout of the momentum matters."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
        model = model.to(memory_format=torch.channels_last)
        if optimizer == "sgd":
            return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        return model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)

    def step(model: nn.Module, descent: torch.optim.Optimizer) -> None:
        descent.zero_grad()
        model(batch).square().mean().backward()
        descent.step()

    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model, descent = build()
    for _ in range(3):
        step(model, descent)
    tree = there_and_back({"model": model.state_dict(), "optimizer": descent.state_dict()}, tmp_path)
    other, other_descent = build()
    other.load_state_dict(tree["model"])
    other_descent.load_state_dict(tree["optimizer"])
    for _ in range(2):
        step(model, descent)
        step(other, other_descent)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _other(data: bytes) -> bytes:
    return b"not a checkpoint"


def _empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damage", [_cut, _other, _empty])
def test_a_damaged_file_is_an_error_that_names_it(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    save_tree(path, {"a": torch.randn(100)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"tree\.safetensors is damaged"):
        load_tree(path)


def test_a_missing_file_is_the_same_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is damaged"):
        load_tree(tmp_path / "nothing")


# -- How often ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("took", "epoch", "written"),
    [
        (QUICK / 2, 0.01, [1, 2, 3, 4, 5, 6, 7, 8]),  # as in small runs
        (1.0, 0.75 * WORTH, [1, 3, 5, 7]),
        (1.0, 0.01, [1]),
        (1.0, WORTH, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_checkpoints_that_take_long_are_written_less_often(took: float, epoch: float, written: list[int]) -> None:
    now = [100.0]
    pace, found = Pace(lambda: now[0]), []
    for number in range(1, 9):
        now[0] += epoch
        if pace.is_due:
            with pace.writing():
                found.append(number)
                now[0] += took
    assert found == written


# -- Random streams -------------------------------------------------------------------------------------------------


def draws() -> tuple[Any, ...]:
    generator = np.random  # the global stream, on purpose
    return random.random(), random.gauss(0, 1), generator.rand(), generator.randn(), torch.rand(3).tolist()


def test_random_state_goes_through_a_file(tmp_path: Path) -> None:
    seed_everything(3)
    draws()  # leaves a second Gaussian number cached in Python's and NumPy's stream
    state = there_and_back(random_state(CPU), tmp_path)
    expected = draws()
    draws()
    restore_random_state(state, CPU)
    assert draws() == expected


def test_random_state_comes_back_from_another_device() -> None:
    seed_everything(3)
    state = random_state(CPU)
    expected = draws()
    keys, *others = state["numpy"]
    state["numpy"] = [SimpleNamespace(cpu=lambda: keys), *others]  # a GPU's tensor can't become an array
    restore_random_state(state, CPU)
    assert draws() == expected


def test_seeding_decides_all_global_streams() -> None:
    seed_everything(5)
    first = draws()
    seed_everything(6)
    other = draws()
    seed_everything(5)
    assert draws() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_seeds_beyond_32_bits_are_taken() -> None:
    seed_everything(2**47 + 1)


# -- The run's folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def folder(home: Path) -> RunFolder:
    job = Job(
        method="nayer",
        config={},
        schedule=Schedule(epochs=2, student_steps=1, batch_size=2, lr=0.1),
        dataset="digits",
        teacher=TeacherSpec(model="convnet32"),
        student="convnet8",
        seed=0,
        protocol="smoke",
    )
    made = RunFolder(job)
    made.create()
    return made


def reopened(folder: RunFolder) -> RunFolder:
    """As another process finds it."""
    return RunFolder(folder.job)


def new_pool(cap: int | None = None) -> Pool:
    return Pool((1, 2, 2), CPU, torch.Generator().manual_seed(0), cap)


def add(pool: Pool, count: int) -> None:
    """The next ``count`` images, of random pixels, with their number as an extra of two kinds."""
    start = pool.made
    number = torch.arange(start, start + count)
    images = torch.rand(count, 1, 2, 2, generator=torch.Generator().manual_seed(start))
    pool.add(images, {"number": number, "feature": number.view(-1, 1, 1).expand(-1, 2, 3) / 7})


def same(one: Pool, other: Pool) -> bool:
    return (
        torch.equal(one.images, other.images)
        and one.made == other.made
        and one.extras.keys() == other.extras.keys()
        and all(torch.equal(rows, other.extras[name]) for name, rows in one.extras.items())
    )


def test_the_folder_is_named_by_the_job_and_holds_it(folder: RunFolder, home: Path) -> None:
    assert folder.path == home / "runs" / folder.job.id
    assert Job.model_validate_json((folder.path / "job.json").read_text()) == folder.job


@pytest.mark.parametrize("cap", [None, 5, 12])
def test_state_and_pool_come_back_after_each_save(folder: RunFolder, cap: int | None) -> None:
    pool = new_pool(cap)
    for epoch, count in enumerate((3, 4, 0, 9, 1)):
        if count:
            add(pool, count)
        folder.save({"epoch": epoch, "weights": torch.tensor([1.5])}, pool)
        found = new_pool(cap)
        state = reopened(folder).load(found)
        assert (state["epoch"], state["weights"].item()) == (epoch, 1.5)
        assert same(pool, found)


@pytest.mark.parametrize("cap", [None, 5])
def test_saving_goes_on_after_a_resume(folder: RunFolder, cap: int | None) -> None:
    pool = new_pool(cap)
    for epoch in range(4):
        add(pool, 3)
        folder.save({"epoch": epoch}, pool)
        folder, pool_before, pool = reopened(folder), pool, new_pool(cap)
        folder.load(pool)
        assert same(pool, pool_before)
    assert pool.made == 12


def test_several_batches_between_two_saves_may_exceed_the_cap(folder: RunFolder) -> None:
    pool = new_pool(4)
    add(pool, 3)
    folder.save({}, pool)
    for _ in range(5):
        add(pool, 3)  # most of these are dropped again before the next save
    folder.save({}, pool)
    found = new_pool(4)
    reopened(folder).load(found)
    assert found.extras["number"].tolist() == [14, 15, 16, 17]


def test_rows_of_a_crash_between_the_two_steps_of_a_save_are_cut_off(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = new_pool()
    add(pool, 4)
    folder.save({"epoch": 1}, pool)
    with monkeypatch.context() as patch:
        patch.setattr(runfolder, "save_tree", _crash)
        add(pool, 6)
        with pytest.raises(InterruptedError):
            folder.save({"epoch": 2}, pool)
    images = folder.path / "checkpoint" / "images.bin"
    assert images.stat().st_size == 10 * 4

    resumed, found = reopened(folder), new_pool()
    assert resumed.load(found) == {"epoch": 1}
    assert len(found) == 4
    add(found, 2)
    resumed.save({"epoch": 2}, found)
    assert images.stat().st_size == 6 * 4
    again = new_pool()
    reopened(folder).load(again)
    assert same(again, found)


def _crash(path: Path, tree: Any) -> None:
    raise InterruptedError


def test_a_crash_in_the_very_first_save_leaves_a_fresh_start(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = new_pool()
    add(pool, 4)
    with monkeypatch.context() as patch:
        patch.setattr(runfolder, "save_tree", _crash)
        with pytest.raises(InterruptedError):
            folder.save({}, pool)
    assert not folder.has_checkpoint
    fresh, resumed = new_pool(), reopened(folder)
    add(fresh, 2)
    resumed.save({}, fresh)
    found = new_pool()
    reopened(folder).load(found)
    assert same(found, fresh)


def test_saving_appends_only_what_is_new(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    append = runfolder._append

    def watched(path: Path, rows: Tensor, position: int) -> None:
        written.append(len(rows))
        append(path, rows, position)

    monkeypatch.setattr(runfolder, "_append", watched)
    pool = new_pool()
    for count in (8, 2):
        add(pool, count)
        folder.save({}, pool)
    folder.save({}, pool)
    resumed, found = reopened(folder), new_pool()
    resumed.load(found)
    add(found, 3)
    resumed.save({}, found)
    assert written == [8, 8, 8, 2, 2, 2, 3, 3, 3]  # images and two extras


def test_a_method_without_a_pool_has_checkpoints_too(folder: RunFolder) -> None:
    folder.save({"epoch": 3}, new_pool())
    assert reopened(folder).load(new_pool()) == {"epoch": 3}


@pytest.mark.parametrize("name", ["state.safetensors", "images.bin", "extra-number.bin"])
def test_a_damaged_checkpoint_says_what_to_delete(folder: RunFolder, name: str) -> None:
    pool = new_pool()
    add(pool, 4)
    folder.save({}, pool)
    path = folder.path / "checkpoint" / name
    path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError, match=r"can't be read .* to start it anew") as caught:
        reopened(folder).load(new_pool())
    message = str(caught.value)
    assert str(folder.path) in message
    assert "\n" not in message


def test_a_forgotten_checkpoint_is_gone(folder: RunFolder) -> None:
    folder.save({}, new_pool())
    assert folder.has_checkpoint
    folder.forget_checkpoint()
    assert not folder.has_checkpoint


def test_metrics_are_one_json_line_an_epoch(folder: RunFolder) -> None:
    for epoch in range(2):
        folder.append_metrics({"epoch": epoch, "loss": 0.5})
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1]


# -- The lease ------------------------------------------------------------------------------------------------------


def gone_process() -> int:
    """The id of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return child.pid


def leave_lease(folder: RunFolder, text: str, age: float = 0.0) -> Path:
    path = folder.path / "lease"
    path.write_text(text)
    os.utime(path, (time.time() - age,) * 2)
    return path


def owner(pid: int, host: str | None = None, started: float = 0.0) -> str:
    return json.dumps({"host": host or socket.gethostname(), "pid": pid, "started": started})


def myself() -> str:
    return owner(os.getpid(), started=psutil.Process().create_time())


def test_a_signal_right_after_the_lease_is_taken_gives_it_back(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_thread: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lease.threading.Thread, "start", stopped)  # what comes next
    with pytest.raises(KeyboardInterrupt), folder.lease():
        pass
    assert not (folder.path / "lease").exists()


def test_a_signal_while_the_lease_is_taken_gives_it_back(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command stopped in its first moments left one that nobody owned, one time in fifty."""
    link = os.link

    def stopped(draft: Path, path: Path) -> None:
        link(draft, path)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", stopped)
    with pytest.raises(KeyboardInterrupt), folder.lease():
        pass
    assert list(folder.path.glob("lease*")) == []


def test_a_lease_is_whole_before_others_see_it(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    link = os.link

    def observed(draft: Path, path: Path) -> None:
        link(draft, path)
        seen.append(Path(path).read_text())

    monkeypatch.setattr(os, "link", observed)
    with folder.lease():
        assert json.loads(seen[0])["pid"] == os.getpid()


def test_a_file_system_without_links_has_leases_too(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_draft: Path, _path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    with folder.lease(), pytest.raises(Busy), reopened(folder).lease():
        pass
    assert list(folder.path.glob("lease*")) == []


def test_a_second_holder_is_busy_until_the_first_is_done(folder: RunFolder) -> None:
    with folder.lease():
        with pytest.raises(Busy, match=folder.job.id), reopened(folder).lease():
            pass
        assert (folder.path / "lease").exists()  # the refused one took nothing away
    with reopened(folder).lease():
        pass
    assert not (folder.path / "lease").exists()


def test_the_lease_ends_with_an_error_too(folder: RunFolder) -> None:
    with pytest.raises(KeyError), folder.lease():
        raise KeyError
    assert not (folder.path / "lease").exists()


def test_a_lease_needs_no_folder_yet(folder: RunFolder) -> None:
    (folder.path / "job.json").unlink()
    folder.path.rmdir()
    with folder.lease():
        assert (folder.path / "lease").exists()


def test_the_lease_names_its_holder(folder: RunFolder) -> None:
    with folder.lease():
        assert json.loads((folder.path / "lease").read_text()).items() >= json.loads(myself()).items()


def test_the_lease_of_a_dead_process_is_taken_over(folder: RunFolder) -> None:
    leave_lease(folder, owner(gone_process()))
    with folder.lease():
        assert json.loads((folder.path / "lease").read_text())["pid"] == os.getpid()


def test_a_lease_without_a_sign_of_life_is_taken_over(folder: RunFolder) -> None:
    leave_lease(folder, owner(os.getpid(), "another-host"), age=lease.STALE + 5)
    with folder.lease():
        pass


@pytest.mark.parametrize(
    ("text", "age", "stale"),
    [
        (owner(os.getpid()), 0, False),
        (owner(os.getpid()), lease.STALE + 5, True),  # the number belongs to someone else now
        (myself(), lease.STALE + 5, False),  # stopped by Ctrl-Z: it will go on
        (owner(1, "another-host"), lease.STALE - 5, False),
        (owner(1, "another-host"), lease.STALE + 5, True),
        ("", 0, False),  # just being written
        ("", lease.HEARTBEAT + 2, True),  # its writer died in between
        ('{"host": "a', 0, False),
        ('{"host": "a', lease.STALE + 5, True),
    ],
)
def test_which_leases_are_stale(folder: RunFolder, text: str, age: float, stale: bool) -> None:
    assert is_stale(leave_lease(folder, text, age)) is stale


@pytest.mark.parametrize("name", ["boot", "pids"])
@pytest.mark.parametrize(("age", "stale"), [(0, False), (lease.STALE + 5, True)])
def test_a_number_of_another_namespace_says_nothing(folder: RunFolder, name: str, age: float, stale: bool) -> None:
    """Containers that share the host's network have its name, too, and process 4,000,000 of one is none of another."""
    text = json.dumps(json.loads(owner(gone_process())) | lease._where() | {name: "another"})
    assert is_stale(leave_lease(folder, text, age)) is stale


def test_a_number_of_the_same_namespace_counts(folder: RunFolder) -> None:
    with folder.lease():
        text = (folder.path / "lease").read_text()
    assert not is_stale(leave_lease(folder, text, lease.STALE + 5))
    assert is_stale(leave_lease(folder, json.dumps(json.loads(text) | {"pid": gone_process()})))


def test_a_lease_that_is_gone_can_be_taken(folder: RunFolder) -> None:
    assert is_stale(folder.path / "lease")


def test_a_holder_gives_signs_of_life(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.01)
    with folder.lease():
        path = folder.path / "lease"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - path.stat().st_mtime < 60


def test_a_sign_of_life_that_cannot_be_given_is_not_the_last(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.01)
    given: list[Path] = []

    def utime(path: Path) -> None:
        given.append(path)
        raise OSError(errno.ESTALE, "the network's folder is away")

    monkeypatch.setattr(os, "utime", utime)
    with folder.lease():
        deadline = time.monotonic() + 5
        while len(given) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(given) > 1


def test_of_two_that_find_a_lease_stale_one_gets_it(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_lease(folder, owner(gone_process()))
    first = contextlib.ExitStack()

    def looked(path: Path, look: Callable[[Path], bool] = lease.is_stale) -> bool:
        stale = look(path)
        monkeypatch.setattr(lease, "is_stale", look)
        first.enter_context(reopened(folder).lease())  # between the second one's look and its taking over
        return stale

    monkeypatch.setattr(lease, "is_stale", looked)
    with first, pytest.raises(Busy), folder.lease():
        pass


def test_a_lease_made_meanwhile_is_not_replaced_by_one_that_is_put_back(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = leave_lease(folder, owner(1, "of the second"))
    rename = os.rename

    def renamed(source: Path, target: Path) -> None:
        rename(source, target)
        if source == path:  # right then a third one takes it
            leave_lease(folder, owner(1, "of the third"))

    monkeypatch.setattr(os, "rename", renamed)
    lease._remove(path, owner(1, "of the first"))
    assert [file.name for file in folder.path.glob("lease*")] == ["lease"]
    assert path.read_text() == owner(1, "of the third")


def test_a_foreign_lease_is_put_back(folder: RunFolder) -> None:
    path = leave_lease(folder, owner(1, "of the second"), age=5)
    before = path.stat().st_mtime
    lease._remove(path, owner(1, "of the first"))
    assert [file.name for file in folder.path.glob("lease*")] == ["lease"]
    assert (path.read_text(), path.stat().st_mtime) == (owner(1, "of the second"), before)


def test_a_lease_that_another_has_taken_over_is_left_to_it(folder: RunFolder) -> None:
    with folder.lease():
        path = leave_lease(folder, owner(1, "another-host"))
    assert path.exists()


def test_who_has_lost_the_lease_does_not_touch_the_new_one(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT", 0.01)
    with folder.lease():
        path = folder.path / "lease"
        draft = path.with_name("draft")
        draft.write_text(owner(1, "another-host"))
        os.utime(draft, (0, 0))
        os.replace(draft, path)
        time.sleep(0.2)
    assert path.stat().st_mtime == 0


@pytest.mark.parametrize("taken", [True, False], ids=["by another", "and given back"])
def test_who_has_lost_the_lease_writes_no_checkpoint(folder: RunFolder, taken: bool) -> None:
    """After a minute without a sign of life the run is another one's, who appends to the same files."""
    pool = new_pool()
    add(pool, 3)
    with folder.lease():
        folder.save({"epoch": 1}, pool)
        if taken:
            leave_lease(folder, owner(1, "another-host"))
        else:
            (folder.path / "lease").unlink()
        before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
        add(pool, 3)
        with pytest.raises(Busy, match="taken over"):
            folder.save({"epoch": 2}, pool)
        with pytest.raises(Busy):
            folder.append_metrics({"epoch": 1})
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


def test_who_loses_the_lease_while_the_pool_is_written_does_not_replace_the_state(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = new_pool()
    with folder.lease():
        folder.save({"epoch": 1}, pool)
        add(pool, 3)

        def hangs(*_: object) -> None:
            leave_lease(folder, owner(1, "another-host"))

        monkeypatch.setattr(runfolder, "_append", hangs)
        with pytest.raises(Busy):
            folder.save({"epoch": 2}, pool)
    assert reopened(folder).load(new_pool()) == {"epoch": 1}
