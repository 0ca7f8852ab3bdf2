"""Figures at the size of a paper's column. matplotlib's objects only: no global figure, no window."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dfkd_bench.errors import UserError
from dfkd_bench.files import write_bytes
from dfkd_bench.record import Record
from dfkd_bench.report.groups import Group, group
from dfkd_bench.report.statistics import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (3.5, 2.9)
WIDE = (7.0, 3.6)
"""Inches: one column of a two-column paper, and both."""

LETTERS = 16.8  # of a title, an inch
ROW_LETTERS = 30  # of a row's name, a line
CROWDED = 8  # methods; with more, bands would hide the lines

FORMATS = (".png", ".pdf", ".svg")

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
"""Okabe and Ito, "Color Universal Design" (2008): told apart by colour-blind readers; without black and yellow."""

_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))
_GREYS = ("#555555", "#888888", "#aaaaaa")
_UNITS = ((2 * 3600.0, 3600.0, "hours"), (10 * 60.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))
STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.6,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # labels and titles are the user's: a dollar sign begins no formula
    "svg.hashsalt": "dfkd-bench",  # the same records give the same file
}


@dataclass(frozen=True)
class Band:
    """A method's curve over its seeds, one entry an epoch: mean time [s], mean, lowest and highest accuracy [%]."""

    seconds: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def band(records: Sequence[Record]) -> Band:
    """Put the curves of runs that differ in the seed only together, epoch by epoch.

    A run that stopped because its student was not finite keeps its last accuracy; the times are those of the others.
    """
    length = max(len(record.curve) for record in records)
    epochs = range(length)
    accuracies = [[record.curve[min(index, len(record.curve) - 1)].accuracy for record in records] for index in epochs]
    complete = [record.curve for record in records if len(record.curve) == length]
    return Band(
        seconds=tuple(fmean(curve[index].seconds for curve in complete) for index in epochs),
        mean=tuple(map(fmean, accuracies)),
        low=tuple(map(min, accuracies)),
        high=tuple(map(max, accuracies)),
    )


def accuracy_against_time(
    records: Sequence[Record], path: Path, title: str = "", method_order: Sequence[str] = ()
) -> Path:
    """Draw accuracy against headline time: a line a method (mean over seeds) in a band from lowest to highest seed.

    The teacher is a dashed line across, controls are grey. Time is logarithmic where methods differ tenfold.
    Of many methods the range of the seeds is drawn at the end alone, and the legend stands in order of accuracy. Runs
    without an accuracy are in the table only.

    Args:
        records: one protocol, data set, pair and teacher, as for a table.
        path: ends in .png (200 dpi), .pdf or .svg; its folder is made.
        title: above the axes, none if empty.
        method_order: which method gets the first colour, and so on.

    Returns:
        ``path``.

    Raises:
        UserError: another suffix, no curve to draw, or records that can't be compared.
    """
    curves = [(one, band(runs)) for one in group(records, method_order) if (runs := _with_curve(one))]
    if not curves:
        raise UserError("no finished run has a curve: nothing to draw; see the table for the reasons")
    crowded = sum(not one.is_control for one, _ in curves) > CROWDED
    with new_figure(path, WIDE if crowded else SIZE) as figure:
        axes = figure.add_subplot()
        _draw(axes, curves, crowded)
        _draw_teacher(axes, records)
        if title:
            axes.set_title(_folded(title, (WIDE if crowded else SIZE)[0] - _BESIDE), loc="left")
        if crowded:
            ends = {one.label: curve.mean[-1] for one, curve in curves}
            lines, names = axes.get_legend_handles_labels()
            order = sorted(range(len(names)), key=lambda index: -ends.get(names[index], 101))
            texts = [
                f"{names[index]}  {ends[names[index]]:.1f}" if names[index] in ends else names[index] for index in order
            ]
            lines = [lines[index] for index in order]
            figure.legend(lines, texts, loc="outside right upper", frameon=False, handlelength=2.2, labelspacing=0.35)
        else:
            figure.legend(loc="outside lower center", ncols=3, frameon=False, columnspacing=1.2, handlelength=2.2)
    return path


@dataclass(frozen=True)
class Panel:
    """One quantity of all rows: ``values`` of a row's seeds by its label; a row without any is said to be missing."""

    xlabel: str
    values: Mapping[str, Sequence[float]]
    reference: float | None = None  # a dashed line across, such as the teacher's accuracy


def dots(labels: Sequence[str], panels: Sequence[Panel], path: Path, title: str = "") -> Path:
    """Draw a line a row: the mean in its Student-t 95 % interval, each seed a faint dot below.

    Args:
        labels: the rows, from the top.
        panels: side by side, one to three.
        path: ends in .png (200 dpi), .pdf or .svg; its folder is made.
        title: above the panels, none if empty.

    Returns:
        ``path``.

    Raises:
        UserError: another suffix, or nothing to draw.
    """
    if not any(values for panel in panels for values in panel.values.values()):
        raise UserError("no finished run: nothing to draw; see the table for the reasons")
    names = ["\n".join(textwrap.wrap(label, ROW_LETTERS)) for label in labels]
    rows = sum(0.2 + 0.09 * name.count("\n") for name in names)
    size = (SIZE[0] + 1.6 * (len(panels) - 1), 1.2 + max(0.6, rows))
    with new_figure(path, size) as figure:
        every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel, colour in zip(every, panels, _COLOURS, strict=False):
            _draw_dots(axes, labels, panel, colour)
        every[0].set_yticks(range(len(labels)), names)
        every[0].set_ylim(len(labels) - 0.5, -0.5)
        if title:
            figure.suptitle(_folded(title, size[0]), **_TITLE)
        figure.supxlabel("bars: 95 % interval, dots: seeds", fontsize=STYLE["legend.fontsize"], color=_GREYS[0])
    return path


def _draw_dots(axes: Axes, labels: Sequence[str], panel: Panel, colour: str) -> None:
    for place, label in enumerate(labels):
        values = panel.values.get(label, ())
        if not values:
            axes.text(0.02, place, "no value", transform=axes.get_yaxis_transform(), va="center", color=_GREYS[1])
            continue
        found = interval(values)
        axes.plot(values, [place + 0.25] * len(values), "o", color=colour, alpha=0.4, markersize=3, markeredgewidth=0)
        axes.errorbar(
            found.mean, place, xerr=found.half_width, fmt="o", color=colour, markersize=4.5, capsize=2.5, linewidth=1.2
        )
    if panel.reference is not None:
        axes.axvline(panel.reference, color="black", linestyle=(0, (4, 2)), linewidth=0.8, zorder=1)
    axes.set_xlabel(panel.xlabel)
    axes.grid(True, color="#e5e5e5", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def sweep(
    curves: Mapping[str, Mapping[float, Sequence[float]]],
    path: Path,
    xlabel: str,
    ylabel: str,
    title: str = "",
    teacher: float | None = None,
) -> Path:
    """Draw accuracy against a setting: a line a curve (mean over seeds) in a band from lowest to highest seed.

    Args:
        curves: label -> setting -> accuracies [%], one a seed; settings without any are left out.
        path: ends in .png (200 dpi), .pdf or .svg; its folder is made.
        xlabel: the setting; its axis is logarithmic where it spans a factor of ten.
        ylabel: the accuracy.
        title: above the axes, none if empty.
        teacher: its accuracy [%], a dashed line across.

    Returns:
        ``path``.

    Raises:
        UserError: another suffix, or nothing to draw.
    """
    settings = sorted({setting for curve in curves.values() for setting, values in curve.items() if values})
    if not settings:
        raise UserError("no finished run: nothing to draw; see the table for the reasons")
    with new_figure(path, SIZE) as figure:
        axes = figure.add_subplot()
        for index, (label, curve) in enumerate(curves.items()):
            colour = _COLOURS[index % len(_COLOURS)]
            found = sorted((setting, values) for setting, values in curve.items() if values)
            if not found:
                continue
            at = [setting for setting, _ in found]
            low, high = [min(values) for _, values in found], [max(values) for _, values in found]
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0, zorder=3)
            axes.plot(
                at, [fmean(values) for _, values in found], "o-", color=colour, markersize=3, label=label, zorder=5
            )
        if teacher is not None:
            axes.axhline(teacher, color="black", linestyle=(0, (4, 2)), linewidth=0.8, label="teacher", zorder=1)
        if settings[-1] >= 10 * settings[0] > 0:
            axes.set_xscale("log")
        axes.set_xticks(settings, [f"{setting:g}" for setting in settings])
        axes.minorticks_off()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(True, color="#e5e5e5", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if title:
            axes.set_title(_folded(title, SIZE[0] - _BESIDE), loc="left")
        figure.legend(loc="outside lower center", ncols=3, frameon=False, columnspacing=1.2, handlelength=2.2)
    return path


_TITLE: Any = {"fontsize": STYLE["axes.titlesize"], "x": 0.01, "ha": "left"}
_BESIDE = 0.5  # inches left of the axes, over which their title begins


def _folded(title: str, width: float) -> str:
    """Lines that a figure of ``width`` inches has room for."""
    return "\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, int(LETTERS * width)))


@contextmanager
def new_figure(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure of ``size`` inches in the project's style, saved as ``path`` in the end."""
    if path.suffix not in FORMATS:
        raise UserError(f"can't draw '{path.name}': expected a name that ends in {', '.join(FORMATS)}")

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure whole, in the form that the name's suffix says: tasks of a job array may end with it at once."""
    drawn = io.BytesIO()
    facts = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    figure.savefig(drawn, format=path.suffix.removeprefix("."), dpi=200, metadata=facts)
    write_bytes(path, drawn.getvalue())


def _with_curve(one: Group) -> list[Record]:
    return [record for record in one.scored if record.curve]


def _draw(axes: Axes, curves: Sequence[tuple[Group, Band]], crowded: bool) -> None:
    ends = [curve.seconds[-1] for _, curve in curves]
    factor, unit = next((factor, unit) for least, factor, unit in _UNITS if max(ends) >= least)
    ends_of_methods = [curve.seconds[-1] for one, curve in curves if not one.is_control] or ends
    controls = methods = 0
    for one, curve in curves:
        if one.is_control:
            colour, dash, width = _GREYS[controls % len(_GREYS)], _DASHES[controls % len(_DASHES)], 1.0
            controls += 1
        else:
            # Colours first, then the dash pattern changes: thirteen methods are still told apart.
            colour, dash, width = _COLOURS[methods % len(_COLOURS)], _DASHES[methods // len(_COLOURS) % 4], 1.2
            methods += 1
        times = [second / factor for second in curve.seconds]
        order = 2 if one.is_control else 3
        if crowded:
            axes.vlines(times[-1], curve.low[-1], curve.high[-1], color=colour, linewidth=0.8, zorder=order)
        else:
            axes.fill_between(times, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0, zorder=order)
        axes.plot(times, curve.mean, color=colour, linestyle=dash, linewidth=width, label=one.label, zorder=order + 2)
        axes.plot(times[-1], curve.mean[-1], "o", color=colour, markersize=3, zorder=order + 2)
    if max(ends_of_methods) > 10 * min(ends_of_methods):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(left=0)
    job = curves[0][0].records[0].job
    axes.set_xlabel(f"time without evaluation [{unit}], {job.protocol} protocol")
    several = any(len(_with_curve(one)) > 1 for one, _ in curves)
    spread = f"\n{'bars' if crowded else 'bands'}: lowest to highest seed" if several else ""
    axes.set_ylabel(f"{job.evaluate_on} accuracy [%]{spread}")
    axes.grid(True, color="#e5e5e5", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_teacher(axes: Axes, records: Sequence[Record]) -> None:
    known = next((record.teacher for record in records if record.teacher), None)
    if known is not None and known.accuracy is not None:
        axes.axhline(known.accuracy, color="black", linestyle=(0, (4, 2)), linewidth=0.8, label="teacher", zorder=1)
