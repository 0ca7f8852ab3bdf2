"""How diverse images are, in pixels and in the teacher's eyes. Pure functions of a sample; nothing here is timed.

A method's sample is compared with real held-out images, seen through the same teacher. These are for measuring only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_bench.augment import Normalize, to_unit

SAMPLE = 2000
"""Images that are looked at, at most; of the real ones, too."""

NEIGHBOURS = 5
"""k of density and coverage, as in the paper."""

NEAR = 0.02
"""Images are near-duplicates up to this root mean square difference of their pixels (range [0, 1]): 5 of 255 steps."""

KEPT_CLASSES, KEPT_PER_CLASS = 100, 10
"""What a run keeps for the gallery."""

_SIDE = 32  # near-duplicates are looked for at this side at most: pairs of large images would take minutes on a CPU


@dataclass(frozen=True)
class Seen:
    """Images, uint8 [n, C, H, W], the teacher's penultimate features of them, float64 [n, F], and its logits [n, K]."""

    images: Tensor
    features: Tensor
    logits: Tensor


@torch.no_grad()
def look(teacher: Any, batches: Iterable[Tensor], normalize: Normalize, limit: int = SAMPLE) -> Seen:
    """What ``teacher`` sees in the first ``limit`` of normalised images [b, C, H, W], batch by batch.

    It sees what a student would, in fp32; only what is kept of the images is clamped and rounded to 8 bits. Looking
    ends early if a batch comes a second time in a row: then the method has no others.
    """
    images, features, logits = list[Tensor](), list[Tensor](), list[Tensor]()
    missing, before = limit, None
    for batch in batches:
        new = batch[:missing].float()
        if before is not None and torch.equal(before[: new.shape[0]], new):
            break
        answers, penultimate, _ = teacher.features(new)
        images.append(normalize.inverse(new).clamp(0, 1).mul(255).round().to(torch.uint8))
        features.append(penultimate.double())
        logits.append(answers.float())
        missing, before = missing - new.shape[0], new
        if missing <= 0:
            break
    return Seen(torch.cat(images), torch.cat(features), torch.cat(logits))


def distinct(seen: Seen) -> Seen:
    """Every image once: the first of equal ones."""
    first: dict[bytes, int] = {}
    for row, key in enumerate(_keys(seen.images)):
        first.setdefault(key, row)
    rows = torch.tensor(list(first.values()), device=seen.images.device)
    return Seen(seen.images[rows], seen.features[rows], seen.logits[rows])


def measure(made: Seen, real: Seen) -> dict[str, float | None]:
    """All measures of the images ``made`` against ``real`` ones; None where one is not defined.

    Returns:
        ``images``, ``real_images``: how many were looked at.
        ``within``, ``between``: mean pairwise distance of features within and between predicted classes, divided by
        the same of the real images: 1 is as diverse as these. ``within_raw``, ``between_raw``: not divided.
        ``density``, ``coverage``: see ``density_and_coverage``.
        ``class_balance``: entropy of the mean answer in [0, 1], 1 is uniform; ``unanswered``: classes never named.
        ``duplicates``, ``near_duplicates``: shares in [0, 1].
    """
    within, between = pairwise_distances(made.features, made.logits.argmax(dim=1))
    real_within, real_between = pairwise_distances(real.features, real.logits.argmax(dim=1))
    density, coverage = density_and_coverage(made.features, real.features)
    exact, near = duplicates(made.images)
    found: dict[str, float | None] = {
        "images": made.images.shape[0],
        "real_images": real.images.shape[0],
        "within": _ratio(within, real_within),
        "between": _ratio(between, real_between),
        "within_raw": within,
        "between_raw": between,
        "density": density,
        "coverage": coverage,
        "class_balance": class_balance(made.logits),
        "unanswered": unanswered(made.logits),
        "duplicates": exact,
        "near_duplicates": near,
    }
    return {
        name: None if value is None or not math.isfinite(value) else round(value, 6) for name, value in found.items()
    }


def pairwise_distances(features: Tensor, classes: Tensor) -> tuple[float | None, float | None]:
    """Mean Euclidean distance of ``features`` [n, F] within and between ``classes`` [n].

    Pairs of images are averaged in each class, then the classes with at least two images; likewise for each pair of
    classes, so that a class that comes often does not count more than others. None: there is no such pair.
    """
    _, index, sizes = classes.unique(return_inverse=True, return_counts=True)
    members = F.one_hot(index).to(features.dtype)  # [n, classes that occur]
    sums = members.T @ torch.cdist(features, features) @ members
    count = sizes.to(features.dtype)
    own = count > 1
    within = (sums.diagonal()[own] / (count * (count - 1))[own]).mean().item() if own.any() else None
    apart = ~torch.eye(len(sizes), dtype=torch.bool, device=features.device)
    between = (sums / (count.unsqueeze(1) * count))[apart].mean().item() if len(sizes) > 1 else None
    return within, between


def density_and_coverage(made: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float | None, float | None]:
    """Density (0 or more; 1 is expected of real images) and coverage (in [0, 1]) of features [m, F] and [n, F].

    A real image has a ball that reaches to its k-th nearest real neighbour. Density: balls that a made image lies in,
    on average, divided by k. Coverage: share of the balls that hold a made image. None with k real images or fewer.
    Source: Naeem et al., ICML 2020, "Reliable Fidelity and Diversity Metrics for Generative Models", eq. 4 and 5.
    """
    if real.shape[0] <= neighbours:
        return None, None
    apart = torch.cdist(real, real).fill_diagonal_(math.inf)
    radius = apart.topk(neighbours, dim=1, largest=False).values[:, -1]
    inside = torch.cdist(real, made) < radius.unsqueeze(1)
    density = inside.sum().item() / (neighbours * made.shape[0])
    return density, inside.any(dim=1).double().mean().item()


def class_balance(logits: Tensor) -> float:
    """Entropy of the mean probabilities of ``logits`` [n, K], divided by log K: 1 is uniform, 0 one class alone."""
    mean = logits.double().softmax(dim=1).mean(dim=0)
    return float(torch.special.entr(mean).sum().item() / math.log(logits.shape[1]))


def unanswered(logits: Tensor) -> int:
    """How many of the K classes are the likeliest of no row of ``logits`` [n, K]."""
    return logits.shape[1] - int(logits.argmax(dim=1).unique().numel())


def duplicates(images: Tensor, threshold: float = NEAR) -> tuple[float, float]:
    """Shares of uint8 ``images`` [n, C, H, W] that equal another one, and that have one within ``threshold``.

    The threshold is a root mean square difference of pixels in [0, 1]. Images wider than 32 pixels are averaged down
    to that for the second share. Equal images are near, too.
    """
    counts = Counter(_keys(images))
    exact = sum(count for count in counts.values() if count > 1) / images.shape[0]
    if images.shape[0] < 2:
        return exact, exact
    height, width = images.shape[2:]
    small = F.adaptive_avg_pool2d(to_unit(images), (min(height, _SIDE), min(width, _SIDE))).flatten(1)
    small = small - small.mean(dim=0)  # keeps the digits of the products
    squares = (small * small).sum(dim=1)
    apart = squares.unsqueeze(1) + squares - 2 * small @ small.T
    nearest = apart.fill_diagonal_(math.inf).amin(dim=1).clamp(min=0).div(small.shape[1]).sqrt()
    return exact, max(exact, (nearest <= threshold).double().mean().item())


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Up to ``wanted`` of the numbers 0 ... ``count`` - 1, first and last among them.

    >>> evenly_spaced(100, 4)
    [0, 33, 66, 99]
    """
    if wanted >= count:
        return list(range(count))
    return [round(index * (count - 1) / (wanted - 1)) for index in range(wanted)]


def keepsakes(seen: Seen) -> dict[str, Tensor]:
    """What a run keeps for the gallery: the first 10 images of each predicted class (of at most 100 classes).

    Returns:
        ``images`` uint8 [m, C, H, W], ``classes`` int64 [m] in ascending order, ``confidence`` float32 [m], on the CPU.
    """
    confidence, answers = seen.logits.softmax(dim=1).max(dim=1)
    rows = [
        (answers == number).nonzero().flatten()[:KEPT_PER_CLASS]
        for number in evenly_spaced(seen.logits.shape[1], KEPT_CLASSES)
    ]
    kept = torch.cat(rows)
    found = {"images": seen.images, "classes": answers, "confidence": confidence}
    return {name: values[kept].cpu().contiguous() for name, values in found.items()}


class OnePass:
    """A pool's images in an order of its own (``method.PoolView``): measuring does not move the pool's stream."""

    def __init__(
        self, images: Tensor, extras: dict[str, Tensor], generator: torch.Generator, device: torch.device
    ) -> None:
        """``images``: uint8 [n, C, H, W], on ``device`` or in host memory; ``generator``: on the CPU."""
        self._images, self._extras, self._device = images, extras, device
        self._order = torch.randperm(images.shape[0], generator=generator).to(images.device)
        self._position = 0

    def __len__(self) -> int:
        return self._images.shape[0]

    def draw(self, size: int) -> Tensor:
        """The next up to ``size`` images, float [b, C, H, W] in [0, 1]; after the last one the first again."""
        return self.draw_with_extras(size)[0]

    def draw_with_extras(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, with the extras' rows of the same images."""
        if self._position >= len(self):
            self._position = 0
        rows = self._order[self._position : self._position + size]
        self._position += size
        images, there = self._images[rows].to(self._device), rows.to(self._device)
        return to_unit(images), {name: values[there] for name, values in self._extras.items()}


def _keys(images: Tensor) -> list[bytes]:
    return [image.tobytes() for image in images.cpu().numpy()]


def _ratio(value: float | None, reference: float | None) -> float | None:
    return value / reference if value is not None and reference else None
