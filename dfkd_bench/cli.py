"""The command line: parses, calls one function, prints. No logic, and no import of torch before it is needed."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, cast

import typer
from rich.console import Console

from dfkd_bench import __version__
from dfkd_bench.errors import UserError, disk_error, unknown

EXIT_FAILED, EXIT_WRONG_INPUT, EXIT_RESUMABLE, EXIT_CTRL_C = 1, 2, 3, 130
RERUN = ("failed", "stale")

app = typer.Typer(
    name="dfkd-bench",
    help="Which data-free distillation method gives the best student for its time? Runs the methods under one "
    "protocol and prints one table.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
teacher_app = typer.Typer(help="Train, import, list and verify teachers.", no_args_is_help=True)
app.add_typer(teacher_app, name="teacher")

# Redirected output has no width of its own; tables in it should not be folded at 80 signs.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# -- options that several commands share ----------------------------------------------------------------------------

SuiteName = Annotated[str | None, typer.Argument(help="A built-in suite or a TOML file; or use --methods.")]
Methods = Annotated[str | None, typer.Option("--methods", "-m", help="Comma list: nayer,fm.")]
DatasetName = Annotated[str | None, typer.Option("--dataset", "-d", help="Data set, or folder:PATH.")]
PairNames = Annotated[str | None, typer.Option("--pair", help="TEACHER:STUDENT, or a comma list of pairs.")]
Protocol = Annotated[str | None, typer.Option(help="paper or smoke; default: what suits the data set.")]
Seeds = Annotated[str | None, typer.Option(help="0, 0-2, or 0,3,5-7; default: 0, or the suite's.")]
Settings = Annotated[list[str] | None, typer.Option("-s", "--set", help="METHOD.SETTING=VALUE; can be repeated.")]
Controls = Annotated[bool, typer.Option("--controls/--no-controls", help="Rows of scratch, real and noise KD.")]
PluginFiles = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file; can be repeated.")]
DataRoot = Annotated[Path | None, typer.Option(help="Where raw data sets are; default: $DFKD_BENCH_DATA.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", envvar="DFKD_BENCH_RESULTS", help="Records, tables and figures go here.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
PrecisionName = Annotated[str, typer.Option(help="auto, fp32 or bf16.")]
SplitName = Annotated[str, typer.Option("--split", help="Evaluate on test, or on validation to choose settings.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; the result only.")]

DEFAULT_OUTPUT = Path("dfkd-results")


def main() -> NoReturn:
    """The console script: one line for wrong input, never a traceback."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        result = app(standalone_mode=False)  # typer.Exit does not come out of here: its code is returned
        code = result if isinstance(result, int) else 0
        if code == EXIT_CTRL_C:  # newer versions of typer turn Ctrl-C into an exit code, too
            raise KeyboardInterrupt
    except UserError as error:
        code = _complain(str(error))
    except _USAGE_ERROR as error:
        code = _wrong_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        err.print("\nstopped: nothing is lost, the same command goes on where this one ended")
        code = EXIT_CTRL_C
    except _Terminated:
        err.print("\nstopped early: nothing is lost, the same command goes on where this one ended")
        code = EXIT_RESUMABLE
    except BrokenPipeError:  # `dfkd-bench table | head`
        code = 0
    except OSError as error:  # no space, no permission: what there is stays as it is
        code = _complain(str(disk_error(error) or error))
    sys.exit(code)


class _Terminated(BaseException):
    """SIGTERM: a batch system wants the machine back."""


def _terminated(_signal: int, _frame: Any) -> None:
    raise _Terminated


# typer carries a copy of click of its own since 0.16, so that click's classes are not the ones it raises.
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def _wrong_usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return EXIT_WRONG_INPUT
    context = getattr(error, "ctx", None)
    where = f" (see `{context.command_path} --help`)" if context else ""
    return _complain(error.format_message() + where)


def _complain(line: str) -> int:
    err.print(f"[bold red]error:[/] {_escaped(' '.join(line.split()))}")
    return EXIT_WRONG_INPUT


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _version(value: bool) -> None:
    if value:
        out.print(f"dfkd-bench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# -- run, plan, table, plot -----------------------------------------------------------------------------------------


@app.command()
def run(
    suite: SuiteName = None,
    methods: Methods = None,
    dataset: DatasetName = None,
    pair: PairNames = None,
    protocol: Protocol = None,
    seeds: Seeds = None,
    settings: Settings = None,
    controls: Controls = True,
    plugin: PluginFiles = None,
    data_root: DataRoot = None,
    output: Output = DEFAULT_OUTPUT,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    split: SplitName = "test",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at a time; default: one a device.")] = None,
    rerun: Annotated[str, typer.Option(help="Also do again what is: failed, stale.")] = "",
    deterministic: Annotated[bool, typer.Option(help="Deterministic GPU kernels (the CPU always is).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as `plan`.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Run methods on a data set and print one table. The same command again does only what is left."""
    from dfkd_bench.engines.local import default_devices
    from dfkd_bench.plan import carry_out, make_plan
    from dfkd_bench.progress import show
    from dfkd_bench.run import Place

    again = _rerun(rerun)
    found = _plugins(plugin)
    chosen = _suite(suite, methods, dataset, pair, protocol, seeds, settings, controls, split, found)
    plan_ = make_plan(chosen, found, output, data_root, device, _precision(precision))
    if dry_run:
        _print_plan(plan_)
        return
    devices, threads = default_devices(device, workers, plan_.to_run(again))
    place = Place(
        output.resolve(), data_root, found.files, device, threads, workers=len(devices), deterministic=deterministic
    )
    with show(plan_, err, quiet=quiet) as report:
        records = carry_out(plan_, found, place, devices, again, report)
    _print_results(chosen, found, records, output, verbose)
    if any(record.status == "failed" for record in records):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def plan(
    suite: SuiteName = None,
    methods: Methods = None,
    dataset: DatasetName = None,
    pair: PairNames = None,
    protocol: Protocol = None,
    seeds: Seeds = None,
    settings: Settings = None,
    controls: Controls = True,
    plugin: PluginFiles = None,
    data_root: DataRoot = None,
    output: Output = DEFAULT_OUTPUT,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    split: SplitName = "test",
) -> None:
    """Show what would run and what is done, failed or stale. Starts nothing."""
    from dfkd_bench.plan import make_plan

    found = _plugins(plugin)
    if (ablation := _ablation(suite, methods, dataset, pair, protocol, seeds, settings, split)) is not None:
        _print_ablation_plan(_ablation_plan(ablation, found, output, data_root, device, precision))
        return
    chosen = _suite(suite, methods, dataset, pair, protocol, seeds, settings, controls, split, found)
    _print_plan(make_plan(chosen, found, output, data_root, device, _precision(precision)))


@app.command()
def table(
    suite: SuiteName = None,
    methods: Methods = None,
    dataset: DatasetName = None,
    pair: PairNames = None,
    protocol: Protocol = None,
    seeds: Seeds = None,
    settings: Settings = None,
    controls: Controls = True,
    plugin: PluginFiles = None,
    data_root: DataRoot = None,
    output: Output = DEFAULT_OUTPUT,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    split: SplitName = "test",
    form: Annotated[str, typer.Option("--format", "-f", help="text, markdown, csv or latex.")] = "text",
    diversity: Annotated[bool, typer.Option("--diversity", help="How varied the images are, not accuracies.")] = False,
) -> None:
    """Print the table of the records at hand. Starts nothing."""
    from dfkd_bench.report import table as tables

    if form not in tables.FORMATS:
        raise unknown("format", form, tables.FORMATS)
    found = _plugins(plugin)
    if (ablation := _ablation(suite, methods, dataset, pair, protocol, seeds, settings, split)) is not None:
        _print_ablation(_ablation_plan(ablation, found, output, data_root, device, precision), form)
        return
    chosen = _suite(suite, methods, dataset, pair, protocol, seeds, settings, controls, split, found)
    if diversity:
        _print_diversity(chosen, _records(chosen, found, output, data_root, device, precision), form)
        return
    for built in _tables(chosen, found, _records(chosen, found, output, data_root, device, precision)):
        _plain(tables.to_text(built, out.width) if form == "text" else tables.FORMATS[form](built))


@app.command()
def plot(
    suite: SuiteName = None,
    methods: Methods = None,
    dataset: DatasetName = None,
    pair: PairNames = None,
    protocol: Protocol = None,
    seeds: Seeds = None,
    settings: Settings = None,
    controls: Controls = True,
    plugin: PluginFiles = None,
    data_root: DataRoot = None,
    output: Output = DEFAULT_OUTPUT,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    split: SplitName = "test",
    to: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf file; default: OUTPUT/figures/.")] = None,
) -> None:
    """Draw accuracy against time, or an ablation's rows, from the records at hand. Starts nothing."""
    found = _plugins(plugin)
    if (ablation := _ablation(suite, methods, dataset, pair, protocol, seeds, settings, split)) is not None:
        planned = _ablation_plan(ablation, found, output, data_root, device, precision)
        out.print(f"figure: {_ablation_figure(planned, planned.plan.records(), output, to)}")
        return
    chosen = _suite(suite, methods, dataset, pair, protocol, seeds, settings, controls, split, found)
    records = _records(chosen, found, output, data_root, device, precision)
    for path in _figures(chosen, records, output, to):
        out.print(f"figure: {path}")


@app.command()
def gallery(
    suite: SuiteName = None,
    methods: Methods = None,
    dataset: DatasetName = None,
    pair: PairNames = None,
    protocol: Protocol = None,
    seeds: Seeds = None,
    settings: Settings = None,
    controls: Controls = True,
    plugin: PluginFiles = None,
    data_root: DataRoot = None,
    output: Output = DEFAULT_OUTPUT,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    split: SplitName = "test",
    to: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf file; default: OUTPUT/figures/.")] = None,
) -> None:
    """Draw generated images, a row a method and a column a class, from the runs at hand. Starts nothing."""
    from dfkd_bench import data
    from dfkd_bench.gallery import gallery as draw

    found = _plugins(plugin)
    chosen = _suite(suite, methods, dataset, pair, protocol, seeds, settings, controls, split, found)
    records = _records(chosen, found, output, data_root, device, precision)
    images = data.dataset(chosen.dataset, data_root, found.datasets)
    for pair_, runs in _by_pair(chosen, records).items():
        place = _figure_path(chosen, pair_, output, to, "-gallery")
        path, advice = draw(runs, images, place, chosen.title, [*chosen.controls, *chosen.methods], data_root)
        for line in advice:
            err.print(f"[yellow]note:[/] {_escaped(line)}")
        out.print(f"figure: {path}")


@app.command()
def ablate(
    name: Annotated[str, typer.Argument(help="A built-in ablation (`list suites`) or a TOML file.")],
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Data set; default: digits.")] = None,
    pair: Annotated[str | None, typer.Option("--pair", help="TEACHER:STUDENT; default: the data set's.")] = None,
    protocol: Protocol = None,
    seeds: Annotated[str | None, typer.Option(help="0, 0-2, or 0,3,5-7; default: the ablation's.")] = None,
    settings: Settings = None,
    plugin: PluginFiles = None,
    data_root: DataRoot = None,
    output: Output = DEFAULT_OUTPUT,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    split: SplitName = "test",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at a time; default: one a device.")] = None,
    rerun: Annotated[str, typer.Option(help="Also do again what is: failed, stale.")] = "",
    deterministic: Annotated[bool, typer.Option(help="Deterministic GPU kernels (the CPU always is).")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="The same as `plan`.")] = False,
    quiet: Quiet = False,
) -> None:
    """Run an ablation's rows and print its table with a verdict on each claim. What is left is done, no run twice."""
    from dfkd_bench.ablation import read_ablation
    from dfkd_bench.ablation_plan import plan_ablation
    from dfkd_bench.engines.local import default_devices
    from dfkd_bench.plan import carry_out
    from dfkd_bench.progress import show
    from dfkd_bench.run import Place

    again = _rerun(rerun)
    found = _plugins(plugin)
    chosen = read_ablation(name, dataset, protocol, pair, seeds, settings or [], split)
    if dry_run:
        _print_ablation_plan(_ablation_plan(chosen, found, output, data_root, device, precision))
        return
    planned = plan_ablation(chosen, found, output, data_root, device, _precision(precision), again, encode=True)
    for row in planned.rows:
        if row.missing:
            err.print(f"[yellow]warning:[/] row '{_escaped(row.row.label)}' is left out: {_escaped(row.missing)}")
    devices, threads = default_devices(device, workers, planned.plan.to_run(again))
    place = Place(
        output.resolve(), data_root, found.files, device, threads, workers=len(devices), deterministic=deterministic
    )
    with show(planned.plan, err, quiet=quiet) as report:
        records = carry_out(planned.plan, found, place, devices, again, report)
    _print_ablation_results(planned, records, output)
    if any(record.status == "failed" for record in records):
        raise typer.Exit(EXIT_FAILED)


# -- methods --------------------------------------------------------------------------------------------------------


@app.command()
def check(
    method: Annotated[str, typer.Argument(help="A method's name, or a Python file with one.")],
    plugin: PluginFiles = None,
) -> None:
    """Run the conformance checks on a method and say check by check what holds."""
    from dfkd_bench import plugins
    from dfkd_bench.check import run_checks

    # A file is looked at by itself: it may well be the source of a built-in method.
    source = plugins.method_file(Path(method)) if method.endswith(".py") else _plugins(plugin).source(method)
    failed = 0
    for outcome in run_checks(source, plugins.load(source)):
        mark = "[yellow]quirk[/]" if outcome.declared and outcome.passed else "[green]ok[/]   "
        mark = mark if outcome.passed else "[bold red]FAIL[/] "
        out.print(f"{mark}  {outcome.name:<34} {_escaped(outcome.detail)}")
        failed += not outcome.passed
    out.print(f"{method}: {'all checks hold' if not failed else f'{failed} checks fail'}")
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="methods, datasets, models or suites.")],
    plugin: PluginFiles = None,
) -> None:
    """List what can be named. Nothing of it is imported."""
    from dfkd_bench import listing

    if kind not in listing.KINDS:
        raise unknown("kind", kind, listing.KINDS)
    out.print(listing.KINDS[kind](_plugins(plugin)))


@app.command()
def describe(
    method: Annotated[str, typer.Argument(help="A method's name.")],
    plugin: PluginFiles = None,
) -> None:
    """Say what a method is: its settings with type, default and source, and its published settings."""
    from dfkd_bench import listing

    found = _plugins(plugin)
    out.print(listing.describe(found.source(method), found.method(method)))


@app.command()
def speed(
    method: Annotated[str | None, typer.Option("--method", "-m", help="Default: the one with plain forms.")] = None,
    pair: Annotated[str, typer.Option("--pair", help="TEACHER:STUDENT.")] = "wrn40_2:wrn16_1",
    batch: Annotated[int, typer.Option(help="Images a student step.")] = 128,
    synthesis_batch: Annotated[int, typer.Option(help="Images a generator step.")] = 128,
    side: Annotated[int, typer.Option(help="Height and width of the images.")] = 32,
    classes: Annotated[int, typer.Option(help="Classes.")] = 10,
    channels: Annotated[int, typer.Option(help="1 or 3.")] = 3,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch; default: one a core.")] = None,
    steps: Annotated[int, typer.Option(help="Generator steps a batch, student steps a phase.")] = 5,
    repeat: Annotated[int, typer.Option(help="Repeats; medians count.")] = 5,
    plugin: PluginFiles = None,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Time the steps of a run here, beside plain PyTorch and the released code's manner. Needs no data."""
    from dfkd_bench.compute import cores_at_hand
    from dfkd_bench.speed import measure, report

    asked = measure.Question(
        method or measure.METHOD, pair, batch, synthesis_batch, side, classes, channels, steps, repeat
    )
    found = measure.measure(asked, _plugins(plugin), device, _precision(precision), threads or cores_at_hand())
    out.print(report.render(found))
    kept, figure = report.write(found, output)
    _plain(f"\nnumbers: {kept}\nfigure:  {figure}")


# -- label-text embeddings ------------------------------------------------------------------------------------------


@app.command()
def encode(
    encoder: Annotated[str, typer.Option(help="sbert, doc2vec, clip, onehot, random, file:PATH, ...")] = "sbert",
    dataset: DatasetName = None,
    labels: Annotated[Path | None, typer.Option(help="Own class names in place of --dataset, one a line.")] = None,
    prompt: Annotated[str, typer.Option(help="With {name} or {index}; or P1, P2, P3, nayer.")] = "nayer",
    output: Annotated[
        Path,
        typer.Option("--output", "-o", envvar="DFKD_BENCH_RESULTS", help="A .safetensors or .npy file, or a folder."),
    ] = DEFAULT_OUTPUT,
    figure: Annotated[Path | None, typer.Option(help="A .png, .svg or .pdf file; default: beside the matrix.")] = None,
    data_root: DataRoot = None,
    plugin: PluginFiles = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Ask a text encoder for label-text embeddings, write them, and describe them in numbers and a figure."""
    from dfkd_bench import encode_command

    encode_command.check_names(output, figure)
    found = _plugins(plugin)
    encoded = encode_command.encode(encoder, prompt, dataset, labels, data_root, found.datasets, found.encoders)
    matrix, picture = encode_command.write(encoded, output, figure)
    if not quiet:
        out.print(encode_command.describe(encoded, verbose))
        out.print()
    _plain(f"matrix: {matrix}\nfigure: {picture}")


# -- teachers -------------------------------------------------------------------------------------------------------


@teacher_app.command("train")
def teacher_train(
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Data set, or folder:PATH.")],
    model: Annotated[str | None, typer.Option(help="Model; default: the data set's teacher.")] = None,
    protocol: Protocol = None,
    settings: Annotated[
        list[str] | None, typer.Option("-s", "--set", help="teacher.epochs=100, teacher.seed=1; can be repeated.")
    ] = None,
    device: Device = "auto",
    precision: PrecisionName = "auto",
    data_root: DataRoot = None,
    plugin: PluginFiles = None,
    quiet: Quiet = False,
) -> None:
    """Train a teacher on real data (last epoch, never the best one) and keep it. Goes on if it was interrupted."""
    from dfkd_bench import teacher_commands
    from dfkd_bench.progress import show_teacher

    with show_teacher(err, quiet) as report:
        line = teacher_commands.train(
            dataset, model, protocol, settings or [], device, _precision(precision), data_root, _plugins(plugin),
            report,
        )  # fmt: skip
    out.print(line)


@teacher_app.command("import")
def teacher_import(
    file: Annotated[Path, typer.Argument(help="A .pth file, such as cifar10_resnet34.pth of the CMI archive.")],
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Default: from the file's name.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: from the file's name.")] = None,
    minimum: Annotated[float | None, typer.Option(help="Refuse below this test accuracy [%].")] = None,
    data_root: DataRoot = None,
    plugin: PluginFiles = None,
) -> None:
    """Take over a foreign checkpoint, read as weights only; `paper` runs then use it."""
    from dfkd_bench import teacher_commands

    out.print(teacher_commands.import_(file, dataset, model, minimum, data_root, _plugins(plugin)))


@teacher_app.command("list")
def teacher_list() -> None:
    """The teachers at hand, with accuracy and hash."""
    from dfkd_bench import teacher_commands

    out.print(teacher_commands.list_())


@teacher_app.command("verify")
def teacher_verify(
    name: Annotated[str | None, typer.Argument(help="A teacher's name from `teacher list`; default: all.")] = None,
    data_root: DataRoot = None,
    plugin: PluginFiles = None,
) -> None:
    """Check hash and accuracy of teachers anew."""
    from dfkd_bench import teacher_commands

    for line in teacher_commands.verify(name, data_root, _plugins(plugin)):
        out.print(line)


@app.command()
def doctor(data_root: DataRoot = None) -> None:
    """Versions, devices, data sets and teachers at hand."""
    from dfkd_bench import listing

    out.print(listing.doctor(data_root))


# -- helpers --------------------------------------------------------------------------------------------------------


def _plugins(files: list[Path] | None) -> Any:
    from dfkd_bench import plugins

    found = plugins.discover(files or [])
    for line in found.broken.values():
        err.print(f"[yellow]warning:[/] {_escaped(line)}")
    return found


def _rerun(text: str) -> list[str]:
    again = [name for name in text.split(",") if name]
    for name in again:
        if name not in RERUN:
            raise unknown("value of --rerun", name, RERUN)
    return again


def _precision(name: str) -> Literal["auto", "fp32", "bf16"]:
    if name not in ("auto", "fp32", "bf16"):
        raise unknown("precision", name, ("auto", "fp32", "bf16"))
    return cast("Literal['auto', 'fp32', 'bf16']", name)


def _suite(
    name: str | None,
    methods: str | None,
    dataset: str | None,
    pair: str | None,
    protocol: str | None,
    seeds: str | None,
    settings: list[str] | None,
    controls: bool,
    split: str,
    found: Any,
) -> Any:
    from dfkd_bench import suite as suites

    return suites.from_options(name, methods, dataset, pair, protocol, seeds, settings or [], controls, split, found)


def _ablation(
    name: str | None,
    methods: str | None,
    dataset: str | None,
    pair: str | None,
    protocol: str | None,
    seeds: str | None,
    settings: list[str] | None,
    split: str,
) -> Any | None:
    """The ablation of this name; None if it is a suite or there is no name."""
    from dfkd_bench import ablation

    if not ablation.names_ablation(name):
        return None
    if methods is not None:
        raise UserError(f"ablation {name} names its methods itself: leave out --methods")
    return ablation.read_ablation(name or "", dataset, protocol, pair, seeds, settings or [], split)


def _ablation_plan(ablation: Any, found: Any, output: Path, data_root: Path | None, device: str, precision: str) -> Any:
    from dfkd_bench.ablation_plan import plan_ablation

    return plan_ablation(ablation, found, output, data_root, device, _precision(precision))


def _records(suite: Any, found: Any, output: Path, data_root: Path | None, device: str, precision: str) -> list[Any]:
    from dfkd_bench.plan import make_plan

    records = make_plan(suite, found, output, data_root, device, _precision(precision)).records()
    if not records:
        raise UserError(f"there are no records of this suite in {output}: `dfkd-bench run` makes them")
    return records


def _by_pair(suite: Any, records: list[Any]) -> dict[str, list[Any]]:
    by_pair = {pair: [record for record in records if record.job.pair == pair] for pair in suite.pairs}
    return {pair: chosen for pair, chosen in by_pair.items() if chosen}


def _tables(suite: Any, found: Any, records: list[Any]) -> list[Any]:
    from dfkd_bench.report import table as tables

    order = [*suite.controls, *suite.methods]
    return [tables.build(chosen, suite.title, order) for chosen in _by_pair(suite, records).values()]


def _print_diversity(suite: Any, records: list[Any], form: str) -> None:
    from dfkd_bench.report import diversity
    from dfkd_bench.report import table as tables

    order = [*suite.controls, *suite.methods]
    for chosen in _by_pair(suite, records).values():
        if form == "csv":
            _plain(diversity.to_csv(chosen, order))
        else:
            built = diversity.build(chosen, suite.title, order)
            _plain(tables.to_text(built, out.width) if form == "text" else tables.FORMATS[form](built))


def _figures(suite: Any, records: list[Any], output: Path, to: Path | None = None) -> list[Path]:
    from dfkd_bench.report.plots import accuracy_against_time

    paths = []
    done = [record for record in records if record.status == "done"]
    for pair, chosen in _by_pair(suite, done).items():
        path = _figure_path(suite, pair, output, to)
        accuracy_against_time(chosen, path, suite.title, [*suite.controls, *suite.methods])
        paths.append(path)
    return paths


def _figure_path(suite: Any, pair: str, output: Path, to: Path | None, kind: str = "") -> Path:
    """``to``, or a file named after the suite; with several pairs, each has its own."""
    from dfkd_bench.record import safe_name

    path = to or output / "figures" / f"{suite.name}{kind}.png"
    return path if len(suite.pairs) == 1 else path.with_stem(f"{path.stem}-{safe_name(pair)}")


def _plain(text: str) -> None:
    """Text that is laid out already."""
    out.print(text, markup=False, soft_wrap=True)


def _print_results(suite: Any, found: Any, records: list[Any], output: Path, verbose: bool) -> None:
    from dfkd_bench.record import record_path, write_text
    from dfkd_bench.report import table as tables

    built = _tables(suite, found, records)
    for item in built:
        _plain(tables.to_text(item, out.width))
    place = output / "tables" / f"{suite.name}.md"
    write_text(place, "\n".join(tables.to_markdown(item) for item in built))
    csv = place.with_suffix(".csv")
    write_text(csv, tables.to_csv(*built))
    figures = ", ".join(map(str, _figures(suite, records, output)))
    _plain(f"\ntable:   {place} (and .csv)\nfigure:  {figures or 'none: no run has a curve'}")
    _plain(f"records: {output / 'records'} ({len(records)} of this table)")
    if verbose:
        for record in records:
            _plain(f"  {record_path(output, record.job)}")


def _print_ablation(planned: Any, form: str) -> None:
    from dfkd_bench.report import ablation_table

    if form not in ablation_table.FORMATS:
        raise unknown("format of an ablation", form, ablation_table.FORMATS)
    built = ablation_table.build(planned.ablation, planned.results(planned.plan.records()))
    _plain(ablation_table.to_text(built, out.width) if form == "text" else ablation_table.FORMATS[form](built))


def _print_ablation_results(planned: Any, records: list[Any], output: Path) -> None:
    from dfkd_bench.record import write_text
    from dfkd_bench.report import ablation_table
    from dfkd_bench.report import table as tables

    built = ablation_table.build(planned.ablation, planned.results(records))
    _plain(ablation_table.to_text(built, out.width))
    place = output / "ablations" / f"{planned.ablation.stem}.md"
    write_text(place, ablation_table.to_markdown(built))
    write_text(place.with_suffix(".csv"), tables.to_csv(built.table))
    write_text(place.with_name(f"{place.stem}-verdicts.csv"), ablation_table.verdicts_csv(built))
    finished = any(record.last is not None for record in records)
    figure = _ablation_figure(planned, records, output) if finished else "none: no run has an accuracy"
    _plain(f"\ntable:   {place} (and .csv, -verdicts.csv)\nfigure:  {figure}")
    _plain(f"records: {output / 'records'} ({len(records)} of this ablation)")


def _ablation_figure(planned: Any, records: list[Any], output: Path, to: Path | None = None) -> Path:
    from dfkd_bench.report.ablation_figure import draw

    return draw(planned.ablation, planned.results(records), to or output / "figures" / f"{planned.ablation.stem}.png")


def _print_ablation_plan(planned: Any) -> None:
    from dfkd_bench import listing

    out.print(listing.ablation_plan(planned))


def _print_plan(plan_: Any) -> None:
    from dfkd_bench import listing

    out.print(listing.plan(plan_))
