"""Verdicts on claims, by one rule, from records of paired seeds. Pure: claims and records in, values out.

Every comparison comes to an *advantage of a over b* with its Student-t 95 % interval over common seeds: a - b of
accuracies, b - a of costs (less is better), or b / a where the claim has a factor (mean of logarithms). ``decide`` has
the rule. A run that never reaches a level counts with its end. That is a lower bound of its cost, so the interval is
open on the side to which the true value would move it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, isnan, log, nan
from statistics import fmean
from typing import Literal

from dfkd_bench.ablation import COSTS, Claim, Measure, RowRecords
from dfkd_bench.record import Record
from dfkd_bench.report.layout import threads
from dfkd_bench.report.statistics import interval

Outcome = Literal["supported", "not supported", "undecided"]

RULE = (
    "rule: the advantage of a over b (a - b; b - a of costs; b / a where a factor is asked for) is paired over common "
    "seeds and has a Student-t 95 % interval. Better by more than m: supported if the whole interval lies above m, not "
    "supported if none of it does. Equal within m: supported if it lies inside of -m to m, not supported if it lies "
    "outside. Else, or at n = 1, undecided at this n. A claim is supported if all its comparisons are, not supported "
    "if one of them is not"
)
"""One line for the end of a table."""


@dataclass(frozen=True)
class Measured:
    """A run's value; ``censored``: it never reached the level, so this is a lower bound."""

    value: float
    censored: bool = False


@dataclass(frozen=True)
class Effect:
    """The advantage of a over b over ``n`` seeds; ``low`` and ``high`` are None at n = 1."""

    mean: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """Rows a and b: their means in the measure's unit, the advantage, what it says, and what one must know of it."""

    a: str
    b: str
    mean_a: float | None
    mean_b: float | None
    effect: Effect | None
    outcome: Outcome
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """A claim with its comparisons and the verdict."""

    claim: Claim
    comparisons: tuple[Comparison, ...]
    outcome: Outcome


def judge(claim: Claim, rows: Sequence[RowRecords]) -> Finding:
    """The verdict on ``claim``; the labels that it compares are among ``rows``."""
    by_label = {item.row.label: item for item in rows}
    comparisons = tuple(_compare(claim, by_label[a], by_label[b]) for a, b in claim.compare)
    return Finding(claim, comparisons, overall([one.outcome for one in comparisons]))


def decide(kind: Literal["better", "equal"], effect: Effect | None, margin: float) -> Outcome:
    """The rule for one comparison.

    ``better``: supported if low > margin, not supported if high <= margin. ``equal``: supported if
    -margin < low and high < margin, not supported if low >= margin or high <= -margin. Else undecided.
    """
    if effect is None or effect.low is None or effect.high is None:
        return "undecided"
    low, high = effect.low, effect.high
    if kind == "better":
        return "supported" if low > margin else "not supported" if high <= margin else "undecided"
    if -margin < low and high < margin:
        return "supported"
    return "not supported" if low >= margin or high <= -margin else "undecided"


def overall(outcomes: Sequence[Outcome]) -> Outcome:
    """Supported if all are; not supported if one is not."""
    if "not supported" in outcomes:
        return "not supported"
    return "undecided" if "undecided" in outcomes else "supported"


def measured(record: Record, measure: Measure, level: float | None = None) -> Measured | None:
    """A run's value of a measure that needs no other run. ``level``: accuracy [%]. None: the record doesn't have it."""
    if measure == "accuracy":
        return Measured(record.last.accuracy) if record.last else None
    if measure in ("noisy_layer_bytes", "diversity", "coverage", "near_duplicates"):
        of_images = record.diversity.get({"diversity": "within"}.get(measure, measure))
        value = record.scalars.get(measure) if measure == "noisy_layer_bytes" else of_images
        return None if value is None else Measured(value)
    if level is None:  # the whole run; epochs are counted to a level only
        return Measured(record.total_seconds) if measure == "seconds" else None
    if not record.curve or isnan(level):
        return None
    reached = next((index for index, point in enumerate(record.curve) if point.accuracy >= level), None)
    last = len(record.curve) - 1 if reached is None else reached
    return Measured(last + 1 if measure == "epochs" else record.curve[last].seconds, censored=reached is None)


def machines(record: Record) -> set[str]:
    """What times depend on: device, processor, threads, and how many runs shared it. Several: of an interrupted run
    that went on elsewhere, whose times are those of neither."""
    return {_machine(facts) for facts in record.machines}


def _machine(facts: Mapping[str, str | int]) -> str:
    workers = facts.get("workers")
    counts = [*threads(facts), *([] if workers is None else [f"{workers} run{'s' * (workers != 1)} at a time"])]
    names = [str(facts[name]) for name in ("device", "gpu", "cpu") if facts.get(name)]
    return ", ".join(names + counts) or "not recorded"


def level_in(record: Record, level: float | Literal["weaker"] | None) -> float | None:
    """The accuracy [%] that a claim's level stands for in a run; None for ``weaker`` and without a level.

    NaN: nobody knows the teacher's accuracy.
    """
    if not isinstance(level, float):
        return None
    reference = record.teacher.accuracy if record.teacher is not None else None
    return nan if reference is None else level / 100 * reference


def scored(item: RowRecords) -> dict[int, Record]:
    """Seed -> run that came to an accuracy, collapsed students included."""
    return {record.job.seed: record for record in item.records if record.status == "done" and record.last is not None}


def _compare(claim: Claim, a: RowRecords, b: RowRecords) -> Comparison:
    runs_a, runs_b = scored(a), scored(b)
    nothing = Comparison(a.row.label, b.row.label, None, None, None, "undecided")
    for item, runs in ((a, runs_a), (b, runs_b)):
        if not runs:
            return replace(nothing, remarks=(f"{item.row.label} has no finished run",))
    common = sorted(runs_a.keys() & runs_b.keys())
    if not common:
        return replace(nothing, remarks=("no seed is in both",))
    found = {seed: _pair(claim, runs_a[seed], runs_b[seed]) for seed in common}
    pairs = {seed: pair for seed, pair in found.items() if pair is not None}
    if not pairs:
        return replace(nothing, remarks=(f"the records have no {claim.measure}",))
    if claim.factor is not None and any(one.value <= 0 for pair in pairs.values() for one in pair):
        return replace(nothing, remarks=("a ratio needs values above 0",))
    matched = [(runs_a[seed], runs_b[seed]) for seed in pairs]
    labels = (a.row.label, b.row.label)
    blocked = _clocks_differ(claim, matched) or _were_slowed(claim, labels, matched) or _times_differ(claim, matched)
    effect = _effect(claim, list(pairs.values()))
    outcome = decide(claim.kind, effect, claim.margin if claim.factor is None else claim.factor)
    return Comparison(
        *labels,
        mean_a=fmean(pair[0].value for pair in pairs.values()),
        mean_b=fmean(pair[1].value for pair in pairs.values()),
        effect=effect,
        outcome="undecided" if blocked else outcome,
        remarks=tuple(filter(None, (_censored(labels, pairs), _spoilt(claim, labels, matched), blocked))),
    )


def _pair(claim: Claim, a: Record, b: Record) -> tuple[Measured, Measured] | None:
    """The values of two runs of one seed."""
    if claim.measure == "accuracy_at_equal_seconds":
        if not a.curve or not b.curve:
            return None
        end = min(a.curve[-1].seconds, b.curve[-1].seconds)
        return _accuracy_at(a, end), _accuracy_at(b, end)
    if claim.level == "weaker":
        assert a.last is not None
        assert b.last is not None
        level = min(a.last.accuracy, b.last.accuracy)
        both = measured(a, claim.measure, level), measured(b, claim.measure, level)
    else:
        both = (
            measured(a, claim.measure, level_in(a, claim.level)),
            measured(b, claim.measure, level_in(b, claim.level)),
        )
    return None if both[0] is None or both[1] is None else (both[0], both[1])


def _accuracy_at(record: Record, seconds: float) -> Measured:
    """Of the last epoch that ended by then; 0 before the first one, when there is no student yet."""
    return Measured(next((point.accuracy for point in reversed(record.curve) if point.seconds <= seconds), 0.0))


def _effect(claim: Claim, pairs: Sequence[tuple[Measured, Measured]]) -> Effect:
    back: Callable[[float], float] = float
    if claim.factor is not None:
        advantages, back = [log(b.value) - log(a.value) for a, b in pairs], exp
    elif claim.measure in COSTS:
        advantages = [b.value - a.value for a, b in pairs]
    else:
        advantages = [a.value - b.value for a, b in pairs]
    found = interval(advantages)
    if found.half_width is None:
        return Effect(back(found.mean), None, None, found.n)
    # A censored cost is really larger: of b, the true advantage is larger; of a, it is smaller.
    low = -inf if any(a.censored for a, _ in pairs) else found.mean - found.half_width
    high = inf if any(b.censored for _, b in pairs) else found.mean + found.half_width
    return Effect(back(found.mean), back(low), back(high), found.n)


def _clocks_differ(claim: Claim, matched: Sequence[tuple[Record, Record]]) -> str:
    timed = claim.measure in ("seconds", "accuracy_at_equal_seconds") or claim.time_within is not None
    if timed and len(set().union(*(machines(record) for pair in matched for record in pair))) > 1:
        return "undecided, since times come from different machines or numbers of workers"
    return ""


def _were_slowed(claim: Claim, labels: tuple[str, str], matched: Sequence[tuple[Record, Record]]) -> str:
    timed = claim.measure in ("seconds", "accuracy_at_equal_seconds") or claim.time_within is not None
    slowed = [label for index, label in enumerate(labels) if any(pair[index].was_slowed for pair in matched)]
    return f"undecided, since other work slowed runs of {', '.join(slowed)}" if timed and slowed else ""


def _times_differ(claim: Claim, matched: Sequence[tuple[Record, Record]]) -> str:
    if claim.time_within is None:
        return ""
    times = [fmean(pair[index].total_seconds for pair in matched) for index in (0, 1)]
    if max(times) <= claim.time_within * min(times):
        return ""
    return f"undecided, since times are not equal: {times[0]:,.1f} and {times[1]:,.1f} s"


def _censored(labels: tuple[str, str], pairs: Mapping[int, tuple[Measured, Measured]]) -> str:
    seeds = {
        label: [str(seed) for seed, pair in pairs.items() if pair[index].censored] for index, label in enumerate(labels)
    }
    parts = [f"{label} (seed {', '.join(found)})" for label, found in seeds.items() if found]
    return f"level never reached, counted with the run's end: {'; '.join(parts)}" if parts else ""


def _spoilt(claim: Claim, labels: tuple[str, str], matched: Sequence[tuple[Record, Record]]) -> str:
    """Collapsed students are results and count; whoever reads the verdict must know of them."""
    if claim.measure == "noisy_layer_bytes":  # the layers are no smaller for it
        return ""
    seeds = {
        label: [str(pair[index].job.seed) for pair in matched if pair[index].outcome not in (None, "ok")]
        for index, label in enumerate(labels)
    }
    parts = [f"{label} (seed {', '.join(found)})" for label, found in seeds.items() if found]
    return f"students that collapsed or became not finite count, too: {'; '.join(parts)}" if parts else ""
