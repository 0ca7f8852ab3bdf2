"""An ablation: rows that differ in settings, and claims about them. TOML or command line -> ``Ablation`` -> jobs.

A row is a method with settings; what a row does not name is as in the data set's main table, so that an unchanged row
is the same job as there and is not run twice. A claim is a sentence that somebody wrote, with its source, and how it is
tested: which rows are compared, in what, and by how much they must differ (``report/verdicts.py`` has the rule).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from dfkd_bench.data import DataSet
from dfkd_bench.errors import UserError, unknown, validation_line
from dfkd_bench.files import safe_name
from dfkd_bench.job import Job, ProtocolName
from dfkd_bench.method import Frozen
from dfkd_bench.plugins import Plugins
from dfkd_bench.record import Record
from dfkd_bench.suite import (
    TEACHER,
    Seeds,
    Suite,
    defaults,
    expand,
    initial_images,
    is_ablation,
    make_suite,
    parse_seeds,
    parse_settings,
    read_toml,
)

NULL = "null"  # TOML has no null: this text stands for it in a row's settings

Measure = Literal[
    "accuracy",
    "accuracy_at_equal_seconds",
    "diversity",
    "coverage",
    "near_duplicates",
    "epochs",
    "seconds",
    "noisy_layer_bytes",
]
"""``accuracy``: of the last epoch [%]. ``accuracy_at_equal_seconds``: of both curves when the shorter run ends.
``diversity``: ``within`` of ``diversity.measure``, 1 is that of real images; ``coverage``: the share of real images
with made ones near them; ``near_duplicates``: the share of images that have a double, or nearly. ``epochs``: student
epochs to a level. ``seconds``: headline time to a level, or of the whole run without one. ``noisy_layer_bytes``: the
record's scalar."""

COSTS: tuple[Measure, ...] = ("near_duplicates", "epochs", "seconds", "noisy_layer_bytes")
"""Measures of which less is better."""

_FACTORED = tuple(measure for measure in COSTS if measure != "near_duplicates")  # which may be 0

OF_ONE_RUN: tuple[Measure, ...] = ("diversity", "coverage", "near_duplicates", "seconds", "noisy_layer_bytes")
"""Measures beside accuracy that a run has by itself, without a level."""


class Reference(Frozen):
    """Published values: the rows of ``benchmarks/published.csv`` with this table, method and, if given, the rest."""

    table: str
    method: str
    metric: str | None = None
    pair: str | None = None  # TEACHER:STUDENT


class Row(Frozen):
    """One line of the table: a method and what is changed of its settings and schedule.

    ``pool_share`` caps the pool at this share of the images that a run makes.
    """

    label: str = Field(min_length=1)
    method: str
    settings: dict[str, Any] = {}
    pool_share: float | None = Field(None, gt=0, lt=1)
    published: tuple[Reference, ...] = ()


class Claim(Frozen):
    """A sentence, who says it, and its test: in all pairs (a, b) of ``compare`` a is better than b, or equal to it."""

    text: str = Field(min_length=1)
    source: str = Field(min_length=1)
    kind: Literal["better", "equal"] = "better"
    measure: Measure = "accuracy"
    level: float | Literal["weaker"] | None = Field(
        None, description="% of the teacher's accuracy; weaker: the lower of both last accuracies, seed by seed"
    )
    margin: float = Field(0.0, description="better by more than this, equal within +- this; negative: not worse by it")
    factor: float | None = Field(None, gt=0, description="of costs: b / a is larger than this, in place of a margin")
    time_within: float | None = Field(None, ge=1, description="total seconds of a and b differ by this factor at most")
    compare: tuple[tuple[str, str], ...] = Field(min_length=1, description="labels of rows")
    published: tuple[Reference, ...] = ()

    def model_post_init(self, _context: Any) -> None:
        if self.measure == "epochs" and self.level is None:
            raise ValueError("measure epochs needs a level")
        if self.level is not None and self.measure not in ("epochs", "seconds"):
            raise ValueError(f"measure {self.measure} has no level: epochs and seconds have")
        if isinstance(self.level, float) and not 0 < self.level <= 100:
            raise ValueError(f"level is in percent of the teacher's accuracy, from 0 to 100 (given: {self.level:g})")
        if self.kind == "equal" and (self.margin <= 0 or self.factor is not None):
            raise ValueError("kind equal needs a margin above 0 and takes no factor")
        if self.factor is not None and (self.measure not in _FACTORED or self.margin):
            raise ValueError(f"factor is for {', '.join(_FACTORED)}, and in place of a margin")


class Ablation(Frozen):
    """One table with its claims, on one data set, for one pair, under one protocol."""

    name: str
    title: str
    dataset: str
    protocol: ProtocolName
    pair: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    axis: str | None = None  # a setting: the figure draws accuracy against it, a curve a method
    columns: tuple[Measure, ...] = ()  # measures that the table shows though no claim is about them
    notes: tuple[str, ...] = ()  # what a reader of the table must know of its rows and claims
    settings: dict[str, Any] = {}  # "method.setting" -> value, for all rows that don't name it themselves
    evaluate_on: Literal["test", "validation"] = "test"
    variant: str = ""  # behind the names of its files: what the command line changed

    @property
    def stem(self) -> str:
        """What its files are called."""
        return f"{self.name}_{safe_name(self.dataset)}{self.variant}"


@dataclass(frozen=True)
class RowRecords:
    """A row and the records at hand; ``missing``: why there are none, or fewer than seeds."""

    row: Row
    records: tuple[Record, ...]
    missing: str = ""


class _File(BaseModel, extra="forbid"):
    """The keys of an ablation's TOML file."""

    title: str
    seeds: Seeds = "0-4"
    axis: str | None = None
    columns: tuple[Measure, ...] = ()
    notes: tuple[str, ...] = ()
    rows: tuple[Row, ...] = Field(min_length=1)
    claims: tuple[Claim, ...] = Field(min_length=1)

    @field_validator("columns")
    @classmethod
    def _of_one_run(cls, columns: tuple[Measure, ...]) -> tuple[Measure, ...]:
        for measure in columns:
            if measure not in OF_ONE_RUN:
                raise ValueError(f"{measure} is no column by itself: {', '.join(OF_ONE_RUN)} are")
        return columns


def names_ablation(name_or_file: str | None) -> bool:
    """Whether this is a built-in ablation or a file with one, and no suite."""
    return name_or_file is not None and is_ablation(read_toml(name_or_file)[1])


def read_ablation(
    name_or_file: str,
    dataset: str | None = None,
    protocol: str | None = None,
    pair: str | None = None,
    seeds: str | None = None,
    settings: Sequence[str] = (),
    evaluate_on: str = "test",
) -> Ablation:
    """A built-in ablation by name, or any TOML file, with what the command line says; defaults are the data set's.

    Raises:
        UserError: it is a suite, or something in it or in the options is wrong.
    """
    name, content = read_toml(name_or_file)
    if not is_ablation(content):
        raise UserError(f"{name} is a suite and no ablation: `dfkd-bench run {name_or_file}` runs it")
    if evaluate_on not in ("test", "validation"):
        raise unknown("split", evaluate_on, ("test", "validation"))
    file = _parsed(name, content)
    given = parse_settings(settings)
    owners = (*dict.fromkeys(row.method for row in file.rows), TEACHER)
    for key in given:
        if key.partition(".")[0] not in owners:
            raise unknown(f"method in -s {key}:", key.partition(".")[0], owners)
    cell = make_suite(
        name, file.title, dataset or defaults()["ablation_dataset"], owners[:1], protocol, (pair,) if pair else None, ()
    )
    return Ablation(
        name=name,
        title=file.title,
        dataset=cell.dataset,
        protocol=cell.protocol,
        pair=cell.pairs[0],
        seeds=parse_seeds(seeds if seeds is not None else file.seeds),
        rows=file.rows,
        claims=file.claims,
        axis=file.axis,
        columns=file.columns,
        notes=file.notes,
        settings=given,
        evaluate_on="test" if evaluate_on == "test" else "validation",
    )


def with_initial_images(ablation: Ablation, folder: str, found: Plugins) -> Ablation:
    """The ablation with ``folder`` for all rows whose method takes images to begin with; other settings go before it.

    Raises:
        UserError: no row has such a method.
    """
    images = initial_images(folder, tuple(dict.fromkeys(row.method for row in ablation.rows)), found)
    return ablation.model_copy(update={"settings": {**images, **ablation.settings}})


def _parsed(name: str, content: Mapping[str, Any]) -> _File:
    _known_keys(f"key of ablation {name}", content, _File)
    for part, model in (("rows", Row), ("claims", Claim)):
        tables = content.get(part)
        for table in tables if isinstance(tables, list) else ():  # what is wrong with another value is said below
            if isinstance(table, Mapping):
                _known_keys(f"key in {part} of ablation {name}", table, model)
    try:
        file = _File(**content)
    except ValidationError as error:
        raise UserError(f"ablation {name}: {validation_line(error)}") from None
    labels = [row.label for row in file.rows]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"ablation {name}: two rows are called '{label}'; give each a label of its own")
    for claim in file.claims:
        for label in (label for pair in claim.compare for label in pair):
            if label not in labels:
                raise unknown(f"row in claim '{claim.text}' of ablation {name}:", label, labels)
    return file


def _known_keys(kind: str, table: Mapping[str, Any], model: type[BaseModel]) -> None:
    for key in table:
        if key not in model.model_fields:
            raise unknown(kind, key, model.model_fields)


def row_suite(
    ablation: Ablation,
    row: Row,
    found: Plugins,
    dataset: DataSet,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> Suite:
    """The suite whose jobs are the row's: one method, no controls.

    Raises:
        UserError: a share of the pool for a method that makes none.
    """
    shared = {key: value for key, value in ablation.settings.items() if key.partition(".")[0] in (row.method, TEACHER)}
    own = {f"{row.method}.{key}": None if value == NULL else value for key, value in row.settings.items()}
    suite = make_suite(
        ablation.name, ablation.title, ablation.dataset, (row.method,), ablation.protocol, (ablation.pair,), (),
        ablation.seeds, {**shared, **own}, ablation.evaluate_on,
    )  # fmt: skip
    if row.pool_share is None:
        return suite
    made = images_made(expand(suite, found, dataset, device, precision)[0], found, dataset.num_classes)
    if not made:
        raise UserError(f"row '{row.label}': pool_share is for methods that keep a pool; {row.method} makes no images")
    cap = max(2, round(row.pool_share * made))
    return suite.model_copy(update={"settings": {**suite.settings, f"{row.method}.pool_cap": cap}})


def axis_value(job: Job, axis: str) -> float | None:
    """A job's place on the axis: the setting of this name, of the method or else of the schedule; None: no number."""
    value = {**job.schedule.model_dump(), **job.config}.get(axis)
    return float(value) if isinstance(value, (int, float)) else None


def images_made(job: Job, found: Plugins, num_classes: int) -> int:
    """Images that a run makes: those that would pass through the teacher if each batch took one step.

    It holds for methods that show the teacher each image once a step.
    """
    method = found.method(job.method)
    if not method.absorbs:
        return 0
    return method.generation_cost(method.Config(**{**job.config, method.absorbs: 1}), job.schedule, num_classes)
