"""Checks of what a method's file says of it: ``CARD``, docstring, ``needs``."""

from __future__ import annotations

import re
import sys
from typing import get_args

from dfkd_bench.check.bench import Subject
from dfkd_bench.check.broken import Broken
from dfkd_bench.method import Need

CARD_KEYS: dict[str, tuple[type, ...]] = {
    "title": (str,),
    "family": (str,),
    "year": (int, type(None)),
    "venue": (str,),
    "confirmed": (bool,),
    "knowledge": (str,),
}


def card_complete(subject: Subject) -> None:
    """The file has a literal `CARD` with title, family, year, venue, confirmed and knowledge."""
    card = subject.source.card()
    if not card:
        raise Broken("no literal `CARD = {...}` can be read from the method's file")
    for name, types in CARD_KEYS.items():
        kinds = " or ".join("None" if kind is type(None) else kind.__name__ for kind in types)
        if name not in card:
            raise Broken(f"`CARD` has no '{name}' ({kinds})")
        if type(card[name]) not in types:
            raise Broken(f"`CARD['{name}']` is {card[name]!r}, expected {kinds}")
        if name in ("title", "family", "knowledge") and not card[name]:
            raise Broken(f"`CARD['{name}']` is empty")


def docstring_link(subject: Subject) -> None:
    """The file's docstring links to the paper (controls need none)."""
    if not subject.is_control and not re.search(r"https?://\S+\.\S+", _docstring(subject)):
        raise Broken("the file's docstring has no http link")


def docstring_differences(subject: Subject) -> None:
    """The file's docstring lists the differences from the paper and from the released code."""
    for other in ("paper", "released code"):
        if not re.search(rf"^Differences from the {other}\n+1\. \S", _docstring(subject), re.MULTILINE):
            raise Broken(f"the file's docstring has no line 'Differences from the {other}' followed by '1. ...'")


def _docstring(subject: Subject) -> str:
    module = sys.modules.get(subject.method_class.__module__)
    return getattr(module, "__doc__", None) or ""


def needs_known(subject: Subject) -> None:
    """`needs` names only what the runner can lend."""
    for need in sorted(subject.method_class.needs):
        if need not in get_args(Need):
            raise Broken(f"`needs` has '{need}'; known: {', '.join(get_args(Need))}")


def training_data_for_controls_only(subject: Subject) -> None:
    """Only a control asks for training data."""
    if "training_data" in subject.method_class.needs and not subject.is_control:
        raise Broken("`needs` has 'training_data', but the family in `CARD` is not 'control'")


CHECKS = (
    card_complete,
    docstring_link,
    docstring_differences,
    needs_known,
    training_data_for_controls_only,
)
