"""How parts are cut into splits: stratified by class, by fixed seeds."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from dfkd_bench.data._arrays import Part, Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dfkd_bench.data._arrays import Labels
    from dfkd_bench.data._dataset import DataSet

VALIDATION_SEED = 1
TEST_SEED = 2  # for data sets that come in one part


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


def parts_of(data: DataSet, split: Split) -> tuple[Part, ...]:
    """The parts that have to be read for a split."""
    if data.one_file and not data.test_only:
        return get_args(Part)
    return ("test",) if split == "test" else ("train",)
