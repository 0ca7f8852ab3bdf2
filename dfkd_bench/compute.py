"""Device, precision and threads: resolved once, passed on as one value."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dfkd_bench.errors import UserError
from dfkd_bench.frozen_norm import lighten
from dfkd_bench.job import Precision


@dataclass(frozen=True)
class Compute:
    """Where and how a run computes. bf16 means autocast: weights, statistics and losses stay in fp32."""

    device: torch.device
    precision: Precision = "fp32"

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which networks run.

        Without autocast's cache: it keeps a weight's bf16 copy until the context ends, whatever an optimizer does to
        the weight in between, and a method makes all steps of a batch of images in one.
        """
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)
        return contextlib.nullcontext()

    def place(self, model: nn.Module) -> nn.Module:
        """``model`` on the device, channels-last: the layout in which convolutions are fastest on both kinds."""
        placed = model.to(self.device).to(memory_format=torch.channels_last)
        return lighten(placed) if self.device.type == "cuda" and self.precision == "bf16" else placed


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` as a device that is really there."""
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (index and not index.isdigit()):
        raise UserError(f"--device {name}: expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= int(index or 0):
        raise UserError(f"--device {name}: this machine has {count} CUDA devices; use --device auto or cpu")
    return torch.device("cuda", int(index or 0))


def resolve_precision(name: Literal["auto", "fp32", "bf16"], device: torch.device, side: int) -> Precision:
    """``auto`` is bf16 where the hardware computes in it and images are at least 16 pixels wide, fp32 elsewhere.

    On 8x8 digits bf16 gains a quarter (19.0 against 24.5 ms a student step on one core with avx512_bf16), too little
    to give up fp32's exactness in a protocol of minutes; on 28x28 images it gains up to a half.
    """
    if name != "auto":
        return name
    return "bf16" if side >= 16 and has_bf16(device) else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether ``device`` multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool({"avx512_bf16", "amx_bf16"} & _cpu_flags())


def cores_at_hand() -> int:
    """Cores that this process may use: those it is bound to, and no more than a container's quota of time is worth."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(Path("/sys/fs/cgroup"))
    return cores if math.isinf(quota) else max(1, min(cores, math.ceil(quota)))


def _quota(groups: Path) -> float:
    """Processors' worth of time that the control group has (`docker run --cpus=2`); infinite: no limit, or unknown."""
    try:
        if (groups / "cpu.max").is_file():
            limit, period = (groups / "cpu.max").read_text().split()
        else:
            limit, period = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        share = float(limit) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file; "max"
        return math.inf
    return share if share > 0 else math.inf


def prepare(device: torch.device, deterministic: bool = False) -> None:
    """Make ``device`` the one of this process, before its first work there. A CPU needs nothing.

    Otherwise streams, events and pinned memory that name no device are those of GPU 0. What is computed in fp32 is
    computed in fp32: by default cuDNN rounds the operands of convolutions to TF32, with 10 bits for 23. With
    ``deterministic``, kernels whose sums have no fixed order are left aside where there are others.
    """
    if device.type != "cuda":
        return
    torch.cuda.set_device(device)
    with warnings.catch_warnings():  # torch 2.9 and 2.10 advise a newer switch; with it, reading this one is an error
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read with the first matrix product
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling what torch.empty returns helps to find mistakes, and costs a pass over each tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False


def set_threads(count: int) -> None:
    """Threads of this process, which begins to compute now.

    Two processes with two threads each on two cores are far slower than one after the other, so the engine gives each
    worker its share.
    """
    torch.set_num_threads(max(1, count))
    keep_freed_memory()


@cache
def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, for the next step to use again (Linux with glibc; else nothing).

    Otherwise large activations are mapped, filled with zeros by the kernel and unmapped in every step: a tenth of the
    time of a step on a CPU, in places more than the operator itself.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def hardware(device: torch.device, workers: int) -> dict[str, str | int]:
    """What the record says about the machine; no host name."""
    facts: dict[str, str | int] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "workers": workers,
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


@cache
def _cpu_info() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_flags() -> set[str]:
    return set(_cpu_info().get("flags", "").split())


def _cpu_name() -> str:
    """The processor's name. Virtual machines often say no more than its maker's: then family and model tell it."""
    facts = _cpu_info()
    name = facts.get("model name") or platform.processor() or platform.machine()
    vague = not any(sign.isdigit() for sign in name) and {"cpu family", "model"} <= set(facts)
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if vague else name
