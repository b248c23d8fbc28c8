"""Executes statements that write personal data, so that a refusal does not put values into the server's log.

PostgreSQL logs every error that it sends. The DETAIL of an error contains the row that a constraint refused, and an
ordinary role cannot turn that off. An error that a function catches is not logged. So these statements run inside the
function `try_execute`, which returns the code and names of an error. This module raises the error that psycopg would
have raised, without its texts.

The function does not catch errors that say nothing about a row (a lost connection, a deadlock, a full disk): they
belong in the log.
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
#: Quotes the statement in the call of the function.
QUOTE = "$statement$"

#: The fields of an error that the function returns.
_FIELDS = (
    DiagnosticField.SQLSTATE,
    DiagnosticField.CONSTRAINT_NAME,
    DiagnosticField.COLUMN_NAME,
    DiagnosticField.TABLE_NAME,
    DiagnosticField.CONTEXT,
)


def try_execute(connection: BaseDatabaseWrapper, statement: str, parameters: Sequence[Any]) -> list[str]:
    """Execute a statement that casts each of its parameters from text and returns one column. Return that column.

    Raises django.db.DatabaseError if PostgreSQL refuses it, with names and codes, but without values.
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
    fields = zip(_FIELDS, (code, *names_and_context), strict=True)
    try:
        kind = errors.lookup(code)
    except KeyError:
        kind = errors.get_base_exception(code)
    return kind("refused", info={field: text.encode() for field, text in fields if text})
