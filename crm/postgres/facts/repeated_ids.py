"""Finds ids that several rows of a source have, as in a view or a table without a key. Only reads."""

from __future__ import annotations

from collections.abc import Iterable

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.errors import OperatorError

#: The maximum number of repeated ids, which are kept in memory. If there are more, the column is not an id.
MAX_IDS = 10_000

# The tables without a valid unique index on the id alone, without a condition. An index does not cover tables that
# inherit from its table.
_NOT_UNIQUE = """
SELECT name FROM unnest(%(tables)s::text[]) AS name WHERE NOT EXISTS (
  SELECT FROM pg_index i
    JOIN pg_class c ON c.oid = i.indrelid
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
   WHERE i.indrelid = to_regclass(quote_ident(%(schema)s) || '.' || name)
     AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1 AND a.attname = 'id'
     AND (c.relkind = 'p' OR NOT EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid)))
"""
_REPEATED = "SELECT id FROM {table} WHERE id IS NOT NULL GROUP BY id HAVING count(*) > 1 ORDER BY id LIMIT %s"


def find_repeated_ids(connection: BaseDatabaseWrapper, tables: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return, by table, the ids that several rows have. Does not query tables whose ids are unique by an index.

    Raises OperatorError if there are more than MAX_IDS.
    """
    found: dict[str, tuple[str, ...]] = {}
    with connection.cursor() as cursor:
        cursor.execute(_NOT_UNIQUE, {"schema": settings.LEGACY_SCHEMA, "tables": list(tables)})
        for (table,) in cursor.fetchall():
            cursor.execute(_REPEATED.format(table=table), [MAX_IDS + 1])
            found[table] = tuple(identifier for (identifier,) in cursor.fetchall())
            if len(found[table]) > MAX_IDS:
                raise OperatorError(
                    f"More than {MAX_IDS:,} ids of {table} belong to several rows each, so its rows cannot be "
                    f"distinguished. The owner of {table} must give each row its own id. Nothing was written."
                )
    return found
