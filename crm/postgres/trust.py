"""Nobody but its owner may put functions and operators into a schema of the search path.

PostgreSQL calls the function or operator whose arguments fit best, wherever in the search path it is: one for
`(varchar, text)` or `(text[])` in the application's schema comes before PostgreSQL's own, which take `text` and any
array. It runs with the rights of whoever calls it. So a schema in which others may create is refused, and so is one
that still holds what they have created under a name of PostgreSQL's. The owner of a schema is trusted, with its members
and superusers, where it is somebody who could do as much without it: a superuser, the database's owner, the owner of
`crm_contacts`, whose triggers run with the same rights, a member of these, or the session's own role. Whoever may make
schemas in the database may have made ours before we did.

Temporary objects are no way in: PostgreSQL looks for no function and no operator among them, and tables of ours or of
the application come before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import psycopg

from config.database import quoted_name
from crm.errors import OperatorError

#: What to set before anything is asked: then no other schema has a say.
SAFE_SEARCH_PATH = "pg_catalog, pg_temp"

# pg_has_role() is true of superusers for any role, and of the database's owner for pg_database_owner.
_OTHERS = """
SELECT n.nspname, pg_get_userbyid(n.nspowner), g.rolname, a.grantor <> n.nspowner
  FROM pg_namespace n
 CROSS JOIN LATERAL aclexplode(n.nspacl) a
  LEFT JOIN pg_roles g ON g.oid = a.grantee
 WHERE n.nspname = ANY($1) AND a.privilege_type = 'CREATE'
   AND COALESCE(g.rolname <> current_user AND NOT pg_has_role(g.oid, n.nspowner, 'MEMBER'), true)
 ORDER BY 1, g.rolname NULLS FIRST
"""
_STRANGERS = """
WITH RECURSIVE trusted(role) AS (
  SELECT oid FROM pg_roles WHERE rolname IN ('pg_database_owner', current_user) OR rolsuper
   UNION
  SELECT datdba FROM pg_database WHERE datname = current_database()
   UNION
  SELECT relowner FROM pg_class
   WHERE relname = 'crm_contacts' AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = $2)
   UNION
  SELECT member FROM trusted JOIN pg_auth_members ON roleid = role
)
SELECT nspname, pg_get_userbyid(nspowner) FROM pg_namespace
 WHERE nspname = ANY($1) AND nspowner NOT IN (SELECT role FROM trusted)
 ORDER BY 1
"""
_PLANTED = """
SELECT kind, format('%I.', n.nspname) || name, pg_get_userbyid(owner)
  FROM (SELECT 'ROUTINE' AS kind, pronamespace AS namespace, proowner AS owner,
               format('%I(%s)', proname, pg_get_function_identity_arguments(p.oid)) AS name
          FROM pg_proc p
         WHERE EXISTS (SELECT FROM pg_proc own
                        WHERE own.proname = p.proname AND own.pronamespace = 'pg_catalog'::regnamespace)
         UNION ALL
        SELECT 'OPERATOR', oprnamespace, oprowner,
               format('%s (%s, %s)', oprname, COALESCE(format_type(NULLIF(oprleft, 0), NULL), 'NONE'),
                      format_type(oprright, NULL))
          FROM pg_operator p
         WHERE EXISTS (SELECT FROM pg_operator own
                        WHERE own.oprname = p.oprname AND own.oprnamespace = 'pg_catalog'::regnamespace)
       ) planted
  JOIN pg_namespace n ON n.oid = namespace
 WHERE n.nspname = ANY($1) AND pg_get_userbyid(owner) <> current_user
   AND NOT pg_has_role(owner, n.nspowner, 'MEMBER')
 ORDER BY 1 DESC, 2
"""
_NAMED = 10


class UntrustedSchemaError(OperatorError):
    """Others than its owner may create in a schema of the search path, or have."""


def require_trusted(session: psycopg.Connection, schemas: Sequence[str], legacy_schema: str) -> None:
    """Raise UntrustedSchemaError where others could have their code called, with the statements that mend it.

    In a session whose search path is SAFE_SEARCH_PATH. Schemas that are not there are passed over. `legacy_schema` is
    the one of the application's tables.
    """
    with psycopg.RawCursor(session) as cursor:
        if strangers := cursor.execute(_STRANGERS.encode(), [list(schemas), legacy_schema]).fetchall():
            raise UntrustedSchemaError(_told_of_strangers(strangers))
        others = cursor.execute(_OTHERS.encode(), [list(schemas)]).fetchall()
        planted = [] if others else cursor.execute(_PLANTED.encode(), [list(schemas)]).fetchall()
    if others:
        raise UntrustedSchemaError(_told_of_others(others))
    if planted:
        raise UntrustedSchemaError(_told_of_planted(planted))


def _told_of_strangers(found: Sequence[tuple[Any, ...]]) -> str:
    whose = ", ".join(f"{schema} belongs to {owner}" for schema, owner in found)
    statements = " ".join(f"ALTER SCHEMA {quoted_name(schema)} OWNER TO ...;" for schema, _ in found)
    return (
        "The search path holds a schema of somebody who owns neither the database nor crm_contacts, and is no member "
        f"of their owners: {whose}. A function or operator in it would be called in the place of PostgreSQL's own, "
        "with the rights of this role. Have a look at what is in it. Then let a superuser give it to the database's "
        f"owner with {statements} or drop it; one that only the role's own search_path names can be left out there. "
        "Nothing was written."
    )


def _told_of_others(found: Sequence[tuple[Any, ...]]) -> str:
    by_schema: dict[tuple[str, str], list[tuple[str | None, bool]]] = {}
    for schema, owner, role, is_granted_on in found:
        by_schema.setdefault((schema, owner), []).append((role, is_granted_on))
    whose, statements = [], []
    for (schema, owner), grants in by_schema.items():
        roles = list(dict.fromkeys(role for role, _ in grants))
        whose.append(f"{schema} of {owner} ({', '.join(role or 'PUBLIC, which is everyone' for role in roles)})")
        cascade = " CASCADE" if any(is_granted_on for _, is_granted_on in grants) else ""
        statements.append(
            f"REVOKE CREATE ON SCHEMA {quoted_name(schema)} "
            f"FROM {', '.join(quoted_name(role) if role else 'PUBLIC' for role in roles)}{cascade};"
        )
    first = next(iter(by_schema))[0]
    return (
        f"Others than the owner may create in the schema {', '.join(whose)}: a function or operator that they put "
        "there would be called in the place of PostgreSQL's own, with the rights of this role. Let the owner or a "
        f"superuser run {' '.join(statements)} A role that the application's own migrations run under is to own the "
        f"schema, or to be a member of its owner: ALTER SCHEMA {quoted_name(first)} OWNER TO that role. (PostgreSQL 14 "
        "and older let everyone create in the schema public, and a database that was upgraded from there still does.) "
        "Nothing was written."
    )


def _told_of_planted(found: Sequence[tuple[Any, ...]]) -> str:
    named = ", ".join(f"{name} of {owner}" for _, name, owner in found[:_NAMED])
    statements = " ".join(f"DROP {kind} {name};" for kind, name, _ in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return (
        f"The search path holds {named}{more}, which would be called in the place of PostgreSQL's own, with the rights "
        "of this role; and whom it belongs to is neither the owner of the schema nor a superuser. Have a look at it. "
        f"Then let a superuser run {statements} or, where it is to stay, ALTER ... OWNER TO the owner of the schema. "
        "Nothing was written."
    )
