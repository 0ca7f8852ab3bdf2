"""Mean over seeds and the Student-t 95 % interval of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

LEVEL = 0.95
"""Coverage of every interval that a table prints."""


@dataclass(frozen=True)
class Interval:
    """``mean`` of ``n`` values; the interval is mean +- ``half_width``, None where one value has no spread."""

    mean: float
    half_width: float | None
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Two-sided Student-t interval of the mean: t(0.975, n - 1) * s / sqrt(n), s with n - 1 in the denominator.

    Args:
        values: finite, one a seed, at least one.

    Raises:
        ValueError: without values there is no mean.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    n = len(values)
    if n == 1:
        return Interval(fmean(values), None, 1)
    # The quantile function behind scipy.stats.t.ppf; scipy.stats takes three times as long to import.
    from scipy.special import stdtrit

    return Interval(fmean(values), float(stdtrit(n - 1, (1 + LEVEL) / 2)) * stdev(values) / sqrt(n), n)


def paired_difference(a: Mapping[int, float], b: Mapping[int, float]) -> Interval:
    """The interval of a - b over the seeds that both have: what runs of one seed share cancels out.

    Args:
        a: seed -> value, in the unit of the result.
        b: likewise.

    Raises:
        ValueError: no seed is in both.
    """
    common = sorted(a.keys() & b.keys())
    if not common:
        raise ValueError("a paired difference needs a seed that both have")
    return interval([a[seed] - b[seed] for seed in common])
