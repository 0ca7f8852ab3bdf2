"""What `dfkd-bench teacher ...` does; each function returns what is to be printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table

from dfkd_bench import data, suite, teachers
from dfkd_bench.compute import Compute, cores_at_hand, prepare, resolve_device, resolve_precision, set_threads
from dfkd_bench.errors import UserError
from dfkd_bench.models import check_model, model_names
from dfkd_bench.plugins import Plugins
from dfkd_bench.teachers import TeacherCard, TrainingProgress


def train(
    dataset_name: str,
    model: str | None,
    protocol: str | None,
    settings: Sequence[str],
    device: str,
    precision: Literal["auto", "fp32", "bf16"],
    data_root: Path | None,
    found: Plugins,
    report: Callable[[TrainingProgress], None],
    deterministic: bool = False,
) -> str:
    """Train the teacher that `run` would train, or one with another recipe."""
    dataset = data.dataset(dataset_name, data_root, found.datasets)
    given = suite.parse_settings(settings)
    for key in given:
        if not key.startswith("teacher."):
            raise UserError(f"-s {key}: expected teacher.SETTING=VALUE, such as teacher.epochs=100")
    known = suite.make_suite("teacher", "", dataset_name, ["none"], protocol=protocol)
    name = model or known.pairs[0].partition(":")[0]
    suite.parse_pair(f"{name}:{name}", found)
    spec = suite.teacher_spec(dataset, name, known.protocol, given)
    if teachers.is_at_hand(dataset, spec):
        return _line(teachers.folder(dataset, spec), teachers.read_card(teachers.folder(dataset, spec))) + " (at hand)"
    check_model(name, dataset.num_classes, dataset.image_shape, found.models)
    resolved = resolve_device(device)
    prepare(resolved, deterministic)
    # As in `run`: with one thread the weights of a `smoke` teacher do not depend on the machine's core count.
    set_threads(1 if suite.settings_table(known.protocol, dataset.name) == "smoke" else cores_at_hand())
    compute = Compute(resolved, resolve_precision(precision, resolved, dataset.image_shape[1]))
    card = teachers.train(dataset, spec, compute, data_root, found.models, report)
    return _line(teachers.folder(dataset, spec), card)


def import_(
    file: Path,
    dataset_name: str | None,
    model: str | None,
    minimum: float | None,
    device: str,
    data_root: Path | None,
    found: Plugins,
) -> str:
    """Import a checkpoint; data set and model may come from a name such as cifar10_resnet34.pth."""
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    guess = _told_by(file, found)
    dataset_name, model = dataset_name or guess[0], model or guess[1]
    if dataset_name is None or model is None:
        missing = {"data set": ("--dataset", dataset_name), "model": ("--model", model)}
        words = [(what, option) for what, (option, given) in missing.items() if given is None]
        what, options = (" and ".join(part) for part in zip(*words, strict=True))
        raise UserError(f"{file.name} does not tell its {what}, as cifar10_resnet34.pth does: give {options}")
    suite.parse_pair(f"{model}:{model}", found)
    dataset = data.dataset(dataset_name, data_root, found.datasets)
    card = teachers.import_checkpoint(file, dataset, model, data_root, minimum, found.models, _prepared(device))
    return _line(teachers.folder(dataset, card.spec), card)


def _told_by(file: Path, found: Plugins) -> tuple[str, str] | tuple[None, None]:
    """Data set and model, if the file's name is one of each. Other names tell nothing: best_model.pth has no model."""
    datasets = {_plain(name): name for name in (*data.dataset_names(), *found.datasets)}
    models = {_plain(name): name for name in (*model_names(), *found.models)}
    words = _plain(file.stem).split("_")
    for end in range(1, len(words)):
        dataset, model = "_".join(words[:end]), "_".join(words[end:])
        if dataset in datasets and model in models:
            return datasets[dataset], models[model]
    return None, None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def list_() -> Table | str:
    """All teachers at hand."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("name", "data set", "test %", "sha256", "origin", "epochs", "seed"):
        table.add_column(name, justify="right" if name in ("test %", "epochs", "seed") else "left")
    for place, card in teachers.list_teachers():
        recipe = card.spec.recipe
        table.add_row(
            place.name,
            card.dataset,
            f"{card.accuracy['test']:.2f}",
            card.sha256[:12],
            card.origin,
            str(recipe.epochs) if recipe else "-",
            str(card.spec.seed) if recipe else "-",
        )
    return table if table.row_count else "no teachers yet: `dfkd-bench teacher train --dataset digits` makes one"


def verify(name: str | None, device: str, data_root: Path | None, found: Plugins) -> Iterator[str]:
    """Measure again what the cards say."""
    at_hand = list(teachers.list_teachers())
    chosen = [(place, card) for place, card in at_hand if name is None or place.name.startswith(name)]
    if not chosen:
        names = ", ".join(place.name for place, _ in at_hand) or "none"
        raise UserError(f"there is no teacher '{name or ''}'; at hand: {names}")
    where = _prepared(device)
    for place, card in chosen:
        dataset = data.dataset(card.dataset, data_root, found.datasets)
        teachers.verify(place, dataset, data_root, found.models, where)
        yield f"{_line(place, card)}: hash and accuracy hold"


def _line(place: Path, card: TeacherCard) -> str:
    return f"{place.name} on {card.dataset}: {card.accuracy['test']:.2f} % test accuracy, sha256 {card.sha256[:12]}"


def _prepared(device: str) -> torch.device:
    """The device that is meant, ready to measure on."""
    where = resolve_device(device)
    prepare(where)
    return where
