"""The same two steps in the manner of released code: images go through PNG files, the host looks at every step.

Facts, no code: synthesised images are clamped, truncated to 8 bits and written as one PNG file each; a loader with four
worker processes reads random files of the folder with PIL and applies the data set's training transform (random crop,
flip, to tensor, normalise); the best images so far are copied out whenever the loss, read by the host, is lower; the
student's loss is read by the host in each step. Everything else is ``plain``.
Source: zju-vipa/CMI, datafree/utils/_utils.py (ImagePool, DataIter); tmtuan1307/NAYER, datafree/synthesis/nayer.py,
datafree_kd.py.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from dfkd_bench.method import Task
from dfkd_bench.speed.plain import Best, Plain

WORKERS = 4
SETTLING = 0.5
"""Seconds in which a loader's processes fill their queues again and come to rest, to disturb no other form."""

ENDLESS = 2**40  # images a pass: a released pool is so large that new passes hardly count


class ReleasedManner:
    """Both steps; the pool is ``folder``. ``close`` ends the loader's processes."""

    def __init__(self, plain: Plain, folder: Path, batch: int) -> None:
        self.plain, self.folder, self.batch = plain, folder, batch
        self._batches: Iterator[Tensor] | None = None

    def close(self) -> None:
        """End the loader's processes, if there are any: they go with its iterator."""
        self._batches = None

    def synthesize(self) -> Tensor:
        """One batch: [B, C, H, W] on the host. Its PNG files are not written yet."""
        images, _ = self.plain.synthesize(keep_on_host)
        return images

    def student_step(self) -> float:
        """One step on the loader's next batch; the loss, on the host."""
        if self._batches is None:
            self._batches = loader(self.folder, training_transform(self.plain.task), self.batch)
        images = next(self._batches).to(self.plain.task.device)
        return float(self.plain.student_step(images).item())


def keep_on_host(images: Tensor, loss: Tensor, best: Best | None) -> Best:
    """The better of both: the host reads the loss and gets a copy of better images."""
    value = loss.item()
    return best if best is not None and value >= best[1] else (images.cpu().clone(), value)


def write(images: Tensor, folder: Path) -> None:
    """[B, C, H, W] in [0, 1] as one PNG file each, truncated to 8 bits."""
    pixels = images.clamp(0, 1).mul(255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    for index, image in enumerate(pixels):
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(folder / f"{index}.png")


def training_transform(task: Task) -> Callable[[Image.Image], Tensor]:
    """The data set's: crop, flip, to tensor, normalise."""
    flip = [transforms.RandomHorizontalFlip()] if task.flip_keeps_class else []
    made: Callable[[Image.Image], Tensor] = transforms.Compose(
        [
            transforms.RandomCrop(task.image_shape[1:], padding=task.crop_padding),
            *flip,
            transforms.ToTensor(),
            transforms.Normalize(task.normalize.mean.flatten().tolist(), task.normalize.std.flatten().tolist()),
        ]
    )
    return made


def loader(folder: Path, transform: Callable[[Image.Image], Tensor], batch: int) -> Iterator[Tensor]:
    """Batches [b, C, H, W] of random files of ``folder``, for ever."""
    images = Files(folder, transform)
    with warnings.catch_warnings():  # four workers on two cores is what released code does, wise or not
        warnings.simplefilter("ignore")
        sampler = RandomSampler(images, replacement=True, num_samples=ENDLESS)
        return iter(DataLoader(images, batch, sampler=sampler, num_workers=WORKERS))


def settle() -> None:
    """Until the loader's processes are at rest."""
    time.sleep(SETTLING)


class Files(Dataset[Tensor]):
    """The PNG files of a folder, grey or of three colours, read one by one."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Tensor]) -> None:
        self.files, self.transform = sorted(folder.glob("*.png")), transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("L" if image.mode == "L" else "RGB"))
