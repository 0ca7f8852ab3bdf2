"""Teachers: trained here by a recipe (last epoch, never the best one), or imported; kept with hash and accuracy."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from dfkd_bench import record
from dfkd_bench.ahead import place, spare_memory, taken
from dfkd_bench.augment import Normalize, random_crop_flip, to_unit
from dfkd_bench.checkpoint import load_tree, random_state, restore_random_state, save_tree, seed_everything
from dfkd_bench.compute import Compute, hardware
from dfkd_bench.data import DataSet, Split, as_tensor
from dfkd_bench.errors import UserError
from dfkd_bench.evaluate import evaluate, logits_of
from dfkd_bench.files import safe_name
from dfkd_bench.job import Precision, Recipe, TeacherSpec, digest
from dfkd_bench.lease import Busy, Lease, held
from dfkd_bench.method import Frozen, LabelledImages
from dfkd_bench.models import build_model, check_model
from dfkd_bench.paths import home

log = logging.getLogger(__name__)

Builders = Mapping[str, Callable[[int, int], nn.Module]]
"""Plugins' models: name -> builder(classes, channels)."""


class TeacherCard(Frozen):
    """What is known of one teacher, beside its weights."""

    dataset: str
    model: str
    classes: int
    channels: int
    origin: str  # "trained here" or "imported from FILE NAME"
    spec: TeacherSpec
    sha256: str  # of weights.safetensors
    accuracy: dict[str, float]  # split -> accuracy [%], fp32
    last_train_loss: float | None = None
    seconds: float | None = None
    precision: Precision = "fp32"
    hardware: dict[str, str | int] = {}
    software: dict[str, str] = {}
    created: str = ""


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher: eval mode, frozen, on its device."""

    model: nn.Module
    card: TeacherCard


@dataclass(frozen=True)
class TrainingProgress:
    """Reported after each epoch of a teacher's training."""

    epoch: int
    epochs: int
    loss: float


def folder(dataset: DataSet, spec: TeacherSpec, root: Path | None = None) -> Path:
    """Where below ``root``, by default the home, a teacher is kept: the spec decides, so that equal specs share one
    teacher. Where the data set's name does not fix its images, their digest decides with it."""
    name = spec.sha256[:8] if spec.sha256 else digest(spec.model_dump(mode="json"))[:8]
    if dataset.content is not None:
        name = digest([name, dataset.content])[:8]
    return (root or home()) / "teachers" / safe_name(dataset.name) / f"{spec.model}-{name}"


def find(dataset: DataSet, spec: TeacherSpec, output: Path | None = None) -> Path:
    """The folder of the teacher for runs whose records go to ``output``; it may not be there yet.

    The one that lies beside the records comes first: another kind of CPU trains another teacher from the same spec, and
    runs with different teachers can't stand in one table. Else it is that of the home.
    """
    beside = folder(dataset, spec, output) if output is not None else None
    return beside if beside is not None and (beside / "teacher.json").is_file() else folder(dataset, spec)


def is_at_hand(dataset: DataSet, spec: TeacherSpec, output: Path | None = None) -> bool:
    """Whether the teacher exists already: in the home, or beside the records in ``output``."""
    return (find(dataset, spec, output) / "teacher.json").is_file()


def keep_beside(dataset: DataSet, spec: TeacherSpec, output: Path) -> None:
    """Copy a trained teacher from the home to ``OUTPUT/teachers``, unless one is there.

    Whoever has the records can then add runs to them on any machine. Imported teachers are not copied: a job names
    their weights by hash.
    """
    if spec.recipe is not None:
        _copy(folder(dataset, spec), folder(dataset, spec, output))


def take_along(source: Path, output: Path) -> None:
    """Copy all teachers beside the records in ``source`` to ``output``, where they are missing there.

    For runs on the side (trials, bf16 against fp32), so that they have the teacher of the table that they are for.
    """
    for card in sorted(source.glob("teachers/*/*/teacher.json")):
        _copy(card.parent, output / card.parent.relative_to(source))


def _copy(origin: Path, place: Path) -> None:
    """One teacher, unless there is one already. The card comes last: a folder with a card is complete."""
    if not (place / "teacher.json").is_file():
        for name in ("weights.safetensors", "teacher.json"):
            record.write_bytes(place / name, (origin / name).read_bytes())


def labelled(
    dataset: DataSet,
    splits: tuple[Split, ...],
    root: Path | None,
    device: torch.device | str = "cpu",
    spare: Callable[[torch.device], int | None] = spare_memory,
) -> LabelledImages:
    """The images and labels of the splits, one after the other.

    Labels are on ``device``, and so are the images if there is room; else they stay in the prepared files, which are
    mapped, and batches are brought from there. ``spare``: bytes that are free on the device now.
    """
    parts = [dataset.split(split, root) for split in splits]
    labels = torch.cat([torch.from_numpy(part.labels.copy()) for part in parts])
    images = place([as_tensor(part.images) for part in parts], torch.device(device), spare)
    return LabelledImages(images, labels.to(device))


def training_splits(spec: TeacherSpec) -> tuple[Split, ...]:
    """What the teacher was trained on. Imported teachers saw everything."""
    with_validation = spec.recipe is None or spec.recipe.include_validation
    return ("train", "validation") if with_validation else ("train",)


def control_splits(spec: TeacherSpec, evaluate_on: Split) -> tuple[Split, ...]:
    """What the controls train on: what the teacher was trained on, but never what they are evaluated on."""
    return tuple(split for split in training_splits(spec) if split != evaluate_on)


def train(
    dataset: DataSet,
    spec: TeacherSpec,
    compute: Compute,
    root: Path | None = None,
    models: Builders | None = None,
    report: Callable[[TrainingProgress], None] = lambda progress: None,
) -> TeacherCard:
    """Train a teacher on real data and keep it, if it is not at hand yet. Goes on from its last epoch.

    While another process trains it, this one waits: it needs the same teacher.
    """
    if spec.recipe is None:
        raise UserError(f"teacher {spec.sha256} is an imported one: run `dfkd-bench teacher import` again")
    place = folder(dataset, spec)
    while True:
        try:
            with held(place / "lease", f"teacher {place.name}", wait=True) as lease:
                if is_at_hand(dataset, spec):
                    return read_card(place)
                return _train(place, lease, dataset, spec, spec.recipe, compute, root, models, report)
        except Busy:  # this one stalled, and another has taken it over
            continue


def _train(
    place: Path,
    lease: Lease,
    dataset: DataSet,
    spec: TeacherSpec,
    recipe: Recipe,
    compute: Compute,
    root: Path | None,
    models: Builders | None,
    report: Callable[[TrainingProgress], None],
) -> TeacherCard:
    device = compute.device
    seed_everything(spec.seed)
    model = compute.place(build_model(spec.model, dataset.num_classes, dataset.image_shape[0], models))
    data = labelled(dataset, training_splits(spec), root, device)
    normalize = Normalize(dataset.mean, dataset.std, device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    )
    checkpoint = place / "training.safetensors"
    first, seconds, loss = 0, 0.0, math.nan
    if checkpoint.is_file():
        first, seconds = _resume(checkpoint, model, optimizer, device)
    padding = dataset.image_shape[1] // 8 if recipe.augment else 0
    flip = dataset.flip_keeps_class and recipe.augment
    for epoch in range(first, recipe.epochs):
        start = _now(device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr / 2 * (1 + math.cos(math.pi * epoch / recipe.epochs))
        loss = _train_epoch(model, optimizer, data, normalize, recipe, padding, flip, compute)
        seconds += _now(device) - start
        report(TrainingProgress(epoch + 1, recipe.epochs, loss))
        if not math.isfinite(loss):
            raise UserError(f"the training of teacher {spec.model} on {dataset.name} diverged: lower the recipe's lr")
        if epoch + 1 < recipe.epochs:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "random": random_state(device),
                "epoch": epoch + 1,
                "seconds": seconds,
            }
            lease.check()
            save_tree(checkpoint, state)
    accuracy = _accuracies(model, dataset, normalize, root, with_validation=not recipe.include_validation)
    lease.check()  # runs may have begun with the teacher of whoever took it over, which has other bits elsewhere
    card = _keep(
        place,
        model,
        TeacherCard(
            dataset=dataset.name,
            model=spec.model,
            classes=dataset.num_classes,
            channels=dataset.image_shape[0],
            origin="trained here",
            spec=spec,
            sha256="",
            accuracy=accuracy,
            last_train_loss=loss if math.isfinite(loss) else None,
            seconds=round(seconds, 3),
            precision=compute.precision,
            hardware=hardware(device, 1),
            software=record.software(),
            created=record.now(),
        ),
    )
    checkpoint.unlink(missing_ok=True)
    return card


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: LabelledImages,
    normalize: Normalize,
    recipe: Recipe,
    padding: int,
    flip: bool,
    compute: Compute,
) -> float:
    model.train()
    order = torch.randperm(len(data.labels), device=compute.device)
    batches = [rows for rows in order.split(recipe.batch_size) if len(rows) > 1]  # BatchNorm can't use a single image
    total = torch.zeros((), device=compute.device)
    for rows, chosen in zip(batches, taken(data.images, batches), strict=True):
        images = normalize(random_crop_flip(to_unit(chosen), padding, flip))
        with compute.autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), data.labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total.item()) / len(batches)


def load(
    dataset: DataSet,
    spec: TeacherSpec,
    device: torch.device,
    models: Builders | None = None,
    output: Path | None = None,
) -> Teacher:
    """The teacher of a spec, as ``find`` has it, ready for use; a missing or damaged one is a ``UserError``."""
    place = find(dataset, spec, output)
    card = read_card(place)
    return Teacher(_load_weights(place, card, dataset, models).to(device=device), card)


def read_card(place: Path) -> TeacherCard:
    """The card in a teacher's folder."""
    path = place / "teacher.json"
    if not path.is_file():
        raise UserError(f"there is no teacher in {place}: `dfkd-bench teacher train` makes one")
    try:
        return TeacherCard.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): delete its folder and train anew") from None


def list_teachers() -> Iterator[tuple[Path, TeacherCard]]:
    """All teachers at hand. A damaged card is logged: it stops no other."""
    for path in sorted((home() / "teachers").glob("*/*/teacher.json")):
        try:
            card = read_card(path.parent)
        except UserError as error:
            log.warning("%s", error)
            continue
        yield path.parent, card


def _cards_of(dataset: DataSet) -> Iterator[TeacherCard]:
    """Of the teachers at hand for a data set. A damaged one is a ``UserError``: it may be the one that is meant."""
    for path in (home() / "teachers" / safe_name(dataset.name)).glob("*/teacher.json"):
        yield read_card(path.parent)


def find_imported(dataset: DataSet, model: str) -> TeacherCard | None:
    """The newest imported teacher of a data set and model, if there is one."""
    cards = [card for card in _cards_of(dataset) if (card.dataset, card.model) == (dataset.name, model)]
    imported = [card for card in cards if card.spec.sha256 is not None]
    return max(imported, key=lambda card: card.created, default=None)


def verify(
    place: Path,
    dataset: DataSet,
    root: Path | None,
    models: Builders | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Check the hash, measure the accuracies anew and return them; a difference is a ``UserError``."""
    card = read_card(place)
    model = _load_weights(place, card, dataset, models).to(device)
    normalize = Normalize(dataset.mean, dataset.std, device)
    measured = _accuracies(model, dataset, normalize, root, with_validation="validation" in card.accuracy)
    for split, accuracy in card.accuracy.items():
        if abs(measured[split] - accuracy) > 0.1:
            raise UserError(
                f"teacher {place.name}: {split} accuracy is {measured[split]:.2f} now, its card says {accuracy:.2f}"
            )
    return measured


def import_checkpoint(
    file: Path,
    dataset: DataSet,
    model_name: str,
    root: Path | None = None,
    minimum: float | None = None,
    models: Builders | None = None,
    device: torch.device | str = "cpu",
) -> TeacherCard:
    """Take over a foreign ``.pth`` or ``.safetensors`` file: a state dict, or a dictionary with one (``_STATE_KEYS``).

    The key names are those of zju-vipa/CMI's modules, prefixes of wrappers (``_WRAPPERS``) are dropped. Read with
    ``weights_only=True``; what doesn't fit is refused. ``minimum``: refuse below this test accuracy [%]; default:
    five times chance or 50 %, whichever is smaller, so that a checkpoint of another data set is not taken. That
    accuracy is measured on ``device``, in fp32.
    """
    check_model(model_name, dataset.num_classes, dataset.image_shape, models or {})
    state = _read_foreign(file)
    model = build_model(model_name, dataset.num_classes, dataset.image_shape[0], models)
    state = _unwrapped(state, model)
    state = {**_batch_counters(model, state), **state}
    _check_fits(state, model, file, model_name, dataset)
    try:
        model.load_state_dict(state)
    except Exception as error:  # sparse, quantised and other tensors that are no plain numbers
        raise UserError(
            f"{file.name} does not fit {model_name}: some of its tensors can't be copied into plain ones "
            f"({type(error).__name__})"
        ) from None
    model.eval().to(device)
    normalize = Normalize(dataset.mean, dataset.std, device)
    accuracy = {"test": _accuracy_of_foreign(model, dataset, normalize, root, file)}
    model.cpu()
    wanted = min(50.0, 500.0 / dataset.num_classes) if minimum is None else minimum
    if accuracy["test"] < wanted:
        raise UserError(
            f"{file.name} as {model_name} reaches {accuracy['test']:.2f} % on {dataset.name}, at least {wanted:g} % "
            "was expected: is it of another data set or normalisation? (--minimum 0 takes it nevertheless)"
        )
    weights = safetensors.torch.save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    spec = TeacherSpec(model=model_name, recipe=None, sha256=hashlib.sha256(weights).hexdigest())
    card = TeacherCard(
        dataset=dataset.name,
        model=model_name,
        classes=dataset.num_classes,
        channels=dataset.image_shape[0],
        origin=f"imported from {file.name}",
        spec=spec,
        sha256="",
        accuracy=accuracy,
        software=record.software(),
        created=record.now(),
    )
    return _keep(folder(dataset, spec), model, card)


def _accuracy_of_foreign(
    model: nn.Module, dataset: DataSet, normalize: Normalize, root: Path | None, file: Path
) -> float:
    """On test [%]. ``UserError``: logits that are not finite.

    A class without a right answer is logged: a wrong order of the classes can leave an accuracy that nobody doubts.
    """
    data = labelled(dataset, ("test",), root, normalize.mean.device)
    logits = logits_of(model, data.images, normalize)
    if not torch.isfinite(logits).all():
        raise UserError(f"{file.name} gives logits that are not finite on {dataset.name}: it is damaged, or no teacher")
    labels = data.labels.to(logits.device)
    right = logits.argmax(dim=1) == labels
    images = torch.bincount(labels, minlength=dataset.num_classes)
    known = torch.bincount(labels[right], minlength=dataset.num_classes)
    missed = [dataset.class_names[index] for index in ((images > 0) & (known == 0)).nonzero().flatten().tolist()]
    if missed:
        listed = ", ".join(f"'{name}'" for name in missed[:10]) + (", ..." if len(missed) > 10 else "")
        log.warning(
            "%s is never right on %d of %d classes (%s): is their order that of its training?",
            *(file.name, len(missed), dataset.num_classes, listed),
        )
    return round(100 * right.double().mean().item(), 4)


_STATE_KEYS = ("state_dict", "model", "net")
"""Under which a checkpoint may have its state dict: CMI and PyTorch's ImageNet example, torchvision's scripts,
kuangliu's CIFAR networks."""


def _read_foreign(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise UserError(f"there is no file {file}")
    content = _read_safetensors(file) if file.suffix.lower() == ".safetensors" else _read_pickled(file)
    if isinstance(content, Mapping):
        content = next((content[key] for key in _STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        keys = ", ".join(f"'{key}'" for key in _STATE_KEYS)
        raise UserError(f"{file} holds no state dict: expected a dictionary of tensors, or one under any of {keys}")
    return {str(name): tensor for name, tensor in content.items()}


_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
"""What stands before all names of a network that was trained in DataParallel, by torch.compile, or in a module of the
user's or of Lightning's."""


def _unwrapped(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """``state`` without the wrappers' prefixes, as far as the model's own names don't begin like that."""
    wanted = model.state_dict().keys()
    while not state.keys() & wanted:
        prefix = next((one for one in _WRAPPERS if all(name.startswith(one) for name in state)), None)
        if prefix is None:
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _read_safetensors(file: Path) -> Any:
    try:
        return safetensors.torch.load(file.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{file} can't be read: it is damaged, or no .safetensors file ({error})") from None


def _read_pickled(file: Path) -> Any:
    """What ``torch.save`` has written, read as weights only: nothing that a pickle names is run."""
    try:
        with warnings.catch_warnings():  # about TorchScript, in many lines
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on foreign or damaged files, with advice about its own options
        text = str(error)
    if found := re.search(r"GLOBAL ([\w.]+)|TorchScript", text):
        holds = f" it holds {found[1]}" if found[1] else ""
        raise UserError(
            f"{file} is no plain state dict (a pickled module?{holds}): save it with "
            f"`torch.save(model.state_dict(), {file.name!r})`"
        )
    raise UserError(f"{file} can't be read as weights: it is damaged, or no file that torch.save has written")


def _batch_counters(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """BatchNorm's counters of batches if ``state`` has none at all: PyTorch before 0.4.1 wrote none, and torchvision's
    oldest files are of that time. No answer of a model depends on them."""
    ours = {name: value for name, value in model.state_dict().items() if name.endswith(".num_batches_tracked")}
    return {} if ours.keys() & state.keys() else ours


def _check_fits(state: Mapping[str, Tensor], model: nn.Module, file: Path, name: str, dataset: DataSet) -> None:
    if trouble := _other_names(state, model):
        raise UserError(f"{file.name} does not fit {name}: {trouble}")
    if trouble := _other_shape(state, model):
        raise UserError(
            f"{file.name} does not fit {name} for {dataset.name} ({dataset.num_classes} classes): {trouble}"
        )


def _misfit(state: Mapping[str, Tensor], model: nn.Module) -> str:
    """Why a state dict can't be loaded into a model, in words; "" if it can."""
    return _other_names(state, model) or _other_shape(state, model)


def _other_names(state: Mapping[str, Tensor], model: nn.Module) -> str:
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state]
    foreign = [key for key in state if key not in wanted]
    return "; ".join(
        f"{len(keys)} {kind} (first: {keys[0]})" for kind, keys in (("missing", missing), ("unknown", foreign)) if keys
    )


def _other_shape(state: Mapping[str, Tensor], model: nn.Module) -> str:
    for key, tensor in model.state_dict().items():
        if state[key].shape != tensor.shape:
            return f"{key} has shape {list(state[key].shape)}, {list(tensor.shape)} was expected"
    return ""


def _load_weights(place: Path, card: TeacherCard, dataset: DataSet, models: Builders | None) -> nn.Module:
    if card.classes != dataset.num_classes or card.channels != dataset.image_shape[0]:
        raise UserError(
            f"teacher {place.name} is for {card.classes} classes and {card.channels} channels, {dataset.name} has "
            f"{dataset.num_classes} and {dataset.image_shape[0]}"
        )
    path = place / "weights.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"the weights of teacher {place.name} can't be read: {error}") from None
    if hashlib.sha256(data).hexdigest() != card.sha256:
        raise UserError(f"{path} is damaged (its SHA-256 differs from teacher.json): delete its folder and train anew")
    try:
        state = safetensors.torch.load(data)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    model = build_model(card.model, card.classes, card.channels, models)
    if trouble := _misfit(state, model):
        whose = f"model {card.model} of the plugin" if card.model in (models or {}) else f"model {card.model}"
        raise UserError(
            f"teacher {place.name} does not fit {whose} any more: {trouble}. Give the model its old form back, or "
            f"delete {place} and train anew"
        )
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def _keep(place: Path, model: nn.Module, card: TeacherCard) -> TeacherCard:
    """Weights first, card last: a folder with a card is complete."""
    weights = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()})
    card = card.model_copy(update={"sha256": hashlib.sha256(weights).hexdigest()})
    record.write_bytes(place / "weights.safetensors", weights)
    record.write_text(place / "teacher.json", json.dumps(card.model_dump(mode="json"), indent=1) + "\n")
    return card


def _accuracies(
    model: nn.Module, dataset: DataSet, normalize: Normalize, root: Path | None, with_validation: bool
) -> dict[str, float]:
    splits: tuple[Split, ...] = ("test", "validation") if with_validation else ("test",)
    result: dict[str, float] = {}
    for split in splits:
        data = labelled(dataset, (split,), root, normalize.mean.device)
        result[split] = round(evaluate(model, data.images, data.labels, normalize).accuracy, 4)
    return result


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[int, float]:
    try:
        state = load_tree(path)
    except ValueError:  # a damaged checkpoint of a teacher costs only time: start anew
        return 0, 0.0
    if _misfit(state["model"], model):  # so does one of a plugin's model that was changed since
        return 0, 0.0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    restore_random_state(state["random"], device)
    return state["epoch"], state["seconds"]


def _now(device: torch.device) -> float:
    import time

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
