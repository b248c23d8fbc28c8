"""The rights that each operation needs, and the check whether the role of a connection has them.

`RIGHTS` is the only list. A run is refused if it lacks a right, and its dry run reports that. The system checks use the
list, and `docs/least_privilege.sql` grants what it contains (a test compares the two).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm import try_execute
from crm.errors import OperatorError
from crm.fields import as_columns
from crm.models import (
    BackfillBatch,
    BackfillRun,
    CommittedTransaction,
    ConflictResolution,
    ContactUpdate,
    LedgerEntry,
    Rollback,
)
from crm.outcome import Repair
from crm.postgres.facts.columns import COLUMNS_IN_USE, CONTACT_COLUMNS, FILLED_COLUMNS, PROMOTED_COLUMNS
from crm.postgres.facts.foreign_keys import KNOWN
from crm.postgres.facts.requirements import CONTACTS, HISTORY, WRITTEN

logger = logging.getLogger(__name__)


class Operation(StrEnum):
    """An operation that needs rights."""

    RUN = "run"  # backfill_crm_contacts
    UPDATE = "update"  # backfill_crm_contacts --update
    RECREATE = "recreate"  # backfill_crm_contacts --recreate-deleted
    ROLLBACK = "rollback"  # rollback_crm_backfill
    ROLLBACK_OF_UPDATE = "rollback_of_update"  # rollback_crm_backfill of a run that updated contacts
    REPAIR = "repair"  # repair_crm_contacts --preparer-ids
    REPAIR_TYPES = "repair_types"  # repair_crm_contacts --types
    REPAIR_PLACEHOLDERS = "repair_placeholders"  # repair_crm_contacts --placeholders
    RESOLVE = "resolve"  # resolve_crm_conflict
    SHOW = "show"  # backfill_runs, trace_contact


#: The options of docs/least_privilege.sql that an operation needs. Others need none.
OPTIONS: dict[Operation, tuple[str, ...]] = {
    Operation.UPDATE: ("update",),
    Operation.RECREATE: ("rollback",),
    Operation.ROLLBACK: ("rollback",),
    Operation.ROLLBACK_OF_UPDATE: ("update", "rollback"),
    Operation.REPAIR_TYPES: ("update",),
    Operation.REPAIR_PLACEHOLDERS: ("update",),
}
#: The operation of each repair, and of its rollback.
OPERATION_OF_REPAIR: Mapping[Repair, Operation] = {
    Repair.PREPARER_IDS: Operation.REPAIR,
    Repair.TYPES: Operation.REPAIR_TYPES,
    Repair.PLACEHOLDERS: Operation.REPAIR_PLACEHOLDERS,
}


@dataclass(frozen=True, slots=True)
class Right:
    """A privilege on columns of a table, or on the whole table if none are named, and the operations that need it.

    `is_always_granted`: the script grants it whatever its options, though only an optional operation needs it.
    """

    table: str
    privilege: str
    operations: tuple[Operation, ...]
    columns: tuple[str, ...] = ()
    is_always_granted: bool = False

    @property
    def is_basic(self) -> bool:
        """Whether the script grants it whatever its options."""
        return self.is_always_granted or any(operation not in OPTIONS for operation in self.operations)

    @property
    def is_ours(self) -> bool:
        """Whether the table is one of the backfill's own."""
        return self.table in OUR_TABLES


_RUN, _UPDATE, _ROLLBACK = Operation.RUN, Operation.UPDATE, Operation.ROLLBACK
_LEDGER, _CHANGES = LedgerEntry._meta.db_table, ContactUpdate._meta.db_table
_RESOLUTIONS, _COMMITTED = ConflictResolution._meta.db_table, CommittedTransaction._meta.db_table
_RUNS, _BATCHES, _ROLLBACKS = BackfillRun._meta.db_table, BackfillBatch._meta.db_table, Rollback._meta.db_table
OUR_TABLES = (_RUNS, _LEDGER, _BATCHES, _RESOLUTIONS, _CHANGES, _ROLLBACKS, _COMMITTED)

RIGHTS = (
    *(Right(table, "SELECT", (_RUN,), names) for table, names in COLUMNS_IN_USE.items() if table != CONTACTS),
    # xmin shows which contacts of a batch were inserted.
    Right(CONTACTS, "SELECT", (_RUN,), ("xmin", *CONTACT_COLUMNS)),
    Right(CONTACTS, "INSERT", (_RUN,), CONTACT_COLUMNS),
    Right(CONTACTS, "UPDATE", (_RUN, _ROLLBACK), FILLED_COLUMNS),
    Right(CONTACTS, "UPDATE", (_UPDATE, Operation.ROLLBACK_OF_UPDATE), PROMOTED_COLUMNS),
    Right(CONTACTS, "UPDATE", (Operation.REPAIR,), ("assignedPreparerId",)),
    Right(CONTACTS, "UPDATE", (Operation.REPAIR_TYPES,), ("contactType",)),
    Right(CONTACTS, "UPDATE", (Operation.REPAIR_PLACEHOLDERS,), ("email",)),
    # Before a contact is deleted, a rollback reads all of its columns and the tables that refer to it.
    Right(CONTACTS, "SELECT", (_ROLLBACK,)),
    *(Right(table, "SELECT", (_ROLLBACK,), (column,)) for table, column in KNOWN),
    Right(CONTACTS, "DELETE", (_ROLLBACK,)),
    *(Right(_RUNS, privilege, (_RUN, _ROLLBACK)) for privilege in ("SELECT", "INSERT", "UPDATE")),
    *(Right(_BATCHES, privilege, (_RUN,)) for privilege in ("SELECT", "INSERT")),
    Right(_LEDGER, "SELECT", (_RUN, _ROLLBACK)),
    Right(_LEDGER, "INSERT", (_RUN,)),
    Right(_LEDGER, "UPDATE", (_RUN, _ROLLBACK)),
    Right(_LEDGER, "DELETE", (_ROLLBACK,)),
    Right(_CHANGES, "SELECT", (_RUN, _ROLLBACK)),
    Right(_CHANGES, "INSERT", (_UPDATE, *OPERATION_OF_REPAIR.values()), is_always_granted=True),
    # The recorded updates of contacts that are missing are deleted.
    Right(_CHANGES, "DELETE", (Operation.RECREATE, _ROLLBACK)),
    Right(_RESOLUTIONS, "SELECT", (_RUN, _ROLLBACK)),
    *(Right(_RESOLUTIONS, privilege, (Operation.RESOLVE,)) for privilege in ("INSERT", "UPDATE")),
    *(Right(_COMMITTED, privilege, (_RUN, _ROLLBACK)) for privilege in ("SELECT", "INSERT", "DELETE")),
    Right(HISTORY, "INSERT", (_UPDATE,), WRITTEN[HISTORY]),
    # When a promotion is reversed, its row of the history is deleted.
    Right(HISTORY, "SELECT", (Operation.ROLLBACK_OF_UPDATE,), ("id",)),
    Right(HISTORY, "DELETE", (Operation.ROLLBACK_OF_UPDATE,)),
    Right(_ROLLBACKS, "SELECT", (Operation.SHOW, _ROLLBACK)),
    *(Right(_ROLLBACKS, privilege, (_ROLLBACK,)) for privilege in ("INSERT", "UPDATE")),
)


def rights_of(*operations: Operation) -> Iterator[Right]:
    """Return the rights that these operations need, in the order of `RIGHTS`."""
    return (right for right in RIGHTS if not set(operations).isdisjoint(right.operations))


#: By oid, because a name cannot be resolved in a schema on which the role lacks USAGE.
_MISSING = """
WITH wanted AS (
  SELECT n.oid AS namespace, c.oid, t, r, name, number,
         -- Only a DELETE is never granted by column.
         CASE r WHEN 'DELETE' THEN has_table_privilege(c.oid, r) ELSE has_any_column_privilege(c.oid, r) END AS has_any
    FROM unnest(%(tables)s::text[], %(rights)s::text[], %(columns)s::text[])
         WITH ORDINALITY AS wanted(t, r, name, number)
    JOIN pg_namespace n ON nspname = CASE WHEN t = ANY(%(ours)s) THEN %(our_schema)s ELSE %(their_schema)s END
    JOIN pg_class c ON relnamespace = n.oid AND relname = t
), missing AS (
  SELECT 0 AS number, 'USAGE on schema ' || nspname AS missing
    FROM pg_namespace WHERE oid IN (SELECT namespace FROM wanted) AND NOT has_schema_privilege(oid, 'USAGE')
   UNION ALL
  SELECT min(number), r || ' on ' || t FROM wanted WHERE NOT has_any GROUP BY r, t
   UNION ALL
  SELECT number, r || ' on ' || t || '.' || attname
    FROM wanted JOIN pg_attribute ON attrelid = wanted.oid AND attname = name
   WHERE has_any AND CASE WHEN r <> 'DELETE' THEN NOT has_column_privilege(wanted.oid, attnum, r) END
   UNION ALL
  SELECT 2000, 'EXECUTE on ' || %(signature)s
    FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace
   WHERE nspname = %(our_schema)s AND proname = %(function)s AND NOT has_function_privilege(p.oid, 'EXECUTE')
)
SELECT missing FROM missing ORDER BY number
"""


def require_rights(
    connection: BaseDatabaseWrapper, *operations: Operation, dry_run: bool, writes_with_apply: bool = False
) -> None:
    """Raise OperatorError if this role lacks a right that one of the operations needs; a dry run only logs a warning.

    The message contains the options with which the script grants the rights of all these operations. SELECT on the
    application's tables is not checked here, but by `examine`. `writes_with_apply` is for a command that is a dry run
    without --apply.
    """
    wanted = [
        (right.table, right.privilege, column)
        for right in rights_of(*operations)
        if right.is_ours or right.privilege != "SELECT"
        for column in right.columns or (None,)
    ]
    tables, rights, columns = as_columns(wanted)
    with connection.cursor() as cursor:
        cursor.execute(
            _MISSING,
            {
                "tables": tables,
                "rights": rights,
                "columns": columns,
                "ours": list(OUR_TABLES),
                "their_schema": settings.LEGACY_SCHEMA,
                "our_schema": settings.BACKFILL_SCHEMA,
                "function": try_execute.FUNCTION,
                "signature": try_execute.SIGNATURE,
            },
        )
        missing = [right for (right,) in cursor.fetchall()]
    if not missing:
        return
    lacked = ", ".join(missing)
    options = dict.fromkeys(option for operation in operations for option in OPTIONS.get(operation, ()))
    script = "docs/least_privilege.sql again"
    if options:
        script += f" with {' '.join(f'--set {option}=on' for option in options)}"
    if dry_run:
        logger.warning(
            "a run %s would be refused, because this role lacks: %s. As the tables' owner, run %s",
            "with --apply" if writes_with_apply else "without --dry-run",
            lacked,
            script,
        )
        return
    first = "leave --apply out" if writes_with_apply else "try --dry-run"
    raise OperatorError(
        f"This role lacks: {lacked}. As the tables' owner, run {script}, or {first} first. Nothing was written."
    )
