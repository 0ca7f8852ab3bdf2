"""From records to a figure of images: what each run keeps of its own, beside real images of the evaluated split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from safetensors import SafetensorError

from dfkd_bench.class_names import AS_WRITTEN
from dfkd_bench.data import DataSet
from dfkd_bench.diversity import KEPT_CLASSES, SAMPLE, evenly_spaced
from dfkd_bench.errors import UserError
from dfkd_bench.paths import home
from dfkd_bench.report.gallery import CLASSES, PER_CELL, Block, draw
from dfkd_bench.report.groups import Group
from dfkd_bench.report.layout import accuracy
from dfkd_bench.report.statistics import interval
from dfkd_bench.runfolder import IMAGES, kept_images

NUMBERS = {"within class": "within", "between classes": "between", "coverage": "coverage"}
"""Columns at the right: heading -> measure."""

REAL_DATA = ("real_kd", "scratch")
"""Controls that learn from real images: no row of their own; the first one's numbers are those of the reference."""


def gallery(
    groups: Sequence[Group], dataset: DataSet, path: Path, title: str = "", data_root: Path | None = None
) -> tuple[Path, tuple[str, ...]]:
    """Draw real images and, below, those of each row: of the first seed whose images are at hand.

    Args:
        groups: the rows, of one protocol, data set, pair and teacher, as for a table.
        dataset: theirs.
        path: ends in .png, .pdf or .svg.
        title: above the figure.
        data_root: where raw data are looked for.

    Returns:
        ``path``, and what a reader should know or do, a line each.

    Raises:
        UserError: no images at all, or another suffix.
    """
    shown = [one for one in groups if one.method not in REAL_DATA]
    blocks, seeds, missing = list[Block](), dict[str, int](), list[Group]()
    classes = _classes(dataset.num_classes)
    for one in shown:
        kept = next(((run, images) for run in one.scored if (images := _kept(run.job_id)) is not None), None)
        if kept is None:
            missing.append(one)
        else:
            seeds[one.label] = kept[0].job.seed
        blocks.append(
            Block(
                label=one.label,
                note=_accuracy(one),
                images=None if kept is None else _by_class(kept[1]["images"], kept[1]["classes"], classes),
                numbers=_numbers(one),
                is_control=one.is_control,
            )
        )
    advice = _advice(missing)
    if not seeds:
        raise UserError(advice or "there are only controls with real data: name a method that makes images")
    real = _real_block(groups, dataset, classes, data_root)
    names = [AS_WRITTEN.get(name, name) for name in dataset.class_names]
    draw([real, *blocks], {number: names[number] for number in classes}, path, title, _notes(groups, dataset, seeds))
    return path, (advice,) if advice else ()


def _kept(job_id: str) -> dict[str, np.ndarray] | None:
    try:
        return kept_images(job_id)
    except (OSError, SafetensorError) as error:
        path = home() / "runs" / job_id / IMAGES
        line = f"the images of run {job_id} can't be read ({error}): delete {path}"
        raise UserError(f"{line}, and its row says that they are not at hand") from None


def _classes(count: int) -> list[int]:
    """The classes that are shown: all, or 12 evenly spaced ones of those that runs keep images of."""
    kept = evenly_spaced(count, KEPT_CLASSES)
    return [kept[place] for place in evenly_spaced(len(kept), CLASSES)]


def _by_class(images: np.ndarray, labels: np.ndarray, classes: Sequence[int]) -> dict[int, np.ndarray]:
    return {number: np.asarray(images[np.flatnonzero(labels == number)[:PER_CELL]]) for number in classes}


def _real_block(groups: Sequence[Group], dataset: DataSet, classes: Sequence[int], root: Path | None) -> Block:
    job = groups[0].records[0].job
    arrays = dataset.split(job.evaluate_on, root)
    control = next((one for name in REAL_DATA for one in groups if one.method == name), None)
    teacher = next((run.teacher for one in groups for run in one.records if run.teacher), None)
    return Block(
        label="real images",
        note=f"teacher {teacher.percent}" if teacher else f"{job.evaluate_on} split",
        images=_by_class(arrays.images, np.asarray(arrays.labels), classes),
        numbers=_numbers(control) if control else {},
    )


def _accuracy(one: Group) -> str:
    last = list(one.last().values())
    return f"{accuracy(interval(last))} %" if last else one.records[0].status


def _numbers(one: Group) -> dict[str, str]:
    """The mean over seeds of each column's measure."""
    found = {}
    for heading, name in NUMBERS.items():
        values = [value for run in one.scored if (value := run.diversity.get(name)) is not None]
        fewer = f"\n(n = {len(values)})" if len(values) < sum(bool(run.diversity) for run in one.scored) else ""
        found[heading] = f"{fmean(values):.2f}{fewer}" if values else "-"
    return found


def _advice(missing: Sequence[Group]) -> str:
    failed = [one.label for one in missing if not one.scored]
    elsewhere = [one.label for one in missing if one.scored]
    parts = [f"{', '.join(failed)} has no finished run: the table says why"] if failed else []
    if elsewhere:
        parts.append(
            f"no images of {', '.join(elsewhere)} are at hand: the runs were made elsewhere or before images were "
            "kept; run them here with --output to a new folder and draw from that"
        )
    return "; ".join(parts)


def _notes(groups: Sequence[Group], dataset: DataSet, seeds: dict[str, int]) -> list[str]:
    job = groups[0].records[0].job
    columns = f"Columns: the class that the teacher names; of the real images ({job.evaluate_on} split), their label."
    if dataset.num_classes > CLASSES:
        columns += f" {CLASSES} of {dataset.num_classes} classes, evenly spaced."
    used = sorted(set(seeds.values()))
    seed = f"seed {used[0]}" if len(used) == 1 else "seeds " + ", ".join(f"{s} ({name})" for name, s in seeds.items())
    trained_on = any(one.method in REAL_DATA for one in groups)
    first = "; in the first row: of real training images" if trained_on else ""
    n = max(len(one.scored) for one in groups)
    mean = f"mean of {n} seeds; ± half-width of the 95 % interval" if n > 1 else "one seed"
    return [
        f"{columns} Images as the student gets them, without the data set's augmentation, drawn at random, {seed}; a "
        f"gray field: of the images looked at (up to {SAMPLE:,}), the teacher gives fewer than {PER_CELL} this class.",
        f"Below the names: last-epoch accuracy, {mean}. At the right, in the teacher's features: mean distance of "
        "images within and between classes over that of held-out real images, and the share of these that is covered"
        f"{first}.",
    ]
