"""Tables of text, and records that show themselves as one. Nothing is computed here."""

import html
import io
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_LEFT = ("leaf", "shape", "dtype", "reason", "codec", "name", "verdict")
"""Columns of words; all others are of figures."""
_FORMATS = {
    "accuracy": ".2%",
    "top-5": ".2%",
    "agreement": ".2%",
    "KL": ".5f",
    "rmse": ".5f",
    "bytes": ",",
    "SQNR dB": ".2f",
}
_COLUMNS = 80


class Shown:
    """A record that prints as a table of at most 80 columns, and appears as an HTML table in a notebook."""

    def table(self) -> Table:
        """The record as a `rich` table."""
        raise NotImplementedError

    def __str__(self) -> str:
        return as_text(self.table())

    def __rich__(self) -> Table:
        return self.table()

    def _repr_html_(self) -> str:
        return as_html(self.table())


class Drawn(Shown):
    """A record that can also be drawn.

    Attributes:
        kinds: the pictures there are; the first is the usual one.
    """

    kinds: ClassVar[tuple[str, ...]]

    def draw(self, ax: Any, kind: str) -> None:
        """Draws the record on a matplotlib axis."""
        raise NotImplementedError

    def plot(self, ax: Any = None, kind: str | None = None) -> Any:
        """Draws the record with matplotlib.

        Args:
            ax: the axis to draw on; by default a new one.
            kind: one of `kinds`; by default the first.

        Returns:
            The axis.

        Raises:
            ValueError: if there is no such kind.
            ImportError: if no axis is given, and matplotlib is not installed.
        """
        kind = self.kinds[0] if kind is None else kind
        if kind not in self.kinds:
            raise ValueError(f"kind is {kind!r}; it can be {', '.join(map(repr, self.kinds))}")
        if ax is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError('plots need matplotlib: pip install "btc_jax[plot]"') from error
            ax = pyplot.subplots(layout="constrained")[1]
        self.draw(ax, kind)
        return ax


def as_text(table: Table, columns: int = _COLUMNS) -> str:
    """A table as lines without trailing spaces, in at most so many columns."""
    console = Console(width=columns, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def as_html(table: Table) -> str:
    """A table as an HTML element; rows in bold are, and rows of dense leaves are grey."""
    columns = [list(column.cells) for column in table.columns]
    aligned = [f' style="text-align: {column.justify}"' for column in table.columns]
    head = _cells("th", [column.header for column in table.columns], aligned)
    rows = [
        f"<tr{_STYLES.get(str(row.style), '')}>{_cells('td', cells, aligned)}</tr>"
        for row, cells in zip(table.rows, zip(*columns, strict=True), strict=True)
    ]
    notes = [f"<p>{html.escape(str(table.caption))}</p>"] if table.caption else []
    caption = f"<caption>{html.escape(str(table.title))}</caption>"
    return "\n".join(
        ["<table>", caption, f"<thead><tr>{head}</tr></thead>", "<tbody>", *rows, "</tbody>", "</table>", *notes]
    )


_STYLES = {"bold": ' style="font-weight: bold"', "dim": ' style="opacity: 0.6"'}


def _cells(tag: str, cells: Iterable[Any], aligned: Iterable[str]) -> str:
    pairs = zip(cells, aligned, strict=True)
    return "".join(f"<{tag}{style}>{html.escape(str(cell))}</{tag}>" for cell, style in pairs)


def comparison_table(rows: Iterable[Mapping[str, Any]], title: str) -> Table:
    """A row for each mapping of column name to figure; numbers are formatted by the name of their column.

    Examples:
        >>> rows = [{"name": "float32", "bytes": 4096}, {"name": "BTC 64", "bytes": 644}]
        >>> print(as_text(comparison_table(rows, "Size")))
        Size
        name    bytes
        ─────────────
        float32 4,096
        BTC 64    644
    """
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = new_table(title, names)
    for row in rows:
        add_row(table, [_figure(name, row.get(name)) for name in names])
    return table


def new_table(title: str, columns: Iterable[str]) -> Table:
    """An empty table with a column for each name."""
    table = Table(
        title=Text(title), min_width=len(title), title_justify="left", caption_justify="left", header_style="bold"
    )
    table.box, table.padding, table.show_edge = box.SIMPLE, 0, False  # narrow: figures stay whole on 80 columns
    for name in columns:
        table.add_column(name, justify="left" if name in _LEFT else "right", overflow="fold")
    return table


def add_row(table: Table, cells: Iterable[str], style: str | None = None) -> None:
    """Adds a row of plain text: a path or an error message may contain markup, or what a terminal obeys."""
    table.add_row(*(Text(printable(cell)) for cell in cells), style=style)


def printable(text: str) -> str:
    """One line without control characters, which are escaped."""
    text = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shape_cell(shape: tuple[int, ...]) -> str:
    """A shape in words: `64 x 3`."""
    return " x ".join(map(str, shape)) or "scalar"


def codec_cell(codec: Mapping[str, Any], order: str) -> str:
    """A codec as JSON values, and an order, in few words: `multilevel 32, 4 bits, taps`."""
    words = [f"{codec.get('id')} {codec.get('block_size')}"]
    if (width := codec.get("width")) is not None:
        words.append("one width" if width == "leaf" else f"{width} bits")
    return ", ".join([*words, "taps"] if order.endswith("-taps") else words)


def _figure(name: str, value: Any) -> str:
    if value is None:
        return ""
    default = "," if isinstance(value, int) else ".3f"
    return value if isinstance(value, str) else format(value, _FORMATS.get(name, default))
