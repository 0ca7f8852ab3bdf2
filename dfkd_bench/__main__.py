"""``python -m dfkd_bench``."""

from dfkd_bench.cli import main

if __name__ == "__main__":
    main()
