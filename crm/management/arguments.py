"""What several commands take as an argument, and refuse in words that say what is possible."""

from __future__ import annotations

import argparse

#: What PostgreSQL takes for a number of rows, with room to spare.
MOST_ROWS = 2**31 - 1


def positive(text: str) -> int:
    """A whole number from 1 on. Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MOST_ROWS)) and 1 <= int(text) <= MOST_ROWS):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MOST_ROWS}")
    return int(text)
