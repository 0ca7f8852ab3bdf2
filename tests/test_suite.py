"""From names and settings to jobs: defaults, overrides, the controls' schedule, and one line for every wrong name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dfkd_bench import data, plugins, suite, teachers
from dfkd_bench.errors import UserError
from dfkd_bench.job import Job, TeacherSpec
from dfkd_bench.suite import Suite, expand, from_options, make_suite, parse_seeds, parse_settings, read_suite, with_all
from dfkd_bench.teachers import TeacherCard

CONTROLS = ("scratch", "real_kd", "noise_kd")
FOUND = plugins.discover()
BARE = """
from dfkd_bench.method import Method, MethodConfig, Synthesis

class Bare(Method):
    Config = MethodConfig
    def synthesize(self, student, at):
        return Synthesis(None)
"""


@pytest.fixture(autouse=True)
def _no_teachers(home: Path) -> None:
    """Imported teachers would change the jobs of protocol `paper`."""


def jobs_of(chosen: Suite, files: tuple[Path, ...] = ()) -> list[Job]:
    return expand(chosen, plugins.discover(files), data.dataset(chosen.dataset), "cpu", "fp32")


def digits(methods: tuple[str, ...] = ("nayer", "fm"), **fields: Any) -> Suite:
    return make_suite("test", "test", "digits", methods, **fields)


def toml(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


# --- Seeds and settings as text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", (0,)), ("0-2", (0, 1, 2)), ("0,3,5-7", (0, 3, 5, 6, 7)), (" 2 , 2-3,1", (2, 3, 1))]
)
def test_seeds(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "0..2", "1,,2", "0x1", "9" * 5000])
def test_seeds_that_are_no_numbers(text: str) -> None:
    with pytest.raises(UserError, match="expected numbers and ranges"):
        parse_seeds(text)


def test_an_empty_range_of_seeds_is_not_guessed() -> None:
    with pytest.raises(UserError, match="did you mean 0-2"):
        parse_seeds("2-0")


def test_a_mistyped_range_does_not_become_a_million_jobs() -> None:
    with pytest.raises(UserError, match="at most 1000"):
        parse_seeds("0-1000000")


@pytest.mark.parametrize(
    ("text", "value"),
    [("40", 40), ("0.5", 0.5), ("true", True), ("null", None), ('"40"', "40"), ("onehot", "onehot"), ("a=b", "a=b")],
)
def test_a_settings_value_is_json_or_else_text(text: str, value: object) -> None:
    assert parse_settings([f"nayer.x={text}"]) == {"nayer.x": value}


@pytest.mark.parametrize("item", ["nayer.lr", "lr=1", "=1", ""])
def test_a_setting_needs_an_owner_and_a_value(item: str) -> None:
    with pytest.raises(UserError, match=r"expected METHOD\.SETTING=VALUE"):
        parse_settings([item])


def test_a_number_without_end_is_refused_like_any_other_text() -> None:
    settings = parse_settings([f"nayer.epochs={'9' * 5000}"])
    with pytest.raises(UserError, match="epochs"):
        jobs_of(digits(settings=settings))


# --- Suites -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", suite.suite_names())
def test_every_built_in_suite_becomes_jobs(name: str) -> None:
    chosen = with_all(read_suite(name), FOUND)
    rows = len(chosen.controls) + len(chosen.methods)
    assert len(jobs_of(chosen)) == rows * len(chosen.pairs) * len(chosen.seeds)


def test_a_suite_file_says_what_the_command_line_says(tmp_path: Path) -> None:
    file = toml(
        tmp_path,
        'title = "mine"\ndataset = "digits"\nmethods = ["nayer"]\npairs = ["wrn16_1:convnet8"]\nseeds = "0-1"\n'
        "controls = []\n[settings.nayer]\ngenerator_steps = 3\n",
    )
    options = from_options(
        None, "nayer", "digits", "wrn16_1:convnet8", None, "0-1", ["nayer.generator_steps=3"], False, "test", FOUND
    )
    ids = [job.id for job in jobs_of(read_suite(file))]
    assert ids == [job.id for job in jobs_of(options)]
    assert len(ids) == 2


def test_a_digit_suite_takes_the_defaults_of_its_data_set() -> None:
    chosen = digits()
    assert (chosen.protocol, chosen.pairs, chosen.controls) == ("smoke", ("wrn16_2:wrn16_1",), CONTROLS)


def test_a_control_that_is_asked_for_is_no_second_row() -> None:
    assert [job.method for job in jobs_of(digits(("scratch", "nayer")))] == ["real_kd", "noise_kd", "scratch", "nayer"]


def test_options_change_a_built_in_suite() -> None:
    chosen = from_options("smoke_digits", None, None, None, None, "7", ["fm.generator_steps=3"], False, "test", FOUND)
    by_method = {job.method: job for job in jobs_of(chosen)}
    assert {job.seed for job in by_method.values()} == {7}
    assert by_method["fm"].config["generator_steps"] == 3


def test_all_are_the_data_free_methods_with_settings_the_lead_method_first() -> None:
    every = suite.all_methods(FOUND, "smoke", "digits")
    assert every[0] == "nayer"
    assert {"fm", "deepinv", "cmi", "mad"} < set(every)
    assert not {"scratch", "real_kd", "noise_kd", "ood_kd"} & set(every)


def test_a_year_that_is_no_number_stops_nothing(tmp_path: Path) -> None:
    text = "from dfkd_bench.methods.fm import FastMeta\nCARD = {'year': '2020'}\nclass Mine(FastMeta): pass\n"
    (tmp_path / "mine.py").write_text(text)
    assert suite.all_methods(plugins.discover([tmp_path / "mine.py"]), "smoke", "digits")[-1] == "mine"


@pytest.mark.parametrize("text", [BARE, "raise RuntimeError('no luck')"], ids=["sound", "broken"])
def test_what_else_is_installed_changes_no_suite(text: str, install: Callable[[str, str, str], None]) -> None:
    install("their_bare", text, "[dfkd_bench.methods]\ntheirs = their_bare\n")
    assert with_all(read_suite("smoke_digits"), plugins.discover()) == with_all(read_suite("smoke_digits"), FOUND)


def test_a_plugin_file_of_the_command_line_is_one_of_all(tmp_path: Path) -> None:
    file = tmp_path / "bare.py"
    file.write_text(BARE)
    built_in = with_all(read_suite("smoke_digits"), FOUND).methods
    assert with_all(read_suite("smoke_digits"), plugins.discover([file])).methods == (*built_in, "bare")


def test_an_installed_method_can_be_named_beside_all(install: Callable[[str, str, str], None]) -> None:
    install("their_bare", BARE, "[dfkd_bench.methods]\ntheirs = their_bare\n")
    asked = with_all(digits(("all", "theirs")), plugins.discover())
    assert asked.methods == (*with_all(digits(("all",)), FOUND).methods, "theirs")


BASE = 'title = "t"\ndataset = "digits"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BASE + 'methods = ["nayer"]\nseed = 1\n', "unknown key of suite mine 'seed': did you mean 'seeds'"),
        (BASE, "methods: Field required"),
        (BASE + "methods = []\n", "methods"),
        (BASE + 'methods = ["nayer"]\nprotocol = "papr"\n', "'paper', 'equal' or 'smoke'"),
        (BASE + 'methods = ["nayer"]\nseeds = "2-0"\n', "did you mean 0-2"),
        (BASE + "methods = [", "suite mine"),
        (BASE + 'methods = ["nayer"]\npairs = []\n', "suite mine: pairs: "),
        (BASE + 'methods = ["nayer"]\nseeds = true\n', "suite mine: seeds: expected a number, or text such as"),
        (BASE + 'methods = ["nayer"]\nseeds = [0, 1]\n', "suite mine: seeds: expected a number, or text such as"),
        (BASE + 'methods = ["nayer"]\n[settings]\nteacher = 5\n', "expected a table [settings.teacher]"),
    ],
)
def test_a_wrong_suite_file_is_one_line(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_suite(toml(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pair_that_is_named_twice_is_one(tmp_path: Path) -> None:
    pairs = '["wrn16_1:convnet8", "wrn16_1:convnet8"]'
    file = toml(tmp_path, BASE + f'methods = ["nayer"]\npairs = {pairs}\n')
    assert read_suite(file).pairs == ("wrn16_1:convnet8",)


def test_a_suite_files_settings_may_be_one_key(tmp_path: Path) -> None:
    file = toml(tmp_path, BASE + 'methods = ["nayer"]\n[settings]\n"nayer.generator_steps" = 3\n')
    assert read_suite(file).settings == {"nayer.generator_steps": 3}


def test_a_suite_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"title = '\xff\xfe'")
    with pytest.raises(UserError, match="no UTF-8"):
        read_suite(str(path))


@pytest.mark.parametrize(
    ("name", "words"), [("smoke_digit", "did you mean 'smoke_digits'"), ("gone.toml", "there is no suite file")]
)
def test_an_unknown_suite(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_suite(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ("nayr",)}, "unknown method 'nayr': did you mean 'nayer'"),
        ({"controls": ("scrach",)}, "unknown method 'scrach': did you mean 'scratch'"),
        ({"pairs": ("wrn16_3:wrn16_1",)}, "unknown model 'wrn16_3': did you mean 'wrn16_"),
        ({"pairs": ("wrn16_2",)}, "expected TEACHER:STUDENT"),
        ({"protocol": "smok"}, "unknown protocol 'smok': did you mean 'smoke'"),
        ({"settings": {"nayer.generator_step": 1}}, "did you mean 'generator_steps'"),
        ({"settings": {"nayr.generator_steps": 1}}, "did you mean 'nayer'"),
        ({"settings": {"teacher.epoch": 1}}, "unknown setting of teacher 'epoch': did you mean 'epochs'"),
        ({"settings": {"nayer": 1}}, "unknown setting of nayer"),
    ],
)
def test_a_wrong_name_gets_the_nearest_one(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        jobs_of(digits(**change))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("nayer.generator_steps", 0),
        ("nayer.generator_steps", "many"),
        ("nayer.lr", -1.0),
        ("nayer.lr", float("nan")),
        ("nayer.epochs", 0),
        ("nayer.warmup_epochs", 1000),
        ("nayer.optimizer", "adamw"),
        ("teacher.epochs", 0),
        ("teacher.seed", -1),
    ],
)
def test_a_value_out_of_bounds_names_the_setting(setting: str, value: object) -> None:
    owner, _, name = setting.partition(".")
    with pytest.raises(UserError, match=f"^{owner}: .*{name}") as caught:
        jobs_of(digits(settings={setting: value}))
    assert "\n" not in str(caught.value)


def test_a_suite_with_methods_of_its_own_takes_no_others() -> None:
    with pytest.raises(UserError, match="leave out --methods"):
        from_options("smoke_digits", "fm", None, None, None, None, [], True, "test", FOUND)


@pytest.mark.parametrize(("methods", "dataset"), [(None, None), ("nayer", None), (None, "digits")])
def test_methods_and_data_set_are_both_needed(methods: str | None, dataset: str | None) -> None:
    with pytest.raises(UserError, match="give --methods and --dataset"):
        from_options(None, methods, dataset, None, None, None, [], True, "test", FOUND)


# --- Settings of a cell -----------------------------------------------------------------------------------------------


def cells() -> list[tuple[str, str, str]]:
    found = plugins.discover()
    return [
        (name, protocol, cell)
        for name in found.methods
        for protocol, table in (("paper", found.method(name).published), ("smoke", found.method(name).smoke))
        for cell in table
    ]


@pytest.mark.parametrize(("method", "protocol", "cell"), cells())
def test_every_published_cell_becomes_a_job(method: str, protocol: str, cell: str) -> None:
    dataset, _, pair = cell.partition("/")
    chosen = make_suite("t", "t", dataset, [method], protocol, [pair] if pair else None, ())
    (job,) = jobs_of(chosen)
    published = plugins.discover().method(method)
    own = (published.published if protocol == "paper" else published.smoke)[cell]
    assert job.schedule == own.schedule
    assert own.config.items() <= job.config.items()
    assert job.origin == own.origin


def test_settings_of_the_pair_come_before_those_of_the_data_set() -> None:
    method = plugins.discover().method("fm")
    pair = suite.settings_for(method, "paper", "cifar10", "resnet34:resnet18")
    assert pair is not None
    assert pair == method.published["cifar10/resnet34:resnet18"]


def test_settings_for_another_cell_are_called_transferred() -> None:
    found = suite.settings_for(plugins.discover().method("nayer"), "paper", "svhn", "wrn40_2:wrn16_1")
    assert found is not None
    assert found.origin == "transferred"
    assert found.source.startswith("from cifar10: ")


def test_the_same_pair_of_another_data_set_is_nearer_than_another_pair() -> None:
    method = plugins.discover().method("fm")
    found = suite.settings_for(method, "paper", "svhn", "vgg11:resnet18")
    assert found is not None
    assert found.config == method.published["cifar10/vgg11:resnet18"].config


def test_settings_come_from_a_data_set_with_as_many_classes_first() -> None:
    method = plugins.discover().method("fm")
    found = suite.settings_for(method, "smoke", "glyphs32", "convnet32:convnet16", classes=47)
    assert found is not None
    assert found.schedule == method.smoke["glyphs16"].schedule


@pytest.mark.parametrize(
    ("method", "dataset", "pair"),
    [
        ("dfnd", "cifar100", "wrn40_2:wrn16_1"),
        ("ta_dfkd", "cifar100", "wrn40_2:wrn16_1"),
        ("ta_dfkd", "tiny_imagenet", "wrn40_2:wrn16_1"),
        ("spaceshipnet", "tiny_imagenet", "wrn40_2:wrn16_1"),
        ("nayer", "tiny_imagenet", "wrn40_2:wrn16_1"),
    ],
)
def test_another_pair_gets_the_values_of_its_own_data_set(method: str, dataset: str, pair: str) -> None:
    released = FOUND.method(method).published[f"{dataset}/resnet34:resnet18"]
    assert released.origin == "code"
    found = suite.settings_for(FOUND.method(method), "paper", dataset, pair)
    assert found == released.model_copy(update={"origin": "transferred"})


def test_nayer_on_a_data_set_without_settings_has_cifar10s_whatever_the_pair() -> None:
    method = FOUND.method("nayer")
    found = suite.settings_for(method, "paper", "svhn", "resnet34:resnet18")
    assert found is not None
    assert found.schedule == method.published["cifar10"].schedule


def test_an_override_is_ours_and_is_told() -> None:
    chosen = make_suite("t", "t", "cifar10", ["nayer"], controls=(), settings={"nayer.loops": 3})
    (job,) = jobs_of(chosen)
    assert (job.config["loops"], job.origin) == (3, "ours")
    assert job.source.endswith("changed by -s")


@pytest.mark.parametrize("setting", ["loops", "student_steps"])
def test_an_override_with_the_value_that_it_has_changes_nothing(setting: str) -> None:
    (job,) = jobs_of(make_suite("t", "t", "cifar10", ["nayer"], controls=()))
    value = (job.config | job.schedule.model_dump())[setting]
    again = make_suite("t", "t", "cifar10", ["nayer"], controls=(), settings={f"nayer.{setting}": value})
    assert jobs_of(again) == [job]


# --- Controls ---------------------------------------------------------------------------------------------------------


def by_method(jobs: list[Job]) -> dict[str, Job]:
    return {job.method: job for job in jobs}


@pytest.mark.parametrize(
    "settings", [{}, {"nayer.epochs": 9, "nayer.warmup_epochs": 4, "nayer.student_steps": 7, "nayer.batch_size": 12}]
)
def test_controls_have_the_leads_student_steps_without_its_warm_up(settings: dict[str, Any]) -> None:
    jobs = by_method(jobs_of(digits(settings=settings)))
    lead = jobs["nayer"].schedule
    for name in CONTROLS:
        schedule = jobs[name].schedule
        assert schedule.total_student_steps == lead.total_student_steps
        assert (schedule.warmup_epochs, schedule.batch_size, schedule.lr) == (0, lead.batch_size, lead.lr)


def test_the_lead_is_the_tables_first_method() -> None:
    jobs = by_method(jobs_of(digits(("fm", "nayer"), settings={"fm.student_steps": 5})))
    assert jobs["real_kd"].schedule.student_steps == 5


def test_a_table_of_controls_alone_takes_the_default_lead() -> None:
    alone = by_method(jobs_of(digits(("real_kd",), controls=())))
    assert alone["real_kd"].schedule == by_method(jobs_of(digits()))["real_kd"].schedule


def test_a_control_can_be_overridden_itself() -> None:
    jobs = by_method(jobs_of(digits(settings={"scratch.epochs": 2})))
    assert jobs["scratch"].schedule.epochs == 2
    assert jobs["real_kd"].schedule.epochs == jobs["nayer"].schedule.epochs - jobs["nayer"].schedule.warmup_epochs


def test_a_method_without_settings_takes_the_default_leads_schedule_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "bare.py"
    file.write_text(BARE)
    jobs = by_method(jobs_of(digits(("bare",)), (file,)))
    assert jobs["bare"].schedule == by_method(jobs_of(digits()))["nayer"].schedule
    assert jobs["bare"].source == "defaults, with the schedule of nayer"
    assert jobs["scratch"].schedule.total_student_steps == jobs["bare"].schedule.total_student_steps


# --- Teachers of jobs -------------------------------------------------------------------------------------------------


def test_all_jobs_of_a_pair_share_one_teacher() -> None:
    assert len({job.teacher.model_dump_json() for job in jobs_of(digits(seeds=(0, 1, 2)))}) == 1


def test_teacher_settings_change_recipe_and_seed() -> None:
    (job,) = jobs_of(digits(("nayer",), controls=(), settings={"teacher.epochs": 3, "teacher.seed": 5}))
    assert job.teacher.recipe is not None
    assert (job.teacher.recipe.epochs, job.teacher.seed) == (3, 5)
    assert job.teacher.recipe.batch_size == 64  # the rest of digits' own recipe stays


def imported(monkeypatch: pytest.MonkeyPatch) -> TeacherSpec:
    spec = TeacherSpec(model="wrn40_2", recipe=None, sha256="ab" * 32)
    card = TeacherCard(
        dataset="cifar10", model="wrn40_2", classes=10, channels=3, origin="imported from x.pth", spec=spec,
        sha256="ab" * 32, accuracy={"test": 94.0},
    )  # fmt: skip
    monkeypatch.setattr(teachers, "_cards_of", lambda dataset: iter([card]))
    return spec


def test_paper_takes_an_imported_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = imported(monkeypatch)
    assert suite.teacher_spec(data.dataset("cifar10"), "wrn40_2", "paper") == spec


def test_teacher_settings_come_before_an_imported_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    imported(monkeypatch)
    found = suite.teacher_spec(data.dataset("cifar10"), "wrn40_2", "paper", {"teacher.epochs": 7})
    assert found.recipe is not None
    assert found.recipe.epochs == 7


def test_a_teacher_that_is_trained_on_validation_is_not_evaluated_there() -> None:
    asked = make_suite("t", "t", "cifar10", ["nayer"], controls=(), evaluate_on="validation")
    with pytest.raises(UserError, match=r"-s teacher\.include_validation=false"):
        expand(asked, FOUND, data.dataset("cifar10"), "cpu")
    left_out = asked.model_copy(update={"settings": {"teacher.include_validation": False}})
    assert expand(left_out, FOUND, data.dataset("cifar10"), "cpu")


def test_an_imported_teacher_may_be_evaluated_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = imported(monkeypatch)
    asked = make_suite("t", "t", "cifar10", ["nayer"], controls=(), evaluate_on="validation")
    (job,) = expand(asked, FOUND, data.dataset("cifar10"), "cpu")
    assert job.teacher == spec


# --- Identity ---------------------------------------------------------------------------------------------------------


def test_equal_jobs_have_equal_ids_and_others_do_not() -> None:
    first, second = jobs_of(digits(seeds=(0, 1))), jobs_of(digits(seeds=(0, 1)))
    assert [job.id for job in first] == [job.id for job in second]
    assert len({job.id for job in first}) == len(first)


def test_giving_a_default_explicitly_is_the_same_job() -> None:
    plain = by_method(jobs_of(digits()))["fm"]
    given = by_method(jobs_of(digits(settings={"fm.generator_steps": plain.config["generator_steps"]})))["fm"]
    assert given.id == plain.id


def test_seeds_are_paired() -> None:
    jobs = jobs_of(digits(seeds=(0, 3)))
    rows = {name: [job.seed for job in jobs if job.method == name] for name in (*CONTROLS, "nayer", "fm")}
    assert set(map(tuple, rows.values())) == {(0, 3)}
