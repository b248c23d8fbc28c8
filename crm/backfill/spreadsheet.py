"""CSV that a spreadsheet shows and never computes."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from typing import IO

#: What makes a formula of a cell. Spreadsheets look past white space before it.
_STARTS_OF_FORMULA = ("=", "+", "-", "@")


def row_writer(file: IO[str]) -> Callable[[Iterable[object]], None]:
    """Return what writes one row to the file, cell by cell. Every CSV of the project is written by it."""
    writer = csv.writer(file, lineterminator="\n")

    def write(values: Iterable[object]) -> None:
        writer.writerow(map(cell, values))

    return write


def cell(value: object) -> str:
    """The value as a cell; one that a spreadsheet would take for a formula gets an apostrophe before it."""
    text = "" if value is None else str(value)
    return f"'{text}" if text.lstrip().startswith(_STARTS_OF_FORMULA) or text[:1] in ("\t", "\r", "\n") else text
