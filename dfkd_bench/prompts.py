"""Class names -> texts: the prompts, and filling them in."""

from __future__ import annotations

import string
from collections.abc import Sequence

from dfkd_bench.class_names import clean
from dfkd_bench.errors import UserError, unknown

PROMPTS = {
    "P1": "{name}",
    "P2": "a photo of a {name}",
    "P3": "a class of {index}",
    "nayer": "a image of {name}",  # sic: the prompt of NAYER's released code
}
"""Prompts that have a name of their own (P1 to P3: NAYER's ablation)."""

FIELDS = ("name", "index")


def template(prompt: str) -> str:
    """The template of a prompt: itself, or what a name of ``PROMPTS`` stands for.

    ``UserError``: unknown fields, a field with a format, or no field at all, which would make all classes one.
    """
    text = PROMPTS.get(prompt, prompt)
    try:
        fields = _fields(text)
    except ValueError as error:
        raise UserError(f"prompt '{prompt}' is no template ({error}): fields are {{name}} and {{index}}") from None
    for field in fields:
        if field not in FIELDS:
            raise unknown("field of the prompt", field, FIELDS, f"The prompt was '{prompt}'")
    if not fields:
        raise UserError(
            f"prompt '{prompt}' has no field: expected {{name}} or {{index}} in it, or {', '.join(PROMPTS)}"
        )
    if _is_formatted(text):
        raise UserError(f"prompt '{prompt}' can't be filled in: write plain {{name}} or {{index}}, without a format")
    return text


def render(prompt: str, class_names: Sequence[str]) -> list[str]:
    """One text a class; ``{name}`` is in lower case with blanks for '_' and '-', ``{index}`` counts from 0.

    Classes of one name get the same text.

    >>> render("a photo of a {name}", ["Aquarium_fish"])
    ['a photo of a aquarium fish']
    """
    text = template(prompt)
    return [text.format(name=clean(name), index=index) for index, name in enumerate(class_names)]


def names_classes(prompt: str) -> bool:
    """Whether the texts depend on the class names. Otherwise the first K texts serve any K classes."""
    return "name" in _fields(template(prompt))


def _is_formatted(text: str) -> bool:
    """Whether a field has a format, which a class name may not fit, or which may fill the memory."""
    return any(spec or conversion for _, _, spec, conversion in string.Formatter().parse(text))


def _fields(text: str) -> list[str]:
    return [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
