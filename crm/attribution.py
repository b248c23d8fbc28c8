"""The attribution columns of `crm_contacts`, and the index on one of them: added where they are missing.

The table belongs to the application, which writes to it while this runs. So:

- The catalogue is asked first, which takes no lock on the table. Where Prisma was first, that is all that happens.
- All missing columns come with one ALTER TABLE. It needs ACCESS EXCLUSIVE for an instant and rewrites nothing: the one
  default is stored in the catalogue. While it waits for that lock, everybody else queues behind it, so it waits for
  `lock_timeout` only, lets them pass, and tries again.
- The index is built CONCURRENTLY, which lets the application read and write throughout. A build that is broken off
  leaves an invalid index behind; the next attempt drops it, concurrently too, and builds anew.

`migrate` looks at the table each time, and not at its own record: Prisma drops the columns again where its schema does
not name them.

What was added says so in a comment of its own, and only that is ever removed. A column and its comment commit together.
An index gets its comment after the build: one that was broken off by force in between stays when this is taken back,
unless it goes with its column. So does one that was there before, broken, and was only repaired.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.db import DatabaseError, connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper
from django.db.migrations.recorder import MigrationRecorder
from psycopg import sql

from config.database import quoted_name
from crm import sqlstates
from crm.errors import OperatorError
from crm.interruption import sleep_until_signal
from crm.postgres.errors import sqlstate

TABLE = "crm_contacts"
COLUMNS: Mapping[str, str] = {
    "referrerUsername": "text",
    "referrerType": "text",
    "commissionRate": "numeric(5,2)",
    "commissionRateLockedAt": "timestamp(3)",
    "attributionMethod": "text",
    "attributionConfidence": "integer NOT NULL DEFAULT 100",
}
INDEX = "crm_contacts_referrerUsername_idx"
INDEXED_COLUMN = "referrerUsername"
MARK = "Added by the CRM contacts backfill"

#: Somebody else added the same thing after the catalogue was asked.
ADDED_MEANWHILE = (sqlstates.DUPLICATE_COLUMN, sqlstates.DUPLICATE_TABLE, sqlstates.UNIQUE_VIOLATION)
PASSING = (sqlstates.LOCK_NOT_AVAILABLE, sqlstates.DEADLOCK_DETECTED, *ADDED_MEANWHILE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    `table` bounds the wait for the lock behind which the application queues; `build` that for the transactions that a
    concurrent build has to see end, which keeps nobody waiting; `pauses` are those between the attempts.
    """

    table: float = 3
    build: float = 30
    pauses: tuple[float, ...] = (1, 2, 4, 8, 16)


DEFAULT_PATIENCE = Patience()
#: The migration that adds the columns for the first time, and takes them away when it is reversed.
MIGRATION = ("crm", "0002_attribution")


@dataclass(frozen=True, slots=True)
class Found:
    """A column or the index, as the catalogue has it."""

    valid: bool
    marked: bool


@dataclass(frozen=True, slots=True)
class Table:
    """What the catalogue says of `crm_contacts`."""

    columns: Mapping[str, Found]
    index: Found | None

    @property
    def missing_columns(self) -> list[str]:
        """The attribution columns that the table does not have."""
        return [name for name in COLUMNS if name not in self.columns]

    @property
    def lacks_index(self) -> bool:
        """Whether there is no valid index of them."""
        return self.index is None or not self.index.valid

    @property
    def marked_columns(self) -> list[str]:
        """The columns that our migration added, by their comment."""
        return [name for name, column in self.columns.items() if column.marked]

    @property
    def has_marked_index(self) -> bool:
        """Whether our migration made the index."""
        return self.index is not None and self.index.marked


def add(connection: BaseDatabaseWrapper, patience: Patience = DEFAULT_PATIENCE) -> None:
    """Add the columns and the index that are missing; where nothing is, do nothing at all.

    Must not be called in a transaction. Raises OperatorError where the table is missing, where this role may not change
    it (with the SQL for its owner), where the connection goes through PgBouncer and an index has to be built, and where
    other sessions hold the table for longer than `patience` allows.
    """
    table = _require_table(connection)
    if table.lacks_index:
        _require_session(connection, _statements_to_add(table))
    # What is found broken was somebody's before: a repair is not an addition.
    is_addition = table.index is None or table.index.marked
    try:
        _with_patience(connection, patience, lambda: _add_columns(connection, patience))
        _with_patience(connection, patience, lambda: _add_index(connection, patience, mark=is_addition))
    except DatabaseError as error:
        if sqlstate(error) != sqlstates.INSUFFICIENT_PRIVILEGE:
            raise
        raise _owner_needed(connection, _statements_to_add(_require_table(connection))) from error


def restore(using: str, **_signal: Any) -> None:
    """Add what is missing, whatever the record of migrations says. A receiver of `post_migrate`.

    Prisma drops columns that its schema does not name, and Django would not run a migration twice. Does nothing where
    the migration is not applied: then they are not to be there, or it adds them itself. Raises what `add` does.
    """
    connection = connections[using]
    if connection.vendor == "postgresql" and MIGRATION in MigrationRecorder(connection).applied_migrations():
        add(connection)


def remove(connection: BaseDatabaseWrapper, patience: Patience = DEFAULT_PATIENCE) -> None:
    """Drop the columns, with the data in them, and the index that `add` added; whatever else is there stays.

    It is the reverse of `add` and asks no more questions than it: a column that was added goes even when Prisma knows
    it by now, and so do indexes that others made on it. The attribution itself is not lost: it is the leads'.

    Must not be called in a transaction. Raises OperatorError where this role may not change the table (with the SQL for
    its owner), where something depends on a column, where the connection goes through PgBouncer and an index has to be
    dropped, and where other sessions hold the table for longer than `patience` allows.
    """
    table = _look(connection)
    if table is None:
        return
    if table.has_marked_index:
        _require_session(connection, _statements_to_remove(table))
    try:
        _with_patience(connection, patience, lambda: _remove_index(connection, patience))
        _with_patience(connection, patience, lambda: _remove_columns(connection, patience))
    except DatabaseError as error:
        if sqlstate(error) == sqlstates.DEPENDENT_OBJECTS_STILL_EXIST:
            raise OperatorError(
                f"A view or another object depends on an attribution column of {TABLE}, so none was dropped. "
                "Drop that object, and try again."
            ) from error
        if sqlstate(error) != sqlstates.INSUFFICIENT_PRIVILEGE:
            raise
        raise _owner_needed(connection, _statements_to_remove(_require_table(connection))) from error


# Each of these looks for itself: it may be the second attempt, or others may have been at work.


def _add_columns(connection: BaseDatabaseWrapper, patience: Patience) -> None:
    if missing := _require_table(connection).missing_columns:
        with _short_transaction(connection, patience) as cursor:
            cursor.execute(_add_columns_sql(missing))
            for name in missing:
                cursor.execute(_mark_sql("COLUMN", _qualified(TABLE, name)))


def _add_index(connection: BaseDatabaseWrapper, patience: Patience, *, mark: bool) -> None:
    table = _require_table(connection)
    if not table.lacks_index:
        return
    with _bounded_session(connection, patience) as cursor:
        if table.index is not None:
            cursor.execute(_drop_index_sql())
        cursor.execute(_create_index_sql())
        if mark:
            cursor.execute(_mark_sql("INDEX", _qualified(INDEX)))


def _remove_index(connection: BaseDatabaseWrapper, patience: Patience) -> None:
    if _require_table(connection).has_marked_index:
        with _bounded_session(connection, patience) as cursor:
            cursor.execute(_drop_index_sql())


def _remove_columns(connection: BaseDatabaseWrapper, patience: Patience) -> None:
    if marked := _require_table(connection).marked_columns:
        with _short_transaction(connection, patience) as cursor:
            cursor.execute(_drop_columns_sql(marked))


def _with_patience(connection: BaseDatabaseWrapper, patience: Patience, step: Callable[[], None]) -> None:
    for attempt, pause in enumerate((*patience.pauses, None), start=1):
        try:
            return step()
        except DatabaseError as error:
            if sqlstate(error) not in PASSING:
                raise
            if pause is None and sqlstate(error) in ADDED_MEANWHILE:
                raise _name_taken() from error
            if pause is None:
                raise _lock_not_given(connection, attempt) from error
        logger.info("%s is in use by other sessions; attempt %d in %g s", TABLE, attempt + 1, pause)
        sleep_until_signal(pause)
    return None


@contextmanager
def _short_transaction(connection: BaseDatabaseWrapper, patience: Patience) -> Iterator[CursorWrapper]:
    with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
        _set_timeouts(cursor, _milliseconds(patience.table), "0", local=True)
        yield cursor


@contextmanager
def _bounded_session(connection: BaseDatabaseWrapper, patience: Patience) -> Iterator[CursorWrapper]:
    """For statements that refuse to run in a transaction. A role's statement_timeout would break off a long build."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('lock_timeout'), current_setting('statement_timeout')")
        lock_timeout, statement_timeout = cursor.fetchone()
        _set_timeouts(cursor, _milliseconds(patience.build), "0", local=False)
        try:
            yield cursor
        finally:
            _set_timeouts(cursor, lock_timeout, statement_timeout, local=False)


def _set_timeouts(cursor: CursorWrapper, lock_timeout: str, statement_timeout: str, *, local: bool) -> None:
    cursor.execute(
        "SELECT set_config('lock_timeout', %s, %s), set_config('statement_timeout', %s, %s)",
        [lock_timeout, local, statement_timeout, local],
    )


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))


# The catalogue


def _require_table(connection: BaseDatabaseWrapper) -> Table:
    if (table := _look(connection)) is not None:
        return table
    raise OperatorError(
        f"The schema {settings.LEGACY_SCHEMA} has no table {TABLE}: this is not the application's database, or its "
        "tables are in another schema. Correct DATABASE_URL, or name the schema in it (?schema=)."
    )


def _look(connection: BaseDatabaseWrapper) -> Table | None:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE n.nspname = %s AND c.relname = %s AND c.relkind = 'r'",
            [settings.LEGACY_SCHEMA, TABLE],
        )
        if (row := cursor.fetchone()) is None:
            return None
        cursor.execute(
            "SELECT attname, coalesce(col_description(attrelid, attnum) = %s, false) FROM pg_attribute "
            "WHERE attrelid = %s AND attname = ANY(%s) AND NOT attisdropped",
            [MARK, row[0], list(COLUMNS)],
        )
        columns = {name: Found(valid=True, marked=marked) for name, marked in cursor.fetchall()}
        cursor.execute(
            "SELECT x.indisvalid, coalesce(obj_description(i.oid, 'pg_class') = %s, false) FROM pg_index x "
            "JOIN pg_class i ON i.oid = x.indexrelid WHERE x.indrelid = %s AND i.relname = %s",
            [MARK, row[0], INDEX],
        )
        index = cursor.fetchone()
        return Table(columns, Found(*index) if index else None)


def _sessions_on_the_table(connection: BaseDatabaseWrapper) -> list[int]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT DISTINCT l.pid FROM pg_locks l JOIN pg_class c ON c.oid = l.relation "
            "JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_database d ON d.oid = l.database "
            "WHERE d.datname = current_database() AND n.nspname = %s AND c.relname = %s AND l.granted "
            "AND l.pid <> pg_backend_pid() ORDER BY l.pid",
            [settings.LEGACY_SCHEMA, TABLE],
        )
        return [pid for (pid,) in cursor.fetchall()]


# The statements


def _statements_to_add(table: Table) -> list[str]:
    return [
        *([_add_columns_sql(table.missing_columns)] if table.missing_columns else []),
        *([_drop_index_sql()] if table.index is not None and not table.index.valid else []),
        *([_create_index_sql()] if table.lacks_index else []),
    ]


def _statements_to_remove(table: Table) -> list[str]:
    return [
        *([_drop_index_sql()] if table.has_marked_index else []),
        *([_drop_columns_sql(table.marked_columns)] if table.marked_columns else []),
    ]


def _add_columns_sql(names: list[str]) -> str:
    columns = ", ".join(f"ADD COLUMN {_identifier(name)} {COLUMNS[name]}" for name in names)
    return f"ALTER TABLE {_qualified(TABLE)} {columns}"


def _drop_columns_sql(names: list[str]) -> str:
    columns = ", ".join(f"DROP COLUMN {_identifier(name)}" for name in names)
    return f"ALTER TABLE {_qualified(TABLE)} {columns}"


def _create_index_sql() -> str:
    return f"CREATE INDEX CONCURRENTLY {_identifier(INDEX)} ON {_qualified(TABLE)} ({_identifier(INDEXED_COLUMN)})"


def _drop_index_sql() -> str:
    return f"DROP INDEX CONCURRENTLY IF EXISTS {_qualified(INDEX)}"


def _mark_sql(kind: str, name: str) -> str:
    return f"COMMENT ON {kind} {name} IS {sql.Literal(MARK).as_string()}"


def _qualified(*names: str) -> str:
    return _identifier(settings.LEGACY_SCHEMA, *names)


def _identifier(*names: str) -> str:
    return ".".join(map(quoted_name, names))


# What the operator is told


def _require_session(connection: BaseDatabaseWrapper, statements: list[str]) -> None:
    """A concurrent build needs timeouts of the session, and through PgBouncer those would become the application's."""
    if connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
        raise OperatorError(
            f"The index {INDEX} cannot be built or dropped through PgBouncer without a long lock. For this one "
            "command, give the database's direct address in DATABASE_URL, without pgbouncer=true; or run "
            f"{'; '.join(statements)}; and try again."
        )


def _owner_needed(connection: BaseDatabaseWrapper, statements: list[str]) -> OperatorError:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_user")
        (role,) = cursor.fetchone()
    return OperatorError(
        f"The role {role} may not change the table {settings.LEGACY_SCHEMA}.{TABLE}. Let its owner run, one by one and "
        f"not in a transaction, {'; '.join(statements)}; and try again."
    )


def _lock_not_given(connection: BaseDatabaseWrapper, attempts: int) -> OperatorError:
    sessions = ", ".join(map(str, _sessions_on_the_table(connection)))
    holders = f" (now: the server processes {sessions})" if sessions else ""
    return OperatorError(
        f"Other sessions{holders} kept {settings.LEGACY_SCHEMA}.{TABLE} in use during all {attempts} attempts, and the "
        "application was not to wait any longer. Find the long transaction in pg_stat_activity, let it end, and try "
        "again: what is done stays done."
    )


def _name_taken() -> OperatorError:
    return OperatorError(
        f"Something in the schema {settings.LEGACY_SCHEMA} that is no index of {TABLE} has the name {INDEX}, which "
        "Prisma gives to the index on its referrers. Rename it, and try again."
    )
