"""Transactions whose result is known even if the answer to the commit is lost.

If the connection is lost during a commit, the client does not know whether it succeeded. Repeating the work may do or
count it twice; not repeating it may lose it. So each transaction records its number, and the client asks PostgreSQL
over a new connection whether that transaction has ended. The number is not enough to know the result: a server that
crashed has lost the last transactions that were not on disk, and reuses their numbers. So each transaction also inserts
a token of its own, which exists exactly if the transaction was committed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple
from uuid import uuid4

from django.db import Error as DjangoDatabaseError
from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from crm import sqlstates
from crm.errors import OperatorError
from crm.interruption import sleep_until_signal, stop_is_requested
from crm.postgres import errors
from crm.postgres.errors import UnknownEndError
from crm.postgres.trust import query_of_added, require_none

#: Waits before the server is asked again, in seconds. Their sum is about that of the retries of a batch.
WAITS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
#: The longest of these waits after a stop request, in seconds.
MAX_WAIT_OF_A_STOP = 0.2

#: How often to look for the token of a transaction with the status committed: before the minor releases of 2022,
#: PostgreSQL reports that status a moment before the rows are visible.
LOOKS_FOR_A_TOKEN = 3

_COMMITTED, _IN_PROGRESS = "committed", "in progress"
_NUMBER = "SELECT pg_current_xact_id()::text"
_STATUS = "SELECT pg_xact_status(%s::xid8)"
_HAS_COME_THROUGH = "SELECT EXISTS (SELECT FROM committed_transaction WHERE token = %s)"

# A deferred constraint would fail at the commit, when the row that it refuses is unknown.
_SETTINGS = "SET LOCAL lock_timeout = {lock}; SET LOCAL statement_timeout = {statement}; SET CONSTRAINTS ALL IMMEDIATE"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Lock timeout and statement timeout of a transaction, in milliseconds."""

    lock: int = 5_000
    statement: int = 60_000


class WrittenTables(NamedTuple):
    """The tables that a transaction writes.

    The role needs a right to write the whole table, or, for those in `inserted`, to insert into some columns.
    """

    whole: tuple[str, ...]
    inserted: tuple[str, ...] = ()

    @property
    def lock(self) -> str:
        """The statements that lock the tables as a writer does: until the end, no trigger or foreign key can be added.

        EXPLAIN locks what it plans, and fires no trigger. Unlike LOCK TABLE, it does not lock partitions.
        """
        explain = [f"EXPLAIN INSERT INTO {table} DEFAULT VALUES" for table in self.inserted]
        return "; ".join([f"LOCK TABLE {', '.join(self.whole)} IN ROW EXCLUSIVE MODE", *explain])


def require_trusted_writes(connection: BaseDatabaseWrapper, written: WrittenTables, *first: str) -> str:
    """Lock the tables that a transaction is to write, and return the number of the transaction.

    `first` are statements to execute first. Everything is sent in one round trip.

    Raises UntrustedCodeError if an untrusted role has added a trigger or foreign key to one of the tables. From here on
    to the end of the transaction, none can.
    """
    query = query_of_added(*written.whole, *written.inserted)
    results = []
    with connection.cursor() as cursor:
        cursor.execute("; ".join([*first, written.lock, query, _NUMBER]))
        while True:
            if cursor.description:
                results.append(cursor.fetchall())
            if not cursor.nextset():
                break
    *_, added, [(number,)] = results
    require_none(added)
    return str(number)


@contextmanager
def certain_transaction(
    connection: BaseDatabaseWrapper, written: WrittenTables, timeouts: Timeouts | None = None, *first: str
) -> Iterator[None]:
    """Run the block in its own transaction. If no error is raised, it was committed, otherwise rolled back.

    Without `timeouts`, those of the session apply. `first` are statements to execute after these settings. A signal
    that interrupts the commit is ignored if the commit succeeded: callers check for a stop request after it.

    Raises UntrustedCodeError, with nothing written, if an untrusted role has added a trigger or foreign key to one of
    the tables, and UnknownEndError if the answer to the commit was lost and the server cannot be asked, for the
    duration of WAITS or until a signal.
    """
    token, number, is_committing = str(uuid4()), "", False
    try:
        with transaction.atomic(using=connection.alias, durable=True):
            number = _begin(connection, written, timeouts, first, token)
            yield
            is_committing = True
    except (DjangoDatabaseError, OperatorError, KeyboardInterrupt) as error:
        # Django makes a new connection at once where a commit lost its own; that session may not be fit.
        if not is_committing or not _is_committed_after_all(connection, number, token):
            raise
        logger.warning("interrupted during the commit, which succeeded: %s", errors.describe(error))


def _begin(
    connection: BaseDatabaseWrapper, written: WrittenTables, timeouts: Timeouts | None, first: Iterable[str], token: str
) -> str:
    settings = [_SETTINGS.format(lock=timeouts.lock, statement=timeouts.statement)] if timeouts else []
    written = written._replace(whole=("committed_transaction", *written.whole))
    number = require_trusted_writes(connection, written, *settings, *first)
    with connection.cursor() as cursor:
        # Its triggers are among those that were asked for.
        cursor.execute("INSERT INTO committed_transaction (token) VALUES (%s)", [token])
    return number


def _is_committed_after_all(connection: BaseDatabaseWrapper, number: str, token: str) -> bool:
    try:
        return _is_committed(connection, number, token)
    except KeyboardInterrupt as stop:
        raise UnknownEndError from stop


def _is_committed(connection: BaseDatabaseWrapper, number: str, token: str) -> bool:
    """Wait until a transaction has ended, and return whether it was committed."""
    looks_in_vain = 0
    for wait in WAITS:
        connection.close()
        try:
            with connection.cursor() as cursor:
                cursor.execute(_STATUS, [number])
                (status,) = cursor.fetchone()
                if status != _IN_PROGRESS:
                    # A separate statement, because its snapshot must be newer than the status.
                    cursor.execute(_HAS_COME_THROUGH, [token])
                    (is_there,) = cursor.fetchone()
                    looks_in_vain += not is_there
                    if is_there or status != _COMMITTED or looks_in_vain == LOOKS_FOR_A_TOKEN:
                        return bool(is_there)
        except OperatorError as error:
            # The new session does not pass the checks, so the result stays unknown.
            raise UnknownEndError from error
        except DjangoDatabaseError as error:
            # The server crashed before the transaction was on disk: its number has not been assigned again yet.
            if errors.sqlstate(error) == sqlstates.INVALID_PARAMETER_VALUE:
                return False
            if errors.transient_cause(error) is None:
                raise UnknownEndError from error
        if stop_is_requested() and wait > MAX_WAIT_OF_A_STOP:
            break
        sleep_until_signal(wait)
    raise UnknownEndError
