"""Options that several commands share. Those that say which table is meant are the fields of one frozen value.

A new option of that kind is one new field of ``TableOptions``: ``spread`` brings it into the signature that typer reads
of every command that takes the value. ``--help`` shows the fields in their order, at the value's place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from dfkd_bench.paths import expanded

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def given_path(path: Path | None) -> Path | None:
    """An option's path, ``~`` expanded."""
    return None if path is None else expanded(path)


DatasetName = Annotated[str | None, typer.Option("--dataset", "-d", help="Data set, or folder:PATH.")]
Protocol = Annotated[str | None, typer.Option(help="paper, equal or smoke; default: what suits the data set.")]
Settings = Annotated[list[str] | None, typer.Option("-s", "--set", help="METHOD.SETTING=VALUE; can be repeated.")]
InitImages = Annotated[
    str | None, typer.Option(help="Folder of images to begin with, for every method that takes some.")
]
Controls = Annotated[bool, typer.Option("--controls/--no-controls", help="Rows of scratch, real and noise KD.")]
MethodOrFile = Annotated[str, typer.Argument(help="A method's name, or a Python file with one.")]
PluginFiles = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file; can be repeated.")]
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Where raw data sets are; default: $DFKD_BENCH_DATA, else data/raw in the home folder."),
]


def output_option(text: str) -> Any:
    """``--output`` with its variable, whose help is ``text``."""
    return typer.Option("--output", "-o", envvar="DFKD_BENCH_RESULTS", callback=given_path, help=text)


Output = Annotated[Path, output_option("Records, tables and figures go here.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
PrecisionName = Annotated[
    str,
    typer.Option(
        help="auto, fp32 or bf16; auto: bf16 where the hardware has it and images are at least 16 pixels wide."
    ),
]
Deterministic = Annotated[bool, typer.Option(help="Deterministic GPU kernels (the CPU always is).")]
SplitName = Annotated[str, typer.Option("--split", help="Evaluate on test, or on validation to choose settings.")]
FigureFile = Annotated[
    Path | None, typer.Option(callback=given_path, help="A .png, .svg or .pdf file; default: OUTPUT/figures/.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Name the file of every record and student.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; the result only.")]

DEFAULT_OUTPUT = Path("dfkd-results")


@dataclass(frozen=True)
class TableOptions:
    """Which table: of ``run``, ``plan``, ``table``, ``plot`` and ``gallery``."""

    suite: Annotated[str | None, typer.Argument(help="A built-in suite or a TOML file; or use --methods.")] = None
    methods: Annotated[str | None, typer.Option("--methods", "-m", help="Comma list: nayer,fm; or all.")] = None
    dataset: DatasetName = None
    pair: Annotated[str | None, typer.Option("--pair", help="TEACHER:STUDENT, or a comma list of pairs.")] = None
    protocol: Protocol = None
    seeds: Annotated[str | None, typer.Option(help="0, 0-2, or 0,3,5-7; default: 0, or the suite's.")] = None
    settings: Settings = None
    init_images: InitImages = None
    controls: Controls = True
    plugin: PluginFiles = None
    data_root: DataRoot = None
    output: Output = DEFAULT_OUTPUT
    device: Device = "auto"
    precision: PrecisionName = "auto"
    split: SplitName = "test"

    @property
    def variant(self) -> str:
        """What files are called behind the name of the table: "" for the plain one, so that no other overwrites it.

        >>> TableOptions(split="validation", controls=False).variant
        '-validation-no_controls'
        """
        from dfkd_bench.files import safe_name
        from dfkd_bench.job import digest

        settings = sorted([*(self.settings or []), *([self.init_images] if self.init_images else [])])
        parts = (
            self.protocol,
            self.pair and safe_name(self.pair),
            self.split if self.split != "test" else None,
            None if self.controls else "no_controls",
            digest(settings)[:6] if settings else None,
        )
        return "".join(f"-{part}" for part in parts if part)


@dataclass(frozen=True)
class AblationOptions(TableOptions):
    """The same of ``ablate``: other defaults, and no option (no ``Annotated``) for what the ablation itself says."""

    suite: None = None
    methods: None = None
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Data set; default: digits.")] = None
    pair: Annotated[str | None, typer.Option("--pair", help="TEACHER:STUDENT; default: the data set's.")] = None
    seeds: Annotated[str | None, typer.Option(help="0, 0-2, or 0,3,5-7; default: the ablation's.")] = None
    controls: bool = True


@dataclass(frozen=True)
class WorkOptions:
    """How the work is done that is left of a table: of ``run`` and ``ablate``."""

    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes at a time; default: one a GPU; on a CPU one a core for smoke, else one."),
    ] = None
    rerun: Annotated[str, typer.Option(help="Run again what failed, is stale, or both: failed,stale.")] = ""
    deterministic: Deterministic = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as `plan`.")] = False


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` as typer can read it: each parameter that is a dataclass is replaced by the options among its fields.

    The command that comes back takes keywords only, as typer calls it.
    """
    values: dict[str, type[DataclassInstance]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and is_dataclass(kind):
            values[parameter.name] = kind
            parameters += _options(kind)
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def spread_out(**given: Any) -> None:  # Any: what typer has parsed, each as its option's annotation says
        for name, kind in values.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in fields(kind) if field.name in given})
        command(**given)

    # typer looks at both.
    spread_out.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread_out.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread_out


def _options(kind: type[DataclassInstance]) -> list[inspect.Parameter]:
    """The fields that are annotated for typer; others keep their defaults."""
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in fields(kind)
        if get_origin(hints[field.name]) is Annotated
    ]
