"""`python manage.py check --database default`: missing and unneeded rights of the role, and unmet requirements.

The needed rights are those that `docs/least_privilege.sql` grants. Rights are checked only after `migrate`, in a
database with the application's tables. Any other reason for which a run would be refused is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register  # noqa: A004 - Django's name
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from config.database import quoted_name
from crm import try_execute
from crm.errors import OperatorError, listed
from crm.postgres.errors import as_operator_error
from crm.postgres.facts.columns import OPTIONAL_TABLES, REQUIRED_COLUMNS
from crm.postgres.facts.requirements import CONTACTS, HISTORY
from crm.postgres.facts.rights import OUR_TABLES, RIGHTS, Right
from crm.postgres.facts.schema import examine, find_misfits

#: Columns that no query of the backfill reads.
SECRET_COLUMNS = ("ssn", "dateOfBirth", "address", "bankDetails", "hashedPassword")
#: The secret columns of an intake.
SECRETS_OF_INTAKES = (
    *("full_form_data", "address_line_1", "address_line_2", "city", "state", "zip_code"),
    *("contactNotes", "unqualifiedNotes"),
)
READ_ONLY_TABLES = ("users", "profiles", "leads", "tax_intake_leads", "client_preparers")
#: Attributes that an ordinary role does not have, in the order of the queries.
ATTRIBUTES = ("SUPERUSER", "CREATEROLE", "CREATEDB", "REPLICATION", "BYPASSRLS")
#: Predefined roles that may only read the server's statistics, for --max-replica-lag, and pg_database_owner, of which
#: the owner of the database is implicitly a member.
HARMLESS_ROLES = (
    "pg_database_owner", "pg_monitor", "pg_read_all_settings", "pg_read_all_stats", "pg_stat_scan_tables",
)  # fmt: skip
#: The tag of the check for rights that the backfill does not need. The role that runs `migrate` needs them.
EXCESS = "excess_rights"
#: The tag of the check for other refusals of a run, for which `migrate` may be the remedy.
RUN = "run"
#: The tags of the checks that `migrate` skips.
NOT_FOR_MIGRATE = (EXCESS, RUN)
#: The hint for a role that the server or the application needs.
KEEP = "Do not change this role: docs/least_privilege.sql creates another one that has only the needed rights."
SCRIPT = "docs/least_privilege.sql creates a role that has only the needed rights."


class ColumnRight(NamedTuple):
    """A privilege on a column of a table."""

    schema: str
    table: str
    column: str
    privilege: str


class _Rights:
    """The rights of a connection's role."""

    def __init__(self, connection: BaseDatabaseWrapper) -> None:
        self._connection = connection
        ((self.role, self.logged_in),) = self.ask("SELECT current_user, session_user")

    def ask(self, query: str, parameters: Sequence[Any] | Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(query, parameters)
            return list(cursor.fetchall())

    def tables(self, schema: str) -> set[str]:
        query = """
            SELECT relname FROM pg_class JOIN pg_namespace n ON n.oid = relnamespace
             WHERE nspname = %s AND relkind IN ('r', 'p')
        """
        return {name for (name,) in self.ask(query, [schema])}

    def on_columns(self, schema: str, tables: Iterable[str], privileges: Sequence[str]) -> dict[ColumnRight, bool]:
        """Return, for every column and xmin, whether the role has the privilege."""
        query = """
            SELECT nspname, relname, attname, privilege, has_column_privilege(c.oid, attnum, privilege)
              FROM pg_attribute
              JOIN pg_class c ON c.oid = attrelid
              JOIN pg_namespace n ON n.oid = relnamespace
             CROSS JOIN unnest(%s::text[]) AS privilege
             WHERE nspname = %s AND relname = ANY(%s) AND NOT attisdropped AND (attnum > 0 OR attname = 'xmin')
             ORDER BY relname, attnum, privilege
        """
        rows = self.ask(query, [list(privileges), schema, list(tables)])
        return {ColumnRight(*right): granted for *right, granted in rows}


@register(Tags.database)
def check_rights(databases: Sequence[str] | None = None, **_options: Any) -> list[CheckMessage]:
    """Report missing rights, with the GRANT, for each of the databases."""
    return _of_roles(databases, _lacking)


@register(EXCESS)
def check_excess(databases: Sequence[str] | None = None, **_options: Any) -> list[CheckMessage]:
    """Report rights that the backfill does not need, for each of the databases."""
    return _of_roles(databases, _excessive)


def _of_roles(
    databases: Sequence[str] | None, find: Callable[[BaseDatabaseWrapper, _Rights], list[CheckMessage]]
) -> list[CheckMessage]:
    messages: list[CheckMessage] = []
    with _as_operator_error():
        for alias in databases or ():
            connection = connections[alias]
            if connection.vendor == "postgresql":
                rights = _Rights(connection)
                if _is_migrated(rights):
                    messages += find(connection, rights)
    return messages


def _as_operator_error() -> AbstractContextManager[None]:
    return as_operator_error("Database error during the check: {}. Run the command again.")


def _is_migrated(rights: _Rights) -> bool:
    return rights.tables(settings.LEGACY_SCHEMA) >= REQUIRED_COLUMNS.keys() - OPTIONAL_TABLES and rights.tables(
        settings.BACKFILL_SCHEMA
    ) >= set(OUR_TABLES)


def _lacking(_connection: BaseDatabaseWrapper, rights: _Rights) -> list[CheckMessage]:
    return [*_missing_schemas(rights), *_missing(rights), *_missing_function(rights), *_hidden_rows(rights)]


def _excessive(connection: BaseDatabaseWrapper, rights: _Rights) -> list[CheckMessage]:
    # The embedded server has sample data and only one role.
    if connection.settings_dict["ENGINE"] == "config.embedded_backend":
        return []
    messages = _too_much(rights, rights.role)
    if rights.logged_in != rights.role:
        # Any code in the session can return to the role that logged in.
        with transaction.atomic(using=connection.alias):
            rights.ask("SELECT set_config('role', 'none', true)")
            messages += _too_much(_Rights(connection), f"{rights.logged_in} (after RESET ROLE)")
    return [*messages, *_triggers_of_others(rights), *_references_of_others(rights)]


@register(Tags.database)
def check_fit(databases: Sequence[str] | None = None, **_options: Any) -> list[CheckMessage]:
    """Report requirements that a database does not meet, for each of the databases."""
    with _as_operator_error():
        return [
            Error(misfit.problem, hint=misfit.way_out, id="crm.E004")
            for alias in databases or ()
            if connections[alias].vendor == "postgresql"
            for misfit in find_misfits(connections[alias])
        ]


@register(RUN)
def check_run(databases: Sequence[str] | None = None, **_options: Any) -> list[CheckMessage]:
    """Report other reasons for which a run would be refused, such as a table or column that `migrate` creates."""
    messages: list[CheckMessage] = []
    with _as_operator_error():
        for alias in databases or ():
            # `examine` reports only its first finding, so the complete lists of the other checks come first.
            if connections[alias].vendor != "postgresql" or check_rights([alias]) or check_fit([alias]):
                continue
            try:
                examine(connections[alias], for_writing=True, for_inserting=True)
            except OperatorError as error:
                messages.append(Error(str(error), id="crm.E005"))
    return messages


def _missing_schemas(rights: _Rights) -> list[CheckMessage]:
    query = """
        SELECT nspname FROM pg_namespace WHERE nspname = ANY(%s) AND NOT has_schema_privilege(oid, 'USAGE') ORDER BY 1
    """
    return [
        Error(
            f"The role {rights.role} may not use the schema {schema}.",
            hint=f"GRANT USAGE ON SCHEMA {quoted_name(schema)} TO {quoted_name(rights.role)};",
            id="crm.E001",
        )
        for (schema,) in rights.ask(query, [[settings.LEGACY_SCHEMA, settings.BACKFILL_SCHEMA]])
    ]


def _missing(rights: _Rights) -> list[CheckMessage]:
    by_grant: dict[tuple[str, str, str], list[str]] = {}
    for right, granted in (_on_application(rights) | _on_own(rights)).items():
        if not granted and _is_needed(right):
            by_grant.setdefault((right.schema, right.table, right.privilege), []).append(right.column)
    messages: list[CheckMessage] = []
    for (schema, table, privilege), columns in by_grant.items():
        is_own = schema == settings.BACKFILL_SCHEMA
        what = table if is_own else ", ".join(f"{table}.{column}" for column in columns)
        of_columns = "" if is_own else f" ({', '.join(map(quoted_name, columns))})"
        where = f"{quoted_name(schema)}.{quoted_name(table)}"
        messages.append(
            Error(
                f"The role {rights.role} may not {privilege} {what}.",
                hint=f"GRANT {privilege}{of_columns} ON {where} TO {quoted_name(rights.role)};",
                id="crm.E002",
            )
        )
    return messages


def _missing_function(rights: _Rights) -> list[CheckMessage]:
    query = """
        SELECT FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
         WHERE nspname = %s AND proname = %s AND NOT has_function_privilege(p.oid, 'EXECUTE')
    """
    if not rights.ask(query, [settings.BACKFILL_SCHEMA, try_execute.FUNCTION]):
        return []
    return [
        Error(
            f"The role {rights.role} may not EXECUTE {try_execute.FUNCTION}.",
            hint=f"GRANT EXECUTE ON FUNCTION {try_execute.SIGNATURE} TO {quoted_name(rights.role)};",
            id="crm.E002",
        )
    ]


def _on_application(rights: _Rights) -> dict[ColumnRight, bool]:
    return rights.on_columns(settings.LEGACY_SCHEMA, REQUIRED_COLUMNS, ("SELECT", "INSERT", "UPDATE"))


def _on_own(rights: _Rights) -> dict[ColumnRight, bool]:
    return rights.on_columns(settings.BACKFILL_SCHEMA, OUR_TABLES, ("SELECT", "INSERT", "UPDATE"))


def _is_needed(right: ColumnRight) -> bool:
    """Return whether every role of the backfill needs a right."""
    return any(need.is_basic for need in _needs(right))


def _needs(right: ColumnRight) -> Iterator[Right]:
    """Yield the entries of RIGHTS that a privilege on a column satisfies. Rights on whole tables exclude xmin."""
    for need in RIGHTS:
        is_meant = right.column in need.columns if need.columns else right.column != "xmin"
        if is_meant and (need.table, need.privilege) == (right.table, right.privilege):
            yield need


def _hidden_rows(rights: _Rights) -> list[CheckMessage]:
    query = """
        SELECT relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
         WHERE nspname = %s AND row_security_active(c.oid)
           -- The history is written by --update alone.
           AND (relname = ANY(%s) OR relname = %s AND has_any_column_privilege(c.oid, 'INSERT')) ORDER BY 1
    """
    return [
        Error(
            f"Row-level security may hide rows of {table} from the role {rights.role}; they would be missing silently.",
            hint=f"ALTER ROLE {quoted_name(rights.role)} BYPASSRLS;",
            id="crm.E003",
        )
        for (table,) in rights.ask(query, [settings.LEGACY_SCHEMA, list(REQUIRED_COLUMNS), HISTORY])
    ]


def _is_secret(right: ColumnRight) -> bool:
    if right.table == "tax_intake_leads":
        return right.column in SECRETS_OF_INTAKES
    return right.table in READ_ONLY_TABLES and right.column in SECRET_COLUMNS


def _too_much(rights: _Rights, role: str) -> list[CheckMessage]:
    granted = [right for right, is_granted in _on_application(rights).items() if is_granted]
    secret = [right for right in granted if right.privilege == "SELECT" and _is_secret(right)]
    others = rights.tables(settings.LEGACY_SCHEMA) - {CONTACTS}
    written = _writable(rights, sorted(others))
    changed = [
        right
        for right in granted
        if right.table == CONTACTS and right.privilege != "SELECT" and right.column != "xmin"
        if not any(_needs(right))
    ]
    found = (
        ("W001", "may read secret columns", sorted({f"{right.table}.{right.column}" for right in secret})),
        ("W002", "may write tables that the backfill only reads", written),
        (
            "W003",
            "may write columns that the backfill does not write",
            sorted({f"{right.table}.{right.column} ({right.privilege})" for right in changed}),
        ),
        ("W004", "may create tables in the application's schema", _schemas_to_make_tables_in(rights)),
        ("W006", "has rights on other relations", _other_relations(rights)),
        ("W007", "may create objects in other schemas", _other_schemas_to_create_in(rights)),
        ("W008", "may create schemas in the database", _database_to_create_in(rights)),
    )
    messages: list[CheckMessage] = [
        Warning(f"The role {role} {what}: {listed(names)}.", hint=SCRIPT, id=f"crm.{number}")
        for number, what, names in found
        if names
    ]
    if powers := [*_attributes(rights), *_memberships(rights)]:
        messages.append(
            Warning(
                f"The role {role} has more power than an ordinary role: {', '.join(power.name for power in powers)}.",
                hint=KEEP if _is_needed_elsewhere(rights) else " ".join(dict.fromkeys(p.way_out for p in powers)),
                id="crm.W005",
            )
        )
    return messages


def _is_needed_elsewhere(rights: _Rights) -> bool:
    """Return whether the role is a superuser, or owns the database, one of the schemas or a relation in them."""
    query = """
        SELECT FROM pg_roles me
         WHERE rolname = current_user
           AND (rolsuper OR EXISTS (SELECT FROM pg_database WHERE datname = current_database() AND datdba = me.oid)
                OR EXISTS (SELECT FROM pg_namespace WHERE nspname = ANY(%(schemas)s) AND nspowner = me.oid)
                OR EXISTS (SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
                            WHERE nspname = ANY(%(schemas)s) AND relowner = me.oid))
    """
    return bool(rights.ask(query, {"schemas": [settings.LEGACY_SCHEMA, settings.BACKFILL_SCHEMA]}))


def _writable(rights: _Rights, tables: Sequence[str]) -> list[str]:
    query = """
        SELECT relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
         WHERE nspname = %s AND relname = ANY(%s)
           AND (has_any_column_privilege(c.oid, 'UPDATE') OR has_table_privilege(c.oid, 'TRUNCATE')
                OR (relname <> %s
                    AND (has_any_column_privilege(c.oid, 'INSERT') OR has_table_privilege(c.oid, 'DELETE'))))
         ORDER BY 1
    """
    # --update inserts into the stage history, and a rollback deletes from it.
    return [name for (name,) in rights.ask(query, [settings.LEGACY_SCHEMA, tables, HISTORY])]


def _schemas_to_make_tables_in(rights: _Rights) -> list[str]:
    query = "SELECT nspname FROM pg_namespace WHERE nspname = %s AND has_schema_privilege(oid, 'CREATE')"
    return [name for (name,) in rights.ask(query, [settings.LEGACY_SCHEMA])]


def _other_relations(rights: _Rights) -> list[str]:
    """Return views and foreign tables in any schema, and tables in schemas that the backfill does not use."""
    query = """
        SELECT nspname || '.' || relname FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
         WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
           AND (relkind IN ('v', 'm', 'f') OR relkind IN ('r', 'p') AND nspname <> ALL(%s))
           AND (has_any_column_privilege(c.oid, 'INSERT, UPDATE, REFERENCES')
                OR has_table_privilege(c.oid, 'DELETE, TRUNCATE, TRIGGER')
                -- Not relations that PUBLIC may read.
                OR NOT EXISTS (SELECT FROM aclexplode(relacl) WHERE grantee = 0 AND privilege_type = 'SELECT')
                   AND EXISTS (
                     SELECT FROM pg_attribute a
                      WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
                        AND has_column_privilege(c.oid, attnum, 'SELECT')
                        AND NOT EXISTS (
                              SELECT FROM aclexplode(attacl) WHERE grantee = 0 AND privilege_type = 'SELECT')
                        -- A rollback reads the columns that refer to a contact.
                        AND NOT EXISTS (
                              SELECT FROM pg_constraint
                               WHERE contype = 'f' AND conrelid = c.oid AND attnum = ANY (conkey)
                                 AND confrelid = to_regclass(format('%%I.%%I', %s::text, %s::text)))))
         ORDER BY 1
    """
    schemas = [settings.LEGACY_SCHEMA, settings.BACKFILL_SCHEMA]
    return [name for (name,) in rights.ask(query, [schemas, settings.LEGACY_SCHEMA, CONTACTS])]


def _other_schemas_to_create_in(rights: _Rights) -> list[str]:
    query = """
        SELECT nspname FROM pg_namespace
         WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', %s) AND has_schema_privilege(oid, 'CREATE')
           -- PostgreSQL 14 and older grant this to PUBLIC by default.
           AND NOT (nspname = 'public' AND current_setting('server_version_num')::int < 150000
                    AND EXISTS (SELECT FROM aclexplode(nspacl) WHERE grantee = 0 AND privilege_type = 'CREATE'))
         ORDER BY 1
    """
    return [name for (name,) in rights.ask(query, [settings.LEGACY_SCHEMA])]


def _database_to_create_in(rights: _Rights) -> list[str]:
    query = "SELECT current_database() WHERE has_database_privilege(current_database(), 'CREATE')"
    return [name for (name,) in rights.ask(query)]


def _triggers_of_others(rights: _Rights) -> list[CheckMessage]:
    """Warn of roles, other than owners and superusers, that may create triggers on tables that the backfill writes."""
    query = """
        SELECT nspname, relname,
               array_agg(DISTINCT COALESCE(g.rolname::text, '') ORDER BY COALESCE(g.rolname::text, '')),
               bool_or(grantor <> relowner)
          FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
         CROSS JOIN LATERAL aclexplode(relacl) a LEFT JOIN pg_roles g ON g.oid = grantee
         WHERE (nspname = %s AND relname = ANY(%s) OR nspname = %s AND relname = ANY(%s)) AND relkind IN ('r', 'p')
           AND privilege_type = 'TRIGGER' AND grantee <> relowner AND g.rolsuper IS NOT TRUE
         GROUP BY nspname, relname ORDER BY nspname DESC, relname
    """
    parameters = [settings.LEGACY_SCHEMA, [CONTACTS, HISTORY], settings.BACKFILL_SCHEMA, list(OUR_TABLES)]
    where, statements = [], []
    for schema, table, roles, is_granted_on in rights.ask(query, parameters):
        where.append(f"{schema}.{table} ({listed([role or 'PUBLIC' for role in roles])})")
        statements.append(
            f"REVOKE TRIGGER ON {quoted_name(schema)}.{quoted_name(table)} "
            f"FROM {', '.join(quoted_name(role) if role else 'PUBLIC' for role in roles)}"
            f"{' CASCADE' if is_granted_on else ''};"
        )
    if not where:
        return []
    return [
        Warning(
            "Roles other than the owner may create triggers, which run with the rights of the backfill, "
            f"on {', '.join(where)}.",
            hint=" ".join(statements),
            id="crm.W009",
        )
    ]


def _references_of_others(rights: _Rights) -> list[CheckMessage]:
    """Warn of roles that may create foreign keys to contacts, with which they can make every command refuse to work."""
    query = """
        SELECT array_agg(DISTINCT COALESCE(g.rolname::text, '') ORDER BY COALESCE(g.rolname::text, '')),
               bool_or(grantor <> relowner)
          FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
         CROSS JOIN LATERAL (
               SELECT * FROM aclexplode(relacl)
                UNION ALL
               SELECT acl.* FROM pg_attribute, aclexplode(attacl) AS acl WHERE attrelid = c.oid AND NOT attisdropped
               ) a LEFT JOIN pg_roles g ON g.oid = grantee
         WHERE nspname = %s AND relname = %s AND relkind IN ('r', 'p')
           AND privilege_type = 'REFERENCES' AND grantee <> relowner AND g.rolsuper IS NOT TRUE
        HAVING count(*) > 0
    """
    return [
        Warning(
            f"Roles other than the owner may create foreign keys to {CONTACTS}: "
            f"{listed([role or 'PUBLIC' for role in roles])}. A rollback keeps contacts that a row refers to, and "
            "every command refuses a foreign key of an untrusted role.",
            # This also revokes grants on columns.
            hint=f"REVOKE REFERENCES ON {quoted_name(settings.LEGACY_SCHEMA)}.{quoted_name(CONTACTS)} "
            f"FROM {', '.join(quoted_name(role) if role else 'PUBLIC' for role in roles)}"
            f"{' CASCADE' if is_granted_on else ''};",
            id="crm.W012",
        )
        for roles, is_granted_on in rights.ask(query, [settings.LEGACY_SCHEMA, CONTACTS])
    ]


class _Power(NamedTuple):
    """A power that an ordinary role does not have, and the statement that revokes it."""

    name: str
    way_out: str


def _attributes(rights: _Rights) -> list[_Power]:
    query = """
        SELECT ARRAY[rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls], EXISTS (
                 SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
                  WHERE (nspname = %s AND relname = ANY(%s) OR nspname = %s) AND relrowsecurity)
          FROM pg_roles WHERE rolname = current_user
    """
    parameters = [settings.LEGACY_SCHEMA, [*REQUIRED_COLUMNS, HISTORY], settings.BACKFILL_SCHEMA]
    ((has, is_row_security_on),) = rights.ask(query, parameters)
    return [
        _Power(name, f"ALTER ROLE {quoted_name(rights.role)} NO{name};")
        for name in _named(has)
        # With policies, the role needs BYPASSRLS to see all rows (E003).
        if not (name == "BYPASSRLS" and is_row_security_on)
    ]


def _memberships(rights: _Rights) -> list[_Power]:
    """Return the roles of which this one is a member and that may do more than the backfill needs."""
    query = """
        SELECT r.rolname, r.rolname LIKE 'pg\\_%%',
               ARRAY[r.rolsuper, r.rolcreaterole, r.rolcreatedb, r.rolreplication, r.rolbypassrls], EXISTS (
                 SELECT FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
                  WHERE relowner = r.oid AND nspname = ANY(%s) AND relkind IN ('r', 'p')),
               ARRAY(SELECT direct.rolname::text
                       FROM pg_auth_members m JOIN pg_roles direct ON direct.oid = m.roleid
                      WHERE m.member = me.oid AND pg_has_role(direct.oid, r.oid, 'MEMBER') ORDER BY 1)
          FROM pg_roles r JOIN pg_roles me ON me.rolname = current_user
         WHERE pg_has_role(r.oid, 'MEMBER') AND r.oid <> me.oid AND r.rolname <> ALL(%s)
           -- pg_has_role() is true for a superuser and any role.
           AND NOT me.rolsuper
         ORDER BY 1
    """
    powers = []
    schemas = [settings.LEGACY_SCHEMA, settings.BACKFILL_SCHEMA]
    for name, is_predefined, has, is_owner, through in rights.ask(query, [schemas, list(HARMLESS_ROLES)]):
        why = [*_named(has), *(["owner of tables"] if is_owner else [])]
        if is_predefined or why:
            what = f"member of {name}" + (f" ({', '.join(why)})" if why else "")
            groups = ", ".join(map(quoted_name, through))
            powers.append(_Power(what, f"REVOKE {groups} FROM {quoted_name(rights.role)};"))
    return powers


def _named(has: Sequence[bool]) -> list[str]:
    return [name for name, granted in zip(ATTRIBUTES, has, strict=True) if granted]
