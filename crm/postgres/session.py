"""What every session with the database must be, whatever its role, its database and a pooler say.

A receiver of Django's `connection_created`, so that no command can forget it. The search path decides which tables a
name means: it has to be our schema and then the examined one. Past a pooler both come from our own start-up options;
that they took effect is looked at, since a pooler may drop them without a word. Behind one they are the role's.

PostgreSQL's own schema is not named in it. So it comes first, and new tables are made in ours. Whether the schemas can
be trusted is asked before anything else, in a transaction in which no other schema has a say: see `crm.postgres.trust`.

Of our own tables a session must see every row, whatever it is about to do: what a policy hides would be missing in
silence.

Settings that change what a text means, or that end our transactions, are set here. Behind a pooler only those can be
that PgBouncer follows from server to server; the others would stay with a server connection that is not ours, so a
session that has them otherwise is refused.
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

#: Settings that PgBouncer keeps with the client. How timestamps and our own string constants are read.
FOLLOWED: Mapping[str, str] = {"DateStyle": "ISO, MDY", "standard_conforming_strings": "on"}
#: The others, where PostgreSQL has them: how values are read, what would break a transaction off, that the values of a
#: statement that failed are not logged, and that a statement is planned for the values that it has.
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
#: A session that is frozen in a transaction holds locks; a batch that reads its page does not take as long. Between two
#: transactions a session may wait for its turn, as --max-rate has it, or for a worker. A pooler has its own sessions.
IDLE = {"idle_in_transaction_session_timeout": "5min", "idle_session_timeout": "0"}
#: Until the limits of a command are set; a database may have one that no look at a session takes less than.
_TO_LOOK = "1min"

# In one round trip: a session may allow itself no time between two of a transaction.
_BEGIN = f"""
BEGIN ISOLATION LEVEL READ COMMITTED; SHOW search_path; SET LOCAL search_path = {SAFE_SEARCH_PATH};
SET LOCAL idle_in_transaction_session_timeout = '{IDLE["idle_in_transaction_session_timeout"]}';
SET LOCAL statement_timeout = '{_TO_LOOK}'
"""
# What the role, the database, or both, say of the search path: the most particular one counts.
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
    """Make a new connection's session what it must be. A receiver of `connection_created`.

    Raises OperatorError, and closes the connection, where it cannot be made so, and where the ledger is that of another
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
    """The schemas that a search path names, as PostgreSQL reads it: quoted ones as they are, others in lower case."""
    found = re.findall(r'"((?:[^"]|"")*)"|([^\s,"]+)', search_path)
    return [quoted.replace('""', '"') or plain.lower() for quoted, plain in found]


def _require_fitting(connection: BaseDatabaseWrapper) -> None:
    is_pooled = bool(connection.settings_dict.get("DISABLE_SERVER_SIDE_CURSORS"))
    # psycopg's own cursor: Django would keep these among the statements of the command.
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
    """Begin a transaction in which only PostgreSQL's own functions and operators are called; the search path before."""
    cursor = session.execute(_BEGIN)
    cursor.nextset()
    ((search_path,),) = cursor.fetchall()
    return str(search_path)


def _require_search_path(search_path: str, own: Sequence[str], role: str, database: str, *, is_pooled: bool) -> None:
    names = names_in(search_path)
    wanted = [settings.BACKFILL_SCHEMA, settings.LEGACY_SCHEMA]
    # PostgreSQL's own schema comes first as long as nobody says where it comes.
    if names[: len(wanted)] == wanted and "pg_catalog" not in names:
        return
    rest = [name for name in own if name not in (*wanted, "$user")]
    why = (
        "A connection through PgBouncer cannot choose it"
        if is_pooled
        else "The start-up options of the connection were dropped on the way, as a pooler does. Add pgbouncer=true to "
        "DATABASE_URL"
    )
    raise OperatorError(
        f"The search path of this connection is {search_path}, so the tables of the backfill and of the schema "
        f"{settings.LEGACY_SCHEMA} would be taken for others. {why}: let the role have it, once, with "
        f"ALTER ROLE {quoted_name(role)} IN DATABASE {quoted_name(database)} "
        f"SET search_path = {', '.join(map(quoted_name, (*wanted, *rest)))}; and reconnect PgBouncer's server "
        "connections."
    )


def _path(own: Sequence[str]) -> str:
    """Our search path, with the role's own after it: a trigger of the application may need that.

    Temporary tables come last. They would come first if they were not named.
    """
    names = dict.fromkeys((settings.BACKFILL_SCHEMA, settings.LEGACY_SCHEMA, *own, "pg_temp"))
    return ", ".join(map(quoted_name, names))


def _require_settings(session: psycopg.Connection, role: str, database: str) -> None:
    if otherwise := _rows(session, _OTHERWISE, list(SETTINGS), list(SETTINGS.values())):
        where = f"ALTER ROLE {quoted_name(role)} IN DATABASE {quoted_name(database)} SET"
        statements = " ".join(f"{where} {name} = {_literal(value)};" for name, value in otherwise)
        raise OperatorError(
            f"This session has another {', '.join(name for name, _ in otherwise)} than the backfill needs, and a "
            f"connection through PgBouncer cannot choose it: let the role have it with {statements} and reconnect "
            "PgBouncer's server connections."
        )


def _require_all_rows(hidden: Sequence[str], role: str) -> None:
    """What a policy hides of our own tables would be taken for not done, or for not decided."""
    if hidden:
        tables = [f"{quoted_name(settings.BACKFILL_SCHEMA)}.{quoted_name(name)}" for name in hidden]
        statements = " ".join(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY;" for table in tables)
        raise OperatorError(
            f"The row-level security of {', '.join(f'{settings.BACKFILL_SCHEMA}.{name}' for name in hidden)} decides "
            f"which rows the role {role} sees and writes, and every row of the backfill's own tables counts. Let their "
            f"owner run {statements} Or let a superuser ALTER ROLE {quoted_name(role)} BYPASSRLS;"
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
                f"schema {settings.BACKFILL_SCHEMA} is that of the schema {other}: name that one."
            )
        renamed = f"UPDATE {runs} SET legacy_schema = {_literal(settings.LEGACY_SCHEMA)};"
        raise OperatorError(
            f"The ledger in the schema {settings.BACKFILL_SCHEMA} is that of the schema {other}, and DATABASE_URL "
            f"names the schema {settings.LEGACY_SCHEMA}: its rows would be taken for those. Name {other} (?schema=) or "
            f"give the tables of {settings.LEGACY_SCHEMA} a database of their own. Where the schema was only renamed, "
            f"{renamed}"
        )


def _set(session: psycopg.Connection, wanted: Mapping[str, str]) -> None:
    _rows(session, _SET, list(wanted), list(wanted.values()))


def _rows(session: psycopg.Connection, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    with psycopg.RawCursor(session) as cursor:
        return cursor.execute(query.encode(), parameters).fetchall()


def _literal(value: str) -> str:
    return sql.Literal(value).as_string()
