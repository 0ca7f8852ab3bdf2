"""Any method's own steps as ordinary PyTorch code has them, and in the released codes' manner, as forms.

The yardsticks of the methods that were not written anew for it, as the lead method was (``plain``): the method's own
file, run by the runner, in fp32 and without what makes the project's code fast.

- *plain*: activations and weights in rows (NCHW), BatchNorm statistics as torch has them, torch's default optimisers,
  memory given back to the system as the C library does. What a method's file does by itself stays: layers of one kind
  in one product, augmentation as one gather, a pool of 8-bit images on the device. So it is rather too fast.
- *released manner*: the same, with the images of a pool through PNG files and a loader with four workers, and on a GPU
  the host waits after each step of an optimiser, as for the losses that released code reads. The crops stay on the
  device, where they cost less than in the loader. A method without a pool has no files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchvision import transforms

from dfkd_bench import plugins, statistics
from dfkd_bench.method import PoolView
from dfkd_bench.speed.bench import Bench, Question
from dfkd_bench.speed.forms import GENERATOR, LOADED, Facts, Own, Seconds
from dfkd_bench.speed.released_manner import loader, settle, write
from dfkd_bench.speed.timing import middle, repeated, seconds_of, synchronize


class OrdinaryForm(Own):
    """Plain PyTorch. The batch of a student step comes from the pool in memory."""

    def __init__(self, asked: Question, device: torch.device, threads: int, found: plugins.Plugins) -> None:
        torch.set_num_threads(threads)
        with ordinary():
            super().__init__(Bench(asked, device, "fp32", threads, found))

    def repeat(self) -> Seconds:
        with ordinary():
            return super().repeat()

    def facts(self) -> Facts:
        """The work is that of all forms: no fast path hides an operator from the counter here."""
        peak = self.peak()
        with ordinary():
            return Facts(peak, self.works())


class OrdinaryReleasedForm(OrdinaryForm):
    """Through PNG files and a loader, with a host that waits."""

    png_seconds: float | None = None

    def __init__(self, asked: Question, device: torch.device, threads: int, found: plugins.Plugins) -> None:
        super().__init__(asked, device, threads, found)
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._share = 0.0
        images = self.bench.pooled
        if images is None:
            return
        self._files = tempfile.TemporaryDirectory()
        folder = Path(self._files.name)
        self.png_seconds = middle(repeated(lambda: write(images, folder), device, asked.repeat))
        self.bench.pool = self._pool = FilesBefore(self.bench.pool, folder, asked.batch, device)
        own_steps = getattr(type(self.bench.config)(), type(self.bench.method).absorbs, 1)
        self._share = self.png_seconds / own_steps

    def repeat(self) -> Seconds:
        """Writing a batch is shared by its generator steps. A batch that doesn't count sets the loader going."""
        bench, steps, found = self.bench, self.bench.asked.steps, {}
        with ordinary(), waiting(self.device):
            if bench.generated:
                seconds = seconds_of(bench.synthesis, self.device)
                found[GENERATOR] = seconds / bench.generator_steps + self._share
            bench.sampling()
            found[LOADED] = seconds_of(bench.distillation, self.device) / steps
        if self._files is not None:
            settle()
        return found

    def facts(self) -> Facts:
        """Ends the loader's processes, too."""
        peak = self.peak()
        if self._files is not None:
            self._pool.close()
            self._files.cleanup()
        return Facts(peak, {}, self.png_seconds)


class FilesBefore:
    """A pool whose images come from the files of ``folder``, whatever is added; extras are the pool's own.

    Rows of extras are those of other images than the files': for times alone.
    """

    def __init__(self, pool: Any, folder: Path, batch: int, device: torch.device) -> None:
        self._pool, self._folder, self._batch, self._device = pool, folder, batch, device
        self._batches: Iterator[Tensor] | None = None

    def __len__(self) -> int:
        return len(self._pool)

    def add(self, images: Tensor, extras: Any) -> None:
        """Into the pool in memory; the files have been written and their time is known."""
        self._pool.add(images, extras)

    def draw(self, size: int) -> Tensor:
        """``size`` images of files, float [b, C, H, W] in [0, 1]."""
        if self._batches is None:
            self._batches = loader(self._folder, transforms.ToTensor(), self._batch)
        drawn: list[Tensor] = []
        while sum(map(len, drawn)) < size:
            drawn.append(next(self._batches).to(self._device))
        return torch.cat(drawn)[:size]

    def draw_with_extras(self, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The same, with as many rows of extras."""
        view: PoolView = self._pool
        return self.draw(size), view.draw_with_extras(size)[1]

    def close(self) -> None:
        """End the loader's processes, if there are any: they go with its iterator."""
        self._batches = None


@contextmanager
def ordinary() -> Iterator[None]:
    """What is built and run inside is ordinary PyTorch code. For one form's turn: it concerns the whole process."""
    with ExitStack() as stack:
        for owner, name, value in (
            (Tensor, "contiguous", _in_rows(Tensor.contiguous)),
            (Tensor, "to", _in_rows(Tensor.to)),
            (statistics, "batch_moments", moments),
            (torch.optim.Adam, "__init__", _not_fused(torch.optim.Adam.__init__)),
            (torch.optim.SGD, "__init__", _not_fused(torch.optim.SGD.__init__)),
        ):
            stack.enter_context(_replaced(owner, name, value))
        yield


@contextmanager
def waiting(device: torch.device) -> Iterator[None]:
    """The host waits for ``device`` after each step of an optimiser."""
    handle = register_optimizer_step_post_hook(lambda *_: synchronize(device))
    try:
        yield
    finally:
        handle.remove()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [c] of ``x`` [n, c, h, w], as released code asks for them."""
    rows = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1)
    return x.mean([0, 2, 3]), rows.var(1, unbiased=False)


def _in_rows(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def called(*arguments: Any, **options: Any) -> Tensor:
        if options.get("memory_format") is torch.channels_last:
            options["memory_format"] = torch.contiguous_format
        return method(*arguments, **options)

    return called


def _not_fused(initialise: Callable[..., None]) -> Callable[..., None]:
    def called(*arguments: Any, **options: Any) -> None:
        initialise(*arguments, **{**options, "fused": None})

    return called


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    own = name in vars(owner)  # else it is its base's, and goes back there
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
