"""Published accuracies: ``benchmarks/published.csv``, looked up by this project's names."""

from __future__ import annotations

import csv
import importlib.resources
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from dfkd_bench.models import model_names

NAMES: Mapping[str, tuple[str, ...]] = {
    "teacher": ("teacher", "teacher [cifar100 original]"),
    "scratch": ("student_scratch", "student_scratch [cifar100 original]", "Scratch"),
    "real_kd": ("KD_original_data", "KD_original_data [cifar100 original]", "KD-ORI"),
    "noise_kd": ("Normal noise",),
    "dafl": ("DAFL", "DAFL (batch 256)", "DAFL [data-free]"),
    "dfad": ("DFAD",),
    "dfnd": ("DFND",),
    "zskt": ("ZSKT", "ZSKT [data-free]"),
    "deepinv": ("DeepInv", "DeepInv-2k", "DeepInv (140K)", "DeepInv [data-free]", "ADI"),
    "dfq": ("DFQ", "DFQ [data-free]"),
    "cmi": ("CMI", "CMI-500", "CMI_adv", "CMI_nonadv", "CMI_scratch_init", "CMI (re-run)"),
    "fm": (
        "FastDFKD",
        "Fast-2",
        "Fast-5",
        "Fast-10",
        "Fast-50",
        "FM10",
        "FM_100",
        "FM_200",
        "FM_300",
        "FastDFKD (140K)",
        "Fast (model inversion)",
    ),
    "mad": ("MAD",),
    "nayer": ("NAYER", "NAYER_100", "NAYER_200", "NAYER_300", "NAYER prompt P3 (label index)"),
    "spaceshipnet": ("SpaceshipNet",),
    "pre_dfkd": ("PRE-DFKD",),
    "kakr": ("KAKR_GR (LRA, generative replay)",),
    "cae_dfkd": ("CAE-DFKD",),
}
"""Method here -> its names in the CSV, the plain one first (the others are variants and are shown by name).

Taken in: what a paper or its README prints, re-runs by other papers included. Left out, on purpose: re-runs by users
in issues and repositories; a competitor's step-starved variants (CMI-2, DeepInv-2); combinations with another
method's idea (guided, KDCI, condensed samples); noise whose distribution is not stated (RANDOM)."""

CAUTIONS: Mapping[tuple[str, str], str] = {
    ("FAST_README_cifar10", "KD_original_data"): "probably a misprint: one number for all five pairs",
    ("DAFL_T3", "Normal noise"): "noise of a normal distribution; the control's is uniform",
}
"""(table, name in the CSV) -> what a reader must know about the number."""

_RANKS = ("primary", "author", "cited", "secondary", "figure")
"""How sure a number is, by how its ``confidence`` starts; best first, all others last."""

_FIGURE_ERROR = 0.05
"""Accuracies measured in NAYER's figure are good to +-0.05 points (their ``source`` says so)."""


@dataclass(frozen=True)
class PublishedValue:
    """One number from the literature. ``value`` in the metric's unit [%]; ``epochs`` as the source words them."""

    value: float
    epochs: str
    source: str
    table_id: str
    confidence: str
    variant: str  # the method's name in the source; "" for the plain one
    caution: str = ""


def published(
    method: str, dataset: str, teacher: str, student: str, metric: str = "top1_acc"
) -> tuple[PublishedValue, ...]:
    """All published values of a cell in the order of the CSV; none for a method, pair or data set not in it.

    Names match exactly: a value whose pair its source does not state belongs to no cell. A model's name here may end in
    the data set that its form is for (``resnet50_imagenet``); the CSV says ``resnet50`` and means that form, and no
    value there is of another one.
    """
    names = NAMES.get(method, ())
    if any(f"{name}_{dataset}" in model_names() for name in (teacher, student)):
        return ()
    teacher, student = (name.removesuffix(f"_{dataset}") for name in (teacher, student))
    return tuple(
        PublishedValue(
            value=float(row["value"]),
            epochs=row["epochs"],
            source=row["source"],
            table_id=row["table_id"],
            confidence=row["confidence"],
            variant="" if row["method"] == names[0] else row["method"],
            caution=CAUTIONS.get((row["table_id"], row["method"]), ""),
        )
        for row in rows()
        if row["method"] in names
        and (row["dataset"], row["teacher"], row["student"], row["metric"]) == (dataset, teacher, student, metric)
    )


def distinct(values: Iterable[PublishedValue]) -> tuple[PublishedValue, ...]:
    """One entry for each different number, ascending, each from its best source.

    A marker measured in a figure is not a number of its own if a printed one lies within the measuring error.
    """
    chosen: list[PublishedValue] = []
    for value in sorted(values, key=_rank):
        error = _FIGURE_ERROR if value.confidence.startswith("figure") else 0.0
        if all(abs(value.value - other.value) > error + 1e-9 for other in chosen):
            chosen.append(value)
    return tuple(sorted(chosen, key=lambda value: value.value))


def _rank(value: PublishedValue) -> int:
    ranks = (place for place, start in enumerate(_RANKS) if value.confidence.startswith(start))
    return next(ranks, len(_RANKS))


@cache
def rows() -> tuple[dict[str, str], ...]:
    text = importlib.resources.files("dfkd_bench.benchmarks").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))
