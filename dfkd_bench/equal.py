"""Protocol `equal`: the same student training and the same generation cost for every method.

Equal by construction: student steps, rows of a student batch, optimiser, schedule. Capped and counted by the runner:
images that synthesis passes through the teacher with gradient. Each method names the setting that takes up the budget
(``absorbs``) and says what a run costs (``generation_cost``); the largest value that fits is taken. The method's own:
losses, temperature, and everything else.
"""

from __future__ import annotations

import importlib.resources
import math
import tomllib
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

from pydantic import ValidationError

from dfkd_bench.errors import UserError, validation_line
from dfkd_bench.method import Frozen, Method, Published, Schedule


class Budget(Frozen):
    """What every method gets on one data set: a table of ``benchmarks/equal.toml``."""

    settings: Literal["paper", "smoke"]
    epochs: int
    student_steps: int
    batch_size: int
    teacher_images: int
    lr: tuple[float, ...]
    lr_min: float
    momentum: float
    weight_decay: float


@cache
def budget(dataset: str) -> Budget:
    """The budget of a data set; what its table doesn't say is that of ``[default]``."""
    text = importlib.resources.files("dfkd_bench.benchmarks").joinpath("equal.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    return Budget(**{**tables["default"], **tables.get(dataset, {})})


def learning_rate(method: type[Method], dataset: str, pair: str) -> tuple[float, str]:
    """The student's initial learning rate and where it comes from: chosen on validation, or the middle candidate."""
    for key in (f"{dataset}/{pair}", dataset):
        if key in method.equal_lr:
            return method.equal_lr[key], "learning rate chosen on validation"
    candidates = sorted(budget(dataset).lr)
    return candidates[len(candidates) // 2], "learning rate not chosen on validation yet"


def student_schedule(own: Schedule, given: Budget, lr: float) -> Schedule:
    """The budget's schedule in the method's rhythm: its share of warm-up epochs and, as nearly as the epoch can be
    divided, its student steps a round."""
    trained = own.epochs - own.warmup_epochs
    warmup = math.ceil(given.epochs * own.warmup_epochs / trained)
    divisors = [steps for steps in range(1, given.student_steps + 1) if given.student_steps % steps == 0]
    steps = min(divisors, key=lambda steps: abs(math.log(steps / own.student_steps)))
    if own.rounds_per_epoch == 1:
        steps = given.student_steps
    return Schedule(
        epochs=given.epochs + warmup,
        warmup_epochs=warmup,
        rounds_per_epoch=given.student_steps // steps,
        student_steps=steps,
        batch_size=given.batch_size,
        optimizer="sgd",
        lr=lr,
        momentum=given.momentum,
        weight_decay=given.weight_decay,
        lr_min=given.lr_min,
        pool_cap=own.pool_cap,
    )


def fit(
    name: str,
    method: type[Method],
    own: Published,
    dataset: str,
    pair: str,
    num_classes: int,
    overrides: dict[str, Any],
) -> Published:
    """``own`` settings brought to the budget of ``dataset``. ``overrides`` are the user's own settings."""
    given = budget(dataset)
    lr, note = learning_rate(method, dataset, pair)
    if "lr" in overrides:
        lr, note = overrides["lr"], "learning rate changed by -s"
    fixed = Schedule.model_fields.keys() - {"lr", "pool_cap"}
    for setting in overrides.keys() & fixed:
        raise UserError(f"-s {name}.{setting}: protocol equal gives every method the same; leave it out")
    try:
        schedule = student_schedule(own.schedule, given, lr)
        if "pool_cap" in overrides:
            schedule = Schedule(**{**schedule.model_dump(), "pool_cap": overrides["pool_cap"]})
        config = {**own.config, **method.described}
        config |= {key: value for key, value in overrides.items() if key in method.Config.model_fields}
        settled = method.Config(**config)
        size = _largest(given.batch_size, lambda size: method.batch_rows(settled, size) <= given.batch_size)
        schedule = schedule.model_copy(update={"batch_size": size})
        if method.absorbs and method.absorbs not in overrides:
            config[method.absorbs] = _absorbed(name, method, config, schedule, given, num_classes)
        complete = method.Config(**config)
    except ValidationError as error:
        raise UserError(f"{name}: {validation_line(error)}") from None
    cost = method.generation_cost(complete, schedule, num_classes)
    if cost > given.teacher_images:
        raise UserError(
            f"{name} would pass {cost:,} images through the teacher; protocol equal allows {given.teacher_images:,} on "
            f"{dataset}: leave out -s {name}.{method.absorbs}"
        )
    return Published(
        schedule=schedule,
        config=complete.model_dump(mode="json"),
        origin="ours",
        source=f"protocol equal, {note}; otherwise: {own.source}",
    )


def _absorbed(
    name: str, method: type[Method], config: dict[str, Any], schedule: Schedule, given: Budget, num_classes: int
) -> int:
    """The largest value of the absorbing setting whose cost stays within the budget."""

    def cost(value: int) -> int:
        return method.generation_cost(method.Config(**{**config, method.absorbs: value}), schedule, num_classes)

    if cost(1) > given.teacher_images:
        raise UserError(
            f"{name}: {method.absorbs}=1 already passes {cost(1):,} images through the teacher; protocol equal allows "
            f"{given.teacher_images:,}"
        )

    def fits(value: int) -> bool:
        try:
            return cost(value) <= given.teacher_images
        except ValidationError:  # beyond the setting's own bound
            return False

    return _largest(given.teacher_images, fits)


def _largest(high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to ``high`` that fits; what fits has nothing below it that doesn't. 1 fits."""
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
