"""Read-only transactions with one snapshot of the database, and queries that stream their rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Model, QuerySet

from crm.postgres.limits import statement_timeout
from crm.postgres.loaders import read_as_text

Found = TypeVar("Found", bound=Model)

#: Number of rows to fetch at a time.
PAGE = 2_000

# A stream is read completely, so its plan should be the best for all rows and not for the first ones.
_SETTINGS = """
SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY;
SET LOCAL statement_timeout = {statement};
SET LOCAL cursor_tuple_fraction = 1
"""


@contextmanager
def snapshot(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Open a read-only transaction in which all statements see the same snapshot of the database."""
    with _no_query_log(connection), transaction.atomic(using=connection.alias, durable=True):
        with connection.cursor() as cursor:
            cursor.execute(_SETTINGS.format(statement=statement_timeout()))
        yield


@contextmanager
def _no_query_log(connection: BaseDatabaseWrapper) -> Iterator[None]:
    """Turn off Django's query log, which with DEBUG would keep thousands of statements in memory."""
    log, connection.queries_log = connection.queries_log, deque(maxlen=0)
    try:
        yield
    finally:
        connection.queries_log = log


def stream(
    connection: BaseDatabaseWrapper, name: str, query: str, parameters: Mapping[str, Any] | None = None
) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a query in constant memory, with timestamps and rates as text. Requires a `snapshot`.

    The cursor is declared in SQL and ends with the transaction, so it works through PgBouncer, too.
    """
    with connection.cursor() as cursor:
        read_as_text(cursor)
        cursor.execute(f"DECLARE {name} NO SCROLL CURSOR FOR {query}", parameters)
        fetch = f"FETCH FORWARD {PAGE} FROM {name}"
        cursor.execute(fetch)
        while rows := cursor.fetchall():
            yield from rows
            if len(rows) < PAGE:
                break
            cursor.execute(fetch)
        cursor.execute(f"CLOSE {name}")


def in_pages(found: QuerySet[Found]) -> Iterator[Found]:
    """Yield the objects of a queryset by primary key, in constant memory and without a server-side cursor."""
    after = 0
    while page := list(found.filter(pk__gt=after).order_by("pk")[:PAGE]):
        yield from page
        after = page[-1].pk
