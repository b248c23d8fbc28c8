"""Rows that PostgreSQL refuses: which parts of the error may be stored, and when the rows are not the cause."""

from __future__ import annotations

from dataclasses import dataclass

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.outcome import Refusal
from crm.postgres.errors import EveryRowRefusedError

#: If this many rows in succession are refused for one reason, the fault may not be in the rows.
MAX_ALIKE = 100

_NAMES = """
SELECT (SELECT conname FROM pg_constraint WHERE conname = %(constraint)s::text
         UNION
        SELECT relname FROM pg_class WHERE relname = %(constraint)s::text AND relkind IN ('i', 'I')
         UNION
        SELECT tgname FROM pg_trigger WHERE tgname = %(constraint)s::text AND NOT tgisinternal),
       (SELECT attname FROM pg_attribute WHERE attname = %(column)s::text AND attnum > 0 AND NOT attisdropped LIMIT 1),
       (SELECT relname FROM pg_class WHERE relname = %(table)s::text AND relkind IN ('r', 'p', 'f', 'v') LIMIT 1),
       (SELECT t.tgname FROM unnest(ARRAY['crm_contacts', 'crm_stage_history']) WITH ORDINALITY AS known(name, number)
          JOIN pg_trigger t ON t.tgrelid = to_regclass(quote_ident(%(schema)s) || '.' || known.name)
          JOIN pg_proc p ON p.oid = t.tgfoid AND p.proname = %(function)s::text
         ORDER BY number, t.tgname LIMIT 1)
"""


def names_of_the_schema(connection: BaseDatabaseWrapper, refusal: Refusal) -> Refusal:
    """Return a refusal with only the names that exist in the catalogue, and the trigger instead of its function.

    A function may RAISE any text as a name, such as the refused value, which may be personal data.
    """
    if refusal[1:] == Refusal()[1:]:
        return refusal
    with connection.cursor() as cursor:
        cursor.execute(
            _NAMES,
            {
                "constraint": refusal.constraint,
                "column": refusal.column,
                "table": refusal.table,
                "function": refusal.trigger,
                "schema": settings.LEGACY_SCHEMA,
            },
        )
        return Refusal(refusal.sqlstate, *cursor.fetchone())


def in_words(refusal: Refusal) -> str:
    """Describe a refusal for the log or a run's record."""
    names = {
        "SQLSTATE": refusal.sqlstate,
        "constraint": refusal.constraint,
        "column": refusal.column,
        "table": refusal.table,
        "trigger": refusal.trigger,
    }
    return ", ".join(f"{name} {value}" for name, value in names.items() if value) or "PostgreSQL named no cause"


@dataclass(slots=True)
class AlikeRefusals:
    """Counts rows in succession that are refused for one reason, so that the bisection of a batch ends.

    Do not note rows that an earlier run has refused as well: every run retries them.
    """

    refusal: Refusal | None = None
    count: int = 0

    def note(self, refusal: Refusal) -> bool:
        """Count a refused row. Return whether the count is high enough to sample the remaining rows."""
        self.count = self.count + 1 if refusal == self.refusal else 1
        self.refusal = refusal
        return self.count % MAX_ALIKE == 0

    def end(self) -> None:
        """Reset the count, because a row was written."""
        self.refusal, self.count = None, 0

    def fail(self) -> None:
        """Raise EveryRowRefusedError."""
        reason = in_words(self.refusal or Refusal())
        raise EveryRowRefusedError(f"the database refuses every row for one reason ({reason})")
