"""Checks of the images that a method synthesizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dfkd_bench.check.bench import WARMUP, Subject
from dfkd_bench.check.broken import Broken
from dfkd_bench.method import Synthesis


def images_shape(subject: Subject) -> None:
    """`synthesize` returns floating-point images [n, C, H, W], or None."""
    bench = subject.bench()
    for epoch in range(WARMUP + 1):  # without the pool, which would refuse a wrong shape first
        made = bench.synthesize(epoch)
        if not isinstance(made, Synthesis):
            raise Broken(f"`synthesize` returned a {type(made).__name__}, expected a dfkd_bench.method.Synthesis")
        images, wanted = made.images, bench.case.image_shape
        if images is None:
            continue
        if images.ndim != 4 or images.shape[0] < 1 or images.shape[1:] != wanted:
            raise Broken(f"images have shape {list(images.shape)}, expected [n, {', '.join(map(str, wanted))}]")
        if not images.is_floating_point():
            raise Broken(f"images are {images.dtype}, expected floats in [0, 1]")


def images_finite(subject: Subject) -> None:
    """No image has NaN or infinite pixels."""
    for images in _images(subject):
        if not torch.isfinite(images).all():
            raise Broken("images have NaN or infinite pixels")


def images_in_range(subject: Subject) -> None:
    """Pixels lie in [0, 1]."""
    for images in _images(subject):
        finite = images[torch.isfinite(images)]
        if finite.numel() and (finite.min() < 0 or finite.max() > 1):
            raise Broken(f"pixels lie in [{finite.min().item():.3g}, {finite.max().item():.3g}], expected [0, 1]")


def images_detached(subject: Subject) -> None:
    """Images and their extras carry no graph."""
    for made in subject.bench().play().syntheses:
        kept = {} if made.images is None else {"images": made.images}
        for name, value in {**kept, **made.extras}.items():
            if value.requires_grad:
                raise Broken(f"`{name}` of the synthesis still has a graph: return them detached")


def extras_have_rows(subject: Subject) -> None:
    """Every extra of a synthesis or of a batch has one row for each image."""
    bench = subject.bench()
    for epoch in range(WARMUP + 1):  # without the pool, which would refuse them first
        made = bench.synthesize(epoch)
        _same_rows("synthesis", made.images, made.extras)
    for batch in subject.bench().play().batches:
        _same_rows("student batch", batch.images, batch.extras)


def _same_rows(where: str, images: Tensor | None, extras: Mapping[str, Tensor]) -> None:
    rows = 0 if images is None else images.shape[0]
    for name, value in extras.items():
        if value.ndim == 0 or value.shape[0] != rows:
            raise Broken(f"extra '{name}' of a {where} has shape {list(value.shape)}, expected {rows} rows")


def scalars_are_tensors(subject: Subject) -> None:
    """`scalars` are 0-d tensors: reading them out would wait for the device."""
    for made in subject.bench().play().syntheses:
        for name, value in made.scalars.items():
            if not isinstance(value, Tensor) or value.ndim:
                raise Broken(f"scalar '{name}' is no 0-d tensor")


def _images(subject: Subject) -> Iterator[Tensor]:
    for made in subject.bench().play().syntheses:
        if made.images is not None:
            yield made.images


CHECKS = (
    images_shape,
    images_finite,
    images_in_range,
    images_detached,
    extras_have_rows,
    scalars_are_tensors,
)
