"""A pool in host memory: the same batches as on the device, the next one fetched ahead."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dfkd_bench.ahead import Ahead, HostImages, _Lane, place, spare_memory, taken
from dfkd_bench.augment import to_uint8
from dfkd_bench.method import LabelledImages, Method, Progress, Task
from dfkd_bench.methods.real_kd import RealKD
from dfkd_bench.methods.scratch import Scratch
from dfkd_bench.pool import Pool
from dfkd_bench.shuffle import Shuffle

CPU = torch.device("cpu")
DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda", 0),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
IMAGE = (1, 2, 2)
BYTES = 4  # of an image


def images(start: int, stop: int, device: torch.device = CPU) -> Tensor:
    """Images whose every pixel is their number / 255."""
    return (torch.arange(start, stop, device=device) / 255).view(-1, 1, 1, 1).expand(-1, *IMAGE)


def stored(count: int) -> Tensor:
    """Images as they are kept, whose every pixel is their number."""
    return torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, *IMAGE)


def stream(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def two_pools(device: torch.device, cap: int | None = None, full: bool = False) -> tuple[Pool, Pool]:
    """One whose device has no end, one whose device has no room for 12 images, nor for as many as the cap allows."""
    room = 11 if cap is None else cap - 1
    return (
        Pool(IMAGE, device, stream(device), cap, full, spare=lambda _: None),
        Pool(IMAGE, device, stream(device), cap, full, spare=lambda _: 2 * BYTES * room),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("cap", "full"), [(None, False), (9, False), (None, True)])
def test_a_pool_in_host_memory_gives_the_same_batches(device: torch.device, cap: int | None, full: bool) -> None:
    plain, other = two_pools(device, cap, full)
    for start in range(0, 48, 6):
        for pool in (plain, other):
            pool.add(images(start, start + 6, device), {"number": torch.arange(start, start + 6, device=device)})
        for size in (4, 4, 4, 3, 5):
            expected, extras = plain.draw_with_extras(size)
            drawn, others = other.draw_with_extras(size)
            assert torch.equal(drawn, expected)
            assert torch.equal(others["number"], extras["number"])
            assert drawn.device == expected.device
    assert plain._host is None
    assert other._host is not None
    assert other.images.device == CPU


def test_a_pool_stays_on_the_device_while_there_is_room() -> None:
    _, pool = two_pools(CPU)
    pool.add(images(0, 11))
    assert pool._host is None
    pool.add(images(11, 12))  # its tensor would double to 22
    assert pool._host is not None
    assert torch.equal(pool.images[:, 0, 0, 0], torch.arange(12, dtype=torch.uint8))


def test_the_device_is_asked_for_room_when_the_pool_must_grow() -> None:
    asked: list[torch.device] = []
    pool = Pool(IMAGE, CPU, stream(CPU), spare=asked.append)
    for start in range(0, 12, 3):  # room for 3, 6 and 12 images
        pool.add(images(start, start + 3))
    assert len(asked) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_saved_pool_goes_on_in_host_memory(device: torch.device) -> None:
    """Made where there was room, resumed where there is none, in the middle of a pass."""
    plain, other = two_pools(device)
    plain.add(images(0, 20, device))
    plain.draw(7)
    other.load_state_dict(plain.state_dict(), plain.images.cpu(), {})
    assert other._host is not None
    for _ in range(2):  # the rest of the pass: the next one is up to the stream, which a checkpoint holds beside it
        assert torch.equal(other.draw(5), plain.draw(5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(20,), (11, 9), (1, 17, 2)])
def test_images_that_the_device_has_no_room_for_give_the_same_batches(
    device: torch.device, sizes: tuple[int, ...]
) -> None:
    parts = stored(20).split(sizes)
    there, here = place(parts, device, lambda _: 2 * BYTES * 20), place(parts, device, lambda _: 2 * BYTES * 20 - 1)
    assert isinstance(there, Tensor)
    assert isinstance(here, HostImages)
    assert here.shape == there.shape
    assert there.device == device
    order = torch.randperm(20, device=device).split(6)
    for batch, other in zip(taken(there, order), taken(here, order), strict=True):
        assert torch.equal(batch, other)
        assert batch.device == other.device
    assert torch.equal(there[order[0]], here[order[0]])


def test_a_single_part_is_not_copied_where_the_memory_is_the_hosts() -> None:
    part = stored(20)
    placed = place([part], CPU)
    assert isinstance(placed, Tensor)
    assert placed.data_ptr() == part.data_ptr()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [RealKD, Scratch])
def test_controls_have_the_same_batches_from_host_memory(
    method: type[Method], device: torch.device, make_task: Callable[..., Task]
) -> None:
    parts, labels = stored(20).split((13, 7)), torch.arange(20, device=device)
    placed = [place(parts, device, lambda _: None), place(parts, device, lambda _: 0)]
    plain, other = (
        method(
            method.Config(),
            make_task(
                device=device,
                rng=stream(device),
                training_data=LabelledImages(lent, labels),
                augment=lambda batch: batch,
                normalize=lambda batch: batch,
            ),
        )
        for lent in placed
    )
    pool, at = Pool(IMAGE, device, stream(device)), Progress(0, 0, 1, 0)
    for size in (8, 8, 8, 20, 3, 41):  # passes end within batches
        batch, same = plain.student_batch(pool, size, at), other.student_batch(pool, size, at)
        assert torch.equal(batch.images, same.images)
        assert batch.images.device == same.images.device
        assert batch.images.shape[0] == size
        for name, values in batch.extras.items():
            assert torch.equal(values, same.extras[name])
            assert values.tolist() == (255 * batch.images[:, 0, 0, 0]).round().int().tolist()
    saved = [one.state_dict()["shuffle"] for one in (plain, other)]
    assert torch.equal(saved[0]["order"], saved[1]["order"].to(device))


def test_the_expected_batch_is_fetched_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ahead, stored, gathered = Ahead(CPU), images(0, 20), threading.Event()
    fetch = ahead._fetch

    def noted(tensor: Tensor, rows: Tensor) -> Tensor:
        batch = fetch(tensor, rows)
        gathered.set()
        return batch

    monkeypatch.setattr(ahead, "_fetch", noted)
    rows = torch.tensor([3, 1])
    ahead.expect(stored, rows)
    assert gathered.wait(timeout=10)
    gathered.clear()
    assert torch.equal(ahead.take(stored, rows), stored[rows])
    assert not gathered.is_set()  # nothing was fetched a second time


def test_other_rows_than_expected_are_fetched_anew() -> None:
    ahead, stored = Ahead(CPU), images(0, 20)
    ahead.expect(stored, torch.tensor([3, 1]))
    assert torch.equal(ahead.take(stored, torch.tensor([5])), stored[torch.tensor([5])])


def test_nothing_fetched_survives_a_change_of_the_pool() -> None:
    """With a cap the rows move up: what was fetched ahead are other images by then."""
    _, pool = two_pools(CPU, cap=12)
    pool.add(images(0, 12))
    pool.draw(4)  # the next four are under way
    pool.add(images(12, 24))
    drawn = torch.cat([pool.draw(4) for _ in range(3)])
    assert sorted((drawn[:, 0, 0, 0] * 255).round().int().tolist()) == list(range(12, 24))


def test_the_cpu_has_no_memory_of_its_own() -> None:
    assert spare_memory(CPU) is None


def test_the_rows_ahead_are_those_of_the_next_draw() -> None:
    shuffle = Shuffle(stream(CPU), CPU)
    shuffle.next(10, 4)
    expected = shuffle.ahead(10, 3)
    assert expected is not None
    assert torch.equal(shuffle.next(10, 3), expected)


@pytest.mark.parametrize(("rows", "size"), [(10, 7), (11, 3)])
def test_rows_of_another_pass_are_not_known_ahead(rows: int, size: int) -> None:
    """Seven are more than are left; a pool that has grown begins a new pass."""
    shuffle = Shuffle(stream(CPU), CPU)
    shuffle.next(10, 4)
    assert shuffle.ahead(rows, size) is None


def test_memory_is_pinned_for_the_gpu_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that fetches has GPU 0 as its device, which another process may use."""
    current: list[torch.device | None] = [None]
    pinned_for: list[torch.device | None] = []
    empty = torch.empty

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def noted(shape: Any, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        pinned_for.append(current[-1])
        return empty(shape, dtype=dtype)

    for name in ("Stream", "Event", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: _Nothing())
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(torch, "empty", noted)
    _Lane(CPU).copy(images(0, 20), torch.tensor([3, 1]))
    assert pinned_for == [CPU]


class _Nothing(contextlib.nullcontext[None]):
    """A stream or an event of a device that isn't there."""

    def synchronize(self) -> None: ...

    def record(self) -> None: ...


def test_a_pool_of_imagenets_size_in_host_memory() -> None:
    """140,000 images of 224x224 are 21 GB: more bytes than 32 bits count. Memory that nobody has written takes none."""
    shape, count = (3, 224, 224), 140_000
    try:
        room = torch.empty((count, *shape), dtype=torch.uint8)
    except RuntimeError:
        pytest.skip("this machine does not promise 21 GB")
    pool = Pool(shape, CPU, torch.Generator().manual_seed(0), spare=lambda _device: 0)
    pool.add(torch.zeros(1, *shape))
    last = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    pool._images, pool._size = room, count - len(last)
    pool.add(last)
    assert len(pool) == count
    assert torch.equal(pool._take(torch.tensor([count - 1, count - 2])), to_uint8(last.flip(0)))
    assert pool.draw(8).shape == (8, *shape)
