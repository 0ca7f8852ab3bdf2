"""What the runner lends to methods that ask for it in ``needs``: training images, an unlabelled pool, first images."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_bench import data, teachers
from dfkd_bench.data import DataSet
from dfkd_bench.errors import UserError
from dfkd_bench.job import TeacherSpec
from dfkd_bench.method import LabelledImages
from dfkd_bench.paths import expanded

if TYPE_CHECKING:
    from numpy.typing import NDArray


def training_data(
    dataset: DataSet, spec: TeacherSpec, evaluate_on: data.Split, root: Path | None, device: torch.device
) -> LabelledImages:
    """What the teacher was trained on, without what the run is evaluated on; for controls only."""
    return teachers.labelled(dataset, teachers.control_splits(spec, evaluate_on), root, device)


def pool(
    name: str, dataset: DataSet, root: Path | None, device: torch.device, extra: Mapping[str, DataSet] | None = None
) -> Tensor:
    """Unlabelled images of another data set (its training split) or of a folder, in the shape of ``dataset``.

    ``name``: a data set's name, or ``folder:PATH`` with any images below it. uint8 [n, C, H, W] on ``device``; the
    teacher's own data set is refused, and so is whatever shares images with it.
    """
    other = known_pool(name, dataset, root, extra)
    if isinstance(other, Path):
        return folder_images(other, dataset.image_shape, resize=True).to(device)
    images = other.split("train", root).images
    blocks = (torch.from_numpy(images[start : start + 1024].copy()) for start in range(0, len(images), 1024))
    return torch.cat([fit(block, dataset.image_shape) for block in blocks]).to(device)  # large images stay on disk


def known_pool(
    name: str, dataset: DataSet, root: Path | None, extra: Mapping[str, DataSet] | None = None
) -> DataSet | Path:
    """The data set or folder that a pool's name means, before anything is read; a ``UserError`` if there is none."""
    folder = folder_of(name)
    if folder is not None:
        folder_facts(folder)
        _refuse_own_images(f"pool '{name}'", folder, dataset, root, extra)
        return folder
    other = data.dataset(name, root, extra)
    if other.name == dataset.name:
        raise UserError(f"pool '{name}' is the teacher's own data set: name another one, or folder:PATH")
    if other.name in [relative.name for relative in data.same_images(dataset, extra)]:
        raise UserError(
            f"pool '{name}' has images of {dataset.name}, the teacher's own data set: name another one, or folder:PATH"
        )
    return other


def initial_images(
    name: str, dataset: DataSet, root: Path | None, extra: Mapping[str, DataSet] | None = None
) -> Tensor:
    """The images of a folder that were made for the teacher beforehand, uint8 [n, C, H, W].

    Its own images are refused, as they are for pools: they would be training data under another name.
    """
    folder = expanded(name)
    folder_facts(folder)
    _refuse_own_images(f"initial_images '{name}'", folder, dataset, root, extra)
    return folder_images(folder, dataset.image_shape)


def _refuse_own_images(
    what: str, folder: Path, dataset: DataSet, root: Path | None, extra: Mapping[str, DataSet] | None
) -> None:
    """``UserError``: the folder lies in one that holds the teacher's own images, or around it."""
    folder = folder.resolve()
    for known in data.same_images(dataset, extra):
        for own in known.own_folders(root):
            inner, outer = sorted((folder, own.resolve()), key=lambda path: -len(path.parts))
            if inner.is_relative_to(outer):
                raise UserError(
                    f"{what} has images of {dataset.name}, the teacher's own data set: {own} belongs to "
                    f"{known.name}; name a folder of other images"
                )


def folder_of(pool: str) -> Path | None:
    """The folder that a pool's name means; None: it names a data set."""
    prefix = data.FOLDER_PREFIX
    return expanded(pool.removeprefix(prefix)) if pool.startswith(prefix) else None


def folder_facts(folder: Path) -> data.FolderFacts:
    """Number and digest of the images below ``folder``; none are a ``UserError``."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    try:
        facts = data.folder_facts(folder)
    except OSError as error:
        raise UserError(f"{error.filename} can't be read ({error.strerror}): replace or remove it") from None
    if facts is None:
        raise UserError(f"there are no images ({', '.join(sorted(data.IMAGE_SUFFIXES))}) below {folder}")
    return facts


class _Prepared(DataSet):
    """A folder's images, prepared as a data set's are, without labels; the files are named as what they are."""

    def prepared_files(self, split: data.Split) -> tuple[Path, ...]:
        return tuple(self.folder / name for name in ("images.npy", "labels.npy", "index.json"))


def folder_images(folder: Path, shape: tuple[int, int, int], resize: bool = False) -> Tensor:
    """All images below ``folder`` in the order of their paths, uint8 [n, C, H, W], read-only.

    Gray becomes colour and colour gray. An image of another height or width is resized, or else a ``UserError``: what
    was made for the teacher has its size. They are decoded once, into a file in the home: every run maps that one.
    """
    folder = expanded(folder)
    facts = folder_facts(folder)

    def read(_data: DataSet, _root: Path, _part: data.Part) -> data.RawData:
        labels = np.zeros(facts.files, np.int64)
        return data.RawData.of_files(data.images_below(folder), labels, partial(_decoded, shape=shape, resize=resize))

    prepared = _Prepared(
        name=f"images of {folder.resolve().name}",  # the digest tells it from others
        title="",
        num_classes=1,
        names=("unknown",),
        image_shape=shape,
        mean=(),
        std=(),
        flip_keeps_class=False,
        validation_size=0,
        source="the user's own",
        read=read,
        version=f"1-{facts.digest[:16]}-{'x'.join(map(str, shape))}{'-resized' if resize else ''}",
        sizes=(0, facts.files),
        test_only=True,
    )
    return data.as_tensor(prepared.split("test").images)


def _decoded(path: Path, shape: tuple[int, int, int], resize: bool) -> NDArray[np.uint8]:
    """One image, uint8 [C, H, W]."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(path) as image:
            data.refuse_deep_pixels(path, image)
            pixels = pil_to_tensor(image.convert("RGB" if shape[0] == 3 else "L"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as an image ({error}): replace or remove it") from None
    if not resize and pixels.shape[1:] != shape[1:]:
        (height, width), (wanted_height, wanted_width) = pixels.shape[1:], shape[1:]
        raise UserError(
            f"{path} is {width} pixels wide and {height} high, the images of the data set {wanted_width} and "
            f"{wanted_height}: name a folder of images made for it"
        )
    found: NDArray[np.uint8] = fit(pixels.unsqueeze(0), shape)[0].numpy()
    return found


def fit(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """uint8 images [n, c, h, w] in another shape (C, H, W): gray is repeated, colour becomes luma (ITU-R 601), sides
    are resized bilinearly with antialiasing, without keeping the proportions."""
    channels, height, width = shape
    if images.shape[1:] == shape:
        return images
    parts = []
    for part in images.split(1024):
        pixels = part.float()
        if pixels.shape[1] == 3 and channels == 1:
            weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device).view(1, 3, 1, 1)
            pixels = (pixels * weights).sum(1, keepdim=True)
        if pixels.shape[2:] != (height, width):
            pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
        parts.append(pixels.round_().clamp_(0, 255).to(torch.uint8).expand(-1, channels, -1, -1))
    return torch.cat(parts).contiguous()
