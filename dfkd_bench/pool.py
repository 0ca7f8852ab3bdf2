"""The image pool: one growing uint8 tensor, drawn without replacement, pass after pass.

It lies on the device as long as it takes no more than half of the memory that is free there, and else in host memory,
from where the next batch is fetched while the device works (``ahead``). Where it lies changes no bit of a batch.

It stands for the released codes' folder of PNG files and their loader (zju-vipa/CMI, datafree/utils/_utils.py:
ImagePool, DataIter): images are clamped and truncated to 8 bits, every ``add`` starts a new pass with a new
permutation, and the last batch of a pass is shorter when the pool's size is no multiple of the batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dfkd_bench.ahead import Ahead, spare_memory
from dfkd_bench.augment import to_uint8, to_unit
from dfkd_bench.shuffle import Shuffle


class Pool:
    """Images [n, C, H, W] as uint8 and rows of named extras beside them. With a cap, the newest ``cap`` are kept.

    ``full_batches``: a batch is filled up from the next pass, so that all student batches are of one size.
    ``adds``: how often ``add`` is going to be called, if that is known: no more room is made than that will fill.
    ``spare``: bytes that are free on the device now; None where the device's memory is the host's.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        device: torch.device,
        generator: torch.Generator,
        cap: int | None = None,
        full_batches: bool = False,
        spare: Callable[[torch.device], int | None] = spare_memory,
        adds: int | None = None,
    ) -> None:
        self.cap = cap
        self.made = 0  # images ever added
        self._unfit = torch.zeros(2, dtype=torch.int64, device=device)  # of these: not finite, outside of [0, 1]
        self._adds = adds
        self._added = 0  # calls so far
        self._device = device
        self._spare = spare
        self._host: Ahead | None = None  # fetches batches if the images lie in host memory
        self._shuffle = Shuffle(generator, device, full_batches)
        self._images = torch.empty((0, *image_shape), dtype=torch.uint8, device=device)
        self._extras: dict[str, Tensor] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def images(self) -> Tensor:
        """The stored images, uint8 [n, C, H, W], oldest first, where they lie."""
        return self._images[: self._size]

    def add(self, images: Tensor, extras: Mapping[str, Tensor] | None = None) -> None:
        """Store [0, 1] images and the extras' rows; begins a new pass."""
        extras = extras or {}
        if images.shape[1:] != self._images.shape[1:]:
            raise ValueError(f"images have shape {tuple(images.shape[1:])}, the pool {tuple(self._images.shape[1:])}")
        if self._size and set(extras) != set(self._extras):
            raise ValueError(f"extras are {sorted(extras)}, the pool keeps {sorted(self._extras)}")
        for name, rows in extras.items():
            if rows.shape[0] != images.shape[0]:
                raise ValueError(f"extra '{name}' has {rows.shape[0]} rows for {images.shape[0]} images")
        self._added += 1
        self._unfit += _unfit(images.detach())
        self._append(to_uint8(images.detach()), {name: rows.detach() for name, rows in extras.items()})
        self.made += images.shape[0]
        self._shuffle.restart()

    @property
    def unfit(self) -> tuple[int, int]:
        """Of the images ever added: how many had a pixel that is not finite, and how many one outside of [0, 1] by more
        than a step of 8 bits. The device is waited for."""
        not_finite, outside = self._unfit.tolist()
        return not_finite, outside

    def draw(self, size: int) -> Tensor:
        """The next up to ``size`` images of the pass, float32 [b, C, H, W] in [0, 1]."""
        return to_unit(self._take(self._next(size)))

    def draw_with_extras(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The same with the extras' rows of the same images."""
        rows = self._next(size)
        there = rows
        if rows.device != self._device:  # from memory that isn't pinned the copy would wait for all that is under way
            there = rows.pin_memory().to(self._device, non_blocking=True)
        return to_unit(self._take(rows)), {name: values[there] for name, values in self._extras.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything but the images and extras, which the checkpoint appends to a file of their own."""
        state = {"made": self.made, "added": self._added, "size": self._size, "unfit": list(self.unfit)}
        return {**state, "shuffle": self._shuffle.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], images: Tensor, extras: Mapping[str, Tensor]) -> None:
        """Restore from ``state_dict`` and the stored rows."""
        self._images, self._extras, self._size = self._images[:0], {}, 0
        self._added = state.get("added", 0)  # earlier checkpoints didn't count: more room than needed
        self._append(images, {name: rows.to(self._device) for name, rows in extras.items()})
        if self._size != state["size"]:
            raise ValueError(f"the saved pool has {self._size} images, {state['size']} were expected")
        self.made = state["made"]
        self._unfit = torch.tensor(state.get("unfit", [0, 0]), device=self._device)
        self._shuffle.load_state_dict(state["shuffle"])

    @property
    def extras(self) -> dict[str, Tensor]:
        """The stored extras' rows, oldest first."""
        return {name: values[: self._size] for name, values in self._extras.items()}

    def _next(self, size: int) -> Tensor:
        if self._size == 0:
            raise RuntimeError("the pool is empty: `synthesize` has returned no images yet")
        return self._shuffle.next(self._size, size)

    def _take(self, rows: Tensor) -> Tensor:
        if self._host is None:
            return self._images[rows]
        taken = self._host.take(self._images, rows)
        self._host.expect(self._images, self._shuffle.ahead(self._size, rows.shape[0]))
        return taken

    def _append(self, images: Tensor, extras: Mapping[str, Tensor]) -> None:
        wanted = self._size + images.shape[0]
        if self._host is not None:
            self._host.forget()
        elif not self._fits(wanted):
            self._host = Ahead(self._device)
            self._images = self._images.cpu()
            self._shuffle.move(self._images.device)
        self._images = self._with(self._images, images)
        self._extras = {name: self._with(self._extras.get(name, rows[:0]), rows) for name, rows in extras.items()}
        self._size = self._kept(wanted)

    def _kept(self, wanted: int) -> int:
        """Images in the pool when there were to be ``wanted``."""
        return wanted if self.cap is None else min(wanted, self.cap)

    def _capacity(self, rows: Tensor, wanted: int) -> int:
        """Rows of the next tensor: they double, so that adding is linear in the images added.

        Never beyond the cap, nor what there will be if further calls add as many as this one.
        """
        room = max(wanted, 2 * rows.shape[0])
        if self._adds is not None:
            left = max(0, self._adds - self._added)
            room = min(room, wanted + left * (wanted - self._size))
        return self._kept(room)

    def _fits(self, wanted: int) -> bool:
        """Whether the device can hold ``wanted`` images: the grown tensor takes at most half of what is free now."""
        if self._images.shape[0] >= self._kept(wanted):  # asked first: the driver takes its time to answer
            return True
        spare = self._spare(self._device)
        return spare is None or 2 * self._capacity(self._images, wanted) * math.prod(self._images.shape[1:]) <= spare

    def _with(self, rows: Tensor, new: Tensor) -> Tensor:
        """``rows``, of which those in the pool are used, with ``new`` behind them; what the cap drops has made room."""
        wanted = self._size + new.shape[0]
        kept = self._kept(wanted)
        drop = wanted - kept
        stay = max(0, self._size - drop)
        if rows.shape[0] < kept:
            grown = torch.empty((self._capacity(rows, wanted), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
            grown[:stay] = rows[self._size - stay : self._size]
            rows = grown
        elif drop:
            _move_down(rows[: self._size], drop)
        rows[stay:kept] = new[-(kept - stay) :]
        return rows


def _unfit(images: Tensor) -> Tensor:
    """How many of [n, C, H, W] have a pixel that is not finite, and how many of the others one outside of [0, 1]: [2].

    In 8 bits the first ones become black and the others are clamped, so that nobody would see it.
    """
    low, high = images.flatten(1).aminmax(dim=1)  # NaN wins in both
    finite = torch.isfinite(low) & torch.isfinite(high)
    outside = finite & ((low < -_STEP) | (high > 1 + _STEP))
    return torch.stack([(~finite).sum(), outside.sum()])


_STEP = 1 / 255


def _move_down(rows: Tensor, by: int) -> None:
    """Move each row ``by`` places to the front, in place: in pieces, none of which overlaps the place where it goes."""
    for start in range(0, rows.shape[0] - by, by):
        piece = rows[start + by : start + 2 * by]
        rows[start : start + piece.shape[0]] = piece
