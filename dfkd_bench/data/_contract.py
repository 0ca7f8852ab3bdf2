"""What is asked of a plugin's data set before its files are read."""

from __future__ import annotations

from dfkd_bench.data._dataset import DataSet


def fault(name: str, value: object) -> str | None:
    """What is wrong with what a plugin names ``name`` in its ``DATASETS``, and what was expected; None: nothing."""
    if not isinstance(value, DataSet):
        what = f"is the class {value.__name__}" if isinstance(value, type) else f"is of type {type(value).__name__}"
        return f"{what}: expected a dfkd_bench.data.DataSet(...)"
    if value.name != name:
        return f"calls itself '{value.name}': expected the name that it has among DATASETS"
    channels = value.image_shape[0] if len(value.image_shape) == 3 else 0
    if channels not in (1, 3) or min(value.image_shape) < 1:
        return f"has image_shape {value.image_shape}: expected (C, H, W) with 1 or 3 channels"
    if not len(value.mean) == len(value.std) == channels or min(value.std) <= 0:
        return f"has mean {value.mean} and std {value.std}: expected a number a channel, std above 0"
    if not callable(value.names) and len(value.names) != value.num_classes:
        return f"has {len(value.names)} names of classes and num_classes {value.num_classes}: expected as many"
    if not value.test_only and value.validation_size < 1:
        return f"has validation_size {value.validation_size}: expected 1 or more, or test_only=True"
    return None if callable(value.read) else "has a `read` that can't be called: expected read(data_set, root, part)"
