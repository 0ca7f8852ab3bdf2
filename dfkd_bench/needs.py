"""What jobs need beside their teacher: data, label-text embeddings, pools, first images. Looked at, not fetched.

No text model is loaded here; ``plan.carry_out`` is what fetches, encodes, and refuses what it can't have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfkd_bench import data, prompts, text
from dfkd_bench.data import DataSet
from dfkd_bench.encoders import encoder_kind
from dfkd_bench.errors import UserError
from dfkd_bench.job import Job
from dfkd_bench.method import Method
from dfkd_bench.paths import expanded
from dfkd_bench.plugins import Plugins


@dataclass(frozen=True)
class LabelText:
    """The label-text embeddings that a method's jobs read."""

    method: str
    encoder: str
    prompt: str


@dataclass(frozen=True)
class Lacking:
    """What a run of the jobs would have to get first."""

    embeddings: tuple[LabelText, ...] = ()
    data: tuple[str, ...] = ()  # a line each: what, and what becomes of it


def check_label_text(name: str, method: type[Method], config: Mapping[str, Any], found: Plugins) -> None:
    """``UserError``, told when jobs are made: they read label text, and its encoder or prompt can't be one."""
    if not method.reads_label_text(method.Config(**config)):
        return
    if not {"encoder", "prompt"} <= config.keys():
        raise UserError(f"method {name} needs label_text, but has no settings `encoder` and `prompt`")
    try:
        encoder_kind(config["encoder"], found.encoders)
        prompts.render(config["prompt"], ("a class",))
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def label_texts(jobs: Iterable[Job], found: Plugins) -> tuple[LabelText, ...]:
    """Which embeddings the jobs read, each once a method, in the order of the jobs."""
    wanted: dict[LabelText, None] = {}
    for job in jobs:
        method = found.method(job.method)
        if method.reads_label_text(method.Config(**job.config)):
            wanted[LabelText(job.method, job.config["encoder"], job.config["prompt"])] = None
    return tuple(wanted)


def lacking(jobs: Sequence[Job], found: Plugins, dataset: DataSet, root: Path | None) -> Lacking:
    """What is not at hand of all that the jobs need.

    Raises:
        UserError: an encoder that no run could ask: a wrong argument, a file that is not there or does not fit.
    """
    return Lacking(_not_encoded(label_texts(jobs, found), found, dataset), tuple(_no_data(jobs, found, dataset, root)))


def _not_encoded(wanted: Sequence[LabelText], found: Plugins, dataset: DataSet) -> tuple[LabelText, ...]:
    if not wanted:
        return ()
    try:
        names = dataset.class_names
    except UserError:  # they are in files that are missing, which is told
        return ()
    left = []
    for one in wanted:
        try:
            if not text.is_at_hand(dataset.name, names, one.encoder, one.prompt, found.encoders):
                left.append(one)
        except UserError as error:
            raise UserError(f"{one.method}: {error}") from None
    return tuple(left)


def _no_data(jobs: Sequence[Job], found: Plugins, dataset: DataSet, root: Path | None) -> dict[str, None]:
    """Lines on the data set, on pools and on folders of first images; each once."""
    lines: dict[str, None] = {}
    if jobs:
        lines |= dict.fromkeys(_missing(dataset, root, ""))
    for job in {(job.method, *map(str, job.config.items())): job for job in jobs}.values():
        needs = found.method(job.method).needs
        for setting in ("pool", "initial_images"):
            name = job.config.get(setting)
            if name is None or {"pool": "unlabelled"}.get(setting, setting) not in needs:
                continue
            of = f" ({setting} of {job.method})"
            folder = name.removeprefix(data.FOLDER_PREFIX)
            if setting == "pool" and folder == name:
                lines |= dict.fromkeys(_missing(data.dataset(name, root, found.datasets), root, of))
            elif not expanded(folder).is_dir():
                lines[f"{name}{of}: there is no such folder"] = None
    return lines


def _missing(dataset: DataSet, root: Path | None, of: str) -> list[str]:
    state = data.status(dataset.name, root, {dataset.name: dataset})
    if not state.startswith("missing"):
        return []
    if dataset.raw.address:
        return [f"{dataset.name}{of}, not at hand: downloaded before the runs"]
    return [f"{dataset.name}{of}, not at hand, and no download: {state.removeprefix('missing: ')}"]
