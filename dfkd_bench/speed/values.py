"""What was measured, as immutable values that pass through JSON unchanged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from dfkd_bench.errors import UserError
from dfkd_bench.job import Precision
from dfkd_bench.method import Frozen
from dfkd_bench.speed.timing import Work, middle

SCHEMA_VERSION = 1


PeakName = Literal["fp32", "bf16", "tf32"]
"""tf32: fp32 whose convolutions round their operands, on GPUs; what PyTorch does unless it is told otherwise."""


class Peak(Frozen):
    """The most that this machine was seen to do at one precision [FLOP/s]."""

    matrix_product: float
    convolution: float

    @property
    def best(self) -> float:
        """What shares refer to."""
        return max(self.matrix_product, self.convolution)


class Cell(Frozen):
    """One step in one form. ``seconds`` is the median of ``repeats``."""

    seconds: float = Field(gt=0)
    repeats: tuple[float, ...]
    precision: Precision
    images_per_second: float
    flop_per_second: float
    share_of_peak: float  # of ``Peak.best`` at this precision, in [0, 1] up to noise
    share_of_bound: float  # the larger of the arithmetic and the memory bound [s] over ``seconds``


class Row(Frozen):
    """One step in all its forms; None: there is no such form of it. Ratios above 1 mean that ``ours`` is faster."""

    name: str
    images: int  # that pass in a step
    flop: int  # of matrix products and convolutions
    moved: int  # numbers that these read and write
    ours: Cell
    exact: Cell | None = None  # ours with --precision fp32, which is every method's reference
    plain: Cell | None = None
    released: Cell | None = None
    faster_than_exact: float | None = None
    faster_than_plain: float | None = None
    faster_than_released: float | None = None


class Operator(Frozen):
    """A line of a profile, for one step: time in the operator itself [s], its share of all, calls."""

    name: str
    seconds: float
    share: float
    calls: float


class Machine(Frozen):
    """What this machine can do."""

    peaks: dict[PeakName, Peak]
    copy_bytes_per_second: float  # a large tensor copied on the device: bytes read and written


class Speed(Frozen):
    """Everything of one measurement."""

    schema_version: int = SCHEMA_VERSION
    method: str
    config: dict[str, Any]
    pair: str
    batch: int
    synthesis_batch: int
    image_shape: tuple[int, int, int]  # C, H, W
    classes: int
    precision: Precision  # of ``ours``; the other forms are fp32
    steps: int  # generator steps of a synthesised batch, and student steps of a phase
    repeat: int
    rows: tuple[Row, ...]
    png_seconds: float | None = None  # released manner: writing a synthesised batch as PNG files
    machine: Machine
    epoch: dict[str, float]  # phase of one epoch -> seconds
    peak_memory: dict[str, int]  # form -> bytes: of the GPU's allocator, or resident (libraries included) on a CPU
    profiles: dict[str, tuple[Operator, ...]]  # step -> its most expensive operators
    hardware: dict[str, str | int]
    software: dict[str, str]
    git: dict[str, str | bool]
    measured: str  # when

    @property
    def name(self) -> str:
        """File name without suffix: what was measured on which kind of device."""
        channels, side, _ = self.image_shape
        cpu = [str(self.hardware["cpu"]), f"cpu{self.hardware['threads']}"]
        parts = [self.method, self.pair, f"b{self.batch}", f"g{self.synthesis_batch}", f"{channels}x{side}"]
        parts += [f"k{self.classes}", *([str(self.hardware["gpu"])] if "gpu" in self.hardware else cpu), self.precision]
        return "_".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in parts)


def cell(
    repeats: Sequence[float], images: int, work: Work, precision: Precision, machine: Machine, ordinary: bool = False
) -> Cell:
    """A step's figures from its ``repeats`` [s]. ``ordinary``: fp32 is as PyTorch has it, which on GPUs is TF32."""
    name: PeakName = "tf32" if ordinary and precision == "fp32" and "tf32" in machine.peaks else precision
    seconds, peak = middle(tuple(repeats)), machine.peaks[name].best
    shortest = work.shortest(peak, machine.copy_bytes_per_second, 2 if precision == "bf16" else 4)
    return Cell(
        seconds=seconds,
        repeats=tuple(repeats),
        precision=precision,
        images_per_second=images / seconds,
        flop_per_second=work.flop / seconds,
        share_of_peak=work.flop / seconds / peak,
        share_of_bound=shortest / seconds,
    )


def row(
    name: str,
    images: int,
    work: Work,
    ours: Cell,
    exact: Cell | None = None,
    plain: Cell | None = None,
    released: Cell | None = None,
) -> Row:
    """A row with its ratios: the median over the rounds of the other form's time over ours."""
    return Row(
        name=name,
        images=images,
        flop=work.flop,
        moved=work.moved,
        ours=ours,
        exact=exact,
        plain=plain,
        released=released,
        faster_than_exact=ratio(exact, ours),
        faster_than_plain=ratio(plain, ours),
        faster_than_released=ratio(released, ours),
    )


def ratio(other: Cell | None, ours: Cell) -> float | None:
    """How many times as long the other form takes. Both have one time a round, and drifts are shorter in a round."""
    if other is None:
        return None
    return middle(tuple(theirs / mine for theirs, mine in zip(other.repeats, ours.repeats, strict=True)))


def read(path: Path) -> Speed:
    """Read a measurement back; a damaged or foreign file is a ``UserError`` that names it."""
    try:
        return Speed.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{path} is no measurement of `dfkd-bench speed`: {str(error).splitlines()[0]}") from None
