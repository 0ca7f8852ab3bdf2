"""Tables: ``build`` one from records, print it as plain text, Markdown, CSV or LaTeX. Pure: values in, strings out."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby

from dfkd_bench.report.layout import PHASES, Column, Row, Table, accuracy, build
from dfkd_bench.report.statistics import Interval

__all__ = ["FORMATS", "Table", "build", "latex", "to_csv", "to_latex", "to_markdown", "to_text"]

WIDTH = 120
"""Characters a line of plain text, unless told otherwise."""

_GAP = "  "
_LABEL_WIDTH, _KNOWLEDGE_WIDTH = 26, 24
_DROPPED_FIRST = (
    *("knowledge", "sampling", "memory", "duplicates", "near_duplicates", "images", "unanswered", "class_balance"),
    *("density", "synthesis", "distillation", "published", "noisy_layer_bytes", "between"),
)
"""What a narrow text table leaves out, in this order. Accuracy, seeds and total time always stay."""

_NUMBER = re.compile(
    r"(?P<whole>[\d,]+|-)(?P<part>\.\d+)?( ± (?P<half>\d+)(?P<rest>\.\d+)?)?(?P<mark> \[\d+\]| \(n = \d+\))?"
)


def to_text(table: Table, width: int | None = None) -> str:
    """Aligned plain text for a terminal, numbers aligned at the decimal point.

    Args:
        table: what to print.
        width: characters a line, at least 60; columns that don't fit are left out, and a note says which.
            None: ``WIDTH``.
    """
    limit = width or WIDTH
    columns, dropped = _fitting(table, limit)
    blocks = _blocks(table, columns)
    widths = _widths(columns, blocks)
    total = sum(widths) + len(_GAP) * (len(widths) - 1)
    lines = [*_wrapped(table.title, limit), "", *_heading(columns, widths)]
    section = ""
    for row, cells in zip(table.rows, blocks, strict=True):
        if (row.section == "method") != (section == "method") or not section:
            lines.append("-" * total)
        section = row.section
        lines += [_joined(line, columns, widths) for line in zip(*cells, strict=True)]
        for remark in row.remarks:
            lines += _wrapped(remark, limit, "    ")
    lines.append("-" * total)
    for note in [*table.notes, *_notes_on_dropped(table, dropped)]:
        lines += _wrapped(note, limit, "", "  ")
    for number, reference in enumerate(table.references, 1):
        lines += _wrapped(f"[{number}] {reference}", limit, "", "    ")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def to_markdown(table: Table) -> str:
    """A GitHub table, controls in italics, then remarks, notes and references as a list."""
    head = [f"{column.over}: {column.name}" if column.over else column.name for column in table.columns]
    lines = [f"**{_markdown(table.title)}**", "", _pipes(map(_markdown, head))]
    lines.append(_pipes("--:" if column.decimal else ":--" for column in table.columns))
    for row in table.rows:
        cells = [_markdown(", ".join(column.lines(row))) for column in table.columns]
        lines.append(_pipes([cells[0] if row.section == "method" else f"*{cells[0]}*", *cells[1:]]))
    lines += ["", *(f"- {_markdown(note)}" for note in [*_labelled_remarks(table), *table.notes])]
    lines += [f"- \\[{number}\\] {_markdown(text)}" for number, text in enumerate(table.references, 1)]
    return "\n".join(lines) + "\n"


def to_csv(*tables: Table) -> str:
    """For machines: a line a row, full precision, seconds and bytes; empty where there is no number.

    What all rows of a table share (protocol, data set, pair, teacher, split) is in columns, so that several tables
    make one file with one heading.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    lines = [line for table in tables for line in _csv_lines(table)]
    if lines:
        writer.writerow(lines[0])
    writer.writerows(line.values() for line in lines)
    return out.getvalue()


def to_latex(table: Table) -> str:
    """A ``table`` environment that needs the package booktabs only; the notes stand below in small type."""
    columns = table.columns
    spec = "".join(_latex_columns(column) for column in columns)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{latex(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", *_latex_heading(columns)]
    section = ""
    for row in table.rows:
        if (row.section == "method") != (section == "method") or not section:
            lines.append(r"\midrule")
        section = row.section
        cells = " & ".join(_latex_cell(column, row) for column in columns) + r" \\"
        lines.append(f"{{}}{cells}" if cells[0] in "[*" else cells)  # else they belong to the command before
    lines += [r"\bottomrule", r"\end{tabular}", r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize"]
    notes = [*_labelled_remarks(table), *table.notes]
    notes += [f"[{number}] {text}" for number, text in enumerate(table.references, 1)]
    lines += [latex(note) + r"\par" for note in notes]
    return "\n".join([*lines, r"\end{minipage}", r"\end{table}"]) + "\n"


def _labelled_remarks(table: Table) -> list[str]:
    return [f"{row.label}: {remark}" for row in table.rows for remark in row.remarks]


# Plain text


def _fitting(table: Table, width: int) -> tuple[tuple[Column, ...], list[str]]:
    columns, dropped = table.columns, list[str]()
    for key in _DROPPED_FIRST:
        widths = _widths(columns, _blocks(table, columns))
        if sum(widths) + len(_GAP) * (len(widths) - 1) <= width:
            break
        columns = tuple(column for column in columns if column.key != key)
        dropped.append(key)
    return columns, dropped


def _notes_on_dropped(table: Table, dropped: Sequence[str]) -> Iterable[str]:
    """What was left out stays said: knowledge in full, the others by name."""
    if "knowledge" in dropped:
        known: dict[str, list[str]] = {}
        for row in table.rows:
            known.setdefault(row.knowledge or "-", []).append(row.label)
        yield "outside knowledge: " + "; ".join(f"{what} ({', '.join(labels)})" for what, labels in known.items())
    names = [column.name for column in table.columns if column.key in dropped and column.key != "knowledge"]
    if names:
        yield f"left out to fit the width: {', '.join(names)}"


def _blocks(table: Table, columns: Sequence[Column]) -> list[list[list[str]]]:
    """Row -> column -> lines; all cells of a row have equally many lines, all lines of a number column one width."""
    cells = [[_cell(column, row) for column in columns] for row in table.rows]
    for index, column in enumerate(columns):
        if column.decimal:
            aligned = iter(_aligned([line for row in cells for line in row[index]]))
            for row in cells:
                row[index] = [next(aligned) for _ in row[index]]
    for row in cells:
        height = max(map(len, row))
        for cell in row:
            cell += [""] * (height - len(cell))
    return cells


def _cell(column: Column, row: Row) -> list[str]:
    lines = list(column.lines(row))
    if column.decimal:
        return lines
    width = _LABEL_WIDTH if column.key == "method" else _KNOWLEDGE_WIDTH
    indent = "  " if column.key == "method" else ""
    return [part for line in lines for part in _wrapped(line, width, "", indent)]


def _aligned(lines: Sequence[str]) -> list[str]:
    """Pad ``12.34 ± 0.56 [7]`` and the like so that both decimal points stand below each other.

    >>> _aligned(["9.5", "10.25 ± 1.00", "-"])
    [' 9.5        ', '10.25 ± 1.00', ' -          ']
    """
    found = [_NUMBER.fullmatch(line) for line in lines]
    names = ("whole", "part", "half", "rest", "mark")
    parts = [
        [match[name] or "" for name in names] if match else [line, "", "", "", ""]
        for match, line in zip(found, lines, strict=True)
    ]
    whole, part, half, rest, mark = (max((len(one[index]) for one in parts), default=0) for index in range(5))
    result = []
    for one in parts:
        sign = " ± " if one[2] else "   " if half else ""
        text = f"{one[0]:>{whole}}{one[1]:<{part}}{sign}{one[2]:>{half}}{one[3]:<{rest}}{one[4]:<{mark}}"
        result.append(text)
    return result


def _widths(columns: Sequence[Column], blocks: Sequence[Sequence[Sequence[str]]]) -> list[int]:
    widths = [
        max(len(column.name), *(len(line) for row in blocks for line in row[index]))
        for index, column in enumerate(columns)
    ]
    for name, start, end in _spans(columns):
        lacking = len(f" {name} ") - (sum(widths[start:end]) + len(_GAP) * (end - start - 1))
        if name and lacking > 0:  # a heading over several columns stands over no others
            widths[end - 1] += lacking
    return widths


def _spans(columns: Sequence[Column]) -> Iterable[tuple[str, int, int]]:
    """The headings over the columns' names, with the first column below and the one after the last."""
    start = 0
    for name, span in groupby(columns, key=lambda column: column.over):
        end = start + len(list(span))
        yield name, start, end
        start = end


def _heading(columns: Sequence[Column], widths: Sequence[int]) -> list[str]:
    over = ""
    for name, start, end in _spans(columns):
        width = sum(widths[start:end]) + len(_GAP) * (end - start - 1)
        over += (f" {name} ".center(width, "-") if name else " " * width) + _GAP
    return [over, _joined([column.name for column in columns], columns, widths)]


def _joined(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    sides = (
        f"{cell:>{width}}" if column.decimal else f"{cell:<{width}}"
        for cell, column, width in zip(cells, columns, widths, strict=True)
    )
    return _GAP.join(sides)


def _wrapped(text: str, width: int, first: str = "", rest: str | None = None) -> list[str]:
    indent = first if rest is None else rest
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False, break_long_words=True
    )


# Markdown and CSV


def _markdown(text: str) -> str:
    return re.sub(r"([|\\*<\[\]]|(?<!\w)_|_(?!\w))", r"\\\1", text)


def _pipes(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _csv_lines(table: Table) -> Iterable[dict[str, object]]:
    for row in table.rows:
        cited = (f"{one.value:g} ({table.references[one.reference - 1]})" for one in row.published)
        yield {
            **table.facts,
            "section": row.section,
            "method": row.label,
            **_interval("last", row.last),
            "n": row.n,
            **_interval("best", row.best),
            "published": "; ".join(cited),
            **{f"seconds_{phase}": row.seconds[phase] if row.seconds else None for phase in PHASES},
            "images": row.images,
            "peak_memory_bytes": row.memory,
            "outside_knowledge": row.knowledge,
            "marks": row.marks,
            "remarks": "; ".join(row.remarks),
        }


def _interval(name: str, value: Interval | None) -> dict[str, object]:
    return {name: value and value.mean, f"{name}_half_width": value and value.half_width}


# LaTeX

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def latex(text: str) -> str:
    """Text as LaTeX prints it: every sign with a meaning of its own is escaped."""
    return "".join(_LATEX.get(sign, sign) for sign in text)


def _latex_columns(column: Column) -> str:
    """The interval gets a column of its own behind the mean, so that means align where one has none."""
    return "r@{}l" if column.key == "last" else "r" if column.decimal else "l"


def _latex_heading(columns: Sequence[Column]) -> list[str]:
    over, rules, start = [], [], 1
    for name, span in groupby(columns, key=lambda column: column.over):
        count = sum(len(re.findall(r"[lr]", _latex_columns(column))) for column in span)
        over.append(rf"\multicolumn{{{count}}}{{c}}{{{latex(name)}}}" if name else " & ".join([""] * count))
        if name:
            rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
        start += count
    names = (
        rf"\multicolumn{{2}}{{c}}{{{latex(column.name)}}}" if column.key == "last" else latex(column.name)
        for column in columns
    )
    return [" & ".join(over) + r" \\", "".join(rules), " & ".join(names) + r" \\"]


def _latex_cell(column: Column, row: Row) -> str:
    if column.key == "last":
        mean, _, half = accuracy(row.last).partition(" ± ")
        return f"{mean} & " + (rf"${{}}\pm{half}$" if half else "")
    text = latex(", ".join(column.lines(row)))
    if column.key == "published":
        return re.sub(r" \[(\d+)\]", r"\\textsuperscript{\1}", text)
    return text


FORMATS: Mapping[str, Callable[[Table], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "csv": to_csv,
    "latex": to_latex,
}
"""The names that the command line offers."""
