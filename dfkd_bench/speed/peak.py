"""What this machine can do: the best of a few large matrix products, convolutions and copies, timed here and now."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dfkd_bench.job import Precision
from dfkd_bench.speed.timing import repeated
from dfkd_bench.speed.values import Machine, Peak, PeakName

SIDES = {"cpu": 1536, "cuda": 8192}
"""Rows and columns of the matrices: large enough that the device is busy, small enough for milliseconds."""

CONVOLUTIONS = {"cpu": (32, 64, 32), "cuda": (256, 256, 32)}
"""Images, channels and side of a 3x3 convolution, channels-last."""

COPIED = {"cpu": 2**27, "cuda": 2**31}
"""Bytes of the tensor that is copied: more than any cache holds."""


def measure(device: torch.device, precision: Precision) -> Machine:
    """What ``device`` can do in fp32 and, if that is another one, at ``precision``."""
    names: tuple[Precision, ...] = ("fp32",) if precision == "fp32" else ("fp32", precision)
    peaks: dict[PeakName, Peak] = {name: peak(device, name) for name in names}
    if device.type == "cuda":
        peaks["tf32"] = _tf32_peak(device)
    return Machine(peaks=peaks, copy_bytes_per_second=copy_rate(device))


def best_of(one: Machine, other: Machine) -> Machine:
    """The better figures of two measurements: a machine that others use is not always at its best."""
    peaks = {
        name: Peak(
            matrix_product=max(first.matrix_product, other.peaks[name].matrix_product),
            convolution=max(first.convolution, other.peaks[name].convolution),
        )
        for name, first in one.peaks.items()
    }
    rate = max(one.copy_bytes_per_second, other.copy_bytes_per_second)
    return Machine(peaks=peaks, copy_bytes_per_second=rate)


def _tf32_peak(device: torch.device) -> Peak:
    """With the operands of convolutions rounded to 10 bits, as PyTorch does unless it is told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        return peak(device, "fp32")
    finally:
        torch.backends.cudnn.allow_tf32 = before


def peak(device: torch.device, precision: Precision, repeat: int = 5) -> Peak:
    """The peak of ``device`` at ``precision`` [FLOP/s]; fp32 is without TF32, as in a run."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    side = SIDES[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    images, channels, width = CONVOLUTIONS[device.type]
    x = torch.randn(images, channels, width, width, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        return Peak(
            matrix_product=2 * side**3 / _best(lambda: left @ right, device, repeat),
            convolution=2 * 9 * images * (channels * width) ** 2
            / _best(lambda: F.conv2d(x, weight, padding=1), device, repeat),
        )  # fmt: skip


def copy_rate(device: torch.device, repeat: int = 5) -> float:
    """Bytes a second, read and written, of copying a large tensor on ``device``."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source), device, repeat)


def _best(call: Callable[[], object], device: torch.device, repeat: int) -> float:
    return min(repeated(call, device, repeat))
