"""What `list`, `describe`, `plan` and `doctor` print, as rich renderables. Listing imports no method and no torch."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dfkd_bench import data, paths
from dfkd_bench.plugins import Plugins, Source, unavailable

if TYPE_CHECKING:
    from dfkd_bench.ablation_plan import AblationPlan
    from dfkd_bench.method import Method
    from dfkd_bench.needs import Lacking
    from dfkd_bench.plan import Plan


def _table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name == columns[0])
    return table


def _lines(headings: Sequence[str], rows: Sequence[Sequence[str]], right: tuple[str, ...] = ()) -> Text:
    """The same table as one text: rich takes 1.8 s to lay out a thousand rows, which is most of a plan of that size."""
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns[:-1]] + [0]  # nothing stands to the right of the last one

    def line(cells: Sequence[str]) -> str:
        padded = zip(headings, cells, widths, strict=True)
        return "  ".join(cell.rjust(width) if name in right else cell.ljust(width) for name, cell, width in padded)

    whole = Text("\n").join([Text(line(headings), style="bold"), *(Text(line(row)) for row in rows)])
    whole.no_wrap, whole.overflow = True, "ignore"
    return whole


def methods(found: Plugins, _data_root: Path | None = None) -> RenderableType:
    """Name, family, year, outside knowledge, whether details are confirmed; then those that are not available."""
    table = _table("method", "family", "year", "venue", "outside knowledge", "details", "what it is", right=("year",))
    cards = {name: source.card() for name, source in found.methods.items()}
    for name in sorted(cards, key=lambda name: (cards[name].get("family") == "control", name)):
        card, source = cards[name], found.methods[name]
        table.add_row(
            name if source.kind == "built-in" else f"{name} ({source.kind})",
            str(card.get("family", "-")),
            str(card.get("year") or "-"),
            str(card.get("venue") or "-"),
            str(card.get("knowledge", "-")),
            "confirmed" if card.get("confirmed", True) else "not confirmed",
            str(card.get("title", "-")),
        )
    return Group(table, Text("\nNot available", style="bold"), _unavailable(found))


def _unavailable(found: Plugins) -> RenderableType:
    """Methods without code, and why; one that a plugin has built is left out."""
    table = _table("method", "year", "venue", "what it is", "why not", right=("year",))
    for name, facts in sorted(unavailable().items()):
        if name not in found.methods:
            why = f"{facts['reason']} ({facts['link']})"
            table.add_row(name, str(facts["year"]), facts["venue"], facts["title"], why)
    return table


def datasets(found: Plugins, data_root: Path | None = None) -> RenderableType:
    """Name, classes, shape, whether it is at hand: prepared, or in ``data_root``."""
    table = _table("data set", "classes", "shape", "state", "what it is", right=("classes",))
    for name in (*data.dataset_names(), *found.datasets):
        dataset = data.dataset(name, data_root, found.datasets)
        shape = "x".join(map(str, dataset.image_shape))
        state = data.status(name, data_root, found.datasets).partition(":")[0]  # `doctor` says which files are missing
        table.add_row(name, str(dataset.num_classes), shape, state, dataset.title)
    table.add_row("folder:PATH", "-", "-", "-", "any folder with train/ and test/ in ImageFolder form")
    return table


def models(found: Plugins, _data_root: Path | None = None) -> RenderableType:
    """Names of all models."""
    from dfkd_bench.models import model_names

    return Text("\n".join([*model_names(), *sorted(found.models)]))


def suites(_found: Plugins, _data_root: Path | None = None) -> RenderableType:
    """Built-in suites and ablations with their titles."""
    import importlib.resources
    import tomllib

    table = _table("suite", "for", "title")
    for entry in sorted(importlib.resources.files("dfkd_bench.benchmarks").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml") and entry.name not in ("defaults.toml", "equal.toml"):
            content = tomllib.loads(entry.read_text(encoding="utf-8"))
            command = "ablate" if "rows" in content else "run"  # as suite.is_ablation says, which would import torch
            table.add_row(entry.name.removesuffix(".toml"), command, content["title"])
    return table


def encoders(found: Plugins, _data_root: Path | None = None) -> RenderableType:
    """Text encoders and how each is written."""
    from dfkd_bench.encoders import encoder_names, encoder_title

    table = _table("encoder", "what it is")
    for name in (*encoder_names(), *sorted(found.encoders)):
        table.add_row(name, encoder_title(name, found.encoders).replace("`", ""))
    return table


KINDS: Mapping[str, Callable[[Plugins, Path | None], RenderableType]] = {
    "methods": methods,
    "datasets": datasets,
    "models": models,
    "encoders": encoders,
    "suites": suites,
}


def describe(source: Source, method: type[Method]) -> RenderableType:
    """A method's docstring, settings and published settings."""
    import sys

    settings = _table("setting", "type", "default", "bounds", "meaning and source")
    for name, field in method.Config.model_fields.items():
        kind = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
        kind = kind.replace("typing.", "")
        texts = (name, kind, repr(field.default), _bounds(field.metadata), field.description or "")
        settings.add_row(*map(Text, texts))  # as it is: brackets are no markup
    cells = _table("cell", "origin", "epochs", "student steps", "settings that differ", "source", right=("epochs",))
    for protocol, table in (("paper", method.published), ("smoke", method.smoke)):
        for cell, published in table.items():
            schedule = published.schedule
            changed = ", ".join(f"{key}={value}" for key, value in published.config.items())
            steps = f"{schedule.total_student_steps} x {schedule.batch_size}"
            origin = published.origin
            row = (f"{protocol} {cell}", origin, str(schedule.epochs), steps, changed or "-", published.source)
            cells.add_row(*map(Text, row))
    document = (sys.modules[method.__module__].__doc__ or "no description").strip()
    parts: list[RenderableType] = [Text(document), Text(""), settings]
    if cells.row_count:
        parts += [Text(""), cells]
    if method.absorbs:
        other = ", ".join(f"{key}={value}" for key, value in method.described.items())
        described = f"; as the authors describe it: {other}" if other else ""
        parts += [Text(""), Text(f"protocol equal: {method.absorbs} takes up the generation budget{described}")]
    for name, reason in method.quirks.items():
        parts += [Text(""), Text(f"declared quirk ({name}): {reason}")]
    parts += [Text(""), Text(f"from: {source.describe()}, version {source.version}")]
    return Group(*parts)


def _bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [f"{sign} {getattr(item, key):g}" for item in metadata for key, sign in signs.items() if hasattr(item, key)]
    return ", ".join(found) or "-"


def plan(plan_: Plan, lacking: Lacking) -> RenderableType:
    """Every job with its state, then the sums and what is fetched, encoded and trained before the runs."""
    rows = []
    for item in plan_.planned:
        job = item.job
        rows.append(
            (
                job.id,
                job.method,
                job.pair,
                str(job.seed),
                str(job.schedule.epochs),
                f"{job.schedule.total_student_steps} x {job.schedule.batch_size}",
                job.origin,
                item.state if item.state != "failed" else f"failed: {item.record.reason if item.record else ''}",
            )
        )
    headings = ("job", "method", "pair", "seed", "epochs", "student steps", "settings from", "state")
    table = _lines(headings, rows, right=("seed", "epochs"))
    counts = Counter(item.state for item in plan_.planned)
    sums = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    lines = [f"{len(plan_.planned)} jobs: {sums} (protocol {plan_.suite.protocol}, {plan_.planned[0].job.precision})"]
    for spec in plan_.missing_teachers:
        epochs = f"{spec.recipe.epochs} epochs" if spec.recipe else f"imported, sha256 {(spec.sha256 or '')[:12]}"
        lines.append(f"teacher to be trained first: {spec.model} on {plan_.suite.dataset} ({epochs})")
    return Group(table, Text(""), Text("\n".join([*lines, *_first(lacking), "nothing was started"])))


def _first(lacking: Lacking) -> list[str]:
    readers: dict[tuple[str, str], list[str]] = {}
    for one in lacking.embeddings:
        readers.setdefault((one.encoder, one.prompt), []).append(one.method)
    return [
        *(f"data: {line}" for line in lacking.data),
        *(
            f"embeddings to be encoded first: {encoder}, prompt '{prompt}' ({', '.join(methods)})"
            for (encoder, prompt), methods in readers.items()
        ),
    ]


def ablation_plan(planned: AblationPlan, lacking: Lacking) -> RenderableType:
    """Every row with what is changed in it and how far it is, then the sums, what can't run, and what is missing."""
    table = _table("row", "method", "changed", "job of the first seed", "seeds")
    for item in planned.rows:
        row, counts = item.row, Counter(one.state for one in item.planned)
        changed = [f"{key}={value}" for key, value in row.settings.items()]
        changed += [f"pool_cap={item.planned[0].job.schedule.pool_cap}"] if row.pool_share else []
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        first = item.planned[0].job.id
        table.add_row(*map(Text, (row.label, row.method, ", ".join(changed) or "-", first, states)))
    plan_, ablation = planned.plan, planned.ablation
    counts = Counter(item.state for item in plan_.planned)
    sums = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"
    place = f"data set {ablation.dataset}, pair {ablation.pair}, protocol {ablation.protocol}"
    lines = [f"{len(plan_.planned)} jobs, shared ones once: {sums} ({place})"]
    lines += [f"not at hand for row '{item.row.label}': {item.missing}" for item in planned.rows if item.missing]
    lines += [f"teacher to be trained first: {spec.model} on {ablation.dataset}" for spec in plan_.missing_teachers]
    return Group(table, Text(""), Text("\n".join([*lines, *_first(lacking), "nothing was started"])))


def doctor(data_root: Path | None, found: Plugins) -> RenderableType:
    """The state of the installation."""
    import torch

    from dfkd_bench import compute, teachers

    versions = _table("package", "version")
    versions.add_row("python", platform.python_version())
    for name in (
        "dfkd-bench", "torch", "torchvision", "sentence-transformers", "gensim", "open-clip-torch", "pandas",
        "matplotlib", "pydantic", "typer", "rich",
    ):  # fmt: skip
        try:
            versions.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            versions.add_row(name, Text("not installed", "red"))
    devices = _table("device", "what", "bf16")
    cpu = torch.device("cpu")
    facts = compute.hardware(cpu, 1)
    devices.add_row("cpu", f"{facts['cpu']}, {facts['cores']} cores", "yes" if compute.has_bf16(cpu) else "no")
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        devices.add_row(
            f"cuda:{index}",
            f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB",
            "yes" if compute.has_bf16(device) else "no",
        )
    at_hand = _table("data set", "state")
    for name in (*data.dataset_names(), *found.datasets):
        at_hand.add_row(name, data.status(name, data_root, found.datasets))
    cards = [card for _, card in teachers.list_teachers()]
    known = ", ".join(f"{card.model} on {card.dataset} ({card.accuracy['test']:.2f} %)" for card in cards)
    places = _table("place", "folder")
    places.add_row("home", str(paths.home()))
    places.add_row("raw data", str(paths.data_root(data_root)))
    gap = Text("")
    return Group(versions, gap, devices, gap, places, gap, at_hand, gap, Text(f"teachers: {known or 'none yet'}"))
