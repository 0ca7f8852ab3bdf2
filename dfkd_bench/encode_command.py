"""What `dfkd-bench encode` does: ask a text encoder once, write its matrix, and describe it in numbers and a figure."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dfkd_bench import data, text
from dfkd_bench.encoders import Rows
from dfkd_bench.errors import UserError
from dfkd_bench.files import safe_name, write_bytes
from dfkd_bench.report.plots import FORMATS, STYLE, save
from dfkd_bench.text import LabelEmbeddings

MATRICES = (".safetensors", ".npy")
NEAREST = 3  # neighbours in the table
SHORT = 20  # classes in the table unless all are asked for
LABELLED = 200  # more names than these could not be read in the figure
EPSILON = 1e-5  # BatchNorm1d's


@dataclass(frozen=True, eq=False)
class Encoded:
    """Embeddings with the classes they are of."""

    title: str  # the data set, or the file of labels
    class_names: tuple[str, ...]
    embeddings: LabelEmbeddings


def encode(
    encoder: str,
    prompt: str,
    dataset: str | None,
    labels: Path | None,
    data_root: Path | None = None,
    datasets: Mapping[str, Any] | None = None,
    encoders: Mapping[str, Any] | None = None,
) -> Encoded:
    """The embeddings of a data set's classes, or of the names in a file; encoded now if they are not at hand.

    ``datasets`` and ``encoders`` are those of plugins. ``UserError``: not exactly one of ``dataset`` and ``labels``,
    and whatever is wrong with them, the encoder or the prompt.
    """
    if (dataset is None) == (labels is None):
        raise UserError("nothing to encode: expected either --dataset NAME or --labels FILE with one class name a line")
    if labels is not None:
        title, names = labels.name, read_labels(labels)
    else:
        assert dataset is not None
        known = data.dataset(dataset, data_root, datasets or {})
        title, names = known.name, known.class_names
    # A file's name must not be taken for the data set of that name
    found = text.ensure("" if labels is not None else title, names, encoder, prompt, encoders)
    return Encoded(title, names, found)


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names from a UTF-8 file, one a line in the order of the labels; empty lines don't count."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"can't read labels from {path} ({reason}): expected one class name a line") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) < 2:
        raise UserError(f"{path} has {len(names)} class names: expected two or more, one a line")
    return names


# --- Numbers ----------------------------------------------------------------------------------------------------------


def batch_normalized(matrix: Rows) -> Rows:
    """What a fresh ``BatchNorm1d`` makes of one row a class: every column with mean 0 and, nearly, variance 1."""
    wide = matrix.astype(np.float64)
    return ((wide - wide.mean(0)) / np.sqrt(wide.var(0) + EPSILON)).astype(np.float32)


def distances(matrix: Rows) -> NDArray[np.float64]:
    """Euclidean distances between all rows, [K, K]."""
    wide = matrix.astype(np.float64)
    squares = (wide**2).sum(1)
    return np.sqrt(np.maximum(squares[:, None] + squares[None, :] - 2 * wide @ wide.T, 0.0))


def mean_pairwise(matrix: Rows) -> float:
    """Mean Euclidean distance of two different rows; NaN for a single one."""
    count = len(matrix)
    return float(distances(matrix).sum() / (count * (count - 1))) if count > 1 else float("nan")


def project(matrix: Rows) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """The first two principal components [K, 2], and the shares of the variance that they hold.

    A component's sign is chosen so that its largest entry is positive: the same matrix gives the same figure.
    """
    centred = matrix.astype(np.float64) - matrix.astype(np.float64).mean(0)
    left, scale, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(matrix), 2))
    used = min(2, len(scale))
    points[:, :used] = left[:, :used] * scale[:used]
    points *= np.where(points[np.abs(points).argmax(0), [0, 1]] < 0, -1.0, 1.0)
    total = float((scale**2).sum()) or 1.0
    shares = [*(float(value**2) / total for value in scale[:used]), 0.0, 0.0]
    return points, (shares[0], shares[1])


def same_rows(matrix: Rows) -> list[list[int]]:
    """Groups of classes that no generator can tell apart: their rows are equal."""
    groups: dict[bytes, list[int]] = {}
    for index, row in enumerate(np.ascontiguousarray(matrix)):
        groups.setdefault(row.tobytes(), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


# --- What is printed --------------------------------------------------------------------------------------------------


def describe(encoded: Encoded, everything: bool = False) -> RenderableType:
    """Shape, norms, mean pairwise distance before and after BatchNorm, and the nearest classes.

    The table of classes begins with those that are nearest to another one; ``everything``: all of them.
    """
    found, matrix = encoded.embeddings, encoded.embeddings.matrix
    norms = np.linalg.norm(matrix.astype(np.float64), axis=1)
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    made = " ".join(filter(None, (found.model, found.revision)))
    lines = {
        "classes of": f"{encoded.title}: {', '.join(encoded.class_names[:4])}"
        + (", ..." if len(encoded.class_names) > 4 else ""),
        "encoder": f"{found.encoder} ({made})",
        "prompt": found.prompt or "none: no text is encoded",
        "taken from": {"shipped": "the package", None: "computed"}.get(found.path, found.path) or "",
        "sha256": found.sha256,
        "shape": f"{matrix.shape[0]} x {matrix.shape[1]}",
        "norms": f"{norms.min():.4g} to {norms.max():.4g}, mean {norms.mean():.4g}",
        "mean distance": f"{mean_pairwise(matrix):.4g} before BatchNorm, {_after(matrix):.4g} after",
        "equal rows": _equal_rows(encoded),
    }
    for name, value in lines.items():
        facts.add_row(name, Text(value))
    return Group(facts, Text(""), _neighbours(encoded, everything))


def _after(matrix: Rows) -> float:
    return mean_pairwise(batch_normalized(matrix))


def _equal_rows(encoded: Encoded) -> str:
    groups = [
        " = ".join(f"{encoded.class_names[index]} ({index})" for index in group)
        for group in same_rows(encoded.embeddings.matrix)
    ]
    shown = "; ".join(groups[:5]) + (f"; {len(groups) - 5} more groups" if len(groups) > 5 else "")
    return shown or "none"


def _neighbours(encoded: Encoded, everything: bool) -> RenderableType:
    matrix, names = encoded.embeddings.matrix, encoded.class_names
    between = distances(matrix)
    np.fill_diagonal(between, np.inf)
    order = between.argsort(1, kind="stable")[:, : min(NEAREST, len(names) - 1)]
    smallest = between.min(1)
    chosen = list(range(len(names)))
    if not everything and len(names) > SHORT:
        chosen = [int(index) for index in smallest.argsort(kind="stable")[:SHORT]]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("label", justify="right")
    table.add_column("class")
    table.add_column("nearest classes, with their distances")
    for index in chosen:
        near = ", ".join(f"{names[other]} {between[index, other]:.3g}" for other in order[index])
        table.add_row(str(index), Text(names[index]), Text(near))
    if len(chosen) == len(names):
        return table
    rest = f"the {len(chosen)} classes that are nearest to another one, of {len(names)}; --verbose shows all"
    return Group(table, Text(rest))


# --- What is written --------------------------------------------------------------------------------------------------


def check_names(output: Path, figure: Path | None) -> None:
    """Before anything is encoded. ``UserError``: a file's name asks for a form that there is not."""
    if output.suffix and output.suffix not in MATRICES and not output.is_dir():
        raise UserError(
            f"can't write a matrix to '{output.name}': expected a folder, or a file that ends in {', '.join(MATRICES)}"
        )
    if figure is not None and figure.suffix not in FORMATS:
        raise UserError(f"can't draw '{figure.name}': expected a name that ends in {', '.join(FORMATS)}")


def write(encoded: Encoded, output: Path, figure: Path | None = None) -> tuple[Path, Path]:
    """Write matrix and figure; returns their paths.

    ``output``: a file, or a folder in which ``embeddings/<classes>-<encoder>-<hash>.safetensors`` is written. The
    figure lies beside the matrix unless it has a path of its own.
    """
    path = output
    if path.suffix not in MATRICES:
        found = encoded.embeddings
        path = path / "embeddings" / f"{safe_name(encoded.title)}-{found.encoder}-{found.sha256[:8]}.safetensors"
    write_bytes(path, _npy(encoded) if path.suffix == ".npy" else _safetensors(encoded))
    picture = figure or path.with_suffix(".png")
    draw(encoded, picture)
    return path, picture


def _npy(encoded: Encoded) -> bytes:
    content = io.BytesIO()
    np.save(content, encoded.embeddings.matrix, allow_pickle=False)
    return content.getvalue()


def _safetensors(encoded: Encoded) -> bytes:
    """One float32 matrix [K, d], as ``file:PATH`` reads it, with what it is of."""
    facts = {**encoded.embeddings.facts(), "class_names": json.dumps(encoded.class_names, ensure_ascii=False)}
    return text.pack({"label_embeddings": encoded.embeddings.matrix}, facts)


def draw(encoded: Encoded, path: Path) -> None:
    """The rows on their first two principal components, with the names of up to ``LABELLED`` classes."""
    import matplotlib
    from matplotlib.figure import Figure

    points, shares = project(encoded.embeddings.matrix)
    count, found = len(points), encoded.embeddings
    side, signs = (4.5, 8) if count <= 30 else (8.0, 6) if count <= 120 else (11.0, 5)  # inches, points
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(side, 0.85 * side), dpi=72, layout="constrained")
        axes = figure.add_subplot()
        size = 14 if count <= LABELLED else 6
        axes.scatter(points[:, 0], points[:, 1], s=size, color="#0072b2", linewidths=0, zorder=3)
        axes.margins(x=0.12, y=0.06)  # room for the names at the borders
        prompt = f", '{found.prompt}'" if found.prompt else ""
        axes.set_title(f"{encoded.title}: {count} classes by {found.encoder}{prompt}", loc="left")
        axes.set_xlabel(f"first principal component ({shares[0]:.0%} of the variance)")
        axes.set_ylabel(f"second ({shares[1]:.0%})")
        axes.grid(True, color="#e5e5e5", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if count <= LABELLED:
            figure.draw_without_rendering()  # fixes where the points are on the page
            places = place_names(axes.transData.transform(points), [len(name) for name in encoded.class_names], signs)
            for name, point, place in zip(encoded.class_names, points, places, strict=True):
                if place is None:
                    continue
                axes.annotate(
                    name, point, xytext=place, textcoords="offset points", fontsize=signs, color="#333333",
                    verticalalignment="center", zorder=4,
                )  # fmt: skip
            if None in places:
                axes.set_title(f"without room: {places.count(None)} names", loc="right", color="#666666")
        save(figure, path)


def place_names(points: NDArray[np.float64], lengths: Sequence[int], size: float) -> list[tuple[float, float] | None]:
    """Where names begin beside their points: offsets [points of 1/72 inch] of the middle of their left border.

    Each name gets, of eight places around its point, the first that covers no earlier name and the fewest points; None
    where there is no such place: a name that can't be read helps nobody.

    Args:
        points: [K, 2], in points of 1/72 inch.
        lengths: of the names, in letters.
        size: of the letters, in points.
    """
    gap, high = 0.5 * size, 1.1 * size
    marks = np.concatenate([points - 2, points + 2], axis=1)  # left, bottom, right, top
    names = np.empty((0, 4))
    places: list[tuple[float, float] | None] = []
    for index, ((across, up), length) in enumerate(zip(points, lengths, strict=True)):
        wide = 0.55 * size * length
        right, left, middle = gap, -gap - wide, -wide / 2
        offsets = [(right, 0.35 * high), (right, -0.35 * high), (middle, 0.9 * high), (left, 0.35 * high)]
        offsets += [(left, -0.35 * high), (middle, -0.9 * high), (right, 0.9 * high), (right, -0.9 * high)]
        boxes = [(across + dx, up + dy - high / 2, across + dx + wide, up + dy + high / 2) for dx, dy in offsets]
        free = [place for place, box in enumerate(boxes) if not _covered(box, names)]
        others = np.delete(marks, index, axis=0)
        best = min(free, key=lambda place: _covered(boxes[place], others), default=None)
        places.append(None if best is None else offsets[best])
        if best is not None:
            names = np.vstack([names, boxes[best]])
    return places


def _covered(box: tuple[float, float, float, float], others: NDArray[np.float64]) -> int:
    """How many of ``others`` [n, 4] overlap with ``box``; both are left, bottom, right, top."""
    left, bottom, right, top = box
    apart = (others[:, 0] >= right) | (others[:, 2] <= left) | (others[:, 1] >= top) | (others[:, 3] <= bottom)
    return int((~apart).sum())
