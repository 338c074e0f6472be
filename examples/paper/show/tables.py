"""Results as tables: for a terminal with rich, and as Markdown. Nothing is measured here."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]
_TEXTS = ("model", "method", "block size, why", "layers", "average over", "blocks", "class", "calibration")


@dataclasses.dataclass(frozen=True)
class Shown:
    """A table of strings, with notes below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def rich(self) -> Table:
        table = Table(title=Text(self.title), title_justify="left", caption_justify="left", header_style="bold")
        table.box, table.padding, table.show_edge = box.SIMPLE, (0, 1, 0, 0), False
        for column in self.columns:
            side = "left" if column in _TEXTS else "right"
            table.add_column(
                column, justify=side, overflow="fold", no_wrap=column in ("model", "method", "block size, why")
            )
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        marks = [":--" if column in _TEXTS else "--:" for column in self.columns]
        lines = [self.columns, marks, *self.rows]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        notes = "".join(f"\n{note}\n" for note in self.notes)
        return f"## {self.title}\n\n{table}\n{notes}"


def percent(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"


def figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def span(values: Sequence[float], form: str) -> str:
    """`least to most`, or the single figure."""
    if not values:
        return ""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
