"""Classifies database errors: transient, for the operator to fix, or caused by a row. No other module does.

A retry may cure a transient error. An error for the operator affects every row, such as a missing right or table. All
others belong to the row at which they occur, whatever SQLSTATE a trigger or function raised. Messages contain
SQLSTATEs, never PostgreSQL's own texts, because its DETAIL quotes personal data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import psycopg
from django.db import DatabaseError, DataError, InterfaceError, InternalError, NotSupportedError, OperationalError

from crm import sqlstates, try_execute
from crm.errors import OperatorError
from crm.outcome import Refusal

LOST_CONNECTION = "connection lost"
SETTLED_MEANWHILE = "rows that already have an outcome"
_LEDGER_KEY = "ledger_entry_pkey"
#: Descriptions of transient errors, by SQLSTATE or by class of SQLSTATEs.
TRANSIENT_CAUSES = {
    sqlstates.CONNECTION_EXCEPTION: LOST_CONNECTION,
    sqlstates.TRANSACTION_ROLLBACK: "transaction rolled back by the server",
    sqlstates.INSUFFICIENT_RESOURCES: "server short of resources",
    sqlstates.OPERATOR_INTERVENTION: "server interrupted the statement",
    sqlstates.SERIALIZATION_FAILURE: "serialization failure",
    sqlstates.DEADLOCK_DETECTED: "deadlock",
    sqlstates.TOO_MANY_CONNECTIONS: "too many connections",
    sqlstates.LOCK_NOT_AVAILABLE: "lock timeout",
    sqlstates.QUERY_CANCELED: "statement timeout",
    sqlstates.ADMIN_SHUTDOWN: "server shut down the connection",
    sqlstates.CRASH_SHUTDOWN: "server crashed",
    sqlstates.CANNOT_CONNECT_NOW: "server is starting",
    sqlstates.IDLE_SESSION_TIMEOUT: "idle session timeout",
    sqlstates.IDLE_IN_TRANSACTION_SESSION_TIMEOUT: "idle in transaction timeout",
    sqlstates.TRANSACTION_TIMEOUT: "transaction timeout",
    sqlstates.READ_ONLY_SQL_TRANSACTION: "server is read-only",
}
TIMEOUTS = (sqlstates.LOCK_NOT_AVAILABLE, sqlstates.QUERY_CANCELED, sqlstates.TRANSACTION_TIMEOUT)
#: How an operator fixes an error, for every command.
REMEDIES = {
    sqlstates.INSUFFICIENT_PRIVILEGE: (
        "This role lacks rights that this command needs: docs/least_privilege.sql grants them, and "
        "`python manage.py check --database default` lists the missing ones."
    ),
    sqlstates.UNDEFINED_TABLE: (
        "This database lacks tables that this command needs, or this role may not see them: "
        "`python manage.py migrate` creates those of the backfill."
    ),
    sqlstates.UNDEFINED_COLUMN: (
        "This database lacks columns that this version needs: run `python manage.py migrate`, as after every upgrade."
    ),
}


# The lines of an error's context that name a function. Other lines quote statements, which contain values.
_FUNCTION = re.compile(r'^(?:PL/\w+|SQL) function (?:(?:.+?\.)?([\w$]+|"(?:[^"]|"")+")\(|"(.+?)" )', re.MULTILINE)


class EveryRowRefusedError(Exception):
    """All rows of a batch are refused for one reason, so they are not the cause. The text is for the run's record."""


class SettledMeanwhileError(DatabaseError):
    """This run has already migrated rows of the batch.

    Either the last commit of a killed worker succeeded, or a row has changed its source since.
    """


class RewrittenError(DatabaseError):
    """A trigger changed or suppressed what was written, without an error.

    `trigger` and `column` are names from the catalogue, or None if unknown.
    """

    def __init__(self, trigger: str | None, column: str | None = None) -> None:
        super().__init__(f"crm_contacts does not hold what was sent: trigger {trigger}")
        self.refusal = Refusal(None, trigger, column)


class UnknownEndError(DatabaseError):
    """The answer to a commit was lost, and the server could not be asked whether it was committed."""


class BrokenStartError(OperatorError):
    """A database error prevented a run from starting."""

    exit_code = 5


@contextmanager
def as_operator_error(
    message: str, *, known: Mapping[str, str] | None = None, kind: type[OperatorError] = OperatorError
) -> Iterator[None]:
    """Raise database errors in the block as OperatorError, with a message of one line.

    An error with an SQLSTATE in `known` or REMEDIES raises OperatorError with the text from there, any other `kind`
    with `message`, in which {} stands for the error. Errors of a failed connection attempt, and of a server version
    that Django does not support, are raised unchanged: their texts contain no personal data, and manage.py prints them.
    """
    try:
        yield
    except (DatabaseError, InterfaceError) as error:
        if never_connected(error) or is_too_old(error):
            raise
        if isinstance(error, UnknownEndError):
            raise kind(
                f"Database error: {describe(error)}. Check whether the change was made, then run the command again."
            ) from None
        if remedy := {**REMEDIES, **(known or {})}.get(sqlstate(error) or ""):
            raise OperatorError(remedy) from None
        raise kind(message.format(describe(error))) from None


def refusing_to_start() -> AbstractContextManager[None]:
    """Raise database errors at the start of a run as BrokenStartError, or as OperatorError if there is a remedy."""
    return as_operator_error(
        "Database error at the start: {}. No row was changed; run the command again.", kind=BrokenStartError
    )


def never_connected(error: BaseException) -> bool:
    """Return whether the error is that of a failed connection attempt."""
    cause = error.__cause__
    if isinstance(cause, psycopg.errors.ConnectionTimeout):
        return True
    # Failures of libpq have a connection object; psycopg resolves host names before it creates one.
    return isinstance(cause, psycopg.OperationalError) and (
        cause.pgconn is not None or str(cause).startswith("failed to resolve host")
    )


def is_too_old(error: BaseException) -> bool:
    """Return whether Django does not support this server version. Errors of PostgreSQL itself have a cause."""
    return isinstance(error, NotSupportedError) and error.__cause__ is None


def sqlstate(error: BaseException) -> str | None:
    """Return PostgreSQL's error code, or None if the error did not come from the server."""
    cause = error if isinstance(error, psycopg.Error) else error.__cause__
    return cause.sqlstate if isinstance(cause, psycopg.Error) else None


def row_refusal(error: DatabaseError) -> Refusal | None:
    """Return the refusal of a row, or None if the error is transient or for the operator.

    Its names are copied from the error, and may be any text: see `names_of_the_schema`.
    """
    if isinstance(error, RewrittenError):
        return error.refusal
    code = sqlstate(error)
    if code is None:
        # psycopg itself refuses some values, such as text with a NUL.
        return Refusal() if isinstance(error, DataError) else None
    cause = error if isinstance(error, psycopg.Error) else error.__cause__
    if transient_cause(error) or not isinstance(cause, psycopg.Error):
        return None
    functions = [name or quoted for name, quoted in _FUNCTION.findall(cause.diag.context or "")]
    # Our own function is not that of a trigger.
    functions = [name for name in functions if name != try_execute.FUNCTION]
    if code in REMEDIES and not functions:
        return None
    return Refusal(
        code,
        cause.diag.constraint_name,
        cause.diag.column_name,
        cause.diag.table_name,
        # The last one is the trigger's function: PostgreSQL lists the functions that it called first.
        functions[-1].strip('"').replace('""', '"') if functions else None,
    )


def transient_cause(error: BaseException) -> str | None:
    """Return the description of a transient error, or None for any other error."""
    if isinstance(error, SettledMeanwhileError) or _refused_by(error) == _LEDGER_KEY:
        return SETTLED_MEANWHILE
    code = sqlstate(error)
    if code is None:
        # psycopg raises InternalError for an incomplete answer: the connection broke meanwhile.
        return LOST_CONNECTION if isinstance(error, OperationalError | InterfaceError | InternalError) else None
    return TRANSIENT_CAUSES.get(code) or TRANSIENT_CAUSES.get(code[:2])


def _refused_by(error: BaseException) -> str | None:
    return error.__cause__.diag.constraint_name if isinstance(error.__cause__, psycopg.Error) else None


def too_many_rows(error: BaseException) -> str | None:
    """Return "a timeout" or "a deadlock" if fewer rows at a time may help, otherwise None."""
    return "a timeout" if sqlstate(error) in TIMEOUTS else "a deadlock" if is_deadlock(error) else None


def is_deadlock(error: BaseException) -> bool:
    """Return whether the error is a deadlock, which cannot happen to a batch of one row."""
    return sqlstate(error) == sqlstates.DEADLOCK_DETECTED


def describe(error: BaseException) -> str:
    """Return the class and SQLSTATE of an error, for the log or a run's record, without PostgreSQL's text.

    An OperatorError is described by its own text, without the full stop, because the sentence goes on after it.
    """
    if isinstance(error, OperatorError):
        return str(error).removesuffix(".")
    if isinstance(error, UnknownEndError):
        return "it is not known whether the last transaction was committed"
    code = sqlstate(error)
    return f"{type(error).__name__} ({code})" if code else type(error).__name__
