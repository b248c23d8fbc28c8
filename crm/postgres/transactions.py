"""A transaction whose end is known, also where the answer to its commit is lost.

Whoever loses the connection while a commit is under way does not know whether it came through. To try the work again
may do it twice or count it twice; not to try it may lose it. PostgreSQL remembers what became of every transaction by
its number, so whoever wrote the number down asks, over a new connection, when it has ended. The number alone does not
tell how: a server that crashed forgets the last transactions that were not on its disk yet, and gives their numbers to
others. So each transaction leaves a token of its own behind, which is there exactly when it was committed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

from django.db import Error as DjangoDatabaseError
from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from crm import sqlstates
from crm.errors import OperatorError
from crm.interruption import sleep_until_signal, stop_is_requested
from crm.postgres import errors
from crm.postgres.errors import UnknownEndError

#: How long to wait before the server is asked again; seconds. In all, as long as a batch is tried again.
WAITS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
#: The longest of these waits once the operator asked to stop; seconds.
MAX_WAIT_OF_A_STOP = 0.2

#: How often a token is looked for whose transaction's number is that of a committed one: before the minor releases of
#: 2022, PostgreSQL says so a moment before its rows can be seen.
LOOKS_FOR_A_TOKEN = 3

_COMMITTED, _IN_PROGRESS = "committed", "in progress"
_NUMBER = "SELECT pg_current_xact_id()::text"
_STATUS = "SELECT pg_xact_status(%s::xid8)"
_HAS_COME_THROUGH = "SELECT EXISTS (SELECT FROM committed_transaction WHERE token = %s)"

# Deferred constraints would speak up at the commit, when nobody can tell which row they mean.
_SETTINGS = "SET LOCAL lock_timeout = {lock}; SET LOCAL statement_timeout = {statement}; SET CONSTRAINTS ALL IMMEDIATE"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a transaction may wait for a lock, and how long one of its statements may take; milliseconds."""

    lock: int = 5_000
    statement: int = 60_000


def lock_as_a_writer(table: str) -> str:
    """Return the statement that locks a table as a writer does: until the end, no trigger or foreign key can be added.

    LOCK TABLE needs a right on the whole table, which a role has not that may insert into some columns. EXPLAIN locks
    what it plans, and fires no trigger.
    """
    return f"EXPLAIN INSERT INTO {table} (id) VALUES (NULL)"


@contextmanager
def certain_transaction(
    connection: BaseDatabaseWrapper, timeouts: Timeouts | None = None, *first: str
) -> Iterator[None]:
    """A transaction of its own. It was committed where this is left without an error, and rolled back otherwise.

    Without `timeouts`, it has those of the session. `first` are statements that come after these settings; all of them
    are sent in one round trip. A signal that would break off the commit is passed over where the commit came through:
    whoever asks whether to stop asks after it.

    Raises UnknownEndError where the answer to the commit was lost and the server cannot be asked for longer than WAITS,
    or until a signal ends the waiting.
    """
    token, number, is_committing = str(uuid4()), "", False
    try:
        with transaction.atomic(using=connection.alias, durable=True):
            number = _begin(connection, timeouts, first, token)
            yield
            is_committing = True
    except (DjangoDatabaseError, OperatorError, KeyboardInterrupt) as error:
        # Django makes a new connection at once where a commit lost its own; that session may not be fit.
        if not is_committing or not _is_committed_after_all(connection, number, token):
            raise
        logger.warning("%s at the commit, which had come through", errors.describe(error))


def _begin(connection: BaseDatabaseWrapper, timeouts: Timeouts | None, first: Iterable[str], token: str) -> str:
    settings = [_SETTINGS.format(lock=timeouts.lock, statement=timeouts.statement)] if timeouts else []
    token_is_there = f"INSERT INTO committed_transaction (token) VALUES ('{token}')"
    with connection.cursor() as cursor:
        cursor.execute("; ".join([*settings, *first, token_is_there, _NUMBER]))
        while cursor.nextset():
            """The number is what was asked for last."""
        (number,) = cursor.fetchone()
    return str(number)


def _is_committed_after_all(connection: BaseDatabaseWrapper, number: str, token: str) -> bool:
    try:
        return _is_committed(connection, number, token)
    except KeyboardInterrupt as stop:
        raise UnknownEndError from stop


def _is_committed(connection: BaseDatabaseWrapper, number: str, token: str) -> bool:
    """Whether a transaction was committed; waits until it has ended."""
    looks_in_vain = 0
    for wait in WAITS:
        connection.close()
        try:
            with connection.cursor() as cursor:
                cursor.execute(_STATUS, [number])
                (status,) = cursor.fetchone()
                if status != _IN_PROGRESS:
                    # By a statement of its own, whose snapshot is younger than the answer.
                    cursor.execute(_HAS_COME_THROUGH, [token])
                    (is_there,) = cursor.fetchone()
                    looks_in_vain += not is_there
                    if is_there or status != _COMMITTED or looks_in_vain == LOOKS_FOR_A_TOKEN:
                        return bool(is_there)
        except OperatorError as error:
            # The new session is not fit to ask, so nothing may be said of what was written.
            raise UnknownEndError from error
        except DjangoDatabaseError as error:
            # The server crashed before anything of the transaction was on its disk: its number is of the future now.
            if errors.sqlstate(error) == sqlstates.INVALID_PARAMETER_VALUE:
                return False
            if errors.transient_cause(error) is None:
                raise UnknownEndError from error
        if stop_is_requested() and wait > MAX_WAIT_OF_A_STOP:
            break
        sleep_until_signal(wait)
    raise UnknownEndError
