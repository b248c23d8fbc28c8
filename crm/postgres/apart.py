"""Rows and contacts of which some cannot be read or written: each costs itself, and none of its neighbours.

What is refused together is halved until it stands alone, so one refusal among a thousand items costs some twenty
attempts, and what it refused is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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


class Bisection(Generic[Item, Result]):
    """Attempts items, and yields them in their order: those that were not refused together, and each other one alone.

    Whatever `attempt` raises ends it.
    """

    def __init__(self, items: Sequence[Item], attempt: Callable[[Sequence[Item]], Result | Refusal]) -> None:
        """`attempt` returns a Refusal for items of which at least one is refused; then it must have changed nothing."""
        self._attempt = attempt
        self._waiting = [items] if items else []

    def __iter__(self) -> Iterator[tuple[Sequence[Item], Result | Refusal]]:
        """Each part with what was returned for it; a Refusal is of a single item."""
        while self._waiting:
            some = self._waiting.pop()
            found = self._attempt(some)
            if isinstance(found, Refusal) and len(some) > 1:
                middle = len(some) // 2
                self._waiting += [some[middle:], some[:middle]]
            else:
                yield some, found

    @property
    def left(self) -> list[Item]:
        """The items that were not yielded yet, in their order."""
        return [item for some in reversed(self._waiting) for item in some]


def refusal_of_reading(error: Exception) -> Refusal | None:
    """What is wrong with a row that cannot be read; None when it is not the row. A view may say anything for names."""
    if isinstance(error, DatabaseError):
        refusal = row_refusal(error)
        return refusal and Refusal(refusal.sqlstate)
    return Refusal()


def refusal_of_writing(error: DatabaseError) -> Refusal:
    """What is wrong with a row that PostgreSQL refused to write. Raises the error when it is not the row."""
    refusal = row_refusal(error)
    if refusal is None:
        raise error
    return refusal


def read_in_parts(
    keys: Sequence[Key], read: Callable[[Sequence[Key]], Result]
) -> Iterator[tuple[Sequence[Key], Result | Refusal]]:
    """What is read with these keys, in their order; a key by itself with what is wrong with the row that it names.

    Raises what the reading raised where it is not the rows, or where not one of many can be read.
    """
    is_any_read, unreadable = False, 0

    def read_or_refusal(some: Sequence[Key]) -> Result | Refusal:
        try:
            return read(some)
        except (DatabaseError, UnicodeDecodeError) as error:
            refusal = refusal_of_reading(error)
            if refusal is None or (not is_any_read and unreadable >= MAX_UNREADABLE):
                raise
            return refusal

    for some, found in Bisection(keys, read_or_refusal):
        if isinstance(found, Refusal):
            unreadable += 1
        else:
            is_any_read = is_any_read or bool(found)
        yield some, found


def read_apart(
    connection: BaseDatabaseWrapper, keys: Sequence[Key], read: Callable[[Sequence[Key]], list[Row]]
) -> tuple[list[Row], dict[Key, Refusal]]:
    """The rows with these keys, and what is wrong with those that cannot be read. Raises what `read_in_parts` does."""

    def read_some(some: Sequence[Key]) -> list[Row]:
        # Inside a transaction, a statement that fails would be the last one.
        with transaction.atomic(using=connection.alias):
            return read(some)

    rows: list[Row] = []
    unreadable: dict[Key, Refusal] = {}
    for some, found in read_in_parts(keys, read_some):
        if isinstance(found, Refusal):
            unreadable[some[0]] = found
        else:
            rows += found
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

    def write_or_refusal(some: Sequence[Item]) -> Result | Refusal:
        try:
            with transaction.atomic(using=connection.alias):
                return write(some)
        except DatabaseError as error:
            return refusal_of_writing(error)

    written: Written[Item, Result] = Written()
    alike = AlikeRefusals()
    parts = Bisection(items, write_or_refusal)
    for some, found in parts:
        if not isinstance(found, Refusal):
            written.done.append((some, found))
            alike.end()
            continue
        written.refused.append((some[0], found))
        if alike.note(found) and refuses_all(connection, parts.left, found, write_or_refusal):
            written.refused += [(item, found) for item in parts.left]
            break
    return written


def refuses_all(
    connection: BaseDatabaseWrapper,
    items: Sequence[Item],
    refusal: Refusal,
    write: Callable[[Sequence[Item]], Result | Refusal],
) -> bool:
    """Whether each of a sample from all over these items is refused for this reason. Nothing of it stays written."""
    for item in items[:: math.ceil(len(items) / MAX_ALIKE) or 1]:
        with transaction.atomic(using=connection.alias):
            found = write([item])
            transaction.set_rollback(True, using=connection.alias)
        if found != refusal:
            return False
    return True
