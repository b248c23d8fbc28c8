"""Rows by their keys, where some of them cannot be read: each costs itself, and none of its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from django.db import DatabaseError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.errors import row_refusal
from crm.backfill.outcome import Refusal

#: So many rows in succession that cannot be read, and none that can, are no coincidence.
MAX_UNREADABLE = 100

Key = TypeVar("Key")
Row = TypeVar("Row")


def refusal_of_reading(error: Exception) -> Refusal | None:
    """What is wrong with a row that cannot be read; None when it is not the row. A view may say anything for names."""
    if isinstance(error, DatabaseError):
        refusal = row_refusal(error)
        return refusal and Refusal(refusal.sqlstate)
    return Refusal()


def read_apart(
    connection: BaseDatabaseWrapper, keys: Sequence[Key], read: Callable[[Sequence[Key]], list[Row]]
) -> tuple[list[Row], dict[Key, Refusal]]:
    """The rows with these keys, and what is wrong with those that cannot be read.

    Raises what the reading raised where it is not the rows, or where not one of many can be read.
    """
    rows: list[Row] = []
    unreadable: dict[Key, Refusal] = {}
    waiting = [keys]
    while waiting:
        some = waiting.pop()
        try:
            # Inside a transaction, a statement that fails would be the last one.
            with transaction.atomic(using=connection.alias):
                rows += read(some)
        except (DatabaseError, UnicodeDecodeError) as error:
            refusal = refusal_of_reading(error)
            if refusal is None or (not rows and len(unreadable) >= MAX_UNREADABLE):
                raise
            if len(some) == 1:
                unreadable[some[0]] = refusal
            else:
                middle = len(some) // 2
                waiting += [some[middle:], some[:middle]]
    return rows, unreadable
