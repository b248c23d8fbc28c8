"""Creates the backfill's own PostgreSQL schema before the first migration.

Prisma owns every table of the application's schema and drops unknown ones. So the backfill's schema is first in the
search path, which `crm.postgres.session` checks, and all tables of Django and of the backfill are created there.
`migrate` is refused if they would be created elsewhere.
"""

from typing import Any

from django.conf import settings
from django.db import DatabaseError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

from config.database import quoted_name
from crm import sqlstates
from crm.errors import OperatorError


def prepare(using: str, **_signal: Any) -> None:
    """Create the schema if it is missing. A receiver of `pre_migrate`.

    Raises OperatorError if the session is read-only, if this role may not create or use the schema, and if a table
    `django_migrations` in another schema would be used.
    """
    connection = connections[using]
    if connection.vendor != "postgresql":
        return
    require_writable(connection)
    with connection.cursor() as cursor:
        if not _exists(cursor):
            _create(cursor)
        _check_privileges(cursor)
        _check_record_of_migrations(cursor)


def require_writable(connection: BaseDatabaseWrapper) -> None:
    """Raise OperatorError if the session is read-only."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('transaction_read_only')::bool")
        (is_read_only,) = cursor.fetchone()
    if is_read_only:
        raise OperatorError(
            "This session is read-only: the server is a standby, or default_transaction_read_only is on for it, for "
            "the database or for the role. Set DATABASE_URL to the address of the primary, or turn the setting off. "
            "Nothing was written."
        )


def _exists(cursor: CursorWrapper) -> bool:
    cursor.execute("SELECT FROM pg_namespace WHERE nspname = %s", [settings.BACKFILL_SCHEMA])
    return cursor.fetchone() is not None


def _create(cursor: CursorWrapper) -> None:
    schema = quoted_name(settings.BACKFILL_SCHEMA)
    try:
        # Another process may have created it since `_exists`.
        cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
    except DatabaseError as error:
        if getattr(error.__cause__, "sqlstate", None) != sqlstates.INSUFFICIENT_PRIVILEGE:
            raise
        role = quoted_name(_current_role(cursor))
        raise OperatorError(
            f"The schema {settings.BACKFILL_SCHEMA} is missing, and this role may not create it. As the owner of the "
            f"database, run CREATE SCHEMA {schema} AUTHORIZATION {role}; then run this command again."
        ) from error


def _check_privileges(cursor: CursorWrapper) -> None:
    schema = settings.BACKFILL_SCHEMA
    cursor.execute(
        "SELECT has_schema_privilege(oid, 'USAGE') AND has_schema_privilege(oid, 'CREATE'), pg_get_userbyid(nspowner) "
        "FROM pg_namespace WHERE nspname = %s",
        [schema],
    )
    may, owner = cursor.fetchone()
    if may:
        return
    # Do not suggest a GRANT: only the owner may create objects in a schema of the search path.
    raise OperatorError(
        f"This role may not create tables in the schema {schema}: run `migrate` with the owner, the role {owner}, in "
        "DATABASE_URL. Or, as a superuser, run "
        f"ALTER SCHEMA {quoted_name(schema)} OWNER TO {quoted_name(_current_role(cursor))}; then run this command "
        "again."
    )


def _check_record_of_migrations(cursor: CursorWrapper) -> None:
    """Refuse a table django_migrations of another project, which would be used as long as ours does not exist."""
    cursor.execute(
        "SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
        "WHERE pg_class.oid = to_regclass('django_migrations') AND nspname <> %s",
        [settings.BACKFILL_SCHEMA],
    )
    if (row := cursor.fetchone()) is not None:
        raise OperatorError(
            f"The schema {row[0]} contains a table django_migrations of another Django project, which this project "
            "would use as its own. Move it to a schema outside the search path, then run this command again."
        )


def _current_role(cursor: CursorWrapper) -> str:
    cursor.execute("SELECT current_user")
    (role,) = cursor.fetchone()
    return str(role)
