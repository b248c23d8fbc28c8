"""Statements that write people's data, and of whose refusal no value comes into the server's log.

PostgreSQL logs every error that it sends, and in its DETAIL the row that a constraint refused, with all its values. No
ordinary role can turn that off. What a function catches is not logged. So these statements run inside of one,
`try_execute`, which returns the codes and names of what was refused; here that becomes the error that psycopg would
have raised, but for its texts.

What says nothing of a row (a lost connection, a deadlock, a full disk) the function lets pass: it belongs in the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg
from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import errors
from psycopg.pq import DiagnosticField

FUNCTION = "try_execute"
SIGNATURE = f"{settings.BACKFILL_SCHEMA}.{FUNCTION}(text, text[])"
#: Stands before and after the statement in what is sent.
QUOTE = "$statement$"

#: What the function returns of a refusal.
_FIELDS = (
    DiagnosticField.SQLSTATE,
    DiagnosticField.CONSTRAINT_NAME,
    DiagnosticField.COLUMN_NAME,
    DiagnosticField.TABLE_NAME,
    DiagnosticField.CONTEXT,
)


def try_execute(connection: BaseDatabaseWrapper, statement: str, parameters: Sequence[Any]) -> list[str]:
    """Execute a statement that casts each of its parameters from text, and returns one column; that column.

    Raises a django.db.DatabaseError where PostgreSQL refuses it, with names and codes, and without values.
    """
    body = statement % tuple(f"($1)[{number}]" for number in range(1, len(parameters) + 1))
    body = body.replace("%", "%%")
    placeholders = ", ".join(["%s::text"] * len(parameters))
    with connection.cursor() as cursor:
        # With the very types of ours, so that PostgreSQL finds none of the same name that fits better.
        cursor.execute(
            f"SELECT * FROM {settings.BACKFILL_SCHEMA}.{FUNCTION}"
            f"({QUOTE}{body}{QUOTE}::text, VARIADIC ARRAY[{placeholders}]::text[])",
            parameters,
        )
        rows = cursor.fetchall()
    for _, refusal in rows:
        if refusal is not None:
            with connection.wrap_database_errors:
                raise _error(*refusal)
    return [key for key, _ in rows]


def _error(code: str, *names_and_context: str | None) -> psycopg.Error:
    told = zip(_FIELDS, (code, *names_and_context), strict=True)
    try:
        kind = errors.lookup(code)
    except KeyError:
        kind = errors.get_base_exception(code)
    return kind("refused", info={field: text.encode() for field, text in told if text})
