"""The store of images, and how batches are put together; the autoencoder's replay is tested in test_pre_dfkd.py."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from dfkd_bench.generators import MemoryGenerator
from dfkd_bench.method import Task
from dfkd_bench.replay import BatchStore, Opponent, build, joined


def full_of(value: float) -> Tensor:
    return torch.full((2, 1, 2, 2), float(value))


def filled(capacity: int, every: int, epochs: int) -> list[float]:
    """What a store holds after some epochs of two batches each; of epoch n the last one is full of n."""
    store = BatchStore(capacity, every)
    for epoch in range(epochs):
        store.begin(epoch)
        store.note(full_of(-1.0))
        store.note(full_of(float(epoch)))
    return [images[0, 0, 0, 0].item() for images in store.batches]


def test_the_store_never_holds_more_than_its_capacity() -> None:
    assert filled(capacity=3, every=1, epochs=8) == [4, 5, 6]


def test_the_last_batch_of_every_so_many_epochs_is_stored() -> None:
    assert filled(capacity=10, every=5, epochs=12) == [0, 5, 10]


def test_stored_images_are_copies() -> None:
    store, images = BatchStore(2, 1), full_of(0)
    store.note(images)
    images += 1
    store.begin(1)
    assert not store.batches[0].any()


def test_every_stored_batch_is_drawn_some_time() -> None:
    store, rng = BatchStore(4, 1), torch.Generator().manual_seed(0)
    assert store.draw(rng) is None
    for epoch in range(5):
        store.begin(epoch)
        store.note(full_of(epoch))
    drawn = [store.draw(rng) for _ in range(40)]
    assert {images.unique().item() for images in drawn if images is not None} == {0, 1, 2, 3}


def test_the_store_survives_a_resume() -> None:
    store, fresh = BatchStore(2, 1), BatchStore(2, 1)
    store.note(full_of(1))
    store.begin(1)
    store.note(full_of(0))
    fresh.load_state_dict(store.state_dict())
    fresh.begin(2)
    assert [images.mean().item() for images in fresh.batches] == [1, 0]


def test_a_batch_names_its_new_and_its_old_rows() -> None:
    batch = joined(full_of(0), torch.cat([full_of(1), full_of(2)]))
    assert batch.parts == {"new": slice(0, 2), "replay": slice(2, 6)}
    assert batch.images[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_without_old_images_the_part_is_empty() -> None:
    batch = joined(full_of(0), None)
    assert batch.parts == {"new": slice(0, 2), "replay": slice(2, 2)}


def test_built_networks_have_uniform_weights(task: Task) -> None:
    config = SimpleNamespace(latent_dim=8, generator_width=16)
    for network in build(config, task, Opponent, MemoryGenerator):
        weights = [p for name, p in network.named_parameters() if p.ndim > 1]
        assert all(0.07 < p.abs().max().item() <= 0.08 for p in weights)
