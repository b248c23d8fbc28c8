"""Lists of text rendered as PostgreSQL array literals, a whole column at a time.

psycopg renders a list element by element in Python, which costs more than everything else that the client does for a
row. This does the same with a handful of passes over the joined text, each at C speed.

psycopg would also say that a list of strings is a text[]. Here the statement says what it is, or the column that it is
compared with: a citext is to be compared as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg.abc import Buffer
from psycopg.adapt import PyFormat
from psycopg.types.array import ListDumper

# PostgreSQL's text has no NUL, so marks that begin with one are never mistaken for content.
_NUL = "\0"
_BETWEEN = "\0,"
_NULL = "\0n"


def render(values: Sequence[str | None]) -> str:
    """The array literal of the values; None becomes NULL.

    Raises TypeError for anything else than text or None, and psycopg.DataError for a NUL, as psycopg does.
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
    """psycopg's dumper of lists, with a fast way for lists of text; other lists go psycopg's own way."""

    def get_key(self, obj: list[Any], format: PyFormat) -> type:  # noqa: A002, ARG002 - psycopg's signature
        """One dumper for all lists: what is in them is seen when they are rendered."""
        return self.cls

    def upgrade(self, obj: list[Any], format: PyFormat) -> TextListDumper:  # noqa: A002, ARG002 - psycopg's signature
        """No other dumper is needed."""
        return self

    def dump(self, obj: list[Any]) -> Buffer | None:
        """The literal, of no type of its own: the statement casts it."""
        try:
            return render(obj).encode()
        except TypeError:
            return super().dump(obj)


def use_fast_arrays(connection: BaseDatabaseWrapper, **_signal: Any) -> None:
    """Let a new connection send every list as a literal without a type. A receiver of `connection_created`."""
    if connection.vendor == "postgresql":
        connection.connection.adapters.register_dumper(list, TextListDumper)
