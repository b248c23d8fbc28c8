"""CSV that a spreadsheet shows and never computes."""

from __future__ import annotations

#: What makes a formula of a cell. Spreadsheets look past white space before it.
_STARTS_OF_FORMULA = ("=", "+", "-", "@")


def cell(value: object) -> str:
    """The value as a cell; one that a spreadsheet would take for a formula gets an apostrophe before it."""
    text = "" if value is None else str(value)
    return f"'{text}" if text.lstrip().startswith(_STARTS_OF_FORMULA) or text[:1] in ("\t", "\r", "\n") else text
