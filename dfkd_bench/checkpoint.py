"""Saving and loading nested state (dicts, lists, numbers, tensors) as one safetensors file: no pickle.

The tree without its tensors is JSON in the file's metadata; the tensors are stored by number. Keys of dictionaries
may be strings or integers (optimisers use both), tuples come back as tuples, and channels-last tensors in that layout:
fused optimisers on the CPU pair a weight with its momentum by their place in memory.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dfkd_bench.record import write_bytes

QUICK = 0.2  # seconds; a checkpoint that takes no longer is written after each epoch
WORTH = 20  # times what the last one took lies between two others


class Pace:
    """When a checkpoint is due. State may be big and change in each epoch (a bank of 886 MB): to write it after each
    one would take longer than short epochs do, and wear out a disk."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._took = 0.0
        self._ended = now()

    @property
    def is_due(self) -> bool:
        """Whether the last one was quick, or is long enough ago."""
        return self._took <= QUICK or self._now() - self._ended >= WORTH * self._took

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the writing of one."""
        start = self._now()
        yield
        self._ended = self._now()
        self._took = self._ended - start


def save_tree(path: Path, tree: Any) -> None:
    """Write ``tree`` atomically."""
    tensors: dict[str, Tensor] = {}
    skeleton = json.dumps(_take_apart(tree, tensors))
    write_bytes(path, safetensors.torch.save(tensors, metadata={"tree": skeleton}))


def load_tree(path: Path) -> Any:
    """Read what ``save_tree`` wrote, onto the CPU; raises ValueError if the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            skeleton = json.loads((file.metadata() or {})["tree"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return _put_together(skeleton, tensors)


def _take_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # Contiguous copies of their own: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().contiguous().clone()
        channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
        return {"c" if channels_last and not value.is_contiguous() else "t": name}
    if isinstance(value, Mapping):
        keys = [["i", key] if isinstance(key, int) else ["s", key] for key in value]
        return {"d": [[key, _take_apart(item, tensors)] for key, item in zip(keys, value.values(), strict=True)]}
    if isinstance(value, (list, tuple)):
        return {"l" if isinstance(value, list) else "u": [_take_apart(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"v": value}
    raise TypeError(f"a {type(value).__name__} can't be saved")


def _put_together(node: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = node.items()
    if kind == "t":
        return tensors[value]
    if kind == "c":
        return tensors[value].contiguous(memory_format=torch.channels_last)
    if kind == "d":
        return {key: _put_together(item, tensors) for (_, key), item in value}
    if kind == "l":
        return [_put_together(item, tensors) for item in value]
    if kind == "u":
        return tuple(_put_together(item, tensors) for item in value)
    return value


def random_state(device: torch.device) -> dict[str, Any]:
    """The global random streams of Python, NumPy and torch (CPU and, if used, the GPU)."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries draw from the global one
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """The inverse of ``random_state``."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def seed_everything(seed: int) -> None:
    """Seed the global random streams of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global one
    torch.manual_seed(seed)
