"""What the runner lends to methods that ask for it in ``needs``: training images, an unlabelled pool, first images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dfkd_bench import data, teachers
from dfkd_bench.data import DataSet
from dfkd_bench.errors import UserError
from dfkd_bench.job import TeacherSpec
from dfkd_bench.method import LabelledImages


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
    if name.startswith(data.FOLDER_PREFIX):
        folder = Path(name.removeprefix(data.FOLDER_PREFIX)).expanduser()
        image_files(folder)
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
    folder = Path(name).expanduser()
    image_files(folder)
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


def image_files(folder: Path) -> list[Path]:
    """All images below ``folder`` in the order of their paths; none are a ``UserError``."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    files = data.images_below(folder)
    if not files:
        raise UserError(f"there are no images ({', '.join(sorted(data.IMAGE_SUFFIXES))}) below {folder}")
    return files


def folder_images(folder: Path, shape: tuple[int, int, int], resize: bool = False) -> Tensor:
    """All images below ``folder`` in the order of their paths, uint8 [n, C, H, W].

    Gray becomes colour and colour gray. An image of another height or width is resized, or else a ``UserError``: what
    was made for the teacher has its size.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    images = []
    for path in image_files(folder.expanduser()):
        try:
            with Image.open(path) as image:
                data.refuse_deep_pixels(path, image.mode)
                pixels = pil_to_tensor(image.convert("RGB" if shape[0] == 3 else "L"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be read as an image ({error}): replace or remove it") from None
        if not resize and pixels.shape[1:] != shape[1:]:
            (height, width), (wanted_height, wanted_width) = pixels.shape[1:], shape[1:]
            raise UserError(
                f"{path} is {width} pixels wide and {height} high, the images of the data set {wanted_width} and "
                f"{wanted_height}: name a folder of images made for it"
            )
        images.append(fit(pixels.unsqueeze(0), shape))
    return torch.cat(images)


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
