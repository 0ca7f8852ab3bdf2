"""A suite: what one table needs. TOML or command line -> ``Suite`` -> jobs; unknown keys are errors."""

from __future__ import annotations

import importlib.resources
import json
import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from dfkd_bench import data, equal, inputs, needs, teachers
from dfkd_bench.compute import resolve_device, resolve_precision
from dfkd_bench.data import DataSet
from dfkd_bench.errors import UserError, unknown, validation_line
from dfkd_bench.job import Job, ProtocolName, Recipe, TeacherSpec
from dfkd_bench.method import Frozen, Method, Published, Schedule
from dfkd_bench.models import model_names
from dfkd_bench.plugins import Plugins

TEACHER = "teacher"  # owner of settings that change the teacher's recipe: -s teacher.epochs=50
SMALL_RECIPE = {"epochs": 30, "include_validation": False}  # `smoke` on a data set without a recipe of its own

ALL = "all"  # among the methods of a suite: every built-in data-free one, and those of --plugin files
PROTOCOLS: tuple[ProtocolName, ...] = ("paper", "equal", "smoke")


def _seeds_as_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f'expected a number, or text such as "0-2" or "0,3,5" (given: {value!r})')
    return str(value)


Seeds = Annotated[str, BeforeValidator(_seeds_as_text)]
"""Of a TOML file: ``seeds = 3``, ``seeds = "0-2"``."""


class Suite(Frozen):
    """One table: methods and controls, on one data set, under one protocol."""

    name: str
    title: str
    dataset: str
    protocol: ProtocolName
    pairs: tuple[str, ...] = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1)
    controls: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    settings: dict[str, Any] = {}  # "method.setting" -> value
    evaluate_on: Literal["test", "validation"] = "test"


class _File(BaseModel, extra="forbid"):
    """The keys of a suite's TOML file."""

    title: str
    dataset: str
    protocol: ProtocolName | None = None
    pairs: tuple[str, ...] | None = Field(None, min_length=1)
    methods: tuple[str, ...] | Literal["all"] = Field(min_length=1)
    controls: tuple[str, ...] | None = None
    seeds: Seeds = "0"
    settings: dict[str, Any] = {}


@cache
def defaults() -> dict[str, Any]:
    """``benchmarks/defaults.toml``."""
    text = importlib.resources.files("dfkd_bench.benchmarks").joinpath("defaults.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _defaults_of(dataset: str) -> Mapping[str, Any]:
    """The table of a data set, or an empty one. Other keys of the file, such as ``controls``, are no data sets."""
    found = defaults().get(dataset)
    return found if isinstance(found, Mapping) else {}


def suite_names() -> tuple[str, ...]:
    """The built-in suites."""
    return tuple(name for name, content in _built_in().items() if not is_ablation(content))


def ablation_names() -> tuple[str, ...]:
    """The built-in ablations (``dfkd_bench.ablation``)."""
    return tuple(name for name, content in _built_in().items() if is_ablation(content))


def is_ablation(content: Mapping[str, Any]) -> bool:
    """Whether a TOML file's content is an ablation and no suite: it has rows."""
    return "rows" in content


@cache
def _built_in() -> Mapping[str, dict[str, Any]]:
    """Name -> content of the TOML files in ``benchmarks/`` that are suites or ablations, by name."""
    files = importlib.resources.files("dfkd_bench.benchmarks").iterdir()
    texts = {Path(file.name).stem: file.read_text(encoding="utf-8") for file in files if file.name.endswith(".toml")}
    return {name: tomllib.loads(texts[name]) for name in sorted(texts) if name not in ("defaults", "equal")}


def read_toml(name_or_file: str) -> tuple[str, dict[str, Any]]:
    """Name and content of a built-in suite or ablation, or of any TOML file."""
    path = Path(name_or_file)
    if path.suffix != ".toml":
        if name_or_file not in _built_in():
            raise unknown("suite", name_or_file, _built_in(), "Any TOML file can be given, too")
        return name_or_file, _built_in()[name_or_file]
    if not path.is_file():
        raise UserError(f"there is no suite file {path}")
    try:
        return path.stem, tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"suite file {path} is no UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"suite {path.stem}: {error}") from None


def read_suite(name_or_file: str) -> Suite:
    """A built-in suite by name, or any TOML file."""
    name, content = read_toml(name_or_file)
    if is_ablation(content):
        raise UserError(f"{name} is an ablation and no suite: `dfkd-bench ablate {name_or_file}` runs it")
    for key in content:
        if key not in _File.model_fields:
            raise unknown(f"key of suite {name}", key, _File.model_fields)
    try:
        file = _File(**content)
    except ValidationError as error:
        raise UserError(f"suite {name}: {validation_line(error)}") from None
    return make_suite(
        name,
        file.title,
        file.dataset,
        (ALL,) if file.methods == ALL else file.methods,
        protocol=file.protocol,
        pairs=file.pairs,
        controls=file.controls,
        seeds=parse_seeds(file.seeds),
        settings=flat_settings(name, file.settings),
    )


def make_suite(
    name: str,
    title: str,
    dataset: str,
    methods: Sequence[str],
    protocol: str | None = None,
    pairs: Sequence[str] | None = None,
    controls: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    settings: Mapping[str, Any] | None = None,
    evaluate_on: Literal["test", "validation"] = "test",
) -> Suite:
    """A suite with the defaults of its data set filled in."""
    known = _defaults_of(dataset) or defaults()["default"]
    chosen = protocol or known["protocol"]
    if chosen not in PROTOCOLS:
        raise unknown("protocol", chosen, PROTOCOLS)
    all_controls = defaults()["controls"] if controls is None else controls
    return Suite(
        name=name,
        title=title,
        dataset=dataset,
        protocol=chosen,
        pairs=tuple(dict.fromkeys(pairs or (known["pair"],))),
        methods=tuple(dict.fromkeys(methods)),
        controls=tuple(control for control in dict.fromkeys(all_controls) if control not in methods),
        seeds=tuple(seeds),
        settings=dict(settings or {}),
        evaluate_on=evaluate_on,
    )


def from_options(
    name: str | None,
    methods: str | None,
    dataset: str | None,
    pair: str | None,
    protocol: str | None,
    seeds: str | None,
    settings: Sequence[str],
    controls: bool,
    evaluate_on: str,
    found: Plugins,
    init_images: str | None = None,
) -> Suite:
    """The suite that a command line names: a built-in one or a file with changes, or methods and a data set."""
    if evaluate_on not in ("test", "validation"):
        raise unknown("split", evaluate_on, ("test", "validation"))
    overrides: dict[str, Any] = {"evaluate_on": evaluate_on}
    if name is not None:
        if dataset is not None or methods is not None:
            raise UserError(f"suite {name} names its methods and data set itself: leave out --methods and --dataset")
        base = read_suite(name)
        if protocol is not None and protocol != base.protocol:
            raise UserError(f"suite {name} is of protocol {base.protocol}: leave out --protocol")
    elif methods is None or dataset is None:
        raise UserError("name a suite (`dfkd-bench list suites`), or give --methods and --dataset")
    else:
        names = split_list(methods)
        title = f"{dataset}: {', '.join(names)}"
        base = make_suite(f"{'-'.join(names)}_{dataset}".replace("/", "_"), title, dataset, names, protocol=protocol)
    if pair is not None:
        overrides["pairs"] = split_list(pair)
    if seeds is not None:
        overrides["seeds"] = parse_seeds(seeds)
    given = parse_settings(settings)
    if init_images is not None:
        given = {**initial_images(init_images, with_all(base, found).methods, found), **given}
    if given:
        overrides["settings"] = {**base.settings, **given}
    if not controls:
        overrides["controls"] = ()
    return with_all(base.model_copy(update=overrides), found)


def with_all(suite: Suite, found: Plugins) -> Suite:
    """The suite with ``all`` replaced, where it stands, by what it stands for; who is named keeps an earlier place."""
    if ALL not in suite.methods:
        return suite
    every = all_methods(found, suite.protocol, suite.dataset)
    names = [name for method in suite.methods for name in (every if method == ALL else (method,))]
    return suite.model_copy(update={"methods": tuple(dict.fromkeys(names))})


def all_methods(found: Plugins, protocol: ProtocolName, dataset: str) -> tuple[str, ...]:
    """What ``all`` stands for: the lead method, then by year the other built-in data-free methods that have settings,
    then the data-free ones of plugin files, with settings or without.

    What other packages bring by entry points is not among them: a table must not depend on what is installed beside.
    """
    cards = {name: source.card() for name, source in found.methods.items() if source.kind != "entry point"}
    free = [name for name, card in cards.items() if card.get("family") != "control"]
    of_files = [name for name in free if found.methods[name].kind == "file"]
    lead = defaults()["lead_method"]
    order = sorted(set(free) - set(of_files), key=lambda name: (name != lead, _year(cards[name]), name))
    table = settings_table(protocol, dataset)
    return (*(name for name in order if _tables(found.method(name))[table]), *of_files)


def _year(card: Mapping[str, Any]) -> int:
    """The year of a ``CARD``, 0 if it has none: a plugin may have written anything there."""
    year = card.get("year")
    return year if isinstance(year, int) else 0


def _tables(method: type[Method]) -> Mapping[str, Mapping[str, Published]]:
    return {"paper": method.published, "smoke": method.smoke}


def split_list(text: str) -> tuple[str, ...]:
    """``a,b`` as names."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not names:
        raise UserError(f"'{text}' names nothing: expected a comma list such as nayer,fm")
    return names


def parse_seeds(text: str) -> tuple[int, ...]:
    """``0``, ``0-2``, ``0,3,5-7`` as numbers."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
        if not found:
            raise UserError(f"--seeds {text}: expected numbers and ranges such as 0-2 or 0,3,5")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise UserError(f"--seeds {text}: the range {first}-{last} is empty; did you mean {last}-{first}?")
        if last - first >= 1000:
            raise UserError(f"--seeds {text}: {last - first + 1} seeds in one range; at most 1000 are taken")
        seeds.extend(range(first, last + 1))
    return tuple(dict.fromkeys(seeds))


def parse_settings(items: Sequence[str]) -> dict[str, Any]:
    """``nayer.generator_steps=40`` -> {"nayer.generator_steps": 40}. Values are JSON, or else strings."""
    settings: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or "." not in key:
            raise UserError(f"-s {item}: expected METHOD.SETTING=VALUE, such as nayer.generator_steps=40")
        try:
            settings[key.strip()] = json.loads(text)
        except ValueError:  # no JSON, or a number of thousands of digits
            settings[key.strip()] = text
    return settings


def initial_images(folder: str, methods: Sequence[str], found: Plugins) -> dict[str, str]:
    """The settings that give ``folder`` to those of ``methods`` that take images to begin with.

    Raises:
        UserError: none of them does.
    """
    takers = [name for name in methods if "initial_images" in found.method(name).needs]
    if not takers:
        raise UserError(
            f"--init-images {folder}: no method of this table takes images to begin with ({', '.join(methods)}): "
            "leave it out, or name one that has the setting initial_images"
        )
    return {f"{name}.initial_images": folder for name in takers}


def flat_settings(suite: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """TOML's nested tables, or its keys such as ``"nayer.lr"``, as "method.setting" keys."""
    flat: dict[str, Any] = {}
    for method, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{method}.{key}": item for key, item in value.items()}
        elif "." in method:
            flat[method] = value
        else:
            raise UserError(f"suite {suite}: settings.{method} is {value!r}: expected a table [settings.{method}]")
    return flat


def expand(
    suite: Suite,
    found: Plugins,
    dataset: DataSet,
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> list[Job]:
    """The jobs of a suite, controls first, seed by seed. Nothing is started."""
    suite = with_all(suite, found)
    classes = {name: found.method(name) for name in (*suite.controls, *suite.methods)}
    for key in suite.settings:
        owner = key.partition(".")[0]
        if owner not in (*classes, TEACHER):
            raise unknown(f"method in -s {key}:", owner, (*classes, TEACHER))
    cap = equal.budget(dataset.name).teacher_images if suite.protocol == "equal" else None
    resolved = resolve_precision(precision, resolve_device(device), dataset.image_shape[1])
    families = {name: found.source(name).card().get("family") for name in classes}
    _has_training_images(dataset, classes)
    lead = next((name for name in suite.methods if families[name] != "control"), defaults()["lead_method"])
    jobs = []
    for pair in suite.pairs:
        teacher_name, student = parse_pair(pair, found)
        teacher = teacher_spec(dataset, teacher_name, suite.protocol, suite.settings)
        if suite.evaluate_on == "validation" and teacher.recipe and teacher.recipe.include_validation:
            raise UserError(
                f"--split validation: teacher {teacher_name} is trained on the validation part, too; give "
                "-s teacher.include_validation=false, or evaluate on test"
            )
        plans = {
            name: _plan(name, classes[name], families[name] == "control", lead, suite, pair, found, dataset.num_classes)
            if suite.protocol != "equal"
            else _equal_plan(name, classes[name], suite, pair, dataset, found)
            for name in classes
        }
        for name, plan in plans.items():
            needs.check_label_text(name, classes[name], plan.config, found)
        digests = {name: inputs.digests(classes[name], plan.config, dataset, found) for name, plan in plans.items()}
        for seed in suite.seeds:
            for name, plan in plans.items():
                jobs.append(
                    Job(
                        method=name,
                        config=plan.config,
                        schedule=plan.schedule,
                        dataset=dataset.name,
                        teacher=teacher,
                        student=student,
                        seed=seed,
                        protocol=suite.protocol,
                        evaluate_on=suite.evaluate_on,
                        precision=resolved,
                        generation_cap=cap,
                        inputs=digests[name],
                        origin=plan.origin,
                        source=plan.source,
                    )
                )
    return jobs


def _has_training_images(dataset: DataSet, classes: Mapping[str, type[Method]]) -> None:
    """``UserError``: a control learns from training images, and the data set has none."""
    learners = [name for name, method in classes.items() if "training_data" in method.needs]
    if dataset.test_only and learners:
        raise UserError(
            f"'{dataset.name}' has a test part only, and {', '.join(learners)} would learn from training images: give "
            "--no-controls, or leave them out"
        )


def parse_pair(pair: str, found: Plugins) -> tuple[str, str]:
    """``teacher:student``, both known models."""
    teacher, colon, student = pair.partition(":")
    if not colon or not student:
        raise UserError(f"--pair {pair}: expected TEACHER:STUDENT, such as wrn40_2:wrn16_1")
    known = [*model_names(), *found.models]
    for name in (teacher, student):
        if name not in known:
            raise unknown("model", name, known)
    return teacher, student


def teacher_spec(
    dataset: DataSet, model: str, protocol: ProtocolName, settings: Mapping[str, Any] | None = None
) -> TeacherSpec:
    """The teacher a job gets: an imported one if there is one (``paper`` only), else the data set's recipe.

    Settings ``teacher.epochs`` and the like change the recipe, ``teacher.seed`` the seed; then nothing imported is
    taken. On a data set without training images only an imported one is possible, under every protocol.
    """
    own = {key.partition(".")[2]: value for key, value in (settings or {}).items() if key.startswith(f"{TEACHER}.")}
    for key in own:
        if key not in (*Recipe.model_fields, "seed"):
            raise unknown("setting of teacher", key, [*Recipe.model_fields, "seed"])
    if dataset.test_only:
        return _imported_spec(dataset, model, next(iter(own), None))
    recipe: dict[str, Any] = {}
    if settings_table(protocol, dataset.name) == "paper":
        imported = teachers.find_imported(dataset, model)
        if imported and not own:
            return imported.spec
    else:
        recipe = _defaults_of(dataset.name).get("teacher", SMALL_RECIPE)
    try:
        seed = own.pop("seed", 0)
        return TeacherSpec(model=model, recipe=Recipe(**{**recipe, **own}), seed=seed)
    except ValidationError as error:
        raise UserError(f"teacher: {validation_line(error)}") from None


def _imported_spec(dataset: DataSet, model: str, setting: str | None) -> TeacherSpec:
    """The imported teacher, where none can be trained; ``setting``: one of its training that was asked for."""
    if setting is not None:
        raise UserError(f"-s {TEACHER}.{setting}: '{dataset.name}' has no training images, so no teacher is trained")
    imported = teachers.find_imported(dataset, model)
    if imported is None or not teachers.is_at_hand(dataset, imported.spec):
        since = "" if imported is None else " again: since then the images or dataset.json have changed"
        raise UserError(
            f"there is no teacher {model} for '{dataset.name}', and there are no training images to train one on: "
            f"`dfkd-bench teacher import FILE -d {shlex.quote(dataset.name)} --model {model}`{since}"
        )
    return imported.spec


def settings_table(protocol: ProtocolName, dataset: str) -> Literal["paper", "smoke"]:
    """Which of a method's tables of settings a protocol starts from."""
    return equal.budget(dataset).settings if protocol == "equal" else protocol


def settings_for(
    method: type[Method], protocol: ProtocolName, dataset: str, pair: str, classes: int | None = None
) -> Published | None:
    """A method's own settings for a cell: those of the pair, of the data set, or else transferred from another.

    ``classes``: how many the data set has.
    """
    table = _tables(method)[settings_table(protocol, dataset)]
    for key in (f"{dataset}/{pair}", dataset):
        if key in table:
            return table[key]
    # Another data set's settings for the same pair are nearer than those of another pair; a data set with as many
    # classes is nearer than one with more or fewer, since that is what the number of student steps hangs on.
    near = sorted(table, key=lambda key: classes is None or _classes(key.partition("/")[0]) != classes)
    candidates = [key for key in near if key.endswith(f"/{pair}")] + [key for key in near if "/" not in key]
    for key in [*candidates, *near]:
        found = table[key]
        return found.model_copy(update={"origin": "transferred", "source": f"from {key}: {found.source}"})
    return None


def _classes(dataset: str) -> int | None:
    """Number of classes of a built-in data set; None: another one."""
    return data.dataset(dataset).num_classes if dataset in data.dataset_names() else None


def _plan(
    name: str, method: type[Method], control: bool, lead: str, suite: Suite, pair: str, found: Plugins, classes: int
) -> Published:
    """Schedule and complete configuration of one method in one cell, overrides applied."""
    own = settings_for(method, suite.protocol, suite.dataset, pair, classes)
    if own is None:
        schedule = _lead_schedule(name, lead, suite, pair, found, classes)
        if control:
            schedule = schedule.model_copy(
                update={"epochs": schedule.epochs - schedule.warmup_epochs, "warmup_epochs": 0, "pool_cap": None}
            )
        giver = lead if lead in suite.methods and lead != name else defaults()["lead_method"]
        own = Published(schedule=schedule, config={}, origin="ours", source=f"defaults, with the schedule of {giver}")
    config_fields, schedule_fields = method.Config.model_fields, Schedule.model_fields
    config: dict[str, Any] = dict(own.config)
    schedule_values = own.schedule.model_dump()
    for key, value in suite.settings.items():
        owner, _, setting = key.partition(".")
        if owner != name:
            continue
        if setting in config_fields:
            config[setting] = value
        elif setting in schedule_fields:
            schedule_values[setting] = value
        else:
            raise unknown(f"setting of {name}", setting, [*config_fields, *schedule_fields])
    try:
        complete = method.Config(**config).model_dump(mode="json")
        final = Schedule(**schedule_values)
    except ValidationError as error:
        raise UserError(f"{name}: {validation_line(error)}") from None
    before = method.Config(**own.config).model_dump(mode="json")
    overridden = (complete, final) != (before, own.schedule)  # an ablation's row may name a value that it has anyway
    origin = "ours" if overridden and own.origin != "ours" else own.origin
    source = f"{own.source}; changed by -s" if overridden else own.source
    return Published(schedule=final, config=complete, origin=origin, source=source)


def _equal_plan(
    name: str, method: type[Method], suite: Suite, pair: str, dataset: DataSet, found: Plugins
) -> Published:
    """The same for protocol `equal`: the method's own settings, brought to the data set's budget."""
    own = settings_for(method, suite.protocol, suite.dataset, pair, dataset.num_classes)
    if own is None:
        schedule = _lead_schedule(name, defaults()["lead_method"], suite, pair, found, dataset.num_classes)
        schedule = schedule.model_copy(update={"epochs": 1, "warmup_epochs": 0, "pool_cap": None})
        own = Published(schedule=schedule, config={}, origin="ours", source="defaults")
    overrides = {
        setting: value
        for owner, _, setting, value in ((*key.partition("."), value) for key, value in suite.settings.items())
        if owner == name
    }
    for setting in overrides:
        if setting not in method.Config.model_fields and setting not in Schedule.model_fields:
            raise unknown(f"setting of {name}", setting, [*method.Config.model_fields, *Schedule.model_fields])
    return equal.fit(name, method, own, suite.dataset, pair, dataset.num_classes, overrides)


def _lead_schedule(name: str, lead: str, suite: Suite, pair: str, found: Plugins, classes: int) -> Schedule:
    """The schedule for a method without one: the table's lead's, overrides included, or else the default lead's."""
    if lead in suite.methods and lead != name:
        return _plan(lead, found.method(lead), False, lead, suite, pair, found, classes).schedule
    fallback = defaults()["lead_method"]
    found_settings = settings_for(found.method(fallback), suite.protocol, suite.dataset, pair, classes)
    if found_settings is None:
        raise UserError(f"method {name} has no {suite.protocol} settings and neither has {fallback}")
    return found_settings.schedule
