"""Reads the kind and the columns of the application's tables from PostgreSQL's catalogue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

#: Types of text. Not char(n), which pads values.
TEXT_TYPES = ("text", "varchar", "citext")
MOMENT_TYPES = ("timestamp", "timestamptz")
WHOLE_TYPES = ("int2", "int4", "int8")
#: PostgreSQL's maximum number of fractional digits of a second.
ALL_DIGITS = 6

# Resolves domains to their base types. Each domain on the way may set the modifier, NOT NULL and a default. All columns
# are resolved together, because a query per column would scan pg_type each time.
_COLUMNS = """
WITH RECURSIVE columns AS (
  SELECT c.relname, c.relkind, a.*
    FROM pg_class c
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
   WHERE c.oid IN (SELECT to_regclass(quote_ident(%s) || '.' || quote_ident(name)) FROM unnest(%s::text[]) AS name)
), base(attrelid, attnum, oid, modifier, not_null, has_default) AS (
  SELECT attrelid, attnum, atttypid, atttypmod, attnotnull, atthasdef FROM columns
   UNION ALL
  SELECT attrelid, attnum, d.typbasetype, d.typtypmod, not_null OR d.typnotnull, has_default OR d.typdefault IS NOT NULL
    FROM base JOIN pg_type d ON d.oid = base.oid AND d.typtype = 'd'
)
SELECT a.relname, a.attrelid, a.relkind::text, a.attname, a.atttypid::regtype::text, t.oid, t.typname,
       format('%%I.%%I', tn.nspname, t.typname), t.typtype = 'e' AND t.oid = a.atttypid, base.modifier,
       base.not_null, base.has_default, a.attgenerated <> '' OR a.attidentity = 'a',
       a.attidentity <> '', COALESCE(l.collisdeterministic, true), COALESCE(NULLIF(l.collname, 'default'), ''),
       has_column_privilege(a.attrelid, a.attnum, 'SELECT')
  FROM columns a
  JOIN base USING (attrelid, attnum)
  JOIN pg_type t ON t.oid = base.oid AND t.typtype <> 'd'
  JOIN pg_namespace tn ON tn.oid = t.typnamespace
  LEFT JOIN pg_collation l ON l.oid = a.attcollation
 ORDER BY a.relname, a.attnum
"""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of one of the application's tables. `type` is the plain name of the type, for a domain of its base."""

    name: str
    declared_type: str
    type_oid: int
    type: str
    qualified_type: str
    is_enum: bool
    modifier: int
    not_null: bool
    has_default: bool
    is_generated: bool
    is_identity: bool
    is_deterministic: bool
    #: Empty for the default collation of the database.
    collation: str
    readable: bool

    @property
    def cast(self) -> str:
        """The type to cast text to before comparing it with the column, escaped for a statement with parameters."""
        return self.qualified_type.replace("%", "%%") if self.is_enum else "text"

    @property
    def second_digits(self) -> int:
        """The number of fractional digits of a second that a timestamp stores."""
        return ALL_DIGITS if self.modifier < 0 else self.modifier

    @property
    def room(self) -> int | None:
        """The maximum length of a varchar, or None if it is unlimited."""
        # As in PostgreSQL's anychar_typmodout(): the modifier includes the length of the header.
        return self.modifier - 4 if self.type == "varchar" and self.modifier >= 4 else None

    @property
    def scale(self) -> int | None:
        """The number of decimals of a numeric, or None if it is unlimited."""
        if self.modifier < 0:
            return None
        # As in PostgreSQL's numeric_typmod_scale(): eleven bits with a sign.
        return (((self.modifier - 4) & 0x7FF) ^ 1024) - 1024


@dataclass(frozen=True, slots=True)
class Table:
    """One of the application's tables, or another relation with its name."""

    oid: int
    kind: str
    columns: Mapping[str, Column]


def present_tables(connection: BaseDatabaseWrapper, names: Iterable[str]) -> list[str]:
    """Return those of the names that are tables of the application's schema, in the same order."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT name FROM unnest(%s::text[]) WITH ORDINALITY AS wanted(name, number) "
            "WHERE to_regclass(quote_ident(%s) || '.' || quote_ident(name)) IS NOT NULL ORDER BY number",
            [list(names), settings.LEGACY_SCHEMA],
        )
        return [name for (name,) in cursor.fetchall()]


def read_tables(connection: BaseDatabaseWrapper, names: Iterable[str]) -> dict[str, Table]:
    """Return, by name, the tables that exist in the application's schema."""
    with connection.cursor() as cursor:
        cursor.execute(_COLUMNS, [settings.LEGACY_SCHEMA, list(names)])
        rows = cursor.fetchall()
    found: dict[str, Table] = {}
    columns: dict[str, dict[str, Column]] = {}
    for table, oid, kind, *column in rows:
        of_table = columns.setdefault(table, {})
        of_table[column[0]] = Column(*column)
        found[table] = Table(oid, kind, of_table)
    return found
