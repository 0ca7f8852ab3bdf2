"""The command line: parses, calls one function, prints. No logic, and no import of torch before it is needed."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

import typer
from rich.text import Text

from dfkd_bench import __version__, printing
from dfkd_bench.errors import UserError, disk_error, unknown
from dfkd_bench.once import looking_once
from dfkd_bench.options import (
    DEFAULT_OUTPUT,
    AblationOptions,
    DataRoot,
    DatasetName,
    Deterministic,
    Device,
    FigureFile,
    MethodOrFile,
    Output,
    PluginFiles,
    PrecisionName,
    Protocol,
    Quiet,
    TableOptions,
    Verbose,
    WorkOptions,
    given_path,
    output_option,
    spread,
)
from dfkd_bench.printing import err, out, plain

if TYPE_CHECKING:
    from dfkd_bench.ablation import Ablation
    from dfkd_bench.ablation_plan import AblationPlan
    from dfkd_bench.job import Job
    from dfkd_bench.needs import Lacking
    from dfkd_bench.plan import Plan
    from dfkd_bench.plugins import Plugins
    from dfkd_bench.record import Record
    from dfkd_bench.suite import Suite

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


def main() -> NoReturn:
    """The console script: one line for wrong input, never a traceback."""
    if sys.platform == "win32":  # no process can be forked there, and none tells its peak memory
        sys.exit(_complain("dfkd-bench runs on Linux and macOS: on Windows use it in WSL"))
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a table has signs that not every terminal's encoding has
            stream.reconfigure(errors="replace")
    try:
        with looking_once():
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
    signal.signal(signal.SIGTERM, lambda *_: None)  # a second one must not break off the clearing up
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
    err.print(Text.assemble(("error:", "bold red"), f" {' '.join(line.split())}"))
    return EXIT_WRONG_INPUT


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


# -- run, plan, table, plot, gallery, ablate ------------------------------------------------------------------------


@app.command()
@spread
def run(asked: TableOptions, work: WorkOptions, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Run methods on a data set and print one table. The same command again does only what is left."""
    from dfkd_bench.engines import server

    again = _rerun(work.rerun)
    if not work.dry_run:
        server.start_early()
    from dfkd_bench import listing

    found = _plugins(asked.plugin)
    chosen = _suite(asked, found)
    planned = _plan(asked, chosen, found)
    if work.dry_run:
        out.print(listing.plan(planned, _lacking(asked, planned, found)))
        return
    records = _carry_out(planned, asked, work, found, again, quiet)
    if records:
        stale = _told_stale(records, found)
        printing.results(_named(chosen, planned, asked), records, asked.output, verbose, stale)
    _exit_unless_done(planned, records)


@app.command()
@spread
def plan(asked: TableOptions) -> None:
    """Show what would run and what is done, failed or stale. Starts nothing."""
    from dfkd_bench import listing

    found = _plugins(asked.plugin)
    if (ablation := _ablation_if_named(asked, found)) is not None:
        of_rows = _ablation_plan(asked, ablation, found)
        out.print(listing.ablation_plan(of_rows, _lacking(asked, of_rows.plan, found)))
        return
    planned = _plan(asked, _suite(asked, found), found)
    out.print(listing.plan(planned, _lacking(asked, planned, found)))


@app.command()
@spread
def prepare(asked: TableOptions, quiet: Quiet = False) -> None:
    """Get the data and the label-text embeddings of a table: all that may want a network. Runs nothing."""
    from dfkd_bench.plan import get_ready
    from dfkd_bench.progress import show

    found = _plugins(asked.plugin)
    left_out = 0
    if (ablation := _ablation_if_named(asked, found)) is not None:
        of_rows = _ablation_plan(asked, ablation, found, encode=True)
        for row in of_rows.rows:
            if row.missing:
                printing.warn(f"row '{row.row.label}' will be left out: {row.trouble or row.missing}")
                left_out += 1
        planned = of_rows.plan
    else:
        planned = _plan(asked, _suite(asked, found), found)
    with show(planned, err, quiet=quiet) as report:
        splits = get_ready(planned, found, asked.data_root, report)
    plain(f"data set {planned.suite.dataset}: {', '.join(splits)}")
    for spec in planned.missing_teachers:
        plain(f"teacher to be trained first: {spec.model}")
    plain(f"{len(planned.to_run())} runs are left")
    if left_out:
        raise typer.Exit(EXIT_FAILED)


@app.command()
@spread
def table(
    asked: TableOptions,
    form: Annotated[str, typer.Option("--format", "-f", help="text, markdown, csv or latex.")] = "text",
    diversity: Annotated[bool, typer.Option("--diversity", help="How varied the images are, not accuracies.")] = False,
) -> None:
    """Print the table of the records at hand. Starts nothing."""
    from dfkd_bench.report.table import FORMATS

    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    found = _plugins(asked.plugin)
    if (ablation := _ablation_if_named(asked, found)) is not None:
        if diversity:
            raise UserError(
                f"--diversity is for suites, and {ablation.name} is an ablation: leave it out (an ablation's file has "
                '`columns = ["diversity"]` for it)'
            )
        of_rows, stale = _ablation_at_hand(asked, ablation, found)
        printing.ablation(of_rows, form, stale)
        return
    show = printing.diversity if diversity else printing.table
    chosen, records, stale = _at_hand(asked, found)
    show(chosen, records, form, stale)


@app.command()
@spread
def plot(asked: TableOptions, to: FigureFile = None) -> None:
    """Draw accuracy against time, or an ablation's rows, from the records at hand. Starts nothing."""
    found = _plugins(asked.plugin)
    if (ablation := _ablation_if_named(asked, found)) is not None:
        planned, _ = _ablation_at_hand(asked, ablation, found)
        plain(f"figure: {printing.ablation_figure(planned, planned.plan.records(), asked.output, to)}")
        return
    chosen, records, _ = _at_hand(asked, found)
    paths, wrong = printing.figures(chosen, records, asked.output, to)
    for path in paths:
        plain(f"figure: {path}")
    printing.tell(wrong)


@app.command()
@spread
def gallery(asked: TableOptions, to: FigureFile = None) -> None:
    """Draw generated images, a row a method (or of an ablation) and a column a class, from the runs at hand."""
    from dfkd_bench import data
    from dfkd_bench.gallery import gallery as draw
    from dfkd_bench.report.groups import Group, group

    def draw_rows(rows: Sequence[Group], place: Path, name: str, title: str) -> tuple[Path, tuple[str, ...]]:
        return draw(rows, data.dataset(name, asked.data_root, found.datasets), place, title, asked.data_root)

    found = _plugins(asked.plugin)
    if (ablation := _ablation_if_named(asked, found)) is not None:
        planned, _ = _ablation_at_hand(asked, ablation, found)
        results = planned.results(planned.plan.records())
        rows = [Group(item.row.label, item.row.method, item.records) for item in results if item.records]
        place = to or asked.output / "figures" / f"{planned.ablation.stem}-gallery.png"
        drawn, wrong = [draw_rows(rows, place, ablation.dataset, ablation.title)], None
    else:
        chosen, records, _ = _at_hand(asked, found)
        drawn, wrong = printing.each_pair(
            chosen,
            records,
            lambda pair, runs: draw_rows(
                group(runs, printing.order(chosen)),
                printing.figure_path(chosen, pair, asked.output, to, "-gallery"),
                chosen.dataset,
                chosen.title,
            ),
        )
    for path, advice in drawn:
        for line in advice:
            printing.warn(line, "note")
        plain(f"figure: {path}")
    printing.tell(wrong)


@app.command()
@spread
def ablate(
    name: Annotated[str, typer.Argument(help="A built-in ablation (`list suites`) or a TOML file.")],
    asked: AblationOptions,
    work: WorkOptions,
    quiet: Quiet = False,
) -> None:
    """Run an ablation's rows and print its table with a verdict on each claim. Only what is left is run."""
    from dfkd_bench.engines import server

    again = _rerun(work.rerun)
    if not work.dry_run:
        server.start_early()
    from dfkd_bench import listing

    found = _plugins(asked.plugin)
    chosen = _ablation(name, asked, found)
    if work.dry_run:
        of_rows = _ablation_plan(asked, chosen, found)
        out.print(listing.ablation_plan(of_rows, _lacking(asked, of_rows.plan, found)))
        return
    planned = _ablation_plan(asked, chosen, found, again, encode=True)
    for row in planned.rows:
        if row.missing:
            printing.warn(f"row '{row.row.label}' is left out: {row.trouble or row.missing}")
    records = _carry_out(planned.plan, asked, work, found, again, quiet)
    if records or not planned.plan.planned:
        printing.ablation_results(planned, records, asked.output, _told_stale(records, found))
    _exit_unless_done(planned.plan, records)


# -- methods --------------------------------------------------------------------------------------------------------


@app.command()
def check(method: MethodOrFile, plugin: PluginFiles = None) -> None:
    """Run the conformance checks on a method and say check by check what holds."""
    from dfkd_bench import plugins
    from dfkd_bench.check import run_checks

    name, found = _method_found(method, plugin)
    source, failed = found.source(name), 0
    for outcome in run_checks(source, plugins.load(source)):
        mark = ("quirk", "yellow") if outcome.declared and outcome.passed else ("ok   ", "green")
        mark = mark if outcome.passed else ("FAIL ", "bold red")
        out.print(Text.assemble(mark, f"  {outcome.name:<34} {outcome.detail}"))
        failed += not outcome.passed
    out.print(f"{method}: {'all checks hold' if not failed else f'{failed} checks fail'}")
    if failed:
        raise typer.Exit(EXIT_FAILED)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help="methods, datasets, models, encoders or suites.")],
    data_root: DataRoot = None,
    plugin: PluginFiles = None,
) -> None:
    """List what can be named: methods, data sets, models, text encoders, or suites and ablations."""
    from dfkd_bench import listing

    if kind not in listing.KINDS:
        raise unknown("kind", kind, listing.KINDS)
    if data_root is not None and kind != "datasets":
        raise UserError("--data-root is for `list datasets`: leave it out")
    out.print(listing.KINDS[kind](_plugins(plugin), data_root))


@app.command()
def describe(method: MethodOrFile, plugin: PluginFiles = None) -> None:
    """Say what a method is: its settings with type, default and source, and its published settings."""
    from dfkd_bench import listing

    name, found = _method_found(method, plugin)
    out.print(listing.describe(found.source(name), found.method(name)))


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
    quiet: Quiet = False,
) -> None:
    """Time the steps of a run here, beside plain PyTorch and the released code's manner. Needs no data."""
    from dfkd_bench.compute import cores_at_hand
    from dfkd_bench.progress import show_repeats
    from dfkd_bench.speed import measure, report

    asked = measure.Question(
        method or measure.METHOD, pair, batch, synthesis_batch, side, classes, channels, steps, repeat
    )
    wanted = (_plugins(plugin), device, _precision(precision), threads or cores_at_hand())
    with show_repeats(err, quiet) as reporting:
        found = measure.measure(asked, *wanted, reporting)
    out.print(report.render(found))
    kept, figure = report.write(found, output)
    plain(f"\nnumbers: {kept}\nfigure:  {figure}")


# -- label-text embeddings ------------------------------------------------------------------------------------------


@app.command()
def encode(
    encoder: Annotated[str, typer.Option(help="sbert, doc2vec, clip, onehot, random, file:PATH, ...")] = "sbert",
    dataset: DatasetName = None,
    labels: Annotated[Path | None, typer.Option(help="Own class names in place of --dataset, one a line.")] = None,
    prompt: Annotated[str, typer.Option(help="With {name} or {index}; or P1, P2, P3, nayer.")] = "nayer",
    output: Annotated[Path, output_option("A .safetensors or .npy file, or a folder.")] = DEFAULT_OUTPUT,
    figure: Annotated[
        Path | None,
        typer.Option(
            "--figure", "--to", callback=given_path, help="A .png, .svg or .pdf file; default: beside the matrix."
        ),
    ] = None,
    data_root: DataRoot = None,
    plugin: PluginFiles = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Nearest classes of all classes, not of 20.")
    ] = False,
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
    plain(f"matrix: {matrix}\nfigure: {picture}")


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
    deterministic: Deterministic = False,
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
            report, deterministic,
        )  # fmt: skip
    out.print(line)


@teacher_app.command("import")
def teacher_import(
    file: Annotated[
        Path, typer.Argument(help="A .pth or .safetensors file, such as cifar10_resnet34.pth of the CMI archive.")
    ],
    dataset: Annotated[str | None, typer.Option("--dataset", "-d", help="Default: from the file's name.")] = None,
    model: Annotated[str | None, typer.Option(help="Default: from the file's name.")] = None,
    minimum: Annotated[float | None, typer.Option(help="Refuse below this test accuracy [%].")] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    plugin: PluginFiles = None,
) -> None:
    """Take over a foreign checkpoint, read as weights only; `paper` runs then use it."""
    from dfkd_bench import teacher_commands

    out.print(teacher_commands.import_(file, dataset, model, minimum, device, data_root, _plugins(plugin)))


@teacher_app.command("list")
def teacher_list() -> None:
    """The teachers at hand, with accuracy and hash."""
    from dfkd_bench import teacher_commands

    out.print(teacher_commands.list_())


@teacher_app.command("verify")
def teacher_verify(
    name: Annotated[str | None, typer.Argument(help="A name of `teacher list` or its beginning; default: all.")] = None,
    device: Device = "auto",
    data_root: DataRoot = None,
    plugin: PluginFiles = None,
) -> None:
    """Check hash and accuracy of teachers anew."""
    from dfkd_bench import teacher_commands

    for line in teacher_commands.verify(name, device, data_root, _plugins(plugin)):
        out.print(line)


@app.command()
def doctor(data_root: DataRoot = None, plugin: PluginFiles = None) -> None:
    """Versions, devices, data sets and teachers at hand."""
    from dfkd_bench import listing

    out.print(listing.doctor(data_root, _plugins(plugin)))


# -- helpers --------------------------------------------------------------------------------------------------------


def _plugins(files: list[Path] | None) -> Plugins:
    from dfkd_bench import plugins

    found = plugins.discover(files or [])
    for line in found.broken.values():
        printing.warn(line)
    return found


def _method_found(name_or_file: str, files: list[Path] | None) -> tuple[str, Plugins]:
    """A method's name, and where it is found. A file is looked at by itself: it may well be a built-in's source."""
    from dfkd_bench import plugins

    if not name_or_file.endswith(".py"):
        return name_or_file, _plugins(files)
    source = plugins.method_file(Path(name_or_file))
    return source.name, plugins.Plugins({source.name: source})


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


def _suite(asked: TableOptions, found: Plugins) -> Suite:
    from dfkd_bench.suite import from_options

    chosen = from_options(
        name=asked.suite,
        methods=asked.methods,
        dataset=asked.dataset,
        pair=asked.pair,
        protocol=asked.protocol,
        seeds=asked.seeds,
        settings=asked.settings or [],
        controls=asked.controls,
        evaluate_on=asked.split,
        found=found,
        init_images=asked.init_images,
    )
    return chosen.model_copy(update={"name": f"{chosen.name}{asked.variant}"})


def _plan(asked: TableOptions, chosen: Suite, found: Plugins) -> Plan:
    from dfkd_bench.plan import make_plan

    return make_plan(chosen, found, asked.output, asked.data_root, asked.device, _precision(asked.precision))


def _lacking(asked: TableOptions, planned: Plan, found: Plugins) -> Lacking:
    from dfkd_bench import data, needs

    dataset = data.dataset(planned.suite.dataset, asked.data_root, found.datasets)
    return needs.lacking(planned.to_run(), found, dataset, asked.data_root)


def _named(chosen: Suite, planned: Plan, asked: TableOptions) -> Suite:
    """``chosen`` as its files are called, now that it is known which records are there."""
    return chosen.model_copy(update={"name": f"{chosen.name}{planned.behind_names(asked.output)}"})


def _told_stale(records: Sequence[Record], found: Plugins) -> frozenset[str]:
    """Warn of records that today's code has not made: whoever has just edited a method must not take them for its."""
    from dfkd_bench.plan import made_by_other_code
    from dfkd_bench.report.layout import stale_notes

    stale = made_by_other_code(records, found)
    for line in stale_notes(records, stale):
        printing.warn(line)
    return stale


def _at_hand(asked: TableOptions, found: Plugins) -> tuple[Suite, list[Record], frozenset[str]]:
    """The suite, its records, and the job ids of those that are stale, which is told."""
    chosen = _suite(asked, found)
    planned = _plan(asked, chosen, found)
    records = _some(planned.records(), planned.planned[0].job, asked, "suite")
    return _named(chosen, planned, asked), records, _told_stale(records, found)


def _ablation_at_hand(asked: TableOptions, chosen: Ablation, found: Plugins) -> tuple[AblationPlan, frozenset[str]]:
    """Likewise of an ablation."""
    planned = _ablation_plan(asked, chosen, found)
    records = _some(planned.plan.records(), planned.rows[0].planned[0].job, asked, "ablation")
    return planned, _told_stale(records, found)


def _some(records: list[Record], job: Job, asked: TableOptions, of: str) -> list[Record]:
    """``records``, if there are any. Jobs of another precision are other jobs, and machines choose differently."""
    if records:
        return records
    other = "bf16" if job.precision == "fp32" else "fp32"
    where = f"{asked.output} with precision {job.precision} (--device {asked.device}, --precision {asked.precision})"
    what = asked.suite or f"--methods {asked.methods}"
    raise UserError(
        f"there are no records of this {of} in {where}: `dfkd-bench {'ablate' if of == 'ablation' else 'run'} {what}` "
        f"with the same options makes them; for {other}, if there are such: --precision {other}"
    )


def _ablation(name: str, asked: TableOptions, found: Plugins) -> Ablation:
    from dfkd_bench.ablation import read_ablation, with_initial_images

    chosen = read_ablation(
        name, asked.dataset, asked.protocol, asked.pair, asked.seeds, asked.settings or [], asked.split
    )
    chosen = chosen.model_copy(update={"variant": asked.variant})
    return chosen if asked.init_images is None else with_initial_images(chosen, asked.init_images, found)


def _ablation_if_named(asked: TableOptions, found: Plugins) -> Ablation | None:
    """The ablation of this name; None if it is a suite or there is no name."""
    from dfkd_bench.ablation import names_ablation

    if asked.suite is None or not names_ablation(asked.suite):
        return None
    if asked.methods is not None:
        raise UserError(f"ablation {asked.suite} names its methods itself: leave out --methods")
    if not asked.controls:
        raise UserError(f"ablation {asked.suite} has no controls: leave out --no-controls")
    return _ablation(asked.suite, asked, found)


def _ablation_plan(
    asked: TableOptions, chosen: Ablation, found: Plugins, again: Sequence[str] = (), encode: bool = False
) -> AblationPlan:
    from dfkd_bench.ablation_plan import plan_ablation

    precision = _precision(asked.precision)
    planned = plan_ablation(chosen, found, asked.output, asked.data_root, asked.device, precision, again, encode)
    variant = f"{chosen.variant}{planned.plan.behind_names(asked.output)}"
    return replace(planned, ablation=planned.ablation.model_copy(update={"variant": variant}))


def _carry_out(
    planned: Plan, asked: TableOptions, work: WorkOptions, found: Plugins, again: Sequence[str], quiet: bool
) -> list[Record]:
    from dfkd_bench.engines.local import default_devices
    from dfkd_bench.plan import carry_out
    from dfkd_bench.progress import show
    from dfkd_bench.run import Place

    devices, threads = default_devices(asked.device, work.workers, planned.to_run(again))
    place = Place(
        output=asked.output.resolve(),
        data_root=asked.data_root,
        plugin_files=found.files,
        device=asked.device,
        threads=threads,
        workers=len(devices),
        deterministic=work.deterministic,
    )
    with show(planned, err, quiet=quiet) as report:
        return carry_out(planned, found, place, devices, again, report)


def _exit_unless_done(planned: Plan, records: Sequence[Record]) -> None:
    elsewhere = len(planned.planned) - len(records)
    if elsewhere:
        line = f"{elsewhere} of {len(planned.planned)} runs are under way in another process and are not in the table"
        printing.warn(f"{line}: give the same command again when they have ended", "note")
    if any(record.status == "failed" for record in records):
        raise typer.Exit(EXIT_FAILED)
    if elsewhere:
        raise typer.Exit(EXIT_RESUMABLE)
