"""Adds the attribution columns of `crm_contacts` and the index on one of them, if they are missing.

The table belongs to the application, which writes to it at the same time. So:

- The catalogue is read first, which takes no lock on the table. If Prisma has added everything, nothing else happens.
- One ALTER TABLE adds all missing columns. It needs ACCESS EXCLUSIVE for a moment and rewrites nothing, because the
  only default is stored in the catalogue. While it waits for the lock, all other sessions queue behind it. So it waits
  for `lock_timeout` only, pauses to let them pass, and retries.
- The index is built CONCURRENTLY, so the application can read and write meanwhile. An interrupted build leaves an
  invalid index; the next attempt drops it, also concurrently, and builds it again.

`migrate` checks the table each time, instead of its own record: Prisma drops the columns if its schema does not contain
them.

Columns and index get a comment that marks them, and only marked ones are ever removed. A column and its comment are
committed together. An index gets its comment after the build, so the removal keeps an index that was built but not
marked, unless its column is dropped. It also keeps an invalid index of others that was only rebuilt.
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

#: Errors if another session has added the same object since the catalogue was read.
ADDED_MEANWHILE = (sqlstates.DUPLICATE_COLUMN, sqlstates.DUPLICATE_TABLE, sqlstates.UNIQUE_VIOLATION)
PASSING = (sqlstates.LOCK_NOT_AVAILABLE, sqlstates.DEADLOCK_DETECTED, *ADDED_MEANWHILE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait, in seconds.

    `table` limits the wait for the table lock, behind which the application queues. `build` limits the wait of a
    concurrent build for older transactions, which blocks no other session. `pauses` are the waits between attempts.
    """

    table: float = 3
    build: float = 30
    pauses: tuple[float, ...] = (1, 2, 4, 8, 16)


DEFAULT_PATIENCE = Patience()
#: The migration that adds the columns, and removes them when it is reversed.
MIGRATION = ("crm", "0002_attribution")


@dataclass(frozen=True, slots=True)
class Found:
    """A column or the index in the catalogue."""

    valid: bool
    marked: bool


@dataclass(frozen=True, slots=True)
class Table:
    """The attribution columns and the index of `crm_contacts` in the catalogue."""

    columns: Mapping[str, Found]
    index: Found | None

    @property
    def missing_columns(self) -> list[str]:
        """The attribution columns that the table does not have."""
        return [name for name in COLUMNS if name not in self.columns]

    @property
    def lacks_index(self) -> bool:
        """Whether there is no valid index."""
        return self.index is None or not self.index.valid

    @property
    def marked_columns(self) -> list[str]:
        """The columns that the backfill added, according to their comments."""
        return [name for name, column in self.columns.items() if column.marked]

    @property
    def has_marked_index(self) -> bool:
        """Whether the backfill created the index."""
        return self.index is not None and self.index.marked


def add(connection: BaseDatabaseWrapper, patience: Patience = DEFAULT_PATIENCE) -> None:
    """Add the missing columns and the index; do nothing if none is missing.

    Must not be called in a transaction. Raises OperatorError if the table is missing, if this role may not change it
    (with the SQL for its owner), if the connection uses PgBouncer and the index must be built, and if other sessions
    lock the table for longer than `patience` allows.
    """
    table = _require_table(connection)
    if table.lacks_index:
        _require_session(connection, _statements_to_add(table))
    # An invalid index without the mark belongs to others: rebuilding it does not make it ours.
    is_addition = table.index is None or table.index.marked
    try:
        _with_patience(connection, patience, lambda: _add_columns(connection, patience))
        _with_patience(connection, patience, lambda: _add_index(connection, patience, mark=is_addition))
    except DatabaseError as error:
        if sqlstate(error) != sqlstates.INSUFFICIENT_PRIVILEGE:
            raise
        raise _owner_needed(connection, _statements_to_add(_require_table(connection))) from error


def restore(using: str, **_signal: Any) -> None:
    """Add missing columns and index again if the migration is applied. A receiver of `post_migrate`.

    Prisma drops columns that its schema does not contain, and Django runs a migration only once. Raises the errors of
    `add`.
    """
    connection = connections[using]
    if connection.vendor == "postgresql" and MIGRATION in MigrationRecorder(connection).applied_migrations():
        add(connection)


def remove(connection: BaseDatabaseWrapper, patience: Patience = DEFAULT_PATIENCE) -> None:
    """Drop the columns that `add` added, with their data, and the index. Other columns stay.

    A marked column is dropped even if Prisma's schema contains it meanwhile, and so are the indexes that others have
    created on it. The attribution is not lost, because the leads have it.

    Must not be called in a transaction. Raises OperatorError if this role may not change the table (with the SQL for
    its owner), if something depends on a column, if the connection uses PgBouncer and the index must be dropped, and if
    other sessions lock the table for longer than `patience` allows.
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
                "Drop that object, then run this command again."
            ) from error
        if sqlstate(error) != sqlstates.INSUFFICIENT_PRIVILEGE:
            raise
        raise _owner_needed(connection, _statements_to_remove(_require_table(connection))) from error


# Each of these reads the catalogue again: it may be a retry, or other sessions may have changed the table.


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
        logger.info("%s is in use by other sessions: attempt %d in %g s", TABLE, attempt + 1, pause)
        sleep_until_signal(pause)
    return None


@contextmanager
def _short_transaction(connection: BaseDatabaseWrapper, patience: Patience) -> Iterator[CursorWrapper]:
    with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
        _set_timeouts(cursor, _milliseconds(patience.table), "0", local=True)
        yield cursor


@contextmanager
def _bounded_session(connection: BaseDatabaseWrapper, patience: Patience) -> Iterator[CursorWrapper]:
    """Set timeouts for statements that cannot run in a transaction. A statement_timeout would cancel a long build."""
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


# Messages for the operator


def _require_session(connection: BaseDatabaseWrapper, statements: list[str]) -> None:
    """Refuse PgBouncer: the timeouts of a concurrent build are those of the session, which other clients share."""
    if connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"):
        raise OperatorError(
            f"The index {INDEX} cannot be built or dropped through PgBouncer without a long lock. For this command, "
            "set DATABASE_URL to the direct address of the database, without pgbouncer=true. Or run "
            f"{'; '.join(statements)}; then run this command again."
        )


def _owner_needed(connection: BaseDatabaseWrapper, statements: list[str]) -> OperatorError:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_user")
        (role,) = cursor.fetchone()
    return OperatorError(
        f"The role {role} may not change the table {settings.LEGACY_SCHEMA}.{TABLE}. As its owner, one by one and not "
        f"in a transaction, run {'; '.join(statements)}; then run this command again."
    )


def _lock_not_given(connection: BaseDatabaseWrapper, attempts: int) -> OperatorError:
    sessions = ", ".join(map(str, _sessions_on_the_table(connection)))
    holders = f" (now: the server processes {sessions})" if sessions else ""
    return OperatorError(
        f"Other sessions{holders} used {settings.LEGACY_SCHEMA}.{TABLE} during all {attempts} attempts, and waiting "
        "longer for its lock would have blocked the application. Find the long transaction in pg_stat_activity, wait "
        "for its end, then run this command again. Completed steps stay."
    )


def _name_taken() -> OperatorError:
    return OperatorError(
        f"The schema {settings.LEGACY_SCHEMA} has a relation {INDEX} that is not an index of {TABLE}. Prisma uses this "
        "name for the index on its referrers. Rename the relation, then run this command again."
    )
