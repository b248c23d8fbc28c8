"""Renders lists of text as PostgreSQL array literals, a whole column at a time.

psycopg renders a list element by element in Python, which takes more time than everything else that the client does for
a row. This module renders the joined text with a few string operations, each at C speed.

psycopg also sends a list of strings as text[]. This module sends it without a type, so that PostgreSQL takes the type
from the statement or the compared column: citext columns are compared as citext.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat
from psycopg.types.array import ListDumper

# Text in PostgreSQL cannot contain NUL, so marks that begin with NUL cannot occur in values.
_NUL = "\0"
_BETWEEN = "\0,"
_NULL = "\0n"


def render(values: Sequence[str | None]) -> str:
    """Return the array literal of the values; None becomes NULL.

    Raises TypeError for a value that is neither text nor None, and psycopg.DataError for a NUL, as psycopg does.
    """
    if not values:
        return "{}"
    nulls = values.count(None)
    joined = _BETWEEN.join([_NULL if value is None else value for value in values] if nulls else values)  # type: ignore[arg-type] # without None, they are all text
    if joined.count(_NUL) != len(values) - 1 + nulls:
        raise psycopg.DataError("PostgreSQL text cannot contain NUL (0x00) bytes")
    if "\\" in joined:
        joined = joined.replace("\\", "\\\\")
    if '"' in joined:
        joined = joined.replace('"', '\\"')
    quoted = joined.replace(_BETWEEN, '","')
    literal = f'{{"{quoted}"}}'
    return literal.replace(f'"{_NULL}"', "NULL") if nulls else literal


class TextListDumper(ListDumper):
    """psycopg's dumper of lists, with a fast path for lists of text."""

    def get_key(self, obj: list[Any], format: PyFormat) -> type:  # noqa: A002, ARG002 - psycopg's signature
        """Use one dumper for all lists, whatever their elements."""
        return self.cls

    def upgrade(self, obj: list[Any], format: PyFormat) -> TextListDumper:  # noqa: A002, ARG002 - psycopg's signature
        """Return this dumper."""
        return self

    def dump(self, obj: list[Any]) -> Buffer | None:
        """Return the literal, without a type: the statement casts it."""
        try:
            return render(obj).encode()
        except TypeError:
            return super().dump(obj)


def use_fast_arrays(connection: BaseDatabaseWrapper, **_signal: Any) -> None:
    """Make a new connection send every list as a literal without a type. A receiver of `connection_created`."""
    if connection.vendor == "postgresql":
        connection.connection.adapters.register_dumper(list, TextListDumper)
