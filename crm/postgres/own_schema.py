"""Our own PostgreSQL schema: made before the first migration, and nothing of ours ever lands beside it.

Prisma owns every table of the application's schema and drops what it does not know. So our schema comes first in the
search path, which `crm.postgres.session` checks, and Django's tables and ours are made there. What would put them
elsewhere is refused before it happens.
"""

from typing import Any

from django.conf import settings
from django.db import DatabaseError, connections
from django.db.backends.utils import CursorWrapper

from config.database import quoted_name
from crm import sqlstates
from crm.errors import OperatorError

READ_ONLY = (
    "Nothing can be written here: the server is a standby, or default_transaction_read_only is on for it, for the "
    "database or for the role. Give DATABASE_URL the address of the primary, or let the setting be off."
)


def prepare(using: str, **_signal: Any) -> None:
    """Make the schema where it is missing. A receiver of `pre_migrate`; changes nothing when called again.

    Raises OperatorError where nothing can be written here, where this role may not make the schema or use it, and where
    Django's record of migrations lies in another schema.
    """
    connection = connections[using]
    if connection.vendor != "postgresql":
        return
    with connection.cursor() as cursor:
        _check_writable(cursor)
        if not _exists(cursor):
            _create(cursor)
        _check_privileges(cursor)
        _check_record_of_migrations(cursor)


def _check_writable(cursor: CursorWrapper) -> None:
    cursor.execute("SELECT current_setting('transaction_read_only')::bool")
    if cursor.fetchone()[0]:
        raise OperatorError(READ_ONLY)


def _exists(cursor: CursorWrapper) -> bool:
    cursor.execute("SELECT FROM pg_namespace WHERE nspname = %s", [settings.BACKFILL_SCHEMA])
    return cursor.fetchone() is not None


def _create(cursor: CursorWrapper) -> None:
    schema = quoted_name(settings.BACKFILL_SCHEMA)
    try:
        # Somebody may have been first since the look.
        cursor.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
    except DatabaseError as error:
        if getattr(error.__cause__, "sqlstate", None) != sqlstates.INSUFFICIENT_PRIVILEGE:
            raise
        role = quoted_name(_current_role(cursor))
        raise OperatorError(
            f"The schema {settings.BACKFILL_SCHEMA} is missing, and this role may not make it. Let the owner of the "
            f"database run CREATE SCHEMA {schema} AUTHORIZATION {role}; and try again."
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
    # Not by a GRANT: nobody but its owner may create in a schema that our statements look into.
    raise OperatorError(
        f"This role may not make tables in the schema {schema}: give DATABASE_URL the address of its owner, the role "
        f"{owner}, for `migrate`. Or let a superuser run "
        f"ALTER SCHEMA {quoted_name(schema)} OWNER TO {quoted_name(_current_role(cursor))}; and try again."
    )


def _check_record_of_migrations(cursor: CursorWrapper) -> None:
    """Another Django's record in the application's schema would be taken for ours as long as we have none."""
    cursor.execute(
        "SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace "
        "WHERE pg_class.oid = to_regclass('django_migrations') AND nspname <> %s",
        [settings.BACKFILL_SCHEMA],
    )
    if (row := cursor.fetchone()) is not None:
        raise OperatorError(
            f"The schema {row[0]} holds a table django_migrations of another Django project, which would be taken for "
            "the record of this one. Move it out of the search path, and try again."
        )


def _current_role(cursor: CursorWrapper) -> str:
    cursor.execute("SELECT current_user")
    (role,) = cursor.fetchone()
    return str(role)
