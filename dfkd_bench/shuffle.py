"""Drawing rows without replacement, pass after pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Shuffle:
    """Row numbers in random order; each pass covers every row once. The last batch of a pass may be shorter; if
    batches are to be ``full``, it is filled up from the next pass.

    Source: the released codes' DataIter over a shuffled loader without drop_last (zju-vipa/CMI,
    datafree/utils/_utils.py).
    """

    def __init__(self, generator: torch.Generator, device: torch.device, full: bool = False) -> None:
        self._generator = generator
        self._device = device  # of the stream
        self._rows_device = device
        self._full = full
        self._order: Tensor | None = None
        self._position = 0

    def restart(self) -> None:
        """The next draw begins a new pass."""
        self._order = None

    def move(self, device: torch.device) -> None:
        """Row numbers come on ``device`` from now on; they stay the same, since the stream stays where it is."""
        self._rows_device = device
        if self._order is not None:
            self._order = self._order.to(device)

    def ahead(self, rows: int, size: int) -> Tensor | None:
        """What the next call of ``next`` will give, if it lies within this pass. Nothing is drawn."""
        if self._order is None or self._order.shape[0] != rows or rows - self._position < size:
            return None
        return self._order[self._position : self._position + size]

    def next(self, rows: int, size: int) -> Tensor:
        """Up to ``size`` (``full``: exactly ``size``) of ``rows`` row numbers, int64.

        A single left-over row is skipped: BatchNorm has no variance over one row of a 1x1 feature map.
        """
        if self._full:
            parts, missing = [], size
            while missing > 0:
                parts.append(self._up_to(rows, missing, at_least=1))
                missing -= parts[-1].shape[0]
            return torch.cat(parts)
        return self._up_to(rows, size, at_least=2)

    def _up_to(self, rows: int, size: int, at_least: int) -> Tensor:
        if self._order is None or rows - self._position < min(at_least, rows):
            order = torch.randperm(rows, device=self._device, generator=self._generator)
            self._order = order.to(self._rows_device)
            self._position = 0
        drawn = self._order[self._position : self._position + size]
        self._position += drawn.shape[0]
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """Order and position of the current pass; the generator's state is its owner's business."""
        return {"order": self._order, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        order = state["order"]
        self._order = None if order is None else order.to(self._rows_device)
        self._position = state["position"]
