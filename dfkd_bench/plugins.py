"""Names and classes of methods, and of plugins' data sets, models and text encoders. The only module that loads them.

Three ways, no decorators, no side effects on import:

1. files in the built-in folder ``dfkd_bench.methods`` whose names have no leading underscore;
2. entry points in the groups ``dfkd_bench.methods``, ``.datasets``, ``.models``, ``.encoders``;
3. one file by path (``--plugin FILE``): it defines one ``Method`` subclass (the method's name is the file's stem)
   and/or ``DATASETS``, ``MODELS``, ``ENCODERS``, dictionaries by name.

Names are known without importing, so that listing stays fast; a clash names both origins.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dfkd_bench import __version__
from dfkd_bench.errors import UserError, unknown

if TYPE_CHECKING:
    from dfkd_bench.method import Method

METHODS_PACKAGE = "dfkd_bench.methods"
GROUPS = ("methods", "datasets", "models", "encoders")
TABLES = ("published", "smoke", "search", "equal_lr", "same_results")
"""Attributes that a method's file may assign at its end, and that are no part of what makes a result."""


@dataclass(frozen=True)
class Source:
    """Where one method comes from: ``kind`` is built-in, entry point or file."""

    name: str
    kind: str
    path: Path | None  # the source file, where it can be told without importing
    module: str  # to be imported ("" for a file)
    attribute: str | None = None  # entry points may name the class
    distribution: str = "dfkd-bench"
    version: str = __version__

    def describe(self) -> str:
        """For messages and records."""
        where = f" {self.path}" if self.kind == "file" else f" of {self.distribution}"
        return self.kind + where

    def card(self) -> dict[str, Any]:
        """The literal ``CARD`` of the source file, read without importing; empty if there is none."""
        if self.path is None:
            return {}
        try:
            tree = ast.parse(self.path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):
            return {}
        for node in tree.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == "CARD":
                try:
                    card = ast.literal_eval(node.value)
                except ValueError:
                    return {}
                return card if isinstance(card, dict) else {}
        return {}

    def source_sha256(self) -> str:
        """Hash of the source without comments, docstrings, layout and tables of settings: what could change the
        result of a job. The settings themselves are in the job.

        Modules of this package that hold parts of methods count with the file that imports them: those that import
        the contract themselves, such as ``inversion``. Every version of Python gives the same hash.
        """
        return self._hash(_tree_text)

    def _hash(self, text: Callable[[ast.Module], str]) -> str:
        if self.path is None:
            return ""
        tree = ast.parse(self.path.read_text(encoding="utf-8"))
        files = [_meaning(tree), *map(_meaning, _parts(tree))]
        return hashlib.sha256("".join(map(text, files)).encode()).hexdigest()

    def same_code(self) -> frozenset[str]:
        """Hashes of today's source alone, by the rule of today and by that of earlier records and checkpoints."""
        return frozenset({self.source_sha256(), self._hash(ast.unparse)})

    def same_results(self) -> frozenset[str]:
        """Hashes of sources that make the same records: today's, and earlier ones that the file names."""
        return frozenset({self.source_sha256()}) | self.earlier_sources()

    def earlier_sources(self) -> frozenset[str]:
        """Those that the file names by ``NAME.same_results = ("<hash>", ...)`` at its end, and today's by the rule of
        earlier records: of the text that Python writes for a tree, which its versions write differently.

        A switch that was added touches none of the runs without it, and they need not be made anew.
        """
        text = self.path.read_text(encoding="utf-8") if self.path is not None else ""
        named: frozenset[str] = frozenset()
        if "same_results" in text:
            for node in ast.parse(text).body:
                if isinstance(node, ast.Assign) and _is_table(node, ("same_results",)):
                    named = self._hashes(node.value)
        return named | {self._hash(ast.unparse)}

    def _hashes(self, value: ast.expr) -> frozenset[str]:
        try:
            hashes = ast.literal_eval(value)
        except ValueError:
            hashes = None
        if not isinstance(hashes, tuple | list) or not all(isinstance(one, str) for one in hashes):
            raise UserError(
                f"method '{self.name}' ({self.describe()}): same_results is no tuple of hashes: expected "
                '("<hash of an earlier source>",), as records have them'
            )
        return frozenset(hashes)


def _meaning(tree: ast.Module) -> ast.Module:
    """``tree`` without what can't change a result; it is changed."""
    tree.body = [node for node in tree.body if not _is_table(node, TABLES)]
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0] = ast.Expr(ast.Constant(...))
    return tree


def _tree_text(value: object) -> str:
    """A tree as a text of its nodes; fields that are empty are left out, for newer versions of Python have more."""
    if isinstance(value, ast.JoinedStr):  # some versions put empty texts between the parts of an f-string
        value.values = [part for part in value.values if not (isinstance(part, ast.Constant) and part.value == "")]
    if isinstance(value, ast.AST):
        fields = [f"{name}={_tree_text(field)}" for name, field in ast.iter_fields(value) if field not in (None, [])]
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_tree_text, value))}]"
    return repr(value)


def _parts(tree: ast.Module) -> list[ast.Module]:
    """The modules of this package that ``tree`` imports and that import the contract, in the order of their names."""
    files = [Path(__file__).parent / f"{name}.py" for name in sorted(_own_imports(tree) - {"method"})]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    return [part for part in trees if "method" in _own_imports(part)]


def _own_imports(tree: ast.Module) -> set[str]:
    """Names of the modules of this package that ``tree`` imports at its top level, in any of the three ways."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Import):  # import dfkd_bench.losses
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if node.module == "dfkd_bench":  # from dfkd_bench import losses
                names += [f"dfkd_bench.{alias.name}" for alias in node.names]
            else:  # from dfkd_bench.losses import ...
                names.append(node.module or "")
    return {name.removeprefix("dfkd_bench.") for name in names if name.startswith("dfkd_bench.")}


def _is_table(node: ast.stmt, names: Sequence[str]) -> bool:
    """``Nayer.smoke = {...}`` and the like at a file's end."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return isinstance(target, ast.Attribute) and target.attr in names


@dataclass(frozen=True)
class Plugins:
    """Everything that can be named. ``broken`` holds a line for each plugin that could not be read."""

    methods: Mapping[str, Source]
    datasets: Mapping[str, Any] = field(default_factory=dict)
    models: Mapping[str, Any] = field(default_factory=dict)
    encoders: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str) -> Source:
        """The source of a method; a misspelt name gets the nearest one, an unavailable method its reason.

        What its ``CARD`` calls outside knowledge goes into every record, so it is looked at before anything runs.
        """
        if name not in self.methods:
            missing = unavailable().get(name.lower().replace("-", "_"))
            if missing is not None:
                raise UserError(f"method '{name}' is known, but not available: {missing['reason']}")
            raise unknown("method", name, self.methods, "`dfkd-bench list methods` shows them")
        source = self.methods[name]
        knowledge = source.card().get("knowledge", "")
        if not isinstance(knowledge, str):
            at = f"method '{name}' ({source.describe()}): CARD['knowledge']"
            raise UserError(f"{at} {_what(knowledge)}, expected what the method knows beside the teacher, in words")
        return source

    def method(self, name: str) -> type[Method]:
        """The class of a method: its module is imported now. One that asks for training data must be a control."""
        source = self.source(name)
        found = load(source)
        if "training_data" in found.needs and source.card().get("family") != "control":
            raise UserError(
                f"method '{name}' ({source.describe()}) has 'training_data' in `needs`, which only a control may have: "
                "take it out, or set the family in `CARD` to 'control'"
            )
        _refuse_other_settings(source, found)
        return found


def discover(files: Sequence[Path] = ()) -> Plugins:
    """Find all plugins; those of ``files`` are imported at once, for their other kinds of names."""
    methods: dict[str, Source] = {}
    found: dict[str, dict[str, Any]] = {group: {} for group in GROUPS[1:]}
    broken: dict[str, str] = {}
    for source in _built_in() + _entry_points():
        _put(methods, source)
        if source.path is None:  # an error only where it is asked for by name
            broken[f"method {source.name}"] = (
                f"methods plugin '{source.name}' of {source.distribution}: module {source.module} can't be found"
            )
    origins: dict[tuple[str, str], str] = {}
    for group in found:
        for entry in importlib.metadata.entry_points(group=f"dfkd_bench.{group}"):
            origin = f"entry point of {entry.dist.name if entry.dist else 'unknown'}"
            _refuse_clash(origins, group, entry.name, origin)
            try:
                value = entry.load()
            except (Exception, SystemExit) as error:  # a foreign package may raise anything: a line, not a crash
                wrong: str | None = f"fails to import: {_line(error)}"
            else:
                wrong = _fault(group, entry.name, value)
            if wrong is None:
                found[group][entry.name] = value
            else:
                broken[entry.name] = f"{group} plugin '{entry.name}' ({entry.value}) {wrong}"
    for path in files:
        module = _import_file(path)
        if _method_classes(module):
            _put(methods, _file_source(path))
        elif lacking := _lacking(module):
            raise UserError(f"plugin {path}: {lacking}")
        for group in found:
            values = getattr(module, group.upper(), {})
            if not isinstance(values, Mapping):
                raise UserError(f"plugin {path}: {group.upper()} is no dictionary by name")
            for name, value in values.items():
                if not isinstance(name, str):
                    raise UserError(f"plugin {path}: {group.upper()} has the key {name!r}: expected a name as text")
                _refuse_clash(origins, group, name, f"file {path}")
                if wrong := _fault(group, name, value):
                    raise UserError(f"plugin {path}: {group.upper()}['{name}'] {wrong} (docs/own_models_and_data.md)")
                found[group][name] = value
    return Plugins(methods, files=tuple(path.resolve() for path in files), broken=broken, **found)


RESERVED = ("all", "teacher")
"""No method's names: ``--methods all``, ``-s teacher.epochs=9``."""


@cache
def unavailable() -> dict[str, dict[str, Any]]:
    """Methods that are known and not built: name -> title, year, venue, link and the reason, of unavailable.toml."""
    text = importlib.resources.files(METHODS_PACKAGE).joinpath("unavailable.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def load(source: Source) -> type[Method]:
    """The class of one method: its module is imported now."""
    return _method_class(_import(source), source)


def method_file(path: Path) -> Source:
    """The source of the method in one file."""
    module = _import_file(path)
    if not _method_classes(module):
        raise UserError(f"{path} defines no subclass of dfkd_bench.method.Method{_lacking(module, ': ')}")
    others = {
        source.name: source for source in _built_in() if source.path is None or source.path.resolve() != path.resolve()
    }
    _put(others, _file_source(path))  # its name may be taken, or reserved
    return _file_source(path)


def _fault(group: str, name: str, value: object) -> str | None:
    """What can be said against a plugin's value without building or reading anything; None: nothing."""
    from dfkd_bench.data import fault

    if group == "datasets":
        return fault(name, value)
    if group == "models" and not callable(value):
        return f"is of type {type(value).__name__}: expected a function of (classes, channels) that builds the model"
    if group == "models" and not re.fullmatch(r"[\w.-]+", name):
        return "has a name that no --pair can have: expected letters, digits, _, - and . alone"
    return None


def _refuse_clash(origins: dict[tuple[str, str], str], group: str, name: str, origin: str) -> None:
    other = "built-in of dfkd-bench" if name in _built_in_names(group) else origins.get((group, name))
    if other is not None:
        raise UserError(f"two {group} are called '{name}': {other} and {origin}")
    origins[group, name] = origin


def _refuse_other_settings(source: Source, method: type[Method]) -> None:
    """``published`` and ``smoke`` are read by whoever plans, lists or describes: what is no table of settings ends
    here, in a line with its place."""
    from dfkd_bench.method import Published

    expected = "expected a dfkd_bench.method.Published by data set, or by DATASET/TEACHER:STUDENT"
    for table in ("published", "smoke"):
        at = f"method '{source.name}' ({source.describe()}): {table}"
        entries = getattr(method, table)
        if not isinstance(entries, Mapping):
            raise UserError(f"{at} {_what(entries)}, {expected}")
        for key, entry in entries.items():
            if not isinstance(key, str):
                raise UserError(f"{at} has the key {key!r}, {expected}")
            if not isinstance(entry, Published):
                raise UserError(f"{at}['{key}'] {_what(entry)}, {expected}")


def _what(value: object) -> str:
    """A value of the wrong kind, in an error's words."""
    return f"is the class {value.__name__}" if inspect.isclass(value) else f"is of type {type(value).__name__}"


def _built_in_names(group: str) -> Sequence[str]:
    from dfkd_bench.data import dataset_names
    from dfkd_bench.models import model_names
    from dfkd_bench.text import encoder_names

    return {"datasets": dataset_names, "models": model_names, "encoders": encoder_names}[group]()


def _built_in() -> list[Source]:
    spec = importlib.util.find_spec(METHODS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the package {METHODS_PACKAGE} is not there: install dfkd-bench (`python -m pip install -e .`)"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    return [
        Source(path.stem, "built-in", path, f"{METHODS_PACKAGE}.{path.stem}")
        for folder in folders
        for path in sorted(folder.glob("*.py"))
        if not path.stem.startswith("_")
    ]


def _entry_points() -> list[Source]:
    sources = []
    for entry in importlib.metadata.entry_points(group="dfkd_bench.methods"):
        distribution = entry.dist
        sources.append(
            Source(
                entry.name,
                "entry point",
                _path_of(entry.module),
                entry.module,
                entry.attr or None,
                distribution.name if distribution else "unknown",
                distribution.version if distribution else "unknown",
            )
        )
    return sources


def _path_of(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # find_spec imports parent packages, which may fail in any way
        return None
    return Path(spec.origin) if spec and spec.origin else None


def _put(methods: dict[str, Source], source: Source) -> None:
    if source.name in RESERVED:
        raise UserError(
            f"a method can't be called '{source.name}' ({source.describe()}), which has another meaning in commands: "
            "give it another name"
        )
    other = methods.get(source.name)
    if other is not None:
        raise UserError(f"two methods are called '{source.name}': {other.describe()} and {source.describe()}")
    methods[source.name] = source


def _file_source(path: Path) -> Source:
    return Source(path.stem, "file", path.resolve(), "", None, "none", "none")


def _import(source: Source) -> ModuleType:
    if source.kind == "file":
        assert source.path is not None
        return _import_file(source.path)
    try:
        return importlib.import_module(source.module)
    except (Exception, SystemExit) as error:
        raise UserError(f"method '{source.name}' ({source.describe()}) fails to import: {_line(error)}") from error


def _import_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"there is no plugin file {path}")
    name = f"dfkd_bench_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"plugin {path} fails to import: {_line(error)}") from error
    return module


def _method_classes(module: ModuleType) -> list[type[Method]]:
    return [found for found in _subclasses(module) if not inspect.isabstract(found)]


def _lacking(module: ModuleType, before: str = "") -> str:
    """What keeps the only subclasses of a module from being methods; "" if there are none."""
    parts = [
        f"class {found.__name__} lacks {' and '.join(sorted(found.__abstractmethods__))}, which every method defines"
        for found in _subclasses(module)
        if inspect.isabstract(found)
    ]
    return before + "; ".join(parts) if parts else ""


def _subclasses(module: ModuleType) -> list[type[Method]]:
    from dfkd_bench.method import Method

    return [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    ]


def _method_class(module: ModuleType, source: Source) -> type[Method]:
    classes = _method_classes(module)
    if source.attribute is not None:
        classes = [value for value in classes if value.__name__ == source.attribute]
    if len(classes) != 1:
        names = ", ".join(value.__name__ for value in classes) or "none"
        raise UserError(
            f"method '{source.name}' ({source.describe()}): expected one subclass of dfkd_bench.method.Method that "
            f"defines synthesize, found {names}"
        )
    return classes[0]


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
