"""The user's own files that a job names: a data set or pool in a folder, first images, weights of a text encoder.

Their names do not fix the result, since the files may change: digests of them are part of the job's identity. What is
built in has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from dfkd_bench import data
from dfkd_bench.data import FOLDER_PREFIX, DataSet
from dfkd_bench.encoders import RowEncoder, TextEncoder, build_encoder
from dfkd_bench.errors import UserError
from dfkd_bench.method import Method
from dfkd_bench.paths import expanded
from dfkd_bench.plugins import Plugins


def digests(method: type[Method], config: Mapping[str, Any], dataset: DataSet, found: Plugins) -> dict[str, str]:
    """Digests by setting, ``dataset`` for the data set itself; only what has one.

    Files that are not there have none: the line that says so comes when they are looked for, before the runs.
    """
    wanted = {"dataset": dataset.content}
    if "unlabelled" in method.needs:
        wanted["pool"] = _of_pool(config["pool"], found)
    if "initial_images" in method.needs and config["initial_images"] is not None:
        wanted["initial_images"] = _of_folder(config["initial_images"])
    if method.reads_label_text(method.Config(**config)) and "encoder" in config:
        wanted["encoder"] = _of_encoder(config["encoder"], found)
    return {setting: digest for setting, digest in wanted.items() if digest is not None}


def _of_pool(name: str, found: Plugins) -> str | None:
    if name.startswith(FOLDER_PREFIX):
        return _of_folder(name.removeprefix(FOLDER_PREFIX))
    with contextlib.suppress(UserError):
        return data.dataset(name, extra=found.datasets).content
    return None


def _of_folder(folder: str) -> str | None:
    with contextlib.suppress(UserError, OSError):
        facts = data.folder_facts(expanded(folder))
        return None if facts is None else facts.digest
    return None


def _of_encoder(name: str, found: Plugins) -> str | None:
    with contextlib.suppress(UserError, OSError):
        encoder = build_encoder(name, found.encoders)
        if isinstance(encoder, RowEncoder):
            return encoder.revision if encoder.path is not None else None
        if isinstance(encoder, TextEncoder):
            return encoder.weights()
    return None
