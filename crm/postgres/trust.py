"""Only roles that are trusted have code called by our statements, which runs with the rights of whoever calls it.

Trusted are those who could do as much without it: superusers, the database's owner, the owner of `crm_contacts`, whose
triggers run with the same rights, the members of these, and the session's own role.

PostgreSQL calls the function or operator whose arguments fit best, wherever in the search path it is: one for
`(varchar, text)` or `(text[])` in the application's schema comes before PostgreSQL's own, which take `text` and any
array. So a schema in which others may create is refused, and so is one that still holds what they have created under a
name of PostgreSQL's. The owner of a schema is trusted, with its members and superusers, where it is a trusted role.
Whoever may make schemas in the database may have made ours before we did.

Other code is called whatever the search path says, and belongs to a table, a foreign key or a type:

- The functions of a view, and those in the indexes of a table, which the planner calls as soon as they have only
  constants as arguments. So every table that is read or written must belong to a trusted role: with a table come its
  partitions and other children, and with a view all that it reads.
- A rollback reads the table of a foreign key. Where the key says CASCADE, SET NULL or SET DEFAULT, its triggers run
  at the end of our statement or transaction, up to PostgreSQL 17 as our role. So the table must belong to a trusted
  role as well, and counts as one that is written.
- The functions of triggers and of their conditions, which whoever has TRIGGER on a table can put there. Also that of a
  trigger that is SECURITY DEFINER: what it sets by set_config() or SET CONSTRAINTS outlasts it, such as a search path.
- The casts and the CHECK constraints of a type, both made by its owner. A cast stays with its function when the type
  gets another owner, and so do the functions of indexes, constraints, defaults and views when the table gets one.

Where a row-level policy holds for the session's role, no run begins.

What a trigger or a foreign key takes may be granted, so either may come while a run goes on. Each transaction that
writes asks for these again, once its tables are locked against both: see `crm.postgres.transactions`. It asks, but
locks nothing, where the role has no right to lock: for a table that it may only read and that a foreign key writes when
a contact is deleted, such as crm_interactions, and for a partition of a table into which it may only insert. There, a
trigger that comes after the answer may be called until the transaction ends.

Temporary objects are no way in: PostgreSQL looks for no function and no operator among them, and tables of ours or of
the application come before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import psycopg
from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper
from psycopg import sql

from config.database import quoted_name
from crm import try_execute
from crm.errors import MAX_NAMED, OperatorError, listed

#: What to set before anything is asked: then no other schema has a say.
SAFE_SEARCH_PATH = "pg_catalog, pg_temp"

_APPLICATION = (
    *("users", "profiles", "leads", "tax_intake_leads", "client_preparers"),
    *("crm_contacts", "crm_stage_history", "crm_interactions"),
)
#: The tables of the application that are written.
_WRITTEN = ("crm_contacts", "crm_stage_history")

# pg_has_role() is true of superusers for any role, and of the database's owner for pg_database_owner. An array belongs
# to whom its elements belong to.
#
# `written` are the tables that a statement of ours may come to write. The planner expects millions of rows, and would
# have its plan for some dozens compiled.
_ROLES_AND_WRITTEN = """
SET LOCAL jit = off;
WITH RECURSIVE trusted(role) AS (
  SELECT oid FROM pg_roles WHERE rolname IN ('pg_database_owner', current_user) OR rolsuper
   UNION
  SELECT datdba FROM pg_database WHERE datname = current_database()
   UNION
  SELECT relowner FROM pg_class
   WHERE relname = 'crm_contacts' AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = {legacy_schema})
   UNION
  -- Since PostgreSQL 16 a membership may allow nothing.
  SELECT member FROM trusted JOIN pg_auth_members m ON roleid = role,
         LATERAL (VALUES (to_jsonb(m))) AS granted(options)
   WHERE admin_option OR COALESCE((options ->> 'inherit_option')::boolean, true)
         OR COALESCE((options ->> 'set_option')::boolean, true)
), untrusted(role) AS (
  SELECT oid FROM pg_roles WHERE oid NOT IN (SELECT role FROM trusted)
), written(oid) AS (
  {first}
   UNION
  SELECT next.oid FROM written CROSS JOIN LATERAL (
    -- Partitions and other children, which are written with their parent.
    SELECT inhrelid FROM pg_inherits WHERE inhparent = written.oid
     UNION ALL
    -- What is under a view. A materialized one is only read.
    SELECT refobjid FROM pg_rewrite w JOIN pg_class c ON c.oid = ev_class AND relkind <> 'm'
      JOIN pg_depend ON classid = 'pg_rewrite'::regclass AND objid = w.oid AND refclassid = 'pg_class'::regclass
     WHERE ev_class = written.oid
     UNION ALL
    -- What a foreign key may write. No index finds it by the table that it refers to, but its triggers' does.
    SELECT conrelid FROM pg_trigger JOIN pg_constraint k ON k.oid = tgconstraint AND confrelid = tgrelid
     WHERE tgrelid = written.oid AND ARRAY[confupdtype, confdeltype] && ARRAY['c', 'n', 'd']::"char"[]
    ) AS next(oid)
)"""
# What takes no more than a right that may be granted. An identity has the schema whatever the search path.
_ADDED = """
SELECT 'called', format('the foreign key %I of %s', conname, identity), NULL, pg_get_userbyid(relowner)::text,
       format('ALTER TABLE %1$s DROP CONSTRAINT %2$I; or ALTER TABLE %1$s OWNER TO ...;', identity, conname)
  FROM pg_constraint JOIN pg_class c ON c.oid = conrelid, pg_identify_object('pg_class'::regclass, conrelid, 0)
 WHERE contype = 'f' AND conparentid = 0 AND confrelid = ANY (ARRAY(SELECT oid FROM written))
   AND relowner IN (SELECT role FROM untrusted)
 UNION ALL
-- Its own, and those of its condition.
SELECT DISTINCT 'called', format('the function %s in the trigger %I of %s', function, tgname, identity), NULL,
       pg_get_userbyid(proowner)::text,
       format('DROP TRIGGER %I ON %s; or ALTER FUNCTION %s OWNER TO ...;', tgname, identity, function)
  FROM pg_trigger t JOIN pg_depend ON classid = 'pg_trigger'::regclass AND objid = t.oid
  JOIN pg_proc p ON refclassid = 'pg_proc'::regclass AND p.oid = refobjid,
       pg_identify_object('pg_class'::regclass, tgrelid, 0), CAST(p.oid::regprocedure AS text) AS function
 WHERE tgrelid = ANY (ARRAY(SELECT oid FROM written)) AND NOT tgisinternal AND tgenabled <> 'D'
   AND proowner IN (SELECT role FROM untrusted)
"""
# Most of the time that this takes is that of the planner.
_OF_TRANSACTION = f"{_ROLES_AND_WRITTEN}{_ADDED} ORDER BY 2"
_NAMED_TABLES = "SELECT named.oid::oid FROM unnest({written}::regclass[]) AS named(oid)"
_WRITTEN_TABLES = """SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
   WHERE nspname = {legacy_schema} AND relname = ANY({written})
         OR nspname = {own_schema} AND relkind IN ('r', 'p', 'v', 'm', 'f')"""
# In one round trip: every connection asks.
#
# `tables` are those that a statement of ours may come to, `parts` what belongs to them, and `needs` the types,
# operators and functions that those depend on, with what these depend on. PostgreSQL's own depend on nothing.
_OF_CONNECTION = (
    _ROLES_AND_WRITTEN
    + """, tables(oid) AS (
  SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
   WHERE relkind IN ('r', 'p', 'v', 'm', 'f')
     AND (nspname = {legacy_schema} AND relname = ANY({application}) OR nspname = {own_schema})
   UNION
  -- What refers to a table that is written: a rollback reads it.
  SELECT conrelid FROM pg_constraint WHERE contype = 'f' AND confrelid = ANY (ARRAY(SELECT oid FROM written))
   UNION
  SELECT next.oid FROM tables CROSS JOIN LATERAL (
    SELECT inhrelid FROM pg_inherits WHERE inhparent = tables.oid
     UNION ALL
    SELECT refobjid FROM pg_rewrite w JOIN pg_class c ON c.oid = ev_class AND relkind <> 'm'
      JOIN pg_depend ON classid = 'pg_rewrite'::regclass AND objid = w.oid AND refclassid = 'pg_class'::regclass
     WHERE ev_class = tables.oid
    ) AS next(oid)
), parts(class, oid) AS (
  SELECT 'pg_class'::regclass, oid FROM tables
   UNION ALL
  SELECT 'pg_class'::regclass, indexrelid FROM pg_index WHERE indrelid = ANY (ARRAY(SELECT oid FROM tables))
   UNION ALL
  SELECT 'pg_rewrite'::regclass, w.oid FROM pg_rewrite w JOIN pg_class c ON c.oid = ev_class AND relkind <> 'm'
   WHERE ev_class = ANY (ARRAY(SELECT oid FROM tables))
   UNION ALL
  SELECT 'pg_constraint'::regclass, oid FROM pg_constraint
   WHERE conrelid = ANY (ARRAY(SELECT oid FROM tables)) AND contype <> 'f'
   UNION ALL
  SELECT 'pg_attrdef'::regclass, oid FROM pg_attrdef WHERE adrelid = ANY (ARRAY(SELECT oid FROM written))
   UNION ALL
  SELECT 'pg_trigger'::regclass, oid FROM pg_trigger
   WHERE tgrelid = ANY (ARRAY(SELECT oid FROM written)) AND NOT tgisinternal AND tgenabled <> 'D'
), needs(class, oid) AS (
  SELECT refclassid, refobjid FROM parts JOIN pg_depend ON classid = class AND objid = oid
   WHERE refclassid IN ('pg_type'::regclass, 'pg_operator'::regclass)
      OR refclassid = 'pg_proc'::regclass AND class <> 'pg_trigger'::regclass
   UNION
  SELECT refclassid, refobjid FROM needs CROSS JOIN LATERAL (
    SELECT refclassid, refobjid FROM pg_depend WHERE classid = class AND objid = oid
     UNION ALL
    -- The constraints of a domain.
    SELECT theirs.refclassid, theirs.refobjid FROM pg_depend own JOIN pg_depend theirs USING (classid, objid)
     WHERE own.refclassid = class AND own.refobjid = oid AND own.deptype = 'a'
       AND class = 'pg_type'::regclass AND classid = 'pg_constraint'::regclass
    ) AS next
   WHERE refclassid IN ('pg_type'::regclass, 'pg_operator'::regclass, 'pg_proc'::regclass)
), own_types AS (
  SELECT t.oid, typowner, format('%I.%I', nspname, typname) AS name
    FROM pg_type t JOIN pg_namespace n ON n.oid = typnamespace
   WHERE t.oid = ANY (ARRAY(SELECT oid FROM needs WHERE class = 'pg_type'::regclass))
     AND nspname <> 'pg_catalog' AND NOT (typcategory = 'A' AND typelem <> 0)
), in_use(oid, schema, owner_of_schema) AS (
  SELECT oid, nspname, nspowner FROM pg_namespace WHERE nspname = ANY({schemas}) OR nspname = {own_schema}
), made(kind, schema, owner_of_schema, name, owner, has_name_of_postgresql, is_needed) AS (
  SELECT 'ROUTINE', schema, owner_of_schema,
         format('%I.%I(%s)', schema, proname, pg_get_function_identity_arguments(p.oid)), proowner,
         EXISTS (SELECT FROM pg_proc own
                  WHERE own.proname = p.proname AND own.pronamespace = 'pg_catalog'::regnamespace),
         format('%I.%I(%s)', schema, proname, oidvectortypes(proargtypes)) = {function}
    FROM pg_proc p JOIN in_use ON in_use.oid = pronamespace
   UNION ALL
  SELECT 'OPERATOR', schema, owner_of_schema,
         format('%I.%s (%s, %s)', schema, oprname, COALESCE(format_type(NULLIF(oprleft, 0), NULL), 'NONE'),
                format_type(oprright, NULL)), oprowner,
         EXISTS (SELECT FROM pg_operator own
                  WHERE own.oprname = p.oprname AND own.oprnamespace = 'pg_catalog'::regnamespace),
         false
    FROM pg_operator p JOIN in_use ON in_use.oid = oprnamespace
)
SELECT 'stranger', nspname::text, NULL::text, pg_get_userbyid(nspowner)::text, NULL::text FROM pg_namespace
 WHERE nspname = ANY({schemas}) AND nspowner NOT IN (SELECT role FROM trusted)
 UNION ALL
SELECT 'grant', n.nspname::text, g.rolname::text, pg_get_userbyid(n.nspowner),
       CASE WHEN a.grantor <> n.nspowner THEN ' CASCADE' ELSE '' END
  FROM pg_namespace n
 CROSS JOIN LATERAL aclexplode(n.nspacl) a
  LEFT JOIN pg_roles g ON g.oid = a.grantee
 WHERE n.nspname = ANY({schemas}) AND a.privilege_type = 'CREATE'
   AND COALESCE(g.rolname <> current_user AND NOT pg_has_role(g.oid, n.nspowner, 'MEMBER'), true)
 UNION ALL
SELECT 'planted', kind, name, pg_get_userbyid(owner), format('DROP %s %s;', kind, name) FROM made
 WHERE schema = ANY({schemas}) AND has_name_of_postgresql AND pg_get_userbyid(owner) <> current_user
   AND NOT pg_has_role(owner, owner_of_schema, 'MEMBER')
 UNION ALL
-- In our own schema no name is PostgreSQL's: ours are called there, and another one of the same name may fit better.
-- Without its function a run cannot be: `migrate` makes it once.
SELECT 'ours', kind, name, pg_get_userbyid(owner),
       CASE WHEN is_needed THEN format('ALTER FUNCTION %s OWNER TO ...;', {function})
            ELSE format('DROP %s %s;', kind, name) END
  FROM made WHERE schema = {own_schema} AND owner IN (SELECT role FROM untrusted)
 UNION ALL
SELECT 'called', name, NULL, pg_get_userbyid(relowner), format('ALTER TABLE %s OWNER TO ...;', name)
  FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace,
       format('%I.%I', nspname, relname) AS name
 WHERE c.oid = ANY (ARRAY(SELECT oid FROM tables)) AND relkind IN ('r', 'p', 'v', 'm', 'f')
   AND relowner IN (SELECT role FROM untrusted)
   -- The others are named with their foreign keys.
   AND (nspname = {legacy_schema} AND relname = ANY({application}) OR nspname = {own_schema}
        OR NOT EXISTS (SELECT FROM pg_constraint
                        WHERE conrelid = c.oid AND contype = 'f' AND conparentid = 0
                          AND confrelid = ANY (ARRAY(SELECT oid FROM written))))
 UNION ALL
"""
    + _ADDED
    + """
 UNION ALL
SELECT 'called', format('the function %s, on which the application''s tables depend,', function), NULL,
       pg_get_userbyid(proowner), format('ALTER FUNCTION %s OWNER TO ...;', function)
  FROM pg_proc p, LATERAL (VALUES (p.oid::regprocedure::text)) AS names(function)
 WHERE p.oid = ANY (ARRAY(SELECT oid FROM needs WHERE class = 'pg_proc'::regclass))
   AND proowner IN (SELECT role FROM untrusted)
 UNION ALL
SELECT 'called', format('the type %s', name), NULL, pg_get_userbyid(typowner),
       format('ALTER TYPE %s OWNER TO ...;', name)
  FROM own_types WHERE typowner IN (SELECT role FROM untrusted)
 UNION ALL
-- The cast of a type that is refused itself is not reported.
SELECT 'called', format('the function of the cast (%s AS %s)', f.name, t.name), NULL, pg_get_userbyid(proowner),
       format('DROP CAST (%s AS %s);', f.name, t.name)
  FROM pg_cast JOIN pg_proc p ON p.oid = castfunc
  JOIN pg_type source ON source.oid = castsource JOIN pg_type target ON target.oid = casttarget,
       format_type(castsource, NULL) AS f(name), format_type(casttarget, NULL) AS t(name)
 WHERE (castsource IN (SELECT oid FROM own_types) OR casttarget IN (SELECT oid FROM own_types))
   AND proowner IN (SELECT role FROM untrusted) AND pronamespace <> 'pg_catalog'::regnamespace
   AND source.typowner NOT IN (SELECT role FROM untrusted) AND target.typowner NOT IN (SELECT role FROM untrusted)
 ORDER BY 1, 2, 3 NULLS FIRST
"""
)
_TRUSTED = "Trusted are superusers, the owners of the database and of crm_contacts, and the members of these."


class UntrustedCodeError(OperatorError):
    """Our statements would call code of a role that is not trusted."""


def require_still_trusted(connection: BaseDatabaseWrapper, *tables: str) -> None:
    """Raise UntrustedCodeError if an untrusted role has added a trigger or foreign key to the tables.

    Everything else takes the ownership of a table, type or schema, which the connection has refused. Without a lock, a
    role can add one after this: see `crm.postgres.transactions`.
    """
    connection.ensure_connection()
    with connection.wrap_database_errors:
        cursor = connection.connection.execute(query_of_added(*tables), prepare=False)
        cursor.nextset()
        require_none(cursor.fetchall())


@cache
def query_of_added(*tables: str) -> str:
    """Return the statements that find triggers and foreign keys of untrusted roles on tables; see `require_none`.

    The tables are named as in the search path.
    """
    return _composed(_OF_TRANSACTION, _NAMED_TABLES, settings.LEGACY_SCHEMA, tables)


def require_none(found: Iterable[tuple[Any, ...]]) -> None:
    """Raise UntrustedCodeError if a query of this module has found any."""
    by_kind: dict[str, list[tuple[Any, ...]]] = {}
    for kind, *row in found:
        by_kind.setdefault(kind, []).append(tuple(row))
    for kind, message in _MESSAGES.items():
        if kind in by_kind:
            raise UntrustedCodeError(f"{message(by_kind[kind])} Nothing is written from here on.")


def require_trusted(session: psycopg.Connection, schemas: Sequence[str], legacy_schema: str) -> None:
    """Raise UntrustedCodeError where others could have their code called, with the statements that mend it.

    Of `schemas`, those of the search path, those that are not there are passed over. `legacy_schema` is the one of the
    application's tables. For the schemas to be looked at safely, the search path has to be SAFE_SEARCH_PATH. The
    transaction's statements are not compiled (`jit`) afterwards.
    """
    cursor = session.execute(
        _composed(_OF_CONNECTION, _WRITTEN_TABLES, legacy_schema, _WRITTEN, schemas), prepare=False
    )
    cursor.nextset()
    require_none(cursor.fetchall())


def _composed(query: str, first: str, legacy_schema: str, written: Sequence[str], schemas: Sequence[str] = ()) -> str:
    return (
        sql.SQL(query.replace("{first}", first))
        .format(
            schemas=list(schemas),
            legacy_schema=legacy_schema,
            own_schema=settings.BACKFILL_SCHEMA,
            application=list(_APPLICATION),
            written=list(written),
            function=try_execute.SIGNATURE,
        )
        .as_string()
    )


def _strangers(found: Sequence[tuple[Any, ...]]) -> str:
    owners = ", ".join(f"{schema} belongs to {owner}" for schema, _, owner, _ in found)
    statements = " ".join(f"ALTER SCHEMA {quoted_name(schema)} OWNER TO ...;" for schema, *_ in found)
    return (
        f"The search path contains a schema of an untrusted role: {owners}. A function or operator in it would be "
        f"called instead of PostgreSQL's own, with the rights of this role. {_TRUSTED} Inspect its contents. Then, as "
        f"a superuser, run {statements} with the database's owner, or drop it. If only the role's own search_path "
        "names it, remove it there."
    )


def _grants(found: Sequence[tuple[Any, ...]]) -> str:
    by_schema: dict[tuple[str, str], list[tuple[str | None, str]]] = {}
    for schema, role, owner, cascade in found:
        by_schema.setdefault((schema, owner), []).append((role, cascade))
    schemas, statements = [], []
    for (schema, owner), grants in by_schema.items():
        roles = list(dict.fromkeys(role for role, _ in grants))
        schemas.append(f"{schema} of {owner} ({', '.join(role or 'PUBLIC, which is every role' for role in roles)})")
        cascade = max(cascade for _, cascade in grants)
        statements.append(
            f"REVOKE CREATE ON SCHEMA {quoted_name(schema)} "
            f"FROM {', '.join(quoted_name(role) if role else 'PUBLIC' for role in roles)}{cascade};"
        )
    first = next(iter(by_schema))[0]
    return (
        f"Roles other than the owner may create objects in the schema {', '.join(schemas)}: their functions and "
        "operators would be called instead of PostgreSQL's own, with the rights of this role. As the owner or a "
        f"superuser, run {' '.join(statements)} If the application's own migrations run as such a role, make it the "
        f"owner of the schema or a member of its owner: ALTER SCHEMA {quoted_name(first)} OWNER TO that role. "
        "(PostgreSQL 14 and older let every role create objects in the schema public, and a database that was upgraded "
        "from there still does.)"
    )


def _planted(found: Sequence[tuple[Any, ...]]) -> str:
    return (
        f"The search path contains {_named(found)}, which would be called instead of PostgreSQL's own, with the rights "
        "of this role. The owner is neither that of the schema nor a superuser. Inspect the code. Then, as a "
        f"superuser, run {_statements(found)} or, to keep it, ALTER ... OWNER TO the owner of the schema."
    )


def _ours(found: Sequence[tuple[Any, ...]]) -> str:
    return (
        f"The schema {settings.BACKFILL_SCHEMA} contains {_named(found)}, which could be called instead of the "
        f"backfill's own, with the rights of this role. The owner is not trusted. {_TRUSTED} Inspect the code. Then, "
        f"as a superuser, run {_statements(found)} or, to keep it, ALTER ... OWNER TO the owner of the schema."
    )


def _called(found: Sequence[tuple[Any, ...]]) -> str:
    return (
        f"The backfill would call code of an untrusted role, with the rights of this role, through {_named(found)}. "
        f"{_TRUSTED} Inspect the code. Then, as its owner or a superuser, run {_statements(found)}"
    )


def _named(found: Sequence[tuple[Any, ...]]) -> str:
    return listed([f"{name or what} of {owner}" for what, name, owner, _ in found])


def _statements(found: Sequence[tuple[Any, ...]]) -> str:
    return " ".join(dict.fromkeys(statement for *_, statement in found[:MAX_NAMED]))


_MESSAGES: Mapping[str, Callable[[Sequence[tuple[Any, ...]]], str]] = {
    "stranger": _strangers,
    "grant": _grants,
    "planted": _planted,
    "ours": _ours,
    "called": _called,
}
