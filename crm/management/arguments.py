"""Argument types that several commands share. A refusal says which values are accepted."""

from __future__ import annotations

import argparse
from pathlib import Path

from crm.runs import control

#: A number of rows that PostgreSQL accepts everywhere.
MAX_ROWS = 2**31 - 1


def positive(text: str, maximum: int = MAX_ROWS) -> int:
    """Return a whole number from 1 to `maximum`. Raises ArgumentTypeError."""
    # The length is checked first: Python refuses to convert thousands of digits.
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(maximum)) and 1 <= int(text) <= maximum):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {maximum}")
    return int(text)


def new_file(text: str) -> Path:
    """Return the name of a file to write. Raises ArgumentTypeError for `-`, which would be a valid file name."""
    if text == "-":
        raise argparse.ArgumentTypeError("'-' is not a file: leave the option out to write to standard output")
    return Path(text)


def run_number(text: str) -> int | str:
    """Return the number of a run, or `latest`."""
    if text == control.LATEST:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a run: give its number, as shown by `backfill_runs list`"
        ) from None
