"""Time the steps of a run on this machine beside a plain and a released-manner form of them.

    python -m dfkd_bench.benchmarks.speed --batch 128 --threads 2 --output results

The same as ``dfkd-bench speed``, whose ``--help`` has all options: it prints tables and writes
``OUTPUT/speed/<name>.json`` and a figure beside it. No data set and no text model is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from dfkd_bench import cli


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command of the module's docstring."""
    sys.argv[1:] = ["speed", *(sys.argv[1:] if arguments is None else arguments)]
    cli.main()


if __name__ == "__main__":
    main()
