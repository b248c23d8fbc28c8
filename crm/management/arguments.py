"""What several commands take as an argument, and refuse in words that say what is possible."""

from __future__ import annotations

import argparse
from pathlib import Path

from crm.runs import control

#: What PostgreSQL takes for a number of rows, with room to spare.
MAX_ROWS = 2**31 - 1


def positive(text: str) -> int:
    """A whole number from 1 on. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_ROWS)) and 1 <= int(text) <= MAX_ROWS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_ROWS}")
    return int(text)


def new_file(text: str) -> Path:
    """The name of a file to write. Raises ArgumentTypeError for `-`, which would be the name of one as well."""
    if text == "-":
        raise argparse.ArgumentTypeError("'-' is no file: without this option the output goes to standard output")
    return Path(text)


def run_number(text: str) -> int | str:
    """The number of a run, or `latest`."""
    if text == control.LATEST:
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no run: write its number, as `backfill_runs list` shows it"
        ) from None
