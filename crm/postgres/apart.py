"""Reads and writes items of which some are refused, so that a refused item does not affect the others.

Items that are refused together are bisected until the refused ones are found. One refusal among a thousand items costs
about twenty attempts.
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

#: If this many rows cannot be read, and none can, the fault is not in the rows.
MAX_UNREADABLE = 100

Key = TypeVar("Key")
Row = TypeVar("Row")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Bisection(Generic[Item, Result]):
    """Attempts items and yields them in order: parts that succeed together, and each refused item alone.

    An exception of `attempt` is raised and ends the iteration.
    """

    def __init__(self, items: Sequence[Item], attempt: Callable[[Sequence[Item]], Result | Refusal]) -> None:
        """`attempt` returns a Refusal, having changed nothing, if at least one of the items is refused."""
        self._attempt = attempt
        self._waiting = [items] if items else []

    def __iter__(self) -> Iterator[tuple[Sequence[Item], Result | Refusal]]:
        """Yield each part with the result of `attempt`. A part with a Refusal has one item."""
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
        """The items that were not yielded yet, in order."""
        return [item for some in reversed(self._waiting) for item in some]


def refusal_of_reading(error: Exception) -> Refusal | None:
    """Return the refusal of a row that cannot be read, or None if the error is not caused by the row.

    It has no names, since the functions of a view can raise any text as names.
    """
    if isinstance(error, DatabaseError):
        refusal = row_refusal(error)
        return refusal and Refusal(refusal.sqlstate)
    return Refusal()


def refusal_of_writing(error: DatabaseError) -> Refusal:
    """Return the refusal of a row that PostgreSQL refused to write. Raises the error if the row did not cause it."""
    refusal = row_refusal(error)
    if refusal is None:
        raise error
    return refusal


def read_in_parts(
    keys: Sequence[Key], read: Callable[[Sequence[Key]], Result]
) -> Iterator[tuple[Sequence[Key], Result | Refusal]]:
    """Yield parts of the keys, in order, with what `read` returned; a key whose row cannot be read, with its refusal.

    Raises the error of `read` if the rows did not cause it, or if MAX_UNREADABLE rows cannot be read and none can.
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
    """Return the rows with these keys, and by key the refusals of those that cannot be read. See `read_in_parts`."""

    def read_some(some: Sequence[Key]) -> list[Row]:
        # Without a savepoint, a failed statement would abort the whole transaction.
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
    """The parts that were written, each with the result of `write`, and the items that PostgreSQL refused."""

    done: list[tuple[Sequence[Item], Result]] = field(default_factory=list)
    refused: list[tuple[Item, Refusal]] = field(default_factory=list)


def write_apart(
    connection: BaseDatabaseWrapper, items: Sequence[Item], write: Callable[[Sequence[Item]], Result]
) -> Written[Item, Result]:
    """Write the items, bisecting them if PostgreSQL refuses some, so that the others are written.

    If many items in succession are refused for one reason, and so is a sample of the remaining ones, all remaining
    items count as refused: a table that refuses everything costs a few hundred statements instead of two per item.

    Raises the error of `write` if no item caused it.
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
    """Return whether each item of an evenly spread sample is refused for this reason. Rolls each attempt back."""
    for item in items[:: math.ceil(len(items) / MAX_ALIKE) or 1]:
        with transaction.atomic(using=connection.alias):
            found = write([item])
            transaction.set_rollback(True, using=connection.alias)
        if found != refusal:
            return False
    return True
