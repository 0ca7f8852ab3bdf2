"""A figure of images: a row a method, a column a class. It draws what it is given and reads nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dfkd_bench.report.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 7.16
"""Inches: both columns of a two-column paper."""

PER_CELL, CLASSES = 4, 12
"""Images in a cell, two by two; classes that are shown at most."""

_LEFT, _NUMBER, _EDGE, _GAP = 1.0, 0.42, 0.06, 0.05  # inches: method names, a column of numbers, border, between cells
_LARGEST_CELL = 0.72  # inches
_LINE = 0.105  # inches a line of small type
_SHARP = 32  # pixels: up to this side pixels stay squares; larger images are resampled
_GREY, _FAINT, _EMPTY = "#666666", "#cccccc", "#f3f3f3"


@dataclass(frozen=True)
class Block:
    """A row: ``images`` by class, uint8 [n, C, H, W], None if they are not at hand; ``numbers`` by their column."""

    label: str
    note: str
    images: Mapping[int, np.ndarray] | None
    numbers: Mapping[str, str] = field(default_factory=dict)
    is_control: bool = False


def draw(
    blocks: Sequence[Block],
    class_names: Mapping[int, str],
    path: Path,
    title: str = "",
    notes: Sequence[str] = (),
) -> Path:
    """Draw ``blocks`` from the top; the first one is set apart as the reference.

    Args:
        blocks: rows; their numbers have the same columns in the same order.
        class_names: the columns, by class.
        path: ends in .png (200 dpi), .pdf or .svg; its folder is made.
        title: above everything, none if empty.
        notes: paragraphs below it.

    Returns:
        ``path``.

    Raises:
        UserError: another suffix.
    """
    numbers = list(dict.fromkeys(name for block in blocks for name in block.numbers))
    right = _NUMBER * len(numbers)
    cell = min(_LARGEST_CELL, (WIDTH - _LEFT - right - _EDGE) / len(class_names) - _GAP)
    width = _LEFT + len(class_names) * (cell + _GAP) + right + _EDGE
    heads = [_head(name) for name in class_names.values()]
    longest = max(len(line) for head in heads for line in head)
    # The letters of the font are 0.62 times as wide as its size at most.
    size = min(6.5, max(4.5, 72 * (cell + _GAP) / (0.62 * longest)))
    # A letter of the notes is about 0.055 inches wide, one of the bold title 0.075.
    below = [line for note in notes for line in textwrap.wrap(note, int((width - 2 * _EDGE) / 0.047))]
    above = textwrap.wrap(title, int((width - 2 * _EDGE) / 0.066))
    top = _EDGE + 1.6 * _LINE * len(above) + _LINE * max(2, *map(len, heads)) + 0.06
    height = top + len(blocks) * (cell + _GAP) + 0.18 + _LINE * len(below) + _EDGE
    with new_figure(path, (width, height)) as figure:
        figure.set_layout_engine("none")  # everything has its place
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # inches from the upper left corner
        axes.set_axis_off()
        for index, line in enumerate(above):
            axes.text(_EDGE, _EDGE + 1.6 * _LINE * index, line, va="top", fontsize=8, fontweight="bold")
        for column, head in enumerate(heads):
            centre = _LEFT + column * (cell + _GAP) + cell / 2
            _draw_head(axes, head, centre, top, ha="center", fontsize=size)
        for column, name in enumerate(numbers):
            place = width - _EDGE - (len(numbers) - 1 - column) * _NUMBER
            _draw_head(axes, name.split(), place, top, ha="right", fontsize=5.5, color=_GREY)
        for row, block in enumerate(blocks):
            # The reference stands a little apart.
            upper = top + row * (cell + _GAP) + (0.1 if row else 0)
            _draw_block(axes, block, list(class_names), numbers, upper, cell, width)
        if len(blocks) > 1:
            axes.plot((_EDGE, width - _EDGE), (top + cell + _GAP / 2 + 0.05,) * 2, color=_FAINT, linewidth=0.6)
        start = height - _EDGE - _LINE * len(below)
        for index, line in enumerate(below):
            axes.text(_EDGE, start + _LINE * index, line, va="top", fontsize=6, color=_GREY)
    return path


def _draw_block(
    axes: Axes, block: Block, classes: Sequence[int], numbers: Sequence[str], upper: float, cell: float, width: float
) -> None:
    middle = upper + cell / 2
    note = textwrap.wrap(block.note, 24)[:1]
    label = textwrap.wrap(block.label, 15)[: int((cell + _GAP - _LINE) / (1.15 * _LINE))]
    first = middle - (1.15 * len(label) + len(note)) * _LINE / 2
    colour = _GREY if block.is_control else "black"
    for index, line in enumerate(label):
        axes.text(_EDGE, first + 1.15 * _LINE * index, line, va="top", fontsize=7.5, color=colour)
    for index, line in enumerate(note):
        place = first + _LINE * (1.15 * len(label) + index) + 0.015
        axes.text(_EDGE, place, line, va="top", fontsize=6, color=_GREY)
    for column, name in enumerate(numbers):
        place = width - _EDGE - (len(numbers) - 1 - column) * _NUMBER
        axes.text(place, middle, block.numbers.get(name, "-"), ha="right", va="center", fontsize=6.5, color=colour)
    if block.images is None:
        centre = _LEFT + (len(classes) * (cell + _GAP) - _GAP) / 2
        axes.text(centre, middle, "images not at hand", ha="center", va="center", fontsize=7, color=_GREY)
    for column, number in enumerate(classes if block.images is not None else ()):
        left = _LEFT + column * (cell + _GAP)
        images = (block.images or {}).get(number, ())
        for index, (x, y, side) in enumerate(_places(left, upper, cell)):
            if index >= len(images):
                extent = (x, x + side, y + side, y)
                axes.imshow(np.full((1, 1, 3), int(_EMPTY[1:3], 16), np.uint8), extent=extent, aspect="auto")
            else:
                picture, how = _picture(images[index])
                axes.imshow(picture, extent=(x, x + side, y + side, y), aspect="auto", interpolation=how)
    # Drawing images sets the limits anew.
    axes.set_xlim(0, width)
    axes.set_ylim(axes.figure.get_figheight(), 0)  # type: ignore[union-attr]


def _places(left: float, upper: float, cell: float) -> Iterator[tuple[float, float, float]]:
    """Left and upper corner and side of the images of a cell."""
    gap = 0.012
    side = (cell - gap) / 2
    for index in range(PER_CELL):
        yield left + index % 2 * (side + gap), upper + index // 2 * (side + gap), side


def _picture(image: np.ndarray) -> tuple[np.ndarray, str]:
    """[C, H, W] as matplotlib wants it, gray as three channels, and how it is interpolated."""
    pixels = image.transpose(1, 2, 0)
    pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    side = max(pixels.shape[:2])
    if side > _SHARP:
        return pixels, "antialiased"
    factor = -(-96 // side)  # pixels stay equal squares when the figure is rasterised
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1), "antialiased"


def _head(name: str) -> list[str]:
    """A class name in up to three lines, the first of its synonyms; words stay whole."""
    first = name.partition(",")[0]
    lines = textwrap.wrap(first, 9, break_long_words=False, break_on_hyphens=False, max_lines=3, placeholder=" ...")
    return [line if len(line) <= 13 else line[:12] + "." for line in lines] or [""]


def _draw_head(axes: Axes, lines: Sequence[str], x: float, top: float, **style: Any) -> None:
    """Line by line on common baselines, the last one just above ``top``."""
    for index, line in enumerate(reversed(lines)):
        axes.text(x, top - 0.05 - _LINE * index, line, va="baseline", **style)
