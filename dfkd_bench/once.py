"""What a command looks at once: a folder of a million images takes seconds to list, and many ask for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Found = TypeVar("Found")

_kept: dict[Hashable, Any] | None = None


@contextmanager
def looking_once() -> Iterator[None]:
    """Inside, ``once`` keeps what it finds: files of the user's own are taken to stay as they are."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def once(key: Hashable, find: Callable[[], Found]) -> Found:
    """``find()``, inside ``looking_once`` only if it was not found under that key before. Errors are not kept."""
    if _kept is None:
        return find()
    if key not in _kept:
        _kept[key] = find()
    found: Found = _kept[key]
    return found


def is_kept(key: Hashable) -> bool:
    """Whether ``once`` would answer at once."""
    return _kept is not None and key in _kept
