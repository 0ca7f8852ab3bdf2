"""The figure of a measurement: time of each step in each form, and how many times as long as ours it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dfkd_bench.report.plots import SIZE, new_figure
from dfkd_bench.speed.values import Cell, Row, Speed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMS = {"ours": "#0072b2", "exact": "#56b4e9", "plain": "#e69f00", "released": "#999999"}
LABELS = {"ours": "dfkd-bench", "exact": "dfkd-bench", "plain": "plain PyTorch", "released": "released manner"}
STEPS = {
    "generator step": "generator step",
    "student step": "student step",
    "student step with batch": "student step\nwith batch",
}
"""Row -> its name below the bars."""

_UNITS = ((10.0, 1.0, "s"), (0.0, 1e-3, "ms"))


def draw(speed: Speed, path: Path) -> Path:
    """Draw the generator's and the student's steps as bars; ``path`` ends in .png (200 dpi), .pdf or .svg."""
    rows = [row for row in speed.rows if row.name in STEPS]
    slowest = max(cell.seconds for row in rows for cell in _cells(row).values())
    unit, unit_name = next((factor, name) for least, factor, name in _UNITS if slowest >= least)
    with new_figure(path, SIZE) as figure:
        axes = figure.add_subplot()
        used: set[str] = set()
        for place, row in enumerate(rows):
            there = _cells(row)
            for index, (form, cell) in enumerate(there.items()):
                left = place + 0.23 * (index - (len(there) - 1) / 2)
                label = f"{LABELS[form]}\n{cell.precision}" if form not in used else None
                used.add(form)
                axes.bar(left, cell.seconds / unit, 0.21, color=FORMS[form], label=label)
                _write_above(axes, left, cell.seconds / unit, cell.seconds / row.ours.seconds, form == "ours")
        axes.set_xticks(range(len(rows)), [STEPS[row.name] for row in rows])
        axes.set_xlim(-0.55, len(rows) - 0.45)
        axes.set_ylim(0, 1.12 * slowest / unit)
        axes.set_ylabel(f"time of a step [{unit_name}]")
        axes.set_xlabel(f"above the bars: {unit_name}, or how many times as long", fontsize=6.5)
        axes.grid(True, axis="y", color="#e5e5e5", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(axis="x", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(_title(speed), loc="left")
        figure.legend(
            loc="outside lower center",
            ncols=2 if len(used) == 4 else 3,
            frameon=False,
            columnspacing=1.2,
            handlelength=1.2,
        )
    return path


def _cells(row: Row) -> dict[str, Cell]:
    """The forms that there are of a step."""
    cells = {"ours": row.ours, "exact": row.exact, "plain": row.plain, "released": row.released}
    return {form: cell for form, cell in cells.items() if cell}


def _write_above(axes: Axes, left: float, height: float, ratio: float, is_ours: bool) -> None:
    text = f"{height:.3g}" if is_ours else f"{ratio:.1f}x"
    axes.annotate(text, (left, height), (0, 1.5), textcoords="offset points", ha="center", va="bottom", fontsize=6.5)


def _title(speed: Speed) -> str:
    side = speed.image_shape[1]
    teacher, student = speed.pair.split(":")
    where = str(speed.hardware.get("gpu", f"{speed.hardware['cpu']}, {speed.hardware['threads']} threads"))
    sizes = f"batch {speed.batch}" if speed.batch == speed.synthesis_batch else (
        f"batches {speed.batch} and {speed.synthesis_batch}"
    )  # fmt: skip
    return f"{speed.method}, {teacher} to {student}, {side}x{side}, {sizes}\n{where}"
