"""Where things live on disk: one folder for everything that can be made again, named by DFKD_BENCH_HOME."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from dfkd_bench.errors import UserError

HOME_VARIABLE = "DFKD_BENCH_HOME"
DATA_VARIABLE = "DFKD_BENCH_DATA"


def expanded(path: Path | str) -> Path:
    """``~`` is the user's home, also where no shell looks at it: behind ``folder:`` and in a variable's quotes.

    ``UserError``: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no home folder of that user") from None


def home() -> Path:
    """``$DFKD_BENCH_HOME``, or the platform's cache folder. Holds data/, digests/, teachers/, embeddings/
    and runs/."""
    named = os.environ.get(HOME_VARIABLE)
    return expanded(named) if named else Path(platformdirs.user_cache_dir("dfkd-bench"))


def data_root(given: Path | None = None) -> Path:
    """Where raw data sets are looked for: ``--data-root``, else ``$DFKD_BENCH_DATA``, else ``data/`` in the home."""
    if given is not None:
        return expanded(given)
    named = os.environ.get(DATA_VARIABLE)
    return expanded(named) if named else home() / "data" / "raw"
