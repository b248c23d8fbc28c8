"""Which database errors are transient, which the operator's, and which of a row: the only place that says so.

What is transient passes when one waits. The operator's errors are the same for every row: a right or a table is
missing. All others are of the row at which they come, whatever SQLSTATE a trigger or a function gave them. Names
SQLSTATEs, never PostgreSQL's own texts: its DETAIL quotes people's data.
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
SETTLED_MEANWHILE = "rows that have an outcome by now"
_LEDGER_KEY = "ledger_entry_pkey"
#: What passes when one waits, by SQLSTATE or by its class.
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
#: What an operator can put right, whatever the command.
REMEDIES = {
    sqlstates.INSUFFICIENT_PRIVILEGE: (
        "This role has not all the rights that this takes: docs/least_privilege.sql gives them, and "
        "`python manage.py check --database default` names those that are missing."
    ),
    sqlstates.UNDEFINED_TABLE: (
        "This database has not all the tables that this takes, or this role may not see them: "
        "`python manage.py migrate` makes those of the backfill."
    ),
    sqlstates.UNDEFINED_COLUMN: (
        "This database has not all the columns that this version takes: run `python manage.py migrate`, as after every "
        "new version."
    ),
}


# The lines of an error's context that name a function. The others quote statements, and with them values.
_FUNCTION = re.compile(r'^(?:PL/\w+|SQL) function (?:(?:.+?\.)?([\w$]+|"(?:[^"]|"")+")\(|"(.+?)" )', re.MULTILINE)


class EveryRowRefusedError(Exception):
    """All rows of a batch are refused for one reason: it is not the rows. The message is for the run's record."""


class SettledMeanwhileError(DatabaseError):
    """This run has settled rows of the batch already.

    The last commit of a killed worker came through after all, or a row has gone over to another source since.
    """


class RewrittenError(DatabaseError):
    """PostgreSQL wrote something else than what was sent, or nothing, and raised no error: a trigger did.

    `trigger` and `column` are names of the schema; None where nobody can tell.
    """

    def __init__(self, trigger: str | None, column: str | None = None) -> None:
        super().__init__(f"crm_contacts does not hold what was sent: trigger {trigger}")
        self.refusal = Refusal(None, trigger, column)


class UnknownEndError(DatabaseError):
    """The answer to a commit was lost, and the server could not be asked what became of it."""


class BrokenStartError(OperatorError):
    """The database did not let a run begin."""

    exit_code = 5


@contextmanager
def as_operator_error(
    message: str, *, known: Mapping[str, str] | None = None, kind: type[OperatorError] = OperatorError
) -> Iterator[None]:
    """Tell the operator in one line what the database had against something.

    Raises OperatorError for what can be put right, in the words that `known` has for its SQLSTATE or else in ours, and
    `kind` with the message, in which {} is the error, for anything else. Lets an error pass where there never was a
    connection, and where Django does not take the server: libpq and Django know why, nobody's data are in it, and
    manage.py tells it.
    """
    try:
        yield
    except (DatabaseError, InterfaceError) as error:
        if never_connected(error) or is_too_old(error):
            raise
        if isinstance(error, UnknownEndError):
            raise kind(f"The database broke off: {describe(error)}. Look what is there, then try again.") from None
        if remedy := {**REMEDIES, **(known or {})}.get(sqlstate(error) or ""):
            raise OperatorError(remedy) from None
        raise kind(message.format(describe(error))) from None


def refusing_to_start() -> AbstractContextManager[None]:
    """Tell in one line what the database had against the beginning of a run. Raises BrokenStartError."""
    return as_operator_error(
        "The database broke the start off: {}. No row was touched; run the command again.", kind=BrokenStartError
    )


def never_connected(error: BaseException) -> bool:
    """Whether it was the connection that could not be made."""
    cause = error.__cause__
    if isinstance(cause, psycopg.errors.ConnectionTimeout):
        return True
    # libpq's own failure brings its connection along; names of hosts are looked up before there is one.
    return isinstance(cause, psycopg.OperationalError) and (
        cause.pgconn is not None or str(cause).startswith("failed to resolve host")
    )


def is_too_old(error: BaseException) -> bool:
    """Whether Django does not take this version of the server: PostgreSQL's own refusals have a cause."""
    return isinstance(error, NotSupportedError) and error.__cause__ is None


def sqlstate(error: BaseException) -> str | None:
    """PostgreSQL's code, if it said anything."""
    cause = error if isinstance(error, psycopg.Error) else error.__cause__
    return cause.sqlstate if isinstance(cause, psycopg.Error) else None


def row_refusal(error: DatabaseError) -> Refusal | None:
    """What PostgreSQL said of a row; None when the error is transient, or the operator's.

    The names are as the error gives them, and may be anything: see `names_of_the_schema`.
    """
    if isinstance(error, RewrittenError):
        return error.refusal
    code = sqlstate(error)
    if code is None:
        # psycopg's own refusal to send a value, such as a text with a NUL.
        return Refusal() if isinstance(error, DataError) else None
    cause = error if isinstance(error, psycopg.Error) else error.__cause__
    if transient_cause(error) or not isinstance(cause, psycopg.Error):
        return None
    functions = [name or quoted for name, quoted in _FUNCTION.findall(cause.diag.context or "")]
    # Ours around them says nothing of a trigger.
    functions = [name for name in functions if name != try_execute.FUNCTION]
    if code in REMEDIES and not functions:
        return None
    return Refusal(
        code,
        cause.diag.constraint_name,
        cause.diag.column_name,
        cause.diag.table_name,
        # The outermost is the trigger's: what it called stands before it.
        functions[-1].strip('"').replace('""', '"') if functions else None,
    )


def transient_cause(error: BaseException) -> str | None:
    """The cause, in words, of an error that may pass by itself; None for any other."""
    if isinstance(error, SettledMeanwhileError) or _refused_by(error) == _LEDGER_KEY:
        return SETTLED_MEANWHILE
    code = sqlstate(error)
    if code is None:
        # An InternalError of psycopg's own is an answer that makes no sense, such as none: the line broke in it.
        return LOST_CONNECTION if isinstance(error, OperationalError | InterfaceError | InternalError) else None
    return TRANSIENT_CAUSES.get(code) or TRANSIENT_CAUSES.get(code[:2])


def _refused_by(error: BaseException) -> str | None:
    """The constraint that PostgreSQL named."""
    return error.__cause__.diag.constraint_name if isinstance(error.__cause__, psycopg.Error) else None


def too_many_rows(error: BaseException) -> str | None:
    """The cause, in words, why fewer rows at a time may get through: a timeout or a deadlock; None for any other."""
    return "a timeout" if sqlstate(error) in TIMEOUTS else "a deadlock" if is_deadlock(error) else None


def is_deadlock(error: BaseException) -> bool:
    """Whether the batch and another session waited for each other's locks: one row at a time, it cannot happen."""
    return sqlstate(error) == sqlstates.DEADLOCK_DETECTED


def describe(error: BaseException) -> str:
    """An error for a log line or a run's record: its kind and SQLSTATE, without a word of its text."""
    if isinstance(error, UnknownEndError):
        return "it is not known whether the last transaction was committed"
    code = sqlstate(error)
    return f"{type(error).__name__} ({code})" if code else type(error).__name__
