"""Text tables: columns without borders, one line per row, integers with thousands separators.

On a terminal, columns that may be cut are shortened to its width. A pipe or a file gets complete lines.
"""

from __future__ import annotations

from typing import IO, NamedTuple, cast

from django.core.management.base import OutputWrapper
from rich.console import Console
from rich.text import Text

_GAP = Text("  ")
#: Minimum width of a column that is cut, in characters.
_MIN_WIDTH = 10


class Column(NamedTuple):
    """The layout of a column. Numbers are aligned to the right, text to the left."""

    header: str = ""
    is_number: bool = False
    may_be_cut: bool = False
    min_width: int = 0
    style: str = ""


class Table:
    """A table with a title, and a header if any column has one."""

    def __init__(self, *columns: Column, title: str = "", title_style: str = "bold") -> None:
        self._columns = columns
        self._title = Text(title, title_style)
        self._rows: list[list[Text]] = []
        if any(column.header for column in columns):
            self.add(*(column.header for column in columns), style="bold")

    def add(self, *cells: str | int, style: str = "") -> None:
        """Add a row."""
        texts = (cell if isinstance(cell, str) else f"{cell:,}" for cell in cells)
        self._rows.append(
            [Text(text, column.style or style) for text, column in zip(texts, self._columns, strict=True)]
        )

    def print_on(self, console: Console) -> None:
        """Print the table."""
        if self._title:
            print_line(console, self._title)
        widths = self._widths(console.width if console.file.isatty() else None)
        for row in self._rows:
            line = _GAP.join(map(_laid_out, row, self._columns, widths))
            line.rstrip()
            print_line(console, line)

    def _widths(self, available: int | None) -> list[int]:
        widths = [
            max([column.min_width, *(row[number].cell_len for row in self._rows)])
            for number, column in enumerate(self._columns)
        ]
        excess = 0 if available is None else sum(widths) + len(_GAP) * (len(widths) - 1) - available
        # Cut the last columns first, because the first ones identify the row.
        for number in reversed(range(len(widths))):
            if self._columns[number].may_be_cut and excess > 0:
                cut = min(excess, max(0, widths[number] - _MIN_WIDTH))
                widths[number] -= cut
                excess -= cut
        return widths


class Summary(Table):
    """A table of counts: label, number and remark."""

    def __init__(self, title: str, *, title_style: str = "bold") -> None:
        columns = (Column(min_width=26), Column(is_number=True), Column(may_be_cut=True, style="dim"))
        super().__init__(*columns, title=title, title_style=title_style)

    def count(self, label: str, number: int, remark: str = "", style: str = "") -> None:
        """Add a count."""
        self.add(label, number, remark, style=style)


def console_on(stdout: OutputWrapper) -> Console:
    """Return a rich console that writes to a command's stdout."""
    return Console(file=cast(IO[str], stdout), highlight=False)


def print_line(console: Console, line: str | Text) -> None:
    """Print a line without wrapping, highlighting or markup."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def _laid_out(text: Text, column: Column, width: int) -> Text:
    text = text.copy()
    text.truncate(width, overflow="ellipsis")
    pad = text.pad_left if column.is_number else text.pad_right
    pad(width - text.cell_len)
    return text
