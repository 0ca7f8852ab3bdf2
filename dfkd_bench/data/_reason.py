"""The reason of an error, for the one line that a user gets."""

from __future__ import annotations

import urllib.error


def reason(error: BaseException) -> str:
    """An error in one line, without the path that the caller names anyway."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):
        error = error.reason
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
