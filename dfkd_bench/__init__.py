"""dfkd-bench: the comparative benchmark suite of data-free knowledge distillation."""

__version__ = "0.1.0"
