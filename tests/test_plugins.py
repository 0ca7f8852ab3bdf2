"""Finding methods, data sets and models: built in, by entry point, in a file; and in a line what is wrong with them."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dfkd_bench import data, plugins
from dfkd_bench.errors import UserError
from dfkd_bench.plugins import Source, _meaning, _tree_text, discover, method_file

METHOD = '''
"""A method for these tests."""
import torch
from dfkd_bench.method import Method, MethodConfig, Synthesis

CARD = {"title": "Toy", "family": "pool", "year": 2024, "confirmed": False}

class Toy(Method):
    """Nothing but noise."""
    Config = MethodConfig

    def synthesize(self, student, at):
        # noise
        return Synthesis(torch.rand(4, *self.task.image_shape))
'''
DATA_AND_MODEL = """
import numpy as np
from torch import nn
from dfkd_bench.data import DataSet, RawData

def read(dataset, root, part):
    labels = np.arange(20) % 2
    return RawData.of_arrays(np.zeros((20, 1, 2, 2), np.uint8), labels)

DATASETS = {"toy": DataSet("toy", "a toy", 2, ("a", "b"), (1, 2, 2), (0.5,), (0.5,), False, 4, "here", read)}
MODELS = {"flat": lambda classes, channels: nn.Linear(channels, classes)}
"""

Install = Callable[[str, str, str], None]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """``write(name, text)``: a plugin file."""

    def make(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return path

    return make


# --- Built in ---------------------------------------------------------------------------------------------------------


def test_every_file_of_the_folder_is_a_method() -> None:
    folder = Path(str(__import__("dfkd_bench.methods").methods.__file__)).parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert set(discover().methods) == files
    assert {"nayer", "fm", "scratch", "real_kd", "noise_kd"} <= files


@pytest.mark.parametrize("name", sorted(discover().methods))
def test_a_built_in_method_can_be_imported_and_has_a_card(name: str) -> None:
    found = discover()
    assert found.method(name).__module__ == f"dfkd_bench.methods.{name}"
    assert found.source(name).card()["title"]


def test_names_and_cards_are_known_without_importing_torch_or_a_method(tmp_path: Path) -> None:
    script = (
        "import sys; from dfkd_bench import plugins; found = plugins.discover(); "
        "titles = [source.card()['title'] for source in found.methods.values()]; "
        "heavy = [n for n in ('torch', 'numpy', 'dfkd_bench.methods.nayer') if n in sys.modules]; "
        "sys.exit(f'imported: {heavy}' if heavy or not titles else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_files_stem_is_the_methods_name(write: Callable[[str, str], Path]) -> None:
    path = write("toy", METHOD)
    found = discover([path])
    assert found.method("toy").__name__ == "Toy"
    assert found.source("toy").describe() == f"file {path}"


def test_a_clash_with_a_built_in_name_names_both(write: Callable[[str, str], Path]) -> None:
    path = write("nayer", METHOD)
    with pytest.raises(UserError) as caught:
        discover([path])
    assert "two methods are called 'nayer'" in str(caught.value)
    assert "built-in of dfkd-bench" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def (:", "SyntaxError"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("import sys; sys.exit('no')", "SystemExit: no"),
    ],
)
def test_a_file_that_fails_to_import_is_one_line(text: str, words: str, write: Callable[[str, str], Path]) -> None:
    path = write("broken", text)
    with pytest.raises(UserError) as caught:
        discover([path])
    assert str(caught.value).startswith(f"plugin {path} fails to import: {words}")
    assert "\n" not in str(caught.value)


def test_a_file_that_failed_can_be_mended(write: Callable[[str, str], Path]) -> None:
    path = write("mended", "import no_such_package")
    with pytest.raises(UserError):
        discover([path])
    assert "mended" in discover([write("mended", METHOD)]).methods


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no plugin file"):
        discover([tmp_path / "gone.py"])


def test_training_data_are_for_controls_only(write: Callable[[str, str], Path]) -> None:
    greedy = METHOD.replace("    Config =", "    needs = frozenset({'training_data'})\n    Config =")
    with pytest.raises(UserError, match=r"'greedy' .* only a control may have"):
        discover([write("greedy", greedy)]).method("greedy")
    control = greedy.replace('"pool"', '"control"')
    assert discover([write("control", control)]).method("control").needs


def test_a_misspelt_method_of_a_class_is_named(write: Callable[[str, str], Path]) -> None:
    path = write("misspelt", METHOD.replace("def synthesize", "def synthesise"))
    lacks = "class Toy lacks synthesize, which every method defines"
    with pytest.raises(UserError, match=f"plugin {path}: {lacks}"):
        discover([path])
    with pytest.raises(UserError, match=f"{path} defines no subclass of .*: {lacks}"):
        method_file(path)


@pytest.mark.parametrize("name", ["all", "teacher"])
def test_names_with_another_meaning_in_commands_are_taken(name: str, write: Callable[[str, str], Path]) -> None:
    path = write(name, METHOD)
    for take in (method_file, lambda path: discover([path])):
        with pytest.raises(UserError, match=f"a method can't be called '{name}'"):
            take(path)


def test_a_file_to_be_checked_has_no_name_of_a_built_in_method(write: Callable[[str, str], Path]) -> None:
    with pytest.raises(UserError, match="two methods are called 'fm'"):
        method_file(write("fm", METHOD))


def test_a_file_without_a_method_is_none(write: Callable[[str, str], Path]) -> None:
    with pytest.raises(UserError, match="no subclass"):
        method_file(write("empty", "x = 1"))


def test_an_imported_method_class_does_not_count(write: Callable[[str, str], Path]) -> None:
    with pytest.raises(UserError, match="no subclass"):
        method_file(write("borrowed", "from dfkd_bench.methods.nayer import Nayer"))


def test_two_methods_in_one_file_are_one_too_many(write: Callable[[str, str], Path]) -> None:
    path = write("two", METHOD + "\nclass Other(Toy):\n    pass\n")
    with pytest.raises(UserError, match=r"expected one subclass .* found Toy, Other"):
        discover([path]).method("two")


def test_a_file_can_bring_data_sets_and_models(write: Callable[[str, str], Path]) -> None:
    found = discover([write("extras", DATA_AND_MODEL)])
    assert "extras" not in found.methods
    assert data.dataset("toy", None, found.datasets).class_names == ("a", "b")
    assert found.models["flat"](2, 1).out_features == 2


@pytest.mark.parametrize(
    ("text", "group", "name"),
    [
        ("DATASETS = {'digits': 1}", "datasets", "digits"),
        ("MODELS = {'wrn16_1': 1}", "models", "wrn16_1"),
        ("ENCODERS = {'clip': 1}", "encoders", "clip"),
    ],
)
def test_other_built_in_names_are_taken_too(
    text: str, group: str, name: str, write: Callable[[str, str], Path]
) -> None:
    path = write("taken", text)
    with pytest.raises(UserError) as caught:
        discover([path])
    assert str(caught.value) == f"two {group} are called '{name}': built-in of dfkd-bench and file {path}"


def test_a_list_in_place_of_a_dictionary_is_one_line(write: Callable[[str, str], Path]) -> None:
    with pytest.raises(UserError, match="MODELS is no dictionary"):
        discover([write("listed", "MODELS = ['a']")])


@pytest.mark.parametrize("group", ["DATASETS", "MODELS", "ENCODERS"])
def test_a_name_that_is_no_text_is_one_line(group: str, write: Callable[[str, str], Path]) -> None:
    with pytest.raises(UserError, match=rf"{group} has the key 1: expected a name as text"):
        discover([write(f"keyed_{group}", f"{group} = {{1: print}}")])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("DataSet", r"DATASETS\['mine'\] is the class DataSet: expected a dfkd_bench.data.DataSet\(...\)"),
        ("3", r"DATASETS\['mine'\] is of type int: expected"),
    ],
)
def test_what_is_no_data_set_is_one_line(value: str, words: str, write: Callable[[str, str], Path]) -> None:
    with pytest.raises(UserError, match=words):
        discover([write("mine", f"from dfkd_bench.data import DataSet\nDATASETS = {{'mine': {value}}}")])


@pytest.mark.parametrize("table", ["published", "smoke"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{'digits': 3}", r"\['digits'\] is of type int, expected a dfkd_bench.method.Published"),
        ("{3: None}", " has the key 3, expected"),
        ("['digits']", " is of type list, expected"),
    ],
)
def test_what_is_no_table_of_settings_is_one_line(
    table: str, value: str, words: str, write: Callable[[str, str], Path]
) -> None:
    found = discover([write("mine", f"{METHOD}\nToy.{table} = {value}\n")])
    with pytest.raises(UserError, match=rf"method 'mine' \(file .*\): {table}{words}"):
        found.method("mine")


# --- Entry points -----------------------------------------------------------------------------------------------------


def test_an_entry_point_is_found(install: Install) -> None:
    install("their_toy", METHOD, "[dfkd_bench.methods]\ntoy = their_toy:Toy\n")
    found = discover()
    source = found.source("toy")
    assert (source.kind, source.distribution, source.version) == ("entry point", "their-toy", "1.2")
    assert source.card()["title"] == "Toy"
    assert "their_toy" not in sys.modules  # until it is asked for
    assert found.method("toy").__name__ == "Toy"


def test_an_entry_point_chooses_among_classes(install: Install) -> None:
    text = METHOD + "\nclass Other(Toy):\n    pass\n"
    install("their_two", text, "[dfkd_bench.methods]\ntoy = their_two:Toy\nother = their_two:Other\n")
    found = discover()
    assert (found.method("toy").__name__, found.method("other").__name__) == ("Toy", "Other")


def test_an_entry_point_that_clashes_names_both(install: Install) -> None:
    install("their_fm", METHOD, "[dfkd_bench.methods]\nfm = their_fm\n")
    with pytest.raises(UserError, match=r"'fm': built-in of dfkd-bench and entry point of their-fm"):
        discover()


def test_an_entry_point_that_fails_to_import_is_one_line_when_it_is_used(install: Install) -> None:
    install("their_broken", "raise RuntimeError('no luck')", "[dfkd_bench.methods]\ntheirs = their_broken\n")
    found = discover()
    with pytest.raises(UserError, match=r"method 'theirs' \(entry point of their-broken\) fails .*: no luck$"):
        found.method("theirs")


def test_entry_points_bring_data_sets_and_models(install: Install) -> None:
    install(
        "their_data",
        DATA_AND_MODEL + "toy, flat = DATASETS['toy'], MODELS['flat']\n",
        "[dfkd_bench.datasets]\ntoy = their_data:toy\n[dfkd_bench.models]\nflat = their_data:flat\n",
    )
    found = discover()
    assert found.datasets["toy"].num_classes == 2
    assert list(found.models) == ["flat"]


def test_a_broken_data_set_of_another_package_stops_nothing(install: Install) -> None:
    install("their_bad_data", "import no_such_package", "[dfkd_bench.datasets]\ntheirs = their_bad_data:x\n")
    found = discover()
    assert "nayer" in found.methods
    assert found.broken["theirs"].startswith("datasets plugin 'theirs' (their_bad_data:x) fails to import: ")


def test_a_data_set_of_the_wrong_type_of_another_package_stops_nothing(install: Install) -> None:
    install("their_number", "x = 1", "[dfkd_bench.datasets]\ntheirs = their_number:x\n")
    found = discover()
    assert "theirs" not in found.datasets
    assert found.broken["theirs"].startswith("datasets plugin 'theirs' (their_number:x) is of type int: expected a ")


def test_a_method_whose_module_is_gone_is_a_line_and_an_error_once_it_is_named(install: Install) -> None:
    install("their_gone", "", "[dfkd_bench.methods]\ntheirs = no_such_module\n")
    found = discover()
    assert list(found.broken.values()) == [
        "methods plugin 'theirs' of their-gone: module no_such_module can't be found"
    ]
    with pytest.raises(UserError, match=r"method 'theirs' .* fails to import: ModuleNotFoundError"):
        found.method("theirs")


def test_a_data_set_of_another_package_does_not_replace_a_built_in_one(install: Install) -> None:
    install("their_digits", "x = 1", "[dfkd_bench.datasets]\ndigits = their_digits:x\n")
    with pytest.raises(UserError, match=r"two datasets are called 'digits': built-in .* entry point of their-digits"):
        discover()


# --- Source files -----------------------------------------------------------------------------------------------------


def source_of(path: Path) -> Source:
    return Source(path.stem, "file", path, "")


def test_the_hash_ignores_comments_docstrings_and_layout(write: Callable[[str, str], Path]) -> None:
    plain = source_of(write("a", METHOD)).source_sha256()
    text = METHOD.replace("# noise", "# another comment").replace("Nothing but noise.", "Only noise.")
    text = text.replace('"""A method for these tests."""', '"""Other words."""\n\n\n')
    assert source_of(write("b", text)).source_sha256() == plain


def test_the_hash_ignores_tables_of_settings(write: Callable[[str, str], Path]) -> None:
    """They are in the job: new settings for another data set make no record stale."""
    plain = source_of(write("a", METHOD)).source_sha256()
    assert source_of(write("b", METHOD + "\nNoise.smoke = {}\n")).source_sha256() == plain


def test_the_hash_sees_code(write: Callable[[str, str], Path]) -> None:
    plain = source_of(write("a", METHOD)).source_sha256()
    assert source_of(write("b", METHOD.replace("rand(4", "rand(5"))).source_sha256() != plain


def test_earlier_sources_with_the_same_results_are_named_in_the_file(write: Callable[[str, str], Path]) -> None:
    plain = source_of(write("a", METHOD))
    later = source_of(write("b", METHOD + "\nNoise.switch = 1\nNoise.same_results = ('0ld',)\n"))
    assert later.same_results() == plain_of(later) | {"0ld"}
    assert plain.same_results() == plain_of(plain)


def plain_of(source: Source) -> set[str]:
    """Today's hash, and the one that earlier records have of the same code."""
    tree = _meaning(ast.parse(source.path.read_text()))  # type: ignore[union-attr]
    return {source.source_sha256(), hashlib.sha256(ast.unparse(tree).encode()).hexdigest()}


def test_the_hash_is_the_same_in_every_python(write: Callable[[str, str], Path]) -> None:
    """Python 3.12 writes the quotes of such a text otherwise than 3.11 does, and has fields that 3.11 lacks."""
    source = source_of(write("a", """def f(x: dict[str, int]) -> str:\n    return f"{x['a']!r:>5} {1.5}"\n"""))
    assert source.source_sha256() == "af18c6a97c5a2f10c3f35006a5c2814e932889f14d814616fd245cb8f8e951ef"


def test_an_empty_text_in_an_f_string_is_no_other_code() -> None:
    """Python 3.12.1 has one behind a format within a format."""
    tree = ast.parse("""f"{x:>{w}}\"""")
    plain = _tree_text(tree)
    text = next(node for node in ast.walk(tree) if isinstance(node, ast.FormattedValue)).format_spec
    assert isinstance(text, ast.JoinedStr)
    text.values.append(ast.Constant(""))
    assert _tree_text(tree) == plain


@pytest.mark.parametrize("value", ["'0ld'", "made()", "(1,)"])
def test_earlier_sources_of_the_wrong_form_are_one_line(value: str, write: Callable[[str, str], Path]) -> None:
    source = source_of(write("a", METHOD + f"\nNoise.same_results = {value}\n"))
    with pytest.raises(UserError, match="same_results is no tuple of hashes: expected"):
        source.earlier_sources()


def test_naming_them_does_not_change_the_hash(write: Callable[[str, str], Path]) -> None:
    plain = source_of(write("a", METHOD)).source_sha256()
    assert source_of(write("b", METHOD + "\nNoise.same_results = ('0ld',)\n")).source_sha256() == plain


@pytest.mark.parametrize(
    "text", ["", "CARD = dict(title='x')", "CARD = 5", "CARD = {'a': open('x')}", "def (:", "card = {'title': 'x'}"]
)
def test_a_card_that_is_no_literal_dictionary_is_empty(text: str, write: Callable[[str, str], Path]) -> None:
    assert source_of(write("a", text)).card() == {}


@pytest.mark.parametrize(("value", "words"), [("['none']", "is of type list"), ("None", "is of type NoneType")])
def test_knowledge_that_is_no_text_is_one_line(value: str, words: str, write: Callable[[str, str], Path]) -> None:
    """It goes into the record, which failed after all epochs."""
    path = write("my_method", METHOD.replace('"pool"', f'"pool", "knowledge": {value}'))
    with pytest.raises(UserError) as caught:
        discover([path]).source("my_method")
    line = str(caught.value)
    assert line == (
        f"method 'my_method' (file {path}): CARD['knowledge'] {words}, expected what the method knows beside the "
        "teacher, in words"
    )


def test_a_card_may_have_a_type(write: Callable[[str, str], Path]) -> None:
    assert source_of(write("a", "CARD: dict[str, str]\nCARD: dict[str, str] = {'title': 'x'}")).card() == {"title": "x"}


def test_a_card_is_read_without_running_the_file(write: Callable[[str, str], Path]) -> None:
    path = write("a", "raise SystemExit\nCARD = {'title': 'x', 'year': 2024}")
    assert source_of(path).card() == {"title": "x", "year": 2024}


def test_an_unknown_method_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="unknown method 'nayr': did you mean 'nayer'"):
        plugins.discover().source("nayr")


@pytest.mark.parametrize(
    "imports",
    [
        "from dfkd_bench.part import STEPS\nfrom dfkd_bench.tool import STEPS\n",
        "from dfkd_bench import part, tool\n",
        "import dfkd_bench.part as part\nimport dfkd_bench.tool\n",
    ],
)
def test_shared_parts_of_methods_count_with_the_file_that_imports_them(
    imports: str, write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "part.py").write_text("from dfkd_bench.method import Method\nSTEPS = 1\n")
    (package / "tool.py").write_text("from dfkd_bench.errors import UserError\nSTEPS = 1\n")
    monkeypatch.setattr(plugins, "__file__", str(package / "plugins.py"))
    user = write("a", imports + METHOD)
    before = source_of(user).source_sha256()
    (package / "tool.py").write_text("from dfkd_bench.errors import UserError\nSTEPS = 2\n")
    assert source_of(user).source_sha256() == before
    (package / "part.py").write_text("from dfkd_bench.method import Method\nSTEPS = 2\n")
    assert source_of(user).source_sha256() != before
