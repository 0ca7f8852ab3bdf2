"""``PATH/dataset.json``: what the user knows of a folder of images, and what therefore is not measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfkd_bench.data._reason import reason
from dfkd_bench.errors import UserError, unknown

FILE = "dataset.json"
_KEYS = ("mean", "std", "classes")


@dataclass(frozen=True)
class Stated:
    """The file's content; None where it says nothing."""

    mean: tuple[float, ...] | None = None  # 1 or 3 numbers, of images in [0, 1]; with ``std`` or not at all
    std: tuple[float, ...] | None = None
    classes: tuple[str, ...] | None = None  # names of folders, in the order of the teacher's outputs


def stated(folder: Path) -> Stated:
    """What ``folder/dataset.json`` says; nothing if there is no such file.

    ``UserError``: it is no JSON object, has an unknown key, or a value that can't be one.
    """
    file = folder / FILE
    if not file.is_file():
        return Stated()
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} can't be read as JSON ({reason(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f'{file} is no JSON object: expected {{"mean": [...], "std": [...], "classes": [...]}}')
    for key in content:
        if key not in _KEYS:
            raise unknown(f"key of {file}", key, _KEYS)
    mean = _numbers(file, content, "mean", "numbers from 0 to 1, of images in [0, 1]", lambda value: 0 <= value <= 1)
    std = _numbers(file, content, "std", "numbers above 0, up to 1, of images in [0, 1]", lambda value: 0 < value <= 1)
    if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
        raise UserError(f"{file} needs mean and std, each with 1 number (gray) or 3 (RGB), or neither of them")
    return Stated(mean, std, _classes(file, content))


def _numbers(
    file: Path, content: dict[str, Any], key: str, expected: str, fits: Callable[[float], bool]
) -> tuple[float, ...] | None:
    if key not in content:
        return None
    values = content[key]
    if (
        not isinstance(values, list)
        or len(values) not in (1, 3)
        or not all(type(value) in (int, float) and fits(value) for value in values)
    ):
        raise UserError(f"{file}: {key} is {json.dumps(values)[:80]}: expected a list of 1 or 3 {expected}")
    return tuple(map(float, values))


def _classes(file: Path, content: dict[str, Any]) -> tuple[str, ...] | None:
    if "classes" not in content:
        return None
    names = content["classes"]
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{file}: classes is {json.dumps(names)[:80]}: expected a list of at least 2 names of folders")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{file}: '{twice[0]}' is there twice among the classes: each stands for one output")
    return tuple(names)
