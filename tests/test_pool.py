from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dfkd_bench import check, plugins
from dfkd_bench.augment import to_uint8
from dfkd_bench.pool import Pool
from dfkd_bench.shuffle import Shuffle

CPU = torch.device("cpu")


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_pool(cap: int | None = None, seed: int = 0) -> Pool:
    return Pool((1, 2, 2), CPU, stream(seed), cap)


def numbered(start: int, stop: int) -> Tensor:
    """Images whose every pixel is their number / 255."""
    return (torch.arange(start, stop) / 255).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def numbers(images: Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def one_pass(pool: Pool, size: int) -> list[list[int]]:
    return [numbers(pool.draw(size)) for _ in range(-(-len(pool) // size))]


def in_order(batches: list[list[int]]) -> list[int]:
    return sorted(itertools.chain.from_iterable(batches))


# -- Pool -----------------------------------------------------------------------------------------------------------


def test_length_is_the_sum_of_all_batches() -> None:
    pool = new_pool()
    for size in (3, 1, 7, 20):
        pool.add(torch.rand(size, 1, 2, 2))
    assert len(pool) == pool.made == 31


def test_stored_values_are_truncated_to_8_bits() -> None:
    pool, images = new_pool(), torch.rand(50, 1, 2, 2) * 1.2 - 0.1
    pool.add(images)
    loss = images.clamp(0, 1) - pool.images / 255
    assert loss.min() >= -1e-7  # never brighter
    assert loss.max() < 1 / 255


def test_images_are_kept_in_the_order_of_adding() -> None:
    pool = new_pool()
    for start in range(0, 60, 12):
        pool.add(numbered(start, start + 12))
    assert pool.images[:, 0, 0, 0].tolist() == list(range(60))


@pytest.mark.parametrize(("rows", "size"), [(12, 4), (11, 4), (10, 4), (3, 8)])
def test_a_pass_covers_every_image_once(rows: int, size: int) -> None:
    pool = new_pool()
    pool.add(numbered(0, rows))
    drawn = one_pass(pool, size)
    assert in_order(drawn) == list(range(rows))
    assert [len(batch) for batch in drawn[:-1]] == [size] * (len(drawn) - 1)
    assert len(drawn[-1]) == (rows % size or size)


def test_the_next_pass_has_another_order() -> None:
    pool = new_pool()
    pool.add(numbered(0, 40))
    first, second = one_pass(pool, 8), one_pass(pool, 8)
    assert first != second
    assert in_order(first) == in_order(second)


def test_adding_begins_a_new_pass_over_old_and_new() -> None:
    pool = new_pool()
    pool.add(numbered(0, 10))
    pool.draw(4)
    pool.add(numbered(10, 20))
    assert in_order(one_pass(pool, 5)) == list(range(20))


def test_drawn_images_are_floats_of_the_stored_levels() -> None:
    pool = new_pool()
    pool.add(torch.full((2, 1, 2, 2), 127.9 / 255))
    drawn = pool.draw(2)
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, torch.full((2, 1, 2, 2), 127 / 255))


def test_writing_into_a_drawn_batch_does_not_change_the_pool() -> None:
    pool = new_pool()
    pool.add(numbered(0, 5))
    pool.draw(5).zero_()
    assert pool.images[:, 0, 0, 0].tolist() == list(range(5))


@pytest.mark.parametrize("batch", [1, 3, 4, 6, 10, 15])
def test_a_cap_keeps_the_newest(batch: int) -> None:
    pool = new_pool(cap=10)
    for start in range(0, 60, batch):
        pool.add(numbered(start, start + batch))
    assert pool.images[:, 0, 0, 0].tolist() == list(range(50, 60))
    assert (len(pool), pool.made) == (10, 60)


def test_a_cap_drops_the_oldest_of_one_batch_too() -> None:
    pool = new_pool(cap=4)
    pool.add(numbered(0, 3))
    pool.add(numbered(3, 12), {})
    assert pool.images[:, 0, 0, 0].tolist() == [8, 9, 10, 11]


def test_a_full_pool_stays_where_it_lies() -> None:
    """Of a pool that takes half of a device's memory there is no room for a second one, nor for a larger one."""
    pool = new_pool(cap=10)
    pool.add(numbered(0, 7))
    pool.add(numbered(7, 14))
    place = pool.images.data_ptr()
    for start in range(14, 60, 3):
        pool.add(numbered(start, start + 3))
    assert pool.images.data_ptr() == place
    assert pool.images.untyped_storage().nbytes() == 10 * 4


@pytest.mark.parametrize("batches", [(4,) * 9, (4, 6, 6, 6, 6, 6), (9, 2, 2, 2)])
def test_a_pool_ends_no_larger_than_its_images(batches: tuple[int, ...]) -> None:
    """Doubling would end with up to twice the room. Here the first call is smaller or larger than those that follow."""
    pool = Pool((1, 2, 2), CPU, stream(), adds=len(batches))
    for size in batches:
        pool.add(numbered(len(pool), len(pool) + size))
    assert pool.images[:, 0, 0, 0].tolist() == list(range(sum(batches)))
    assert pool.images.untyped_storage().nbytes() <= 4 * max(sum(batches), batches[0] * len(batches))


def test_a_pool_goes_on_counting_after_a_checkpoint() -> None:
    pool, other = (Pool((1, 2, 2), CPU, stream(), adds=4) for _ in range(2))
    for _ in range(3):
        pool.add(numbered(0, 4))
    other.load_state_dict(pool.state_dict(), pool.images, {})
    other.add(numbered(0, 4))
    assert other.images.untyped_storage().nbytes() == 16 * 4


def test_a_cap_larger_than_the_pool_changes_nothing() -> None:
    capped, other = new_pool(cap=100), new_pool()
    for pool in (capped, other):
        pool.add(numbered(0, 9))
        pool.add(numbered(9, 20))
    assert torch.equal(capped.images, other.images)
    assert one_pass(capped, 6) == one_pass(other, 6)


BUILT_IN = {name: source for name, source in plugins.discover().methods.items() if source.kind == "built-in"}


@pytest.mark.parametrize("method", sorted(BUILT_IN))
def test_every_method_works_with_a_cap(method: str) -> None:
    """The runner's loop with a pool of five images: it holds the newest, with their extras, and students learn."""
    bench = check.Subject(BUILT_IN[method], plugins.discover().method(method)).bench()
    bench.pool = Pool(bench.case.image_shape, CPU, bench.streams["pool"], cap=5)
    played = bench.play()
    made = [synthesis for synthesis in played.syntheses if synthesis.images is not None]
    newest = torch.cat([to_uint8(images) for images in (s.images for s in made) if images is not None] or [EMPTY])[-5:]
    assert len(bench.pool) == len(newest)
    assert not made or torch.equal(bench.pool.images, newest)
    for name, rows in bench.pool.extras.items():
        assert torch.equal(rows, torch.cat([synthesis.extras[name] for synthesis in made])[-5:])
    assert all(torch.isfinite(loss) for loss in played.losses)


EMPTY = torch.empty(0, dtype=torch.uint8)


def test_only_kept_images_are_drawn() -> None:
    pool = new_pool(cap=6)
    pool.add(numbered(0, 9))
    assert in_order(one_pass(pool, 4)) == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("cap", [None, 7])
def test_extras_stay_with_their_images(cap: int | None) -> None:
    pool = new_pool(cap)
    for start in range(0, 20, 4):
        label = torch.arange(start, start + 4)
        pool.add(numbered(start, start + 4), {"label": label, "pair": torch.stack([label, -label], dim=1).float()})
    for _ in range(6):
        images, extras = pool.draw_with_extras(3)
        assert extras["label"].tolist() == numbers(images)
        assert extras["pair"].tolist() == [[n, -n] for n in numbers(images)]


def test_extras_keep_their_type() -> None:
    pool = new_pool()
    pool.add(numbered(0, 2), {"label": torch.tensor([1, 2]), "half": torch.ones(2, 3, dtype=torch.bfloat16)})
    assert {name: rows.dtype for name, rows in pool.extras.items()} == {"label": torch.int64, "half": torch.bfloat16}


def test_extras_must_be_the_same_every_time() -> None:
    pool = new_pool()
    pool.add(numbered(0, 2), {"label": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"extras are \[\], the pool keeps \['label'\]"):
        pool.add(numbered(0, 2))


def test_extras_need_a_row_for_every_image() -> None:
    with pytest.raises(ValueError, match="label"):
        new_pool().add(numbered(0, 3), {"label": torch.zeros(1)})


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 3\), the pool \(1, 2, 2\)"):
        new_pool().add(torch.rand(2, 1, 3, 3))


def test_an_empty_pool_says_so() -> None:
    with pytest.raises(RuntimeError, match="pool is empty"):
        new_pool().draw(2)


@pytest.mark.parametrize("cap", [None, 7])
def test_state_goes_on_in_the_middle_of_a_pass(cap: int | None) -> None:
    pool, generator = new_pool(cap), stream()
    pool._shuffle._generator = generator
    for start in (0, 5):
        pool.add(numbered(start, start + 5), {"label": torch.arange(start, start + 5)})
    pool.draw(3)
    copied = stream()
    copied.set_state(generator.get_state())
    other = Pool((1, 2, 2), CPU, copied, cap)
    other.load_state_dict(pool.state_dict(), pool.images.clone(), {n: rows.clone() for n, rows in pool.extras.items()})
    assert (len(other), other.made) == (len(pool), pool.made)
    for _ in range(5):  # the rest of this pass and some of the next
        images, extras = pool.draw_with_extras(3)
        others, other_extras = other.draw_with_extras(3)
        assert torch.equal(images, others)
        assert torch.equal(extras["label"], other_extras["label"])


def test_adding_goes_on_after_a_resume() -> None:
    pool = new_pool(seed=1)
    saved = new_pool()
    saved.add(numbered(0, 5))
    pool.load_state_dict(saved.state_dict(), saved.images, {})
    pool.add(numbered(5, 9))
    assert pool.images[:, 0, 0, 0].tolist() == list(range(9))
    assert pool.made == 9


def test_rows_that_do_not_match_the_state_are_refused() -> None:
    pool = new_pool()
    pool.add(numbered(0, 5))
    with pytest.raises(ValueError, match="has 4 images, 5 were expected"):
        new_pool().load_state_dict(pool.state_dict(), pool.images[:4], {})


# -- Shuffle --------------------------------------------------------------------------------------------------------


def batches(shuffle: Shuffle, rows: int, size: int) -> Iterator[list[int]]:
    while True:
        yield shuffle.next(rows, size).tolist()


def test_a_single_left_over_row_is_skipped() -> None:
    drawn = batches(Shuffle(stream(), CPU), 9, 4)
    sizes = [len(next(drawn)) for _ in range(6)]
    assert sizes == [4, 4, 4, 4, 4, 4]  # 8 of the 9 rows, then the next pass


def test_the_only_row_is_drawn() -> None:
    drawn = batches(Shuffle(stream(), CPU), 1, 4)
    assert [next(drawn), next(drawn)] == [[0], [0]]


def test_orders_are_uniform() -> None:
    shuffle = Shuffle(stream(), CPU)
    orders = torch.stack([shuffle.next(3, 3) for _ in range(6000)])
    counts = orders.unique(dim=0, return_counts=True)[1]
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 150  # five standard deviations


def test_restart_begins_a_new_pass() -> None:
    shuffle = Shuffle(stream(), CPU)
    shuffle.next(6, 4)
    shuffle.restart()
    drawn = shuffle.next(6, 4).tolist() + shuffle.next(6, 4).tolist()
    assert sorted(drawn) == list(range(6))
