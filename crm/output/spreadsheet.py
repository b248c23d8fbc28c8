"""CSV that a spreadsheet shows and never computes."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from typing import IO
from unicodedata import category, normalize

_STARTS_OF_FORMULA = ("=", "+", "-", "@")
#: Where a spreadsheet may make several cells of one: it need not split at commas. Quotes do not help then.
_PART = re.compile(r"(?:^|(?<=[;|\t\r\n；｜]))[^;|\t\r\n；｜]+")  # noqa: RUF001 - the wide ones are meant


_LINE_END = "\r\n"


class _Lines:
    """Writes the lines of a CSV writer, which quotes each cell with a character of _LINE_END, with a line feed."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(f"{line.removesuffix(_LINE_END)}\n")


def row_writer(file: IO[str]) -> Callable[[Iterable[object]], None]:
    """Return what writes one row to the file, cell by cell. Every CSV of the project is written by it."""
    writer = csv.writer(_Lines(file), lineterminator=_LINE_END)

    def write(values: Iterable[object]) -> None:
        writer.writerow(map(cell, values))

    return write


def cell(value: object) -> str:
    """The value as a cell; an apostrophe comes before what a spreadsheet would take for a formula."""
    text = "" if value is None else str(value)
    safe = _PART.sub(lambda part: f"'{part[0]}" if _is_formula(part[0]) else part[0], text)
    return f"'{safe}" if text[:1] in ("\t", "\r", "\n") else safe


def _is_formula(text: str) -> bool:
    """Decide as a spreadsheet does: it may look past the invisible, and take wide characters for plain ones."""
    # Character by character: a whole text could be composed to one that hides its beginning.
    plain = (character for written in text for character in normalize("NFKC", written))
    first = next((character for character in plain if character != '"' and category(character)[0] not in "CZ"), "")
    return first in _STARTS_OF_FORMULA
