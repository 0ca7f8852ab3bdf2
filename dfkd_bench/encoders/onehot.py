"""``onehot``: the identity [K, K]. ``onehot:WIDTH``: the same with zeros behind it, [K, WIDTH].

So one-hot rows can be as wide as a text model's, and a generator that reads them has as many weights.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from dfkd_bench.encoders import RowEncoder, Rows
from dfkd_bench.encoders._width import parse_width
from dfkd_bench.errors import UserError


class OneHot(RowEncoder):
    """Row k has a one in column k."""

    expected: ClassVar[str] = "'onehot' or 'onehot:WIDTH'"
    revision = ""

    def __init__(self, name: str, argument: str = "") -> None:
        super().__init__(name, argument)
        self.width = parse_width(self.spec, argument) if argument else None

    @property
    def model(self) -> str:
        """``identity``; padded ones say how wide they are."""
        return "identity" if self.width is None else f"identity, padded to {self.width}"

    def rows(self, classes: int) -> Rows:
        """``UserError``: more classes than columns."""
        width = self.width or classes
        if width < classes:
            raise UserError(
                f"text encoder '{self.spec}' is too narrow for {classes} classes: expected a width of {classes} or "
                f"more, or 'onehot', which is always as wide as there are classes"
            )
        return np.eye(classes, width, dtype=np.float32)
