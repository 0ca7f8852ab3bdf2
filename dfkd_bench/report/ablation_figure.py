"""The figure of an ablation: a line a row, or accuracy against the setting that its rows sweep over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dfkd_bench.ablation import Ablation, Claim, RowRecords, axis_value
from dfkd_bench.report.ablation_table import MEGABYTE
from dfkd_bench.report.plots import Panel, dots, sweep
from dfkd_bench.report.verdicts import level_of, measured, scored

_LABELS = {
    "noisy_layer_bytes": "noisy layers [MB]",
    "diversity": "diversity within a class\n[real images = 1]",
    "coverage": "coverage\n[share of real images]",
    "epochs": "epochs",
    "seconds": "seconds",
}


def draw(ablation: Ablation, results: Sequence[RowRecords], path: Path) -> Path:
    """Draw last-epoch accuracies and, beside them, up to two of the measures that claims are about.

    An ablation with an ``axis`` gets a curve a method instead. Returns ``path``.

    Raises:
        UserError: another suffix than .png, .pdf or .svg, or no finished run.
    """
    records = [record for item in results for record in item.records]
    teacher = next((record.teacher.accuracy for record in records if record.teacher), None)
    accuracy = f"{ablation.evaluate_on} accuracy [%]"
    title = f"{ablation.title}\n{ablation.dataset}, {ablation.pair}, {_seeds(results)}"
    if ablation.axis is not None:
        setting = ablation.axis.replace("_", " ")
        spread = f"{accuracy}\nbands: lowest to highest seed"
        return sweep(_curves(results, ablation.axis), path, setting, spread, title, teacher)
    last = {item.row.label: [run.last.accuracy for run in scored(item).values() if run.last] for item in results}
    named = accuracy if teacher is None else f"{accuracy}, dashed: teacher"
    panels = [Panel(named, last, teacher), *_panels(ablation, results)]
    return dots([item.row.label for item in results], panels[:3], path, title)


def _seeds(results: Sequence[RowRecords]) -> str:
    """``n = 5``, or ``n = 3 to 5`` where rows differ."""
    counts = sorted({len(found) for item in results if (found := scored(item))})
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}" if counts else "n = 0"


def _curves(results: Sequence[RowRecords], axis: str) -> dict[str, dict[float, list[float]]]:
    curves: dict[str, dict[float, list[float]]] = {}
    for item in results:
        for run in scored(item).values():
            setting = axis_value(run.job, axis)
            if setting is not None and run.last:
                curves.setdefault(item.row.method, {}).setdefault(setting, []).append(run.last.accuracy)
    return curves


def _panels(ablation: Ablation, results: Sequence[RowRecords]) -> list[Panel]:
    """One for each measure that a run has by itself; a level that depends on another run is in the verdicts alone."""
    known: dict[str, Claim] = {}
    for claim in ablation.claims:
        if claim.measure in _LABELS:
            level = f" to {claim.level:g} % of teacher" if isinstance(claim.level, float) else ""
            known.setdefault(_LABELS[claim.measure] + level, claim)
    return [Panel(label, {item.row.label: _values(claim, item) for item in results}) for label, claim in known.items()]


def _values(claim: Claim, item: RowRecords) -> list[float]:
    scale = MEGABYTE if claim.measure == "noisy_layer_bytes" else 1.0
    found = [measured(run, claim.measure, level_of(claim, run)) for run in scored(item).values()]
    return [one.value / scale for one in found if one is not None]
