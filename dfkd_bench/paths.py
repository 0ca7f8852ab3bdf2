"""Where things live on disk: one folder for everything that can be made again, named by DFKD_BENCH_HOME."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

HOME_VARIABLE = "DFKD_BENCH_HOME"
DATA_VARIABLE = "DFKD_BENCH_DATA"


def home() -> Path:
    """``$DFKD_BENCH_HOME``, or the platform's cache folder. Holds data/, digests/, teachers/, embeddings/
    and runs/."""
    named = os.environ.get(HOME_VARIABLE)
    return Path(named).expanduser() if named else Path(platformdirs.user_cache_dir("dfkd-bench"))


def data_root(given: Path | None = None) -> Path:
    """Where raw data sets are looked for: ``--data-root``, else ``$DFKD_BENCH_DATA``, else ``data/`` in the home."""
    if given is not None:
        return given.expanduser()
    named = os.environ.get(DATA_VARIABLE)
    return Path(named).expanduser() if named else home() / "data" / "raw"
