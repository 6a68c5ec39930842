"""Tables that are read in a terminal, in Markdown and on a page, from one content.

A cell has its words and, where it stands for a number, the number: tables are sorted by it. An uncertain number is
written with two digits of its standard error, ``0.0612 ± 0.0041``. The mark of the best follows the rule of one
standard error (Breiman et al., 1984): whoever is within one standard error of the best shares it.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape

MISSING = "–"
BEST, FRONT = "★", "◆"
SCORES = {"low": lambda value: value, "high": lambda value: -value, "zero": abs}
"""What makes a number the better the lower it is, by what is best of it."""
_LONG = 40  # characters of a cell that is broken into lines on a page


@dataclass(frozen=True)
class Cell:
    """``value`` is what it is sorted by, else its text is; ``title`` is shown to a pointer, ``links`` lead to files.

    links: pairs of words and a relative address, in place of the text.
    """

    text: str = MISSING
    value: float | None = None
    title: str = ""
    mark: str = ""
    links: tuple[tuple[str, str], ...] = ()

    def plain(self) -> str:
        """For a terminal."""
        few = len(self.links) <= 2
        words = " ".join(word for word, _ in self.links) if few else f"{len(self.links)} files"
        words = words or self.text
        return f"{one_line(words)} {self.mark}".rstrip()

    def markdown(self) -> str:
        """For Markdown: what is marked is bold."""
        if self.links:
            return " ".join(f"[{_markdown(word)}](<{address}>)" for word, address in self.links)
        words = _markdown(self.text)
        return f"**{words}** {self.mark}" if self.mark else words


@dataclass(frozen=True)
class Column:
    """``title`` explains the name to a pointer."""

    name: str
    title: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells, one for each column. ``footer`` rows stay last however the others are sorted.

    legend: mark -> what it means. front: the numbers of the rows that are drawn forward. Raises ``ValueError`` for a
    row of another length.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    footer: tuple[tuple[Cell, ...], ...] = ()
    caption: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    front: frozenset[int] = frozenset()

    def __post_init__(self):
        for row in (*self.rows, *self.footer):
            if len(row) != len(self.columns):
                raise ValueError(f"a row: expected {len(self.columns)} cells, found {len(row)}; one for each column.")

    def text(self) -> str:
        """For a terminal."""
        rows = [tuple(cell.plain() for cell in row) for row in (*self.rows, *self.footer)]
        lines = [self.caption] if self.caption else []
        lines.append(table(tuple(one_line(column.name) for column in self.columns), rows))
        return "\n".join(lines + [f"{mark} {words}" for mark, words in self._used()])

    def markdown(self) -> str:
        """For Markdown, with what is a number aligned right."""
        lines = [[_markdown(column.name) for column in self.columns]]
        lines.append(["--:" if numeric else "---" for numeric in self._numeric()])
        lines += [[cell.markdown() for cell in row] for row in (*self.rows, *self.footer)]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        above = f"{_markdown(self.caption)}\n\n" if self.caption else ""
        below = "".join(f"\n\n{mark} {_markdown(words)}" for mark, words in self._used())
        return f"{above}{text}{below}"

    def html(self) -> str:
        """For a page. Without a script it is a plain table; with it, one that is sorted and filtered."""
        numeric = self._numeric()
        head = "".join(_head(column, right) for column, right in zip(self.columns, numeric, strict=True))
        body = "\n".join(self._row(row, numeric, i in self.front) for i, row in enumerate(self.rows))
        foot = "\n".join(self._row(row, numeric) for row in self.footer)
        above = f"<h3>{escape(self.caption)}</h3>\n" if self.caption else ""
        legend = "".join(f'<p class="legend">{escape(mark)} {escape(words)}</p>\n' for mark, words in self._used())
        name = escape(self.caption or "table")
        return (
            f'{above}<div class="scroll" role="region" tabindex="0" aria-label="{name}">\n<table aria-label="{name}">\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
            + (f"<tfoot>\n{foot}\n</tfoot>\n" if foot else "")
            + f"</table>\n</div>\n{legend}"
        )

    def _row(self, row: tuple[Cell, ...], numeric: list[bool], front: bool = False) -> str:
        marks = dict(self.legend)
        cells = "".join(_cell(cell, right, marks) for cell, right in zip(row, numeric, strict=True))
        kind = ' class="front"' if front else ""
        return f"<tr{kind}>{cells}</tr>"

    def _numeric(self) -> list[bool]:
        """Which columns have numbers, and are aligned right."""
        return [any(row[i].value is not None for row in self.rows) for i in range(len(self.columns))]

    def _used(self) -> list[tuple[str, str]]:
        there = {cell.mark for row in (*self.rows, *self.footer) for cell in row}
        return [(mark, words) for mark, words in self.legend if mark in there]


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns of text: the first aligned left, the others right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        cells = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def number(value: float | None, form: str = ".4g", title: str = "") -> Cell:
    """A number as ``format`` writes it; missing where there is none."""
    return Cell() if value is None else Cell(format(value, form), float(value), title)


def uncertain(value: float | None, stderr: float | None) -> Cell:
    """A number with its standard error; the interval of 95 % under the normal distribution is the title."""
    if value is None:
        return Cell()
    if not stderr:
        return number(value, title="" if stderr is None else "standard error 0")
    low, high = value - 1.96 * stderr, value + 1.96 * stderr
    digits = decimals(stderr)
    title = f"95 % interval {low:.{digits}f} to {high:.{digits}f}"
    return Cell(plus_minus(value, stderr), float(value), title)


def plus_minus(value: float, stderr: float) -> str:
    """``0.0612 ± 0.0041``: the error with two digits, the value with as many decimals.

    >>> plus_minus(0.06123, 0.00412), plus_minus(123.4, 25.0)
    ('0.0612 ± 0.0041', '123 ± 25')
    """
    digits = decimals(stderr)
    return f"{value:.{digits}f} ± {stderr:.{digits}f}"


def decimals(stderr: float) -> int:
    """How many decimals show two digits of a positive standard error; 0 to 9."""
    return min(max(1 - math.floor(math.log10(stderr)), 0), 9)


def mark_best(cells: Sequence[Cell], stderrs: Sequence[float | None], best: str) -> list[Cell]:
    """Of a column's cells, marks the best and whatever is within one standard error of it.

    stderrs: of each cell, None where unknown. best: "low", "high" or "zero", the nearest to 0. One number alone is
    best of nothing and gets no mark.
    """
    scores = [None if cell.value is None else SCORES[best](cell.value) for cell in cells]
    known = [(score, stderr or 0.0) for score, stderr in zip(scores, stderrs, strict=True) if score is not None]
    if len(known) < 2:
        return list(cells)
    lowest, error = min(known)
    limit = lowest + error
    pairs = zip(cells, scores, strict=True)
    return [replace(cell, mark=BEST) if score is not None and score <= limit else cell for cell, score in pairs]


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Which points no other beats: none is at most as dear and at most as bad, and less of one of them.

    >>> pareto_front([10, 20, 20, 50], [0.3, 0.2, 0.4, 0.2])
    [0, 1]
    """
    points = list(zip(costs, scores, strict=True))

    def beaten(point: tuple[float, float]) -> bool:
        return any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)

    return [i for i, point in enumerate(points) if not beaten(point)]


def one_line(text: str) -> str:
    """Without what would act on a terminal, or break a line."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def natural(text: str) -> list[tuple[int, int, str]]:
    """Sorts names with numbers in them as people do: run 2 before run 10."""
    parts = re.findall(r"\d+|\D+", text)
    return [(0, int(part), part) if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts]


def _head(column: Column, numeric: bool) -> str:
    kind = ' class="number"' if numeric else ""
    title = f' title="{escape(column.title)}"' if column.title else ""
    return f'<th scope="col"{kind}{title}>{escape(column.name)}</th>'


def _cell(cell: Cell, numeric: bool, marks: dict[str, str]) -> str:
    long = cell.value is None and (len(cell.text) > _LONG or len(cell.links) > 2)
    kinds = {"number": numeric, "best": cell.mark == BEST, "long": long}
    kind = [name for name, on in kinds.items() if on]
    attributes = f' class="{" ".join(kind)}"' if kind else ""
    attributes += f' data-value="{cell.value!r}"' if cell.value is not None else ""
    attributes += f' title="{escape(cell.title)}"' if cell.title else ""
    links = (f'<a href="{escape(address)}">{escape(word)}</a>' for word, address in cell.links)
    words = " ".join(links) if cell.links else escape(cell.text)
    if cell.mark:
        name = escape(marks.get(cell.mark, cell.mark))
        words += f' <span class="mark" role="img" aria-label="{name}">{escape(cell.mark)}</span>'
    return f"<td{attributes}>{words}</td>"


def _markdown(text: str) -> str:
    """Words that are nothing but words in a Markdown table: what would be markup or end the cell is escaped."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", one_line(text)).replace("&", "&amp;").replace("<", "&lt;")


def transpose(lanes: Iterable[Sequence[Cell]]) -> tuple[tuple[Cell, ...], ...]:
    """Columns of cells as rows."""
    return tuple(zip(*lanes, strict=True))
