"""Rows and contacts of which some cannot be read or written: each costs itself, and none of its neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from django.db import DatabaseError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.outcome import Refusal
from crm.postgres.errors import row_refusal
from crm.postgres.refusals import MAX_ALIKE, AlikeRefusals

#: So many rows in succession that cannot be read, and none that can, are no coincidence.
MAX_UNREADABLE = 100

Key = TypeVar("Key")
Row = TypeVar("Row")
Item = TypeVar("Item")
Result = TypeVar("Result")


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


@dataclass(slots=True)
class Written(Generic[Item, Result]):
    """What was written together, with what that returned; and what PostgreSQL refused."""

    done: list[tuple[Sequence[Item], Result]] = field(default_factory=list)
    refused: list[tuple[Item, Refusal]] = field(default_factory=list)


def write_apart(
    connection: BaseDatabaseWrapper, items: Sequence[Item], write: Callable[[Sequence[Item]], Result]
) -> Written[Item, Result]:
    """Write the items; where PostgreSQL refuses one, halve until it is alone, so that the others are written.

    Where many in succession are refused for one reason, and a sample of all that is left as well, what is left counts
    as refused: a table that refuses everything costs some hundred statements, and not two for each item.

    Raises what the writing raised where it is not the item.
    """
    written: Written[Item, Result] = Written()
    alike = AlikeRefusals()
    waiting = [items] if items else []
    while waiting:
        some = waiting.pop()
        found = _write_or_refusal(connection, some, write)
        if not isinstance(found, Refusal):
            written.done.append((some, found))
            alike.end()
        elif len(some) > 1:
            middle = len(some) // 2
            waiting += [some[middle:], some[:middle]]
        else:
            written.refused.append((some[0], found))
            if alike.note(found):
                left = [item for others in reversed(waiting) for item in others]
                sample = left[:: math.ceil(len(left) / MAX_ALIKE) or 1]
                if all(_try(connection, item, write) == found for item in sample):
                    written.refused += [(item, found) for item in left]
                    break
    return written


def _write_or_refusal(
    connection: BaseDatabaseWrapper, items: Sequence[Item], write: Callable[[Sequence[Item]], Result]
) -> Result | Refusal:
    try:
        with transaction.atomic(using=connection.alias):
            return write(items)
    except DatabaseError as error:
        refusal = row_refusal(error)
        if refusal is None:
            raise
        return refusal


def _try(connection: BaseDatabaseWrapper, item: Item, write: Callable[[Sequence[Item]], Result]) -> Result | Refusal:
    with transaction.atomic(using=connection.alias):
        found = _write_or_refusal(connection, [item], write)
        transaction.set_rollback(True, using=connection.alias)
    return found
