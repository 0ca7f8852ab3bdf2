"""Records that belong together: one group a row, its runs differ in nothing but the seed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dfkd_bench.errors import UserError
from dfkd_bench.record import Record

CONTROLS = ("scratch", "real_kd", "ood_kd", "noise_kd")
"""What a data-free method is measured against, in the order in which tables show it."""


@dataclass(frozen=True)
class Group:
    """Runs of one method with one set of settings, in the order of their seeds."""

    label: str  # the method's name, then the settings in which it differs from its other groups
    method: str
    records: tuple[Record, ...]

    @property
    def is_control(self) -> bool:
        """Whether this is a control and not a data-free method."""
        return self.method in CONTROLS

    @property
    def scored(self) -> tuple[Record, ...]:
        """The runs that came to an accuracy, collapsed students included."""
        return tuple(record for record in self.records if record.status == "done" and record.last is not None)

    def last(self) -> dict[int, float]:
        """Seed -> last-epoch accuracy [%]."""
        return {record.job.seed: record.last.accuracy for record in self.scored if record.last is not None}


def group(records: Sequence[Record], method_order: Sequence[str] = ()) -> tuple[Group, ...]:
    """Controls first, then methods in ``method_order``, then the others by name.

    Raises:
        UserError: there are no records, or they can't be compared (``require_comparable``).
    """
    require_comparable(records)
    methods: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        key = json.dumps(settings(record), sort_keys=True)
        methods.setdefault(record.job.method, {}).setdefault(key, []).append(record)
    order = [*CONTROLS, *(name for name in method_order if name not in CONTROLS)]
    order += sorted(methods.keys() - set(order))
    return tuple(found for name in order if name in methods for found in _labelled(name, list(methods[name].values())))


def settings(record: Record) -> dict[str, Any]:
    """What may differ between the rows of a table: configuration, schedule, precision; flat, without the seed."""
    job = record.job
    schedule = job.schedule.model_dump(mode="json")
    renamed = {(f"schedule.{name}" if name in job.config else name): value for name, value in schedule.items()}
    return {**job.config, **renamed, "precision": job.precision}


def require_comparable(records: Sequence[Record]) -> None:
    """One protocol and version, data set, pair, teacher, evaluated split; no run twice.

    Raises:
        UserError: with what is mixed and its values.
    """
    if not records:
        raise UserError("no records to report on: run something first, or name another output folder or data set")
    facts: Mapping[str, Callable[[Record], object]] = {
        "protocols": lambda record: record.job.protocol,
        "protocol versions": lambda record: record.job.protocol_version,
        "data sets": lambda record: record.job.dataset,
        "pairs": lambda record: record.job.pair,
        "evaluated splits": lambda record: record.job.evaluate_on,
        # A run that failed early knows its teacher only if the job names the weights.
        "teachers (sha256)": lambda record: record.teacher.sha256[:12] if record.teacher else _promised(record),
    }
    for kind, fact in facts.items():
        values = sorted({str(value) for value in map(fact, records) if value is not None})
        if len(values) > 1:
            raise UserError(f"one report can't mix {kind}: found {', '.join(values)}; select records of one of them")
    identity, count = Counter(record.job_id for record in records).most_common(1)[0]
    if count > 1:
        raise UserError(f"run {identity} is given {count} times; give each record once")


def _promised(record: Record) -> str | None:
    return record.job.teacher.sha256[:12] if record.job.teacher.sha256 else None


def _labelled(method: str, found: list[list[Record]]) -> list[Group]:
    """Groups of one method, labelled by the settings in which they differ and sorted by them."""
    sets = [settings(records[0]) for records in found]
    names = sorted({name for one in sets for name in one})
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in sets}) > 1]
    keys = [tuple(_sortable(one.get(name)) for name in differing) for one in sets]
    return [
        Group(
            label=" ".join([method, *(f"{name}={_short(sets[index].get(name))}" for name in differing)]),
            method=method,
            records=tuple(sorted(found[index], key=lambda record: record.job.seed)),
        )
        for index in sorted(range(len(found)), key=lambda index: keys[index])
    ]


def _sortable(value: object) -> tuple[float, str]:
    return (float(value), "") if isinstance(value, (int, float)) else (float("inf"), str(value))


def _short(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "/".join(map(_short, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
