"""What is read and what is lent: a part as a reader found it, a split as memory-mapped arrays."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Images = NDArray[np.uint8]  # [n, C, H, W]
    Labels = NDArray[np.int64]  # [n]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

Part = Literal["train", "test"]
"""What is published. The splits ``train`` and ``validation`` come from the part ``train``."""

BLOCK = 256  # images that are decoded and written at a time
PRIVATE_BYTES = 2**30  # of an array that may be written to without harm


@dataclass(frozen=True, eq=False)
class Arrays:
    """One split, memory-mapped and read-only; ``as_tensor`` gives it to torch."""

    images: Images  # uint8 [n, C, H, W]
    labels: Labels  # int64 [n], in the order of the source (often sorted by class)


def as_tensor(array: NDArray) -> Tensor:
    """The array as a tensor that shares its memory: a memory-mapped one stays on disk until its rows are read.

    It is not to be written to. Who does so nevertheless changes a copy of their own, up to ``PRIVATE_BYTES``; beyond
    that the process is killed, for a system refuses private copies of more than it has memory for.
    """
    import numpy as np
    import torch

    base: object = array.base  # of a part of an array it is the whole one
    whole = isinstance(base, mmap.mmap) and array.nbytes <= PRIVATE_BYTES
    if whole and isinstance(array, np.memmap) and array.filename is not None:
        array = np.memmap(array.filename, array.dtype, "c", array.offset, array.shape)
    with warnings.catch_warnings():  # torch warns of arrays that can't be written
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


@dataclass(frozen=True, eq=False)
class RawData:
    """A part as a reader found it: all labels, and images that are decoded when they are written."""

    labels: Labels  # int64 [n]
    blocks: Callable[[NDArray[np.int64]], Iterator[Images]]  # row numbers -> uint8 [b, C, H, W], block after block

    @classmethod
    def of_arrays(cls, images: Images, labels: Labels) -> RawData:
        """From arrays: uint8 [n, C, H, W] and int64 [n]."""

        def blocks(rows: NDArray[np.int64]) -> Iterator[Images]:
            for start in range(0, len(rows), BLOCK):
                yield images[rows[start : start + BLOCK]]

        return cls(labels, blocks)

    @classmethod
    def of_files(cls, files: Sequence[Path], labels: Labels, decode: Callable[[Path], Images]) -> RawData:
        """From image files, decoded by several threads; ``decode`` returns uint8 [C, H, W]."""

        def blocks(rows: NDArray[np.int64]) -> Iterator[Images]:
            from concurrent.futures import ThreadPoolExecutor

            import numpy as np

            with ThreadPoolExecutor() as threads:
                for start in range(0, len(rows), BLOCK):
                    yield np.stack(list(threads.map(decode, [files[row] for row in rows[start : start + BLOCK]])))

        return cls(labels, blocks)
