"""The figure of an ablation: a line a row, or accuracy against the setting that its rows sweep over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dfkd_bench.ablation import Ablation, Measure, RowRecords, axis_value
from dfkd_bench.job import Job
from dfkd_bench.report.ablation_table import SCALES
from dfkd_bench.report.plots import Panel, dots, sweep
from dfkd_bench.report.verdicts import Measured, level_in, measured, scored

_LABELS: dict[str, str] = {
    "noisy_layer_bytes": "noisy layers [MB]",
    "diversity": "diversity within a class\n[real images = 1]",
    "coverage": "coverage\n[share of real images]",
    "near_duplicates": "images with a near double [%]",
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
    """Label -> setting -> accuracies. Rows of a method that differ in something else, too, are other curves."""
    runs = [(item.row.method, run, _others(run.job, axis)) for item in results for run in scored(item).values()]
    curves: dict[str, dict[float, list[float]]] = {}
    for method, run, others in runs:
        setting = axis_value(run.job, axis)
        if setting is None or not run.last:
            continue
        same = [seen for of, _, seen in runs if of == method]
        apart = [f"{name} {value}" for name, value in others.items() if any(seen.get(name) != value for seen in same)]
        label = ", ".join([method, *(text.replace("_", " ") for text in apart)])
        curves.setdefault(label, {}).setdefault(setting, []).append(run.last.accuracy)
    return curves


def _others(job: Job, axis: str) -> dict[str, object]:
    """Every setting of a run but the axis."""
    return {name: value for name, value in {**job.schedule.model_dump(), **job.config}.items() if name != axis}


def _panels(ablation: Ablation, results: Sequence[RowRecords]) -> list[Panel]:
    """One for each measure that a run has by itself; a level that depends on another run is in the verdicts alone.

    So is a level that no run reaches: each would stand at its end.
    """
    known: dict[str, tuple[Measure, float | None]] = {}
    for measure, level in [*((claim.measure, claim.level) for claim in ablation.claims), *_asked_for(ablation)]:
        if measure in _LABELS and level != "weaker":
            whole = " of the whole run" if measure == "seconds" else ""
            behind = whole if level is None else f" to {level:g} % of teacher"
            known.setdefault(_LABELS[measure] + behind, (measure, level))
    panels = []
    for label, (measure, number) in known.items():
        found = {item.row.label: _values(measure, number, item) for item in results}
        never = [one.censored for values in found.values() for one in values]
        if never and all(never):
            continue
        of_all = {row: [one.value * SCALES.get(measure, 1.0) for one in values] for row, values in found.items()}
        panels.append(Panel(f"{label}\n[or to the end]" if any(never) else label, of_all))
    return panels


def _asked_for(ablation: Ablation) -> list[tuple[Measure, None]]:
    return [(measure, None) for measure in ablation.columns]


def _values(measure: Measure, level: float | None, item: RowRecords) -> list[Measured]:
    found = [measured(run, measure, level_in(run, level)) for run in scored(item).values()]
    return [one for one in found if one is not None]
