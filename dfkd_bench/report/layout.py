"""What stands in a table: rows of controls and methods, and the notes without which they can't be read."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median_low
from typing import Literal

from dfkd_bench.record import Record
from dfkd_bench.report.groups import Group, group
from dfkd_bench.report.published import PublishedValue, distinct, published
from dfkd_bench.report.statistics import Interval, interval, paired_difference

Section = Literal["teacher", "control", "method"]

UNCONFIRMED, CONCURRENT = "†", "‡"
PHASES = ("synthesis", "sampling", "distillation", "total")
"""Times of a row. The total holds the set-up, too, and not the evaluation."""

TIMES_NOTE = (
    "times are means; the total includes set-up and excludes evaluation; images: images put into the pool (0: the "
    "method has none and makes new ones in each step); MiB: peak memory (GPU allocator, or resident on a CPU)"
)

_PROTOCOLS = {
    "smoke": "minutes on a CPU, not comparable with published numbers",
    "equal": "the same student training and generation cost for every method, its own losses",
    "paper": "each method's published settings where there are any, their origin below",
}
_REASON_LENGTH = 160


@dataclass(frozen=True)
class Cited:
    """A published accuracy [%], or another value with its unit, and the number of its reference."""

    value: float
    reference: int
    unit: str = ""


@dataclass(frozen=True)
class Row:
    """One line. None stands for "does not apply" or "there is no such number"."""

    label: str
    section: Section
    last: Interval | None  # last epoch, accuracy [%]
    best: Interval | None  # best epoch on the evaluated split, accuracy [%]
    published: tuple[Cited, ...] = ()
    seconds: Mapping[str, float] | None = None  # PHASES -> mean [s]
    images: float | None = None  # synthetic images handed to the pool, mean
    memory: int | None = None  # peak over the runs [bytes]
    knowledge: str = ""  # outside knowledge used
    marks: str = ""
    remarks: tuple[str, ...] = ()  # what became of runs that are missing or collapsed

    @property
    def n(self) -> int | None:
        """Seeds behind the accuracy; None for the teacher."""
        if self.section == "teacher":
            return None
        return self.last.n if self.last else 0


@dataclass(frozen=True)
class Column:
    """``lines`` gives a row's cell, a line each. Columns next to each other with one ``over`` share that heading."""

    key: str
    name: str
    lines: Callable[[Row], tuple[str, ...]]
    over: str = ""
    decimal: bool = True  # aligned at the decimal point; False: text, aligned left


@dataclass(frozen=True)
class Table:
    """``facts``: what all rows share, for machines. ``notes`` and ``references`` are printed below the rows."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    references: tuple[str, ...]  # number i stands at place i - 1
    facts: Mapping[str, str]


class _References:
    """Numbers sources in the order in which rows cite them; a source says which of its values are whose."""

    def __init__(self) -> None:
        self._details: dict[tuple[str, str], list[str]] = {}

    def cite(self, values: Iterable[PublishedValue]) -> tuple[Cited, ...]:
        return tuple(Cited(value.value, self._number(value)) for value in distinct(values))

    def texts(self) -> tuple[str, ...]:
        return tuple(
            " ".join(part for part in (f"{'; '.join(details)}:" if details else "", source, confidence) if part)
            for (source, confidence), details in self._details.items()
        )

    def _number(self, value: PublishedValue) -> int:
        key = (value.source, "" if value.confidence.startswith("primary") else f"[{value.confidence}]")
        details = self._details.setdefault(key, [])
        epochs = f"{value.epochs} epochs" if value.epochs else ""
        detail = ", ".join(text for text in (value.variant, epochs, value.caution) if text)
        if detail and f"{value.value:.2f} {detail}" not in details:
            details.append(f"{value.value:.2f} {detail}")
        return list(self._details).index(key) + 1


def build(records: Sequence[Record], title: str, method_order: Sequence[str] = ()) -> Table:
    """Lay ``records`` out: the teacher, the controls, then the methods in ``method_order`` and any others by name.

    A method with several settings has a row for each, labelled by what differs. Failed, unsupported and collapsed
    runs are rows or remarks on their row, never dropped.

    Raises:
        UserError: nothing to show, or records that can't be compared (see ``groups.require_comparable``).
    """
    groups = group(records, method_order)
    references = _References()
    teacher = _teacher_row(groups, references)
    rows = tuple(_row(one, references) for one in groups)
    return Table(
        title=title,
        columns=_columns(groups[0].records[0].job.evaluate_on, rows),
        rows=teacher + rows,
        notes=tuple(_notes(groups, teacher + rows)),
        references=references.texts(),
        facts=_facts(groups),
    )


def accuracy(value: Interval | None, spread: bool = True, sign: str = "") -> str:
    """``91.20 ± 0.40``, without the interval where there is none, ``-`` without a value. ``sign="+"``: a difference."""
    if value is None:
        return "-"
    if value.half_width is None or not spread:
        return f"{value.mean:{sign}.2f}"
    return f"{value.mean:{sign}.2f} ± {value.half_width:.2f}"


def _teacher_row(groups: Sequence[Group], references: _References) -> tuple[Row, ...]:
    known = [record for one in groups for record in one.records if record.teacher]
    if not known or known[0].teacher is None:
        return ()
    cited = references.cite(_published("teacher", known[0]))
    measured = known[0].teacher.accuracy
    last = None if measured is None else Interval(measured, None, 1)
    return (Row("teacher", "teacher", last=last, best=None, published=cited, knowledge="the training data and labels"),)


def _row(one: Group, references: _References) -> Row:
    scored = one.scored
    best = [record.best.accuracy for record in scored if record.best]
    times = {
        phase: fmean(record.total_seconds if phase == "total" else record.seconds.get(phase, 0.0) for record in scored)
        for phase in PHASES
        if scored
    }
    return Row(
        label=one.label,
        section="control" if one.is_control else "method",
        last=interval(list(one.last().values())) if scored else None,
        best=interval(best) if best else None,
        published=references.cite(_published(one.method, one.records[0])),
        seconds=times or None,
        images=fmean(record.counters.images_made for record in scored) if scored else None,
        memory=max((record.peak_memory for record in scored if record.peak_memory is not None), default=None),
        knowledge=" / ".join(sorted({record.knowledge for record in scored or one.records})),
        marks=_marks(one),
        remarks=tuple(_remarks(one)),
    )


def _published(name: str, record: Record) -> tuple[PublishedValue, ...]:
    if record.job.protocol == "smoke":  # small nets, small data: nothing to compare with
        return ()
    if record.job.evaluate_on != "test":  # published numbers are of the test images
        return ()
    return published(name, record.job.dataset, record.job.teacher.model, record.job.student)


def _marks(one: Group) -> str:
    unconfirmed = any(not record.method.confirmed for record in one.records)
    concurrent = any(_concurrent(record) for record in one.scored)
    return UNCONFIRMED * unconfirmed + CONCURRENT * concurrent


def _concurrent(record: Record) -> bool:
    return any(int(facts.get("workers", 1)) > 1 for facts in record.machines)


def _remarks(one: Group) -> Iterable[str]:
    """``2 of 3 seeds; seed 1 failed: reason``, and which students were counted although they collapsed."""
    missing: dict[str, list[int]] = {}
    for record in one.records:
        if record not in one.scored:
            what: str = "has no accuracy" if record.status == "done" else record.status
            missing.setdefault(what + _because(record), []).append(record.job.seed)
    if len(missing) == 1 and not one.scored:
        yield "; ".join(f"{what} ({_seeds(seeds)})" for what, seeds in missing.items())
    elif missing:
        parts = [f"{_seeds(seeds)} {what}" for what, seeds in missing.items()]
        yield "; ".join([f"{len(one.scored)} of {len(one.records)} seeds", *parts])
    spoilt: dict[str, list[int]] = {}
    for record in one.scored:
        if record.outcome not in (None, "ok"):
            spoilt.setdefault(f"{record.outcome}{_because(record)}", []).append(record.job.seed)
    for what, seeds in spoilt.items():
        yield f"{len(seeds)} of {len(one.scored)} students {what} ({_seeds(seeds)}, counted in the mean)"
    made = sum(record.counters.images_made for record in one.scored)
    for counter, what in (("images_not_finite", "not finite: black in the pool"), ("images_clamped", "not in [0, 1]")):
        of_seeds = {record.job.seed: getattr(record.counters, counter) for record in one.scored}
        if unfit := [seed for seed, count in of_seeds.items() if count]:
            yield f"{sum(of_seeds.values()):,} of {made:,} images were {what} ({_seeds(unfit)})"


def _because(record: Record) -> str:
    lines = (record.reason or "").strip().splitlines()
    return ": " + shortened(lines[0], _REASON_LENGTH) if lines else ""


def shortened(reason: str, length: int) -> str:
    """``reason``, or of a longer one what fits: cut off between words, and never within a command in backticks.

    >>> shortened("there is none: `make it so` makes one", 26)
    'there is none: ...'
    """
    short = textwrap.shorten(reason, length, placeholder=" ...")
    return short if short.count("`") % 2 == 0 else f"{short[: short.rindex('`')].rstrip()} ..."


def _seeds(seeds: Sequence[int]) -> str:
    return ("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))


def _columns(split: str, rows: Sequence[Row]) -> tuple[Column, ...]:
    totals = [row.seconds["total"] for row in rows if row.seconds]
    digits = 0 if max(totals, default=0.0) >= 1000 else 1

    def number(value: float | None, digits: int = 0) -> tuple[str]:
        return ("-" if value is None else f"{value:,.{digits}f}",)

    def time(phase: str, name: str) -> Column:
        return Column(
            phase, name, lambda row: number(row.seconds[phase] if row.seconds else None, digits), over="seconds"
        )

    def cited(row: Row) -> tuple[str, ...]:
        return tuple(f"{one.value:.2f} [{one.reference}]" for one in row.published) or ("-",)

    over = "accuracy [%]"
    return (
        Column("method", "method", lambda row: (row.label + row.marks,), decimal=False),
        Column("last", "last epoch", lambda row: (accuracy(row.last),), over),
        Column("best", f"best on {split}", lambda row: (accuracy(row.best, spread=False),), over),
        Column("published", "published", cited, over),
        Column("n", "n", lambda row: number(row.n)),
        time("synthesis", "synthesis"),
        time("sampling", "sampling"),
        time("distillation", "distill."),
        time("total", "total"),
        Column("images", "images", lambda row: number(row.images)),
        Column("memory", "MiB", lambda row: number(None if row.memory is None else row.memory / 2**20)),
        Column("knowledge", "outside knowledge", lambda row: (row.knowledge or "-",), decimal=False),
    )


def _facts(groups: Sequence[Group]) -> Mapping[str, str]:
    records = [record for one in groups for record in one.records]
    job = records[0].job
    return {
        "protocol": job.protocol,
        "protocol_version": str(job.protocol_version),
        "dataset": job.dataset,
        "teacher": job.teacher.model,
        "student": job.student,
        "evaluated_on": job.evaluate_on,
        "teacher_sha256": next((record.teacher.sha256 for record in records if record.teacher), ""),
    }


def _notes(groups: Sequence[Group], rows: Sequence[Row]) -> Iterable[str]:
    records = [record for one in groups for record in one.records]
    job = records[0].job
    yield f"protocol {job.protocol}, version {job.protocol_version}: {_PROTOCOLS[job.protocol]}"
    yield f"data set {job.dataset}; teacher:student {job.pair}; evaluated on {job.evaluate_on}"
    yield _teacher_note(records)
    steps = _by_value(groups, lambda record: f"{record.job.schedule.total_student_steps:,}")
    yield f"student steps: {steps}; precision: {_by_value(groups, lambda record: record.job.precision)}"
    yield from _student_images(groups)
    known = {_machine(facts) for record in records for facts in record.machines if facts}
    yield f"hardware: {'; '.join(sorted(known))}"
    yield (
        "last epoch: mean ± half-width of the Student-t 95 % interval over n seeds, none at n = 1; "
        f"the interval does not include the variance of the teacher and of the choice of {job.evaluate_on} images"
    )
    cited = any(row.published for row in rows)
    alike = "; most published numbers are selected like this, too, and come from one seed" if cited else ""
    yield f"best on {job.evaluate_on}: mean of each run's best epoch, selected on the {job.evaluate_on} set{alike}"
    yield f"seeds are paired across methods; seeds: {_by_value(groups, _seed_list(groups))}"
    yield from _differences(groups)
    yield TIMES_NOTE
    methods = [one for one in groups if not one.is_control]
    if methods:
        yield f"origin of the settings: {_by_value(methods, _origin, always=True)}"
    yield from _warnings(groups, rows)


def _student_images(groups: Sequence[Group]) -> Iterable[str]:
    """Which students got more or fewer images in as many steps: pairs of images, replay on top, short batches."""
    means = {one.label: fmean(run.counters.student_images for run in one.scored) for one in groups if one.scored}
    usual = median_low(means.values()) if means else 0
    others = {label: mean / usual for label, mean in means.items() if usual and abs(mean / usual - 1) > 0.02}
    if others:
        listed = ", ".join(f"{label} {ratio:.2f}" for label, ratio in others.items())
        yield f"images that the student was taught with, all steps together: {usual:,.0f}; times that: {listed}"


def _teacher_note(records: Sequence[Record]) -> str:
    facts = next((record.teacher for record in records if record.teacher), None)
    if facts is None:
        return "teacher: none was made, see the rows' reasons"
    return f"teacher: {facts.percent}, sha256 {facts.sha256[:12]}, {facts.origin}"


def slowed_note(records: Mapping[str, Sequence[Record]]) -> Iterable[str]:
    """A line that names those of ``records``' rows whose seconds are too long, if there are any."""
    slowed = [label for label, each in records.items() if any(record.was_slowed for record in each)]
    if slowed:
        named = ", ".join(label if label.isidentifier() else f"'{label}'" for label in slowed)
        yield f"other work had the processor during runs of {named}: their seconds are too long"


def stale_notes(records: Iterable[Record], stale: Collection[str]) -> list[str]:
    """A line a method with records among ``stale``, job ids of those that other code has made than today's."""
    counts = Counter(record.job.method for record in records if record.job_id in stale)
    return [
        f"{count} run{'s' * (count != 1)} of {method} {'was' if count == 1 else 'were'} made by other code than "
        f"today's: `--rerun stale` makes {'it' if count == 1 else 'them'} anew"
        for method, count in counts.items()
    ]


def _warnings(groups: Sequence[Group], rows: Sequence[Row]) -> Iterable[str]:
    scored = [record for one in groups for record in one.scored]
    marks = "".join(row.marks for row in rows)
    if UNCONFIRMED in marks:
        yield f"{UNCONFIRMED} details not confirmed: parts of the method are our reading of it"
    if CONCURRENT in marks:
        yield f"{CONCURRENT} made by several concurrent workers: times are not comparable with exclusive runs"
    if len({_machine(facts) for record in scored for facts in record.machines}) > 1:
        yield "times come from different hardware and are not comparable"
    yield from slowed_note({one.label: one.scored for one in groups})
    commits = sorted({str(record.git["commit"])[:7] for record in scored if record.git.get("commit")})
    if len(commits) > 1:
        yield f"runs were made at several commits ({', '.join(commits)}), which may differ in speed"
    changed = [one.label for one in groups if len({record.method.source_sha256 for record in one.scored}) > 1]
    if changed:
        yield f"the method's code changed between the runs of {', '.join(changed)}"


def _differences(groups: Sequence[Group]) -> Iterable[str]:
    """Every method against the first one, over common seeds.

    Pairing takes out what a seed does to both rows: the student's start and the order of random numbers. In committed
    records that is little: the variance of a difference is about the sum of both.
    """
    methods = [one for one in groups if not one.is_control]
    found = [
        (other.label, paired_difference(other.last(), methods[0].last()))
        for other in methods[1:]
        if len(other.last().keys() & methods[0].last().keys()) > 1
    ]
    counts = {difference.n for _, difference in found}
    parts = [
        f"{label} {accuracy(difference, sign='+')}" + (f" (n = {difference.n})" if len(counts) > 1 else "")
        for label, difference in found
    ]
    if parts:
        n = f", n = {counts.pop()}" if len(counts) == 1 else ""
        each = "; each interval is for one difference, not for all of them at once" if len(parts) > 1 else ""
        yield f"difference to {methods[0].label} over common seeds{n} [points]: {', '.join(parts)}{each}"


def _by_value(groups: Sequence[Group], fact: Callable[[Record], str], always: bool = False) -> str:
    """``value`` if all agree, else ``value (labels), other value (labels)``."""
    found: dict[str, list[str]] = {}
    for one in groups:
        labels = found.setdefault(fact(one.records[0]), [])
        labels.append(one.label)
    if len(found) == 1 and not always:
        return next(iter(found))
    return ", ".join(f"{value} ({', '.join(labels)})" for value, labels in found.items())


def _seed_list(groups: Sequence[Group]) -> Callable[[Record], str]:
    seeds = {
        record.job_id: " ".join(str(other.job.seed) for other in one.records)
        for one in groups
        for record in one.records
    }
    return lambda record: seeds[record.job_id]


def _origin(record: Record) -> str:
    return f"{record.job.origin}, {record.job.source}" if record.job.source else record.job.origin


def _machine(facts: Mapping[str, str | int]) -> str:
    names = [str(facts[name]) for name in ("gpu", "cpu") if facts.get(name)]
    counts = [f"{facts['cores']} core{'s' * (facts['cores'] != 1)}"] if "cores" in facts else []
    return ", ".join([*names, *counts, *threads(facts)]) or str(facts.get("device", "not recorded"))


def threads(facts: Mapping[str, str | int]) -> list[str]:
    """``2 threads a run``, if that is known."""
    number = facts.get("threads")
    return [] if number is None else [f"{number} thread{'s' * (number != 1)} a run"]
