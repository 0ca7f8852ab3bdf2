"""Show a measurement as text tables, and keep it as JSON and a figure."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from dfkd_bench.record import write_text
from dfkd_bench.speed import figure
from dfkd_bench.speed.values import Cell, Operator, Speed

FOLDER = "speed"
FORMS = ("ours", "plain", "released")
"""What there may be beside ours: ours in fp32, plain PyTorch, the released manner."""


def write(speed: Speed, output: Path) -> tuple[Path, Path]:
    """Write ``OUTPUT/speed/<name>.json`` and the figure beside it; returns both paths."""
    place = output / FOLDER / f"{speed.name}.json"
    write_text(place, speed.model_dump_json(indent=1) + "\n")
    return place, figure.draw(speed, place.with_name(f"{speed.name}.png"))


def render(speed: Speed) -> Group:
    """All tables, for a console."""
    parts: list[RenderableType] = [
        _head(speed),
        "",
        _steps(speed),
        "",
        _forms(speed),
        "",
        _machine(speed),
        "",
        _epoch(speed),
    ]
    for step, operators in speed.profiles.items():
        parts += ["", _profile(step, operators)]
    return Group(*parts)


def _head(speed: Speed) -> str:
    channels, side, _ = speed.image_shape
    facts = speed.hardware
    machine = ", ".join(str(facts[name]) for name in ("gpu", "cpu") if facts.get(name))
    return (
        f"{speed.method}, {speed.pair}, student batch {speed.batch}, synthesis batch {speed.synthesis_batch}, "
        f"images {channels}x{side}x{side}, {speed.classes} classes, {speed.precision}\n"
        f"{machine}; {facts['threads']} threads of {facts['cores']} cores; torch {speed.software['torch']}; medians of "
        f"{speed.repeat} repeats of {speed.steps} steps"
    )


def _steps(speed: Speed) -> Table:
    table = _table("step", "GFLOP", "ms", "images/s", "GFLOP/s", "% peak", "% bound")
    for row in speed.rows:
        table.add_row(
            row.name if row.images in (speed.batch, speed.synthesis_batch) else f"{row.name}, {row.images:,} images",
            f"{row.flop / 1e9:,.1f}",
            _milliseconds(row.ours),
            f"{row.ours.images_per_second:,.0f}",
            f"{row.ours.flop_per_second / 1e9:,.0f}",
            _share(row.ours),
            f"{100 * row.ours.share_of_bound:.0f}",
        )
    return table


def _forms(speed: Speed) -> Table:
    table = _table("beside it, in fp32", *(text for form in FORMS for text in (f"{form} ms", "% peak", "ratio")))
    for row in speed.rows:
        table.add_row(
            row.name,
            _milliseconds(row.exact),
            _share(row.exact),
            ratio(row.faster_than_exact),
            _milliseconds(row.plain),
            _share(row.plain),
            ratio(row.faster_than_plain),
            _milliseconds(row.released),
            _share(row.released),
            ratio(row.faster_than_released),
        )
    return table


def _machine(speed: Speed) -> Table:
    table = _table("measured peak", "TFLOP/s", "matrix product", "convolution")
    for name, peak in speed.machine.peaks.items():
        table.add_row(name, *(f"{value / 1e12:,.2f}" for value in (peak.best, peak.matrix_product, peak.convolution)))
    table.add_row("copy (GB/s)", f"{speed.machine.copy_bytes_per_second / 1e9:,.1f}", "", "")
    for form, size in speed.peak_memory.items():
        table.add_row(f"memory, {form} (MiB)", f"{size / 2**20:,.0f}", "", "")
    if speed.png_seconds is not None:
        table.add_row("PNG files of a batch (ms)", f"{1e3 * speed.png_seconds:,.1f}", "", "")
    return table


def _epoch(speed: Speed) -> Table:
    table = _table(f"one epoch: {speed.steps} generator and {speed.steps} student steps", "ms", "%")
    total = sum(speed.epoch.values())
    for phase, seconds in speed.epoch.items():
        table.add_row(phase, f"{1e3 * seconds:,.1f}", f"{100 * seconds / total:.1f}")
    table.add_row("all", f"{1e3 * total:,.1f}", "100.0")
    return table


def _profile(step: str, operators: tuple[Operator, ...]) -> Table:
    table = _table(f"{step}: operators", "self ms", "%", "calls")
    for one in operators:
        name = one.name if len(one.name) <= 60 else f"{one.name[:57]}..."
        table.add_row(name, f"{1e3 * one.seconds:,.2f}", f"{100 * one.share:.1f}", f"{one.calls:g}")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _milliseconds(cell: Cell | None) -> str:
    return "-" if cell is None else f"{1e3 * cell.seconds:,.1f}"


def _share(cell: Cell | None) -> str:
    return "-" if cell is None else f"{100 * cell.share_of_peak:.0f}"


def ratio(value: float | None) -> str:
    """``2.51x``, ``-`` without a value."""
    return "-" if value is None else f"{value:.2f}x"
