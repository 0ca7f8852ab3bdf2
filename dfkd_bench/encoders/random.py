"""``random[:WIDTH]``: N(0, 1) of a fixed seed, [K, 512] unless a width is given; the same for every run and machine."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dfkd_bench.encoders import RowEncoder, Rows
from dfkd_bench.encoders._width import parse_width

WIDTH = 512  # of CLIP ViT-B/32's text features, so that random embeddings compare with NAYER's
SEED = 0


class Random(RowEncoder):
    """The width of the table is part of the draw: ``random:7`` is not the beginning of ``random:512``."""

    expected: ClassVar[str] = "'random:WIDTH'"
    model = "N(0, 1)"
    revision = f"seed {SEED}"

    def __init__(self, name: str, argument: str = "") -> None:
        super().__init__(name, argument)
        self.width = parse_width(self.spec, argument) if argument else WIDTH

    def rows(self, classes: int) -> Rows:
        # Box-Muller on raw bits: numpy promises its bit generators' streams for ever, but not those of its samplers
        bits = np.random.PCG64(SEED).random_raw(2 * classes * self.width).reshape(classes, self.width, 2)
        uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        matrix = np.sqrt(-2.0 * np.log(uniform[..., 0])) * np.cos(2.0 * np.pi * uniform[..., 1])
        return matrix.astype(np.float32)
