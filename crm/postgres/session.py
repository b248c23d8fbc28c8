"""Checks and configures every session with the database, whatever the settings of role, database and pooler.

This is a receiver of Django's `connection_created`, so that it applies to every command. The search path decides which
table a name refers to: it must start with the backfill's schema and the application's. On a direct connection, the
start-up options set it; this module checks that they took effect, because a pooler may drop them silently. Through
PgBouncer, the role's own setting applies.

The search path does not name pg_catalog. So pg_catalog comes first, and new tables are created in the backfill's
schema. Before anything else, in a transaction whose search path contains no other schema, `crm.postgres.trust` checks
whether the schemas can be trusted.

A session must see every row of the backfill's own tables: rows hidden by a policy would be missing silently.

Settings that change the meaning of values, or that end transactions, are set here. Through PgBouncer, only settings
that it tracks per client can be set; others would stay with a server connection that other clients use. So a session
with different values for those is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import psycopg
from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from config.database import quoted_name
from crm.errors import OperatorError
from crm.postgres.trust import SAFE_SEARCH_PATH, require_trusted

#: Settings that PgBouncer tracks per client: how timestamps and string constants are read.
FOLLOWED: Mapping[str, str] = {"DateStyle": "ISO, MDY", "standard_conforming_strings": "on"}
#: Other settings, as far as the server has them. They determine how values are read, prevent the server from ending a
#: transaction or logging the values of a failed statement, and allow plans for the actual values of a statement.
SETTINGS: Mapping[str, str] = {
    "IntervalStyle": "postgres",
    "array_nulls": "on",
    "bytea_output": "hex",
    "default_transaction_isolation": "read committed",
    "exit_on_error": "off",
    "extra_float_digits": "1",
    "log_parameter_max_length_on_error": "0",
    "plan_cache_mode": "auto",
    "quote_all_identifiers": "off",
    "transaction_timeout": "0",
    "transform_null_equals": "off",
}
#: A process that hangs in a transaction holds locks; reading a page within a batch never takes five minutes. Between
#: transactions a session may wait longer, because of --max-rate or for a worker. Not set through a pooler.
IDLE = {"idle_in_transaction_session_timeout": "5min", "idle_session_timeout": "0"}
#: Timeout of the checks. The default of the database may be too short for them.
_TO_LOOK = "1min"

# In one round trip: the default of idle_in_transaction_session_timeout may be too short for two.
_BEGIN = f"""
BEGIN ISOLATION LEVEL READ COMMITTED; SHOW search_path; SET LOCAL search_path = {SAFE_SEARCH_PATH};
SET LOCAL idle_in_transaction_session_timeout = '{IDLE["idle_in_transaction_session_timeout"]}';
SET LOCAL statement_timeout = '{_TO_LOOK}'
"""
# The search path may be set for the role in the database, the role, or the database: the most specific one applies.
_SESSION = """
SELECT current_user, current_database(),
       (SELECT substr(config, length('search_path=') + 1)
          FROM pg_db_role_setting, unnest(setconfig) AS config
         WHERE setrole IN (0, (SELECT oid FROM pg_roles WHERE rolname = session_user))
           AND setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))
           AND config LIKE 'search\\_path=%'
         ORDER BY setrole = 0, setdatabase = 0 LIMIT 1),
       EXISTS (SELECT FROM pg_attribute
                       JOIN pg_class c ON c.oid = attrelid
                       JOIN pg_namespace n ON n.oid = relnamespace
                WHERE nspname = $1 AND relname = 'backfill_run' AND attname = 'legacy_schema' AND NOT attisdropped
                  AND has_schema_privilege(n.oid, 'USAGE') AND has_column_privilege(c.oid, attnum, 'SELECT')),
       ARRAY(SELECT relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
              WHERE nspname = $1 AND relkind IN ('r', 'p') AND row_security_active(c.oid) ORDER BY 1)
"""
_SET = """
SELECT set_config(wanted.name, wanted.value, false)
  FROM unnest($1::text[], $2::text[]) AS wanted(name, value) JOIN pg_settings USING (name)
"""
_OTHERWISE = """
SELECT wanted.name, wanted.value
  FROM unnest($1::text[], $2::text[]) AS wanted(name, value) JOIN pg_settings USING (name)
 WHERE setting <> wanted.value ORDER BY 1
"""


def require_fitting(connection: BaseDatabaseWrapper, **_signal: Any) -> None:
    """Check and configure the session of a new connection. A receiver of `connection_created`.

    Raises OperatorError, after closing the connection, if a check fails, including if the ledger belongs to another
    schema.
    """
    if connection.vendor != "postgresql":
        return
    try:
        with connection.wrap_database_errors:
            _require_fitting(connection)
    except BaseException:
        connection.close()
        raise


def names_in(search_path: str) -> list[str]:
    """Return the schemas of a search path as PostgreSQL reads it: unquoted names in lower case."""
    found = re.findall(r'"((?:[^"]|"")*)"|([^\s,"]+)', search_path)
    return [quoted.replace('""', '"') or plain.lower() for quoted, plain in found]


def _require_fitting(connection: BaseDatabaseWrapper) -> None:
    is_pooled = bool(connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"))
    # psycopg's cursor, because Django's would add these statements to the query log.
    session = connection.connection
    search_path = _begin(session)
    role, database, own_path, ledger_is_readable, hidden = _rows(session, _SESSION, settings.BACKFILL_SCHEMA)[0]
    own = [name for name in names_in(own_path or "") if name not in ("pg_catalog", "pg_temp")]
    _require_search_path(search_path, own, role, database, is_pooled=is_pooled)
    in_use = names_in(search_path) if is_pooled else [settings.BACKFILL_SCHEMA, settings.LEGACY_SCHEMA, *own]
    in_use = [role if name == "$user" else name for name in in_use]
    require_trusted(session, in_use, settings.LEGACY_SCHEMA)
    if is_pooled:
        _set(session, FOLLOWED)
        _require_settings(session, role, database)
    else:
        _set(session, {**FOLLOWED, **SETTINGS, **IDLE, "search_path": _path(own)})
    _require_all_rows(hidden, role)
    if ledger_is_readable:
        _require_own_ledger(session)
    session.execute("END")


def _begin(session: psycopg.Connection) -> str:
    """Begin a transaction that can only call functions and operators of pg_catalog; return the previous search path."""
    cursor = session.execute(_BEGIN)
    cursor.nextset()
    ((search_path,),) = cursor.fetchall()
    return str(search_path)


def _require_search_path(search_path: str, own: Sequence[str], role: str, database: str, *, is_pooled: bool) -> None:
    names = names_in(search_path)
    wanted = [settings.BACKFILL_SCHEMA, settings.LEGACY_SCHEMA]
    # pg_catalog comes first unless the search path names it.
    if names[: len(wanted)] == wanted and "pg_catalog" not in names:
        return
    rest = [name for name in own if name not in (*wanted, "$user")]
    why = (
        "A connection through PgBouncer cannot set it"
        if is_pooled
        else "The start-up options of the connection were dropped, as poolers do. Add pgbouncer=true to DATABASE_URL"
    )
    raise OperatorError(
        f"The search path of this connection is {search_path}, so table names would not refer to the tables of the "
        f"backfill and of the schema {settings.LEGACY_SCHEMA}. {why}: set it for the role, once, with "
        f"ALTER ROLE {quoted_name(role)} IN DATABASE {quoted_name(database)} "
        f"SET search_path = {', '.join(map(quoted_name, (*wanted, *rest)))}; and reconnect PgBouncer's server "
        "connections."
    )


def _path(own: Sequence[str]) -> str:
    """Return our search path, followed by the role's own, which a trigger of the application may need.

    pg_temp is last: if it were not named, temporary tables would come first.
    """
    names = dict.fromkeys((settings.BACKFILL_SCHEMA, settings.LEGACY_SCHEMA, *own, "pg_temp"))
    return ", ".join(map(quoted_name, names))


def _require_settings(session: psycopg.Connection, role: str, database: str) -> None:
    if otherwise := _rows(session, _OTHERWISE, list(SETTINGS), list(SETTINGS.values())):
        where = f"ALTER ROLE {quoted_name(role)} IN DATABASE {quoted_name(database)} SET"
        statements = " ".join(f"{where} {name} = {_literal(value)};" for name, value in otherwise)
        raise OperatorError(
            f"This session's {', '.join(name for name, _ in otherwise)} is not what the backfill needs, and a "
            f"connection through PgBouncer cannot set it: set it for the role with {statements} and reconnect "
            "PgBouncer's server connections."
        )


def _require_all_rows(hidden: Sequence[str], role: str) -> None:
    """Refuse row-level security on our own tables: rows that it hides would count as pending or unresolved."""
    if hidden:
        tables = [f"{quoted_name(settings.BACKFILL_SCHEMA)}.{quoted_name(name)}" for name in hidden]
        statements = " ".join(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY;" for table in tables)
        raise OperatorError(
            f"The row-level security of {', '.join(f'{settings.BACKFILL_SCHEMA}.{name}' for name in hidden)} decides "
            f"which rows the role {role} sees and writes, but the backfill needs every row of its own tables. As their "
            f"owner, run {statements} Or, as a superuser, run ALTER ROLE {quoted_name(role)} BYPASSRLS;"
        )


def _require_own_ledger(session: psycopg.Connection) -> None:
    runs = f"{quoted_name(settings.BACKFILL_SCHEMA)}.backfill_run"
    found = _rows(
        session,
        f"SELECT legacy_schema FROM {runs} WHERE legacy_schema <> $1 LIMIT 1",
        settings.LEGACY_SCHEMA,
    )
    if found:
        ((other,),) = found
        if not _rows(session, "SELECT FROM pg_namespace WHERE nspname = $1", settings.LEGACY_SCHEMA):
            raise OperatorError(
                f"There is no schema {settings.LEGACY_SCHEMA}, which DATABASE_URL names (?schema=). The ledger in the "
                f"schema {settings.BACKFILL_SCHEMA} belongs to the schema {other}: name that one."
            )
        renamed = f"UPDATE {runs} SET legacy_schema = {_literal(settings.LEGACY_SCHEMA)};"
        raise OperatorError(
            f"The ledger in the schema {settings.BACKFILL_SCHEMA} belongs to the schema {other}, but DATABASE_URL "
            f"names the schema {settings.LEGACY_SCHEMA}. Name {other} (?schema=), or use another database for the "
            f"tables of {settings.LEGACY_SCHEMA}. If the schema was only renamed, run {renamed}"
        )


def _set(session: psycopg.Connection, wanted: Mapping[str, str]) -> None:
    _rows(session, _SET, list(wanted), list(wanted.values()))


def _rows(session: psycopg.Connection, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.RawCursor(session) as cursor:
        return cursor.execute(query.encode(), parameters).fetchall()


def _literal(value: str) -> str:
    return sql.Literal(value).as_string()
