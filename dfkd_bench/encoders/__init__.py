"""Text encoders by name: every file of this folder without a leading underscore is one, called like the file.

An encoder is written ``name`` or ``name:argument``. Its file defines one subclass of

- ``TextEncoder``: a text model. It is asked once for each list of texts; what it answers is kept (``text.py``);
- ``RowEncoder``: rows that need no text, made whenever they are asked for.

Making an encoder takes its argument apart and loads nothing: no library, no weights. So it is made in every run, while
``encode`` is called before the runs only. A plugin brings such a class by an entry point or in ``ENCODERS``.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dfkd_bench.errors import UserError, unknown
from dfkd_bench.prompts import PROMPTS

Rows = NDArray[np.float32]

INDEX_ROWS = 124
"""Classes that the shipped Doc2Vec has an index prompt for: not all numbers are words of its corpus."""

NO_MODEL_NEEDED = (
    f"No model is needed on built-in data sets with the prompts {', '.join(PROMPTS)} for `-s METHOD.encoder=sbert` and "
    f"`doc2vec` (P3: of {INDEX_ROWS} classes at most), nor for `onehot` and `random`"
)
"""The end of an error about a model that can't be had."""


class Encoder:
    """An encoder's name, taken apart."""

    expected: ClassVar[str] = "its name alone"
    """How it is written, for errors."""

    def __init__(self, name: str, argument: str = "") -> None:
        """``argument``: what stands behind the colon. Raises ``UserError`` where it is wrong."""
        self.name = name
        self.argument = argument

    @property
    def spec(self) -> str:
        """As the user wrote it."""
        return f"{self.name}:{self.argument}" if self.argument else self.name

    @property
    def model(self) -> str:
        """What records call the model; no path, so that it is the same on every machine."""
        return self.argument or self.name


class RowEncoder(Encoder, ABC):
    """Rows that need no text."""

    path: str | None = None
    """The file they are read from, if any."""

    @property
    @abstractmethod
    def revision(self) -> str:
        """What fixes the numbers: a seed, or the hash of a file."""

    @abstractmethod
    def rows(self, classes: int) -> Rows:
        """float32 [classes, d], finite."""


class TextEncoder(Encoder, ABC):
    """A text model."""

    libraries: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions are kept beside what was encoded."""

    version: ClassVar[int] = 1
    """Raised when this code gives other rows than before for the same weights: what was kept then is not used."""

    @property
    def title(self) -> str:
        """The model, in an error's words."""
        return f"the text model '{self.spec}'"

    @property
    def ways_out(self) -> str:
        """What a user without the model can do: sentences, without the last stop."""
        return NO_MODEL_NEEDED

    def weights(self) -> str | None:
        """The hash of what fixes the numbers, where it can be told without loading the model: local files, settings.

        What is kept is found by it.
        """
        return None

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> tuple[Rows, str]:
        """float32 [n, d] of ``texts``, on the CPU, and the revision: ``weights()``, or a hash of what was loaded.

        The row of a text doesn't depend on the other texts. May raise anything: the user sees one line.
        """


def encoder_names() -> tuple[str, ...]:
    """Names of the built-in encoders, sorted; none of their files is imported."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def encoder_title(name: str, extra: Mapping[str, Any] | None = None) -> str:
    """One line on an encoder: how its file, or a plugin's class, begins. No built-in file is imported."""
    path = Path(__file__).parent / f"{name}.py"
    if path.is_file():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    else:
        text = (extra or {})[name].__doc__
    return (text or "").strip().partition("\n")[0]


def build_encoder(spec: str, extra: Mapping[str, Any] | None = None) -> Encoder:
    """The encoder that ``name`` or ``name:argument`` stands for.

    ``extra`` maps names of encoders from plugins to their classes. ``UserError``: an unknown name, a wrong argument, a
    plugin's encoder that is none.
    """
    name, _, argument = spec.partition(":")
    return encoder_kind(spec, extra)(name, argument)


def encoder_kind(spec: str, extra: Mapping[str, Any] | None = None) -> type[Encoder]:
    """The class of that encoder; whether its argument means anything is not looked at. Errors as above."""
    name, colon, argument = spec.partition(":")
    extra = extra or {}
    if name in encoder_names():
        kind = _built_in(name)
    elif name in extra:
        kind = extra[name]
        if not (inspect.isclass(kind) and issubclass(kind, RowEncoder | TextEncoder)) or inspect.isabstract(kind):
            raise UserError(
                f"text encoder '{name}' of a plugin is no encoder: expected a subclass of "
                "dfkd_bench.encoders.TextEncoder that defines encode"
            )
    else:
        raise unknown("text encoder", name, [*encoder_names(), *extra])
    if colon and not argument:
        raise UserError(f"text encoder '{spec}' has nothing after the colon: expected {kind.expected}")
    return kind


@functools.cache
def _built_in(name: str) -> type[Encoder]:
    module = import_module(f"{__name__}.{name}")
    (kind,) = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Encoder) and value.__module__ == module.__name__
    ]
    return kind


# --- For the encoders' files ------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_line(error: BaseException) -> str:
    """The first line of an error, at most 200 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = text.strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(" .:")
