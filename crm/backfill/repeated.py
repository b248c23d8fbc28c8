"""Ids that several rows of a source have: a view, or a table without a key, may hold such. Only reads."""

from __future__ import annotations

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.errors import OperatorError

#: They are held in memory. Where more ids repeat, the table is no table of rows with ids.
MAX_IDS = 10_000

# An index over the id alone, valid and without a condition. One of a table to which others inherit is not over theirs.
_IS_UNIQUE = """
SELECT EXISTS (
  SELECT FROM pg_index i
    JOIN pg_class c ON c.oid = i.indrelid
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
   WHERE i.indrelid = to_regclass(quote_ident(%(schema)s) || '.' || %(table)s)
     AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indnkeyatts = 1 AND a.attname = 'id'
     AND (c.relkind = 'p' OR NOT EXISTS (SELECT FROM pg_inherits WHERE inhparent = c.oid)))
"""
_REPEATED = "SELECT id FROM {table} WHERE id IS NOT NULL GROUP BY id HAVING count(*) > 1 ORDER BY id LIMIT %s"


def find_repeated_ids(connection: BaseDatabaseWrapper, table: str) -> tuple[str, ...]:
    """The ids that several rows of a table have; where an index keeps them unique, nothing is asked.

    Raises OperatorError where they are too many.
    """
    with connection.cursor() as cursor:
        cursor.execute(_IS_UNIQUE, {"schema": settings.LEGACY_SCHEMA, "table": table})
        if cursor.fetchone() == (True,):
            return ()
        cursor.execute(_REPEATED.format(table=table), [MAX_IDS + 1])
        found = tuple(identifier for (identifier,) in cursor.fetchall())
    if len(found) > MAX_IDS:
        raise OperatorError(
            f"More than {MAX_IDS:,} ids of {table} belong to several rows each, so its rows cannot be told apart. "
            f"Let the owner of {table} give each row an id of its own. Nothing was written."
        )
    return found
