"""Time of a call, and the work in it: the device has finished when the clock is read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry


@dataclass(frozen=True)
class Work:
    """What a call must do at least, whatever is fused in it.

    ``flop``: floating-point operations of its matrix products and convolutions, backward included; a multiplication
    with its addition is two. ``moved``: numbers that these read and write, each operand once. What is done element by
    element (BatchNorm, activations, optimisers) is in neither, nor is what a captured graph replays.
    """

    flop: int
    moved: int

    def per(self, steps: float) -> Work:
        """The same for each of ``steps``."""
        return Work(round(self.flop / steps), round(self.moved / steps))

    def without(self, other: Work) -> Work:
        """What is left when ``other``, a part of it, is taken out."""
        return Work(self.flop - other.flop, self.moved - other.moved)

    def shortest(self, flop_per_second: float, bytes_per_second: float, bytes_each: int) -> float:
        """Seconds that it takes at least: the larger of the arithmetic and the memory bound."""
        return max(self.flop / flop_per_second, self.moved * bytes_each / bytes_per_second)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall time of one call [s], from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def repeated(call: Callable[[], object], device: torch.device, repeat: int) -> tuple[float, ...]:
    """Seconds of ``repeat`` calls after warm-up: one on a CPU, three on a GPU, whose kernels are chosen there."""
    for _ in range(3 if device.type == "cuda" else 1):
        call()
    return tuple(seconds_of(call, device) for _ in range(repeat))


def per(seconds: tuple[float, ...], count: float) -> tuple[float, ...]:
    """The same for each of the ``count`` steps of a call."""
    return tuple(value / count for value in seconds)


def middle(seconds: tuple[float, ...]) -> float:
    """The median, which one disturbed repeat doesn't move."""
    return median(seconds)


def work_of(call: Callable[[], object]) -> Work:
    """Count the work in ``call``; its arithmetic by ``torch.utils.flop_counter``."""
    backward: Any = {torch.ops.aten.convolution_backward: _backward_flop}
    with FlopCounterMode(display=False, custom_mapping=backward) as arithmetic, _Operands() as operands:
        call()
    return Work(int(arithmetic.get_total_flops()), operands.moved)


def _backward_flop(
    grad_out: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    wanted: Sequence[bool],
    **_: object,
) -> int:
    """Of a convolution's backward, from shapes: the gradients of its input and of its weight take as much as itself.

    PyTorch's own count takes the weight's gradient of a grouped convolution for that of a full one: 960 times as much
    in a MobileNetV2.
    """
    once = 2 * math.prod(x if transposed else grad_out) * math.prod(weight[1:])
    return once * (wanted[0] + wanted[1])


class _Operands(TorchDispatchMode):
    """Adds up the operands of the operators that ``FlopCounterMode`` counts."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.moved += sum(value.numel() for value in tree_leaves((args, result)) if isinstance(value, Tensor))
        return result
