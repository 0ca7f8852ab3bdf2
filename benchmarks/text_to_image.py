"""Make images of a data set's classes with a text-to-image model, for the method `text2image`.

Called as ``python -m dfkd_bench.benchmarks.text_to_image --dataset cifar10 --model PATH_OR_NAME --output FOLDER
--per-class 1000``. The model is one of the `diffusers` library: a folder, or a name that it downloads. It is told one
text a class ("a photo of a cat") and nothing else; no image of the data set is looked at. Then::

    dfkd-bench run --methods text2image --dataset cifar10 -s text2image.pool=folder:FOLDER

The images are scaled to the data set's size and written to ``FOLDER/<number>_<class>/<number>.png``; ``made.json``
beside them says how they were made. Each has a seed of its own, so that the same command goes on where it was stopped,
and the images don't depend on the size of the batches beyond rounding.

With Stable Diffusion 1.5 an image of 512 x 512 pixels in 50 steps takes some seconds on a GPU and minutes on a CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dfkd_bench import data, prompts
from dfkd_bench.compute import resolve_device
from dfkd_bench.errors import UserError

DEFAULT_PROMPT = prompts.PROMPTS["P2"]
INSTALL = "python -m pip install diffusers transformers accelerate"
NOTE = "made.json"

log = logging.getLogger(__name__)

Painter = Callable[[list[str], list[int]], list[Image.Image]]
"""Texts and seeds, one each an image -> the images."""


def make(
    dataset: data.DataSet, paint: Painter, output: Path, per_class: int, prompt: str, batch_size: int, seed: int = 0
) -> int:
    """Write what is missing of ``per_class`` images of each class below ``output``; returns how many were made."""
    _, height, width = dataset.image_shape
    made = 0
    texts = prompts.render(prompt, dataset.class_names)
    for number, (name, text) in enumerate(zip(dataset.class_names, texts, strict=True)):
        folder = output / f"{number:04}_{''.join(sign if sign.isalnum() else '_' for sign in name)}"
        folder.mkdir(parents=True, exist_ok=True)
        missing = [index for index in range(per_class) if not (folder / f"{index:06}.png").exists()]
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            images = paint([text] * len(part), [image_seed(seed, number, index) for index in part])
            for index, image in zip(part, images, strict=True):
                fitted = image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
                _save(fitted, folder / f"{index:06}.png")
            made += len(part)
        log.info("%s: %d images of '%s'", folder.name, per_class, text)
    return made


def image_seed(seed: int, number: int, index: int) -> int:
    """The seed of image ``index`` of class ``number``: 48 bits that depend on nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{index}".encode()).digest()[:6], "big")


def _save(image: Image.Image, path: Path) -> None:
    """Under its name only once it is whole: a stopped command leaves no half image."""
    part = path.with_suffix(".part")
    image.save(part, format="png")
    os.replace(part, path)


def painter(model: str, device: torch.device, steps: int | None, guidance: float | None) -> Painter:
    """The text-to-image model; its library is imported here and nowhere else. None: the model's own default."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise UserError(f"making images needs the package diffusers ({error}): {INSTALL}") from None
    precision = torch.float16 if device.type == "cuda" else torch.float32
    try:
        pipeline = diffusers.AutoPipelineForText2Image.from_pretrained(model, torch_dtype=precision).to(device)
    except Exception as error:  # the library raises a dozen types, its own and others'
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the text-to-image model '{model}' can't be had: {reason}") from error
    pipeline.set_progress_bar_config(disable=True)
    chosen: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    options = {name: value for name, value in chosen.items() if value is not None}

    def paint(texts: list[str], seeds: list[int]) -> list[Image.Image]:
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        images: list[Image.Image] = pipeline(prompt=texts, generator=generators, **options).images
        return images

    return paint


def note(output: Path, how: dict[str, Any]) -> None:
    """Write how the images are made; a folder that was filled in another way is refused."""
    path = output / NOTE
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(before, dict):
                raise ValueError
        except ValueError:
            raise UserError(f"{path} is damaged: remove it, or name another --output") from None
        for name, value in how.items():
            if before.get(name) != value:
                raise UserError(f"{output} holds images made with {name} {before.get(name)!r}: name another --output")
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(how, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Wrong input is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="whose classes, and whose image size")
    parser.add_argument("--model", required=True, help="folder or name of a text-to-image model")
    parser.add_argument("--output", type=Path, required=True, help="folder the images are written to")
    parser.add_argument("--per-class", type=_count, required=True, metavar="N", help="images of each class")
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, help="with {name} or {index}; default: %(default)s")
    parser.add_argument("--batch-size", type=_count, default=8, help="images at a time; default: 8")
    parser.add_argument("--steps", type=_count, help="denoising steps; default: the model's")
    parser.add_argument("--guidance", type=float, help="weight of the text; default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    how = {name: getattr(given, name) for name in ("dataset", "model", "prompt", "steps", "guidance", "seed")}
    try:
        dataset = data.dataset(given.dataset)
        prompts.render(given.prompt, dataset.class_names)
        paint = painter(given.model, resolve_device(given.device), given.steps, given.guidance)
        note(given.output, how)
        made = make(dataset, paint, given.output, given.per_class, given.prompt, given.batch_size, given.seed)
    except (UserError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
    log.info("%d images made: -s text2image.pool=folder:%s", made, given.output)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is no positive number")
    return value


if __name__ == "__main__":
    main()
