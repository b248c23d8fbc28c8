"""Finds the tables that refer to `crm_contacts`: by a foreign key, or as one of the application's known tables.

Every foreign key in the catalogue counts, whatever its table, schema and columns. So tables that the application adds
later count as well. The known tables have no foreign keys if Prisma manages the relations (`relationMode = "prisma"`).

The action of a foreign key (CASCADE, SET NULL, RESTRICT) does not matter: a contact with referring rows is in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.errors import OperatorError

#: The tables and columns of the application, in any generation, that refer to a contact's id.
KNOWN = (("crm_interactions", "contactId"), ("crm_stage_history", "contactId"))
# PostgreSQL does not compare columns of different collations. The one of the referring column allows to use its index.
_COLLATION = """
CASE WHEN 0 NOT IN ({theirs}.attcollation, {ours}.attcollation) AND {theirs}.attcollation <> {ours}.attcollation
     THEN ' COLLATE ' || {theirs}.attcollation::regcollation ELSE '' END
"""
# The same columns as in _FOREIGN_KEYS. A table that also has the foreign key yields the same condition twice.
_KNOWN_COLUMNS = """
SELECT c.oid::regclass::text,
       format(CASE WHEN a.atttypid IN ('text'::regtype, 'varchar'::regtype) THEN 'r.%%I = c.id'
                   ELSE 'r.%%I::text = c.id' END, a.attname) || {collation},
       has_schema_privilege(c.relnamespace, 'USAGE') AND has_column_privilege(c.oid, a.attnum, 'SELECT'),
       row_security_active(c.oid)
  FROM unnest(%s::text[], %s::text[]) AS known(relname, attname)
  JOIN pg_class c ON c.relname = known.relname AND c.relkind IN ('r', 'p', 'v', 'm', 'f')
  JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = %s
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = known.attname AND NOT a.attisdropped
  LEFT JOIN pg_attribute i ON i.attrelid = to_regclass(quote_ident(n.nspname) || '.crm_contacts') AND i.attname = 'id'
""".format(collation=_COLLATION.format(theirs="a", ours="i"))
# A partition's copy of its parent's constraint has a conparentid. The parent's covers all partitions.
_FOREIGN_KEYS = """
SELECT k.conrelid::regclass::text,
       (SELECT string_agg(format('r.%%I = c.%%I', theirs.attname, ours.attname) || {collation}, ' AND '
                          ORDER BY pair.number)
          FROM unnest(k.conkey, k.confkey) WITH ORDINALITY AS pair(theirs, ours, number)
          JOIN pg_attribute theirs ON theirs.attrelid = k.conrelid AND theirs.attnum = pair.theirs
          JOIN pg_attribute ours ON ours.attrelid = k.confrelid AND ours.attnum = pair.ours),
       has_schema_privilege(t.relnamespace, 'USAGE')
         AND (SELECT bool_and(has_column_privilege(k.conrelid, number, 'SELECT')) FROM unnest(k.conkey) AS number),
       row_security_active(k.conrelid)
  FROM pg_constraint k
  JOIN pg_class t ON t.oid = k.conrelid
  JOIN pg_class c ON c.oid = k.confrelid
  JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE k.contype = 'f' AND k.conparentid = 0 AND n.nspname = %s AND c.relname = 'crm_contacts'
 ORDER BY 1, 2
""".format(collation=_COLLATION.format(theirs="theirs", ours="ours"))
_CASCADES = """
SELECT DISTINCT k.conrelid::regclass::text
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
 WHERE k.contype = 'f' AND k.confrelid = 'crm_contacts'::regclass AND k.confdeltype IN ('c', 'n', 'd')
   AND has_schema_privilege(c.relnamespace, 'USAGE')
   AND has_table_privilege(k.conrelid, 'INSERT, UPDATE, DELETE, TRUNCATE')
 ORDER BY 1
"""


@dataclass(frozen=True, slots=True)
class Reference:
    """A table that refers to `crm_contacts`, and the SQL condition that its row `r` refers to contact `c`."""

    table: str
    condition: str

    @property
    def exists(self) -> str:
        """The SQL condition that any row of the table refers to contact `c`."""
        return f"EXISTS (SELECT FROM {_escaped(self.table)} r WHERE {_escaped(self.condition)})"

    @property
    def name(self) -> str:
        """The table as an SQL text literal."""
        return _escaped("'" + self.table.replace("'", "''") + "'")


def find_foreign_keys(connection: BaseDatabaseWrapper) -> list[Reference]:
    """Return the references to `crm_contacts`, from foreign keys and from known tables.

    A table may be newer than the connection: outside of a batch, call `require_still_trusted` before a table is read.

    Raises OperatorError if this role cannot see all referring rows.
    """
    with connection.cursor() as cursor:
        cursor.execute(_FOREIGN_KEYS, [settings.LEGACY_SCHEMA])
        found = cursor.fetchall()
        cursor.execute(_KNOWN_COLUMNS, [*map(list, zip(*KNOWN, strict=True)), settings.LEGACY_SCHEMA])
        found = sorted({*found, *cursor.fetchall()})
    if unseen := sorted({table for table, _, readable, filtered in found if not readable or filtered}):
        raise OperatorError(
            f"This role cannot see every row of {', '.join(unseen)}, which refers to crm_contacts, so it could delete "
            "contacts that are in use. As the owner, GRANT SELECT on it; if it has row-level security, also run ALTER "
            "ROLE ... BYPASSRLS as a superuser."
        )
    return [Reference(table, condition) for table, condition, _, _ in found]


def find_cascades(connection: BaseDatabaseWrapper) -> list[str]:
    """Return the tables whose foreign key writes them when a contact is deleted, as far as this role may lock them.

    Their triggers on statements are called although no row refers to the contact.
    """
    with connection.cursor() as cursor:
        cursor.execute(_CASCADES)
        return [table for (table,) in cursor.fetchall()]


def is_unreferenced(references: Sequence[Reference]) -> str:
    """Return the SQL condition that no row of any table refers to contact `c`."""
    return " AND ".join(f"NOT {reference.exists}" for reference in references) or "true"


def referring_tables(references: Sequence[Reference]) -> str:
    """Return the SQL array of the tables that refer to contact `c`."""
    tables = [f"CASE WHEN {reference.exists} THEN {reference.name} END" for reference in references]
    return f"array_remove(ARRAY[{', '.join(tables)}]::text[], NULL)"


def _escaped(sql: str) -> str:
    """Escape %, which would start a placeholder."""
    return sql.replace("%", "%%")
