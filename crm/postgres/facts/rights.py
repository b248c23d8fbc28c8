"""The rights that a run needs on tables: a run is refused without them, and its dry run says so."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm import try_execute
from crm.errors import OperatorError
from crm.models import CRMContact
from crm.postgres.facts.requirements import HISTORY

logger = logging.getLogger(__name__)

_CONTACTS = CRMContact._meta.db_table
#: By the oid of a table, since no name leads into a schema that the role may not look into.
_MISSING = """
WITH wanted AS (
  SELECT n.oid AS namespace, c.oid, t, r, number
    FROM unnest(%(tables)s::text[], %(rights)s::text[]) WITH ORDINALITY AS wanted(t, r, number)
    JOIN pg_namespace n ON nspname = CASE WHEN t = ANY(%(theirs)s) THEN %(legacy)s ELSE %(ours)s END
    JOIN pg_class c ON relnamespace = n.oid AND relname = t
), missing AS (
  SELECT 0 AS number, 'USAGE on schema ' || nspname AS missing
    FROM pg_namespace WHERE oid IN (SELECT namespace FROM wanted) AND NOT has_schema_privilege(oid, 'USAGE')
   UNION ALL
  SELECT number, r || ' on ' || t FROM wanted
   -- Only a DELETE is never granted by column.
   WHERE NOT CASE r WHEN 'DELETE' THEN has_table_privilege(oid, r) ELSE has_any_column_privilege(oid, r) END
   UNION ALL
  SELECT 1000, 'UPDATE on ' || relname || '.' || attname
    FROM pg_attribute JOIN pg_class c ON c.oid = attrelid JOIN pg_namespace n ON n.oid = relnamespace
   WHERE nspname = %(legacy)s AND relname = %(contacts)s AND attname = ANY(%(columns)s)
     AND NOT has_column_privilege(c.oid, attnum, 'UPDATE')
   UNION ALL
  SELECT 2000, 'EXECUTE on ' || %(signature)s
    FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
   WHERE nspname = %(ours)s AND proname = %(function)s AND NOT has_function_privilege(p.oid, 'EXECUTE')
)
SELECT missing FROM missing ORDER BY number
"""


def require_rights(
    connection: BaseDatabaseWrapper,
    wanted: Iterable[tuple[str, str]],
    *,
    updated_columns: Sequence[str] = (),
    option: str = "",
    dry_run: bool,
) -> None:
    """Raise OperatorError where this role lacks one of the rights, each a table and a privilege.

    `updated_columns` are those of a contact that it must be able to update; `option` is the one of
    docs/least_privilege.sql that grants all of it. A dry run needs none of the rights: it is told what a run lacks.
    """
    tables, rights = zip(*wanted, strict=True)
    with connection.cursor() as cursor:
        cursor.execute(
            _MISSING,
            {
                "tables": list(tables),
                "rights": list(rights),
                "theirs": [_CONTACTS, HISTORY],
                "legacy": settings.LEGACY_SCHEMA,
                "ours": settings.BACKFILL_SCHEMA,
                "contacts": _CONTACTS,
                "columns": list(updated_columns),
                "function": try_execute.FUNCTION,
                "signature": try_execute.SIGNATURE,
            },
        )
        missing = [right for (right,) in cursor.fetchall()]
    if not missing:
        return
    lacked = ", ".join(missing)
    script = f"docs/least_privilege.sql again{f' with --set {option}=on' if option else ''}"
    if dry_run:
        logger.warning(
            "a run without --dry-run would be refused, since this role lacks: %s. Let the tables' owner run %s",
            lacked,
            script,
        )
        return
    raise OperatorError(
        f"This role lacks: {lacked}. Let the tables' owner run {script}, or look first with --dry-run. "
        "Nothing was written."
    )
