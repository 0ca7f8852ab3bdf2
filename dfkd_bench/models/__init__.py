"""Classifiers by name: every file of this folder without a leading underscore names and builds its own.

Such a file has a literal ``NAMES = ("...", ...)`` and a function ``build(name, classes, channels)``. The names are read
from the source, so that listing them imports neither the file nor torch; there is no central list.

Every model, built in or a plugin's, takes normalised images [b, C, H, W] of any sensible side and has

- ``forward(images)``: logits [b, K];
- ``features(images)``: logits [b, K], penultimate features [b, F], outputs of the stages [b, C_i, H_i, W_i];
- ``classifier``: the final ``nn.Linear`` (F -> K), to be read, not replaced.

ReLUs overwrite the BatchNorm's output before them, which saves a tenth of a student step: whoever taps a layer takes
its input, or a stage's output.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dfkd_bench.errors import UserError, unknown

if TYPE_CHECKING:
    from torch import nn


def model_names() -> tuple[str, ...]:
    """Names of the built-in models, sorted; no model's file is imported."""
    return tuple(sorted(_homes()))


def build_model(
    name: str, classes: int, channels: int = 3, extra: Mapping[str, Callable[[int, int], nn.Module]] | None = None
) -> nn.Module:
    """A freshly initialised model for ``classes`` classes and images of ``channels`` channels.

    ``extra`` maps names of models from plugins to their ``builder(classes, channels)``. Raises ``UserError`` for an
    unknown name, where a plugin's model has the name of a built-in one, and where it lacks a part.
    """
    homes, extra = _homes(), extra or {}
    if clash := sorted(homes.keys() & extra.keys()):
        raise UserError(f"a plugin's model is called '{clash[0]}' like the built-in one: rename the plugin's")
    if name in extra:
        from dfkd_bench.models._contract import built

        return built(name, extra[name], classes, channels)
    if name not in homes:
        raise unknown("model", name, [*homes, *extra])
    home = import_module(f"{__name__}.{homes[name]}")
    return cast("nn.Module", home.build(name, classes, channels))


def check_model(
    name: str, classes: int, image_shape: tuple[int, int, int], extra: Mapping[str, Callable[[int, int], nn.Module]]
) -> None:
    """Build a plugin's model and pass two images through it; a ``UserError`` says what does not hold.

    Built-in models are not looked at: the tests do that.
    """
    if name in extra:
        from dfkd_bench.models._contract import check

        check(name, extra[name], classes, image_shape)


@functools.cache
def _homes() -> dict[str, str]:
    """Model name -> the module of this package that builds it."""
    homes: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        for name in _names_in(path):
            if name in homes:
                raise ValueError(f"model '{name}' is named by both {homes[name]}.py and {path.name}")
            homes[name] = path.stem
    return homes


def _names_in(path: Path) -> tuple[str, ...]:
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "NAMES" for target in statement.targets
        ):
            return tuple(ast.literal_eval(statement.value))
    raise ValueError(f"{path.name} has no literal NAMES = (...) at its top level")
