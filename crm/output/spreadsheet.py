"""CSV without cells that a spreadsheet would interpret as formulas."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable
from typing import IO
from unicodedata import category, normalize

_STARTS_OF_FORMULA = ("=", "+", "-", "@")
#: The parts of a cell if a spreadsheet splits at other characters than commas, for which quotes do not help.
_PART = re.compile(r"(?:^|(?<=[;|\t\r\n；｜]))[^;|\t\r\n；｜]+")  # noqa: RUF001 - the wide ones are meant


_LINE_END = "\r\n"


class _Lines:
    """Writes the lines of a CSV writer with LF. The writer uses CR LF, so that it quotes cells with either of them."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, line: str) -> None:
        self._file.write(f"{line.removesuffix(_LINE_END)}\n")


def row_writer(file: IO[str]) -> Callable[[Iterable[object]], None]:
    """Return a function that writes one row of cells to the file. All CSV files of the project are written by it."""
    writer = csv.writer(_Lines(file), lineterminator=_LINE_END)

    def write(values: Iterable[object]) -> None:
        writer.writerow(map(cell, values))

    return write


def cell(value: object) -> str:
    """Return the value as text, with an apostrophe before each part that a spreadsheet may treat as a formula."""
    text = "" if value is None else str(value)
    safe = _PART.sub(lambda part: f"'{part[0]}" if _is_formula(part[0]) else part[0], text)
    return f"'{safe}" if text[:1] in ("\t", "\r", "\n") else safe


def _is_formula(text: str) -> bool:
    """Return whether a text may be a formula. Spreadsheets skip invisible characters and accept full-width ones."""
    # Normalise each character alone: normalising the whole text could combine the first one with others.
    plain = (character for written in text for character in normalize("NFKC", written))
    first = next((character for character in plain if character != '"' and category(character)[0] not in "CZ"), "")
    return first in _STARTS_OF_FORMULA
