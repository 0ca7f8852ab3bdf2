"""Make the label-text embeddings that are shipped with the package.

Called as ``python -m dfkd_bench.benchmarks.make_embeddings --model FOLDER --output FOLDER [data set ...]``. For every
built-in data set whose class names are at hand it writes one file with the prompts that have class names in them, and
one more with the prompts that have only indices: they serve any data set of up to 1,000 classes. Stored as float16.
Tiny-ImageNet's names are in its own files (``words.txt``, ``wnids.txt``): without them its file is left as it is.

Takes about two minutes on one core; ``--model`` is a folder that holds all-MiniLM-L6-v2, or a model's name.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dfkd_bench import data, text
from dfkd_bench.errors import UserError

INDEX_CLASSES = 1000

log = logging.getLogger(__name__)


def make(model: str, output: Path, datasets: Sequence[str]) -> None:
    """Write ``<data set>.safetensors`` for each of ``datasets``, and ``index.safetensors``, into ``output``."""
    named = [prompt for prompt in text.PROMPTS.values() if "{name}" in prompt]
    indexed = [prompt for prompt in text.PROMPTS.values() if "{name}" not in prompt]
    _write(model, output / "index.safetensors", indexed, [""] * INDEX_CLASSES)
    for name in datasets:
        try:
            class_names = data.dataset(name).class_names
        except UserError as error:
            log.warning("left out: %s", error)
            continue
        _write(model, output / f"{name}.safetensors", named, class_names)


def _write(model: str, path: Path, prompts: Sequence[str], class_names: Sequence[str]) -> None:
    tables = {}
    for prompt in prompts:
        texts = text.render(prompt, class_names)
        matrix, encoded_by = text.encode(f"sbert:{model}", texts)
        tables[prompt] = (texts, matrix.astype(np.float16))
    # the name that users ask for, whatever folder the model was read from
    text.store(path, dataclasses.replace(encoded_by, model=text.SBERT_MODEL), tables)
    log.info("%s: %d classes, revision %s", path, len(class_names), encoded_by.revision)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=text.SBERT_MODEL, help="folder or name of all-MiniLM-L6-v2")
    parser.add_argument("--output", type=Path, required=True, help="folder the files are written to")
    parser.add_argument("datasets", nargs="*", default=data.dataset_names(), help="default: all built-in ones")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        make(given.model, given.output, given.datasets)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
