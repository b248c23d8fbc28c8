"""Rows that PostgreSQL refuses: what of their errors may be written down, and when it is not the rows' fault."""

from __future__ import annotations

from dataclasses import dataclass

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.outcome import Refusal
from crm.postgres.errors import EveryRowRefusedError

#: So many rows in succession that are refused for one reason, and none between them that lands, are no coincidence.
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
    """A refusal with only those names that the database's catalogue has, and its trigger for the trigger's function.

    A function may RAISE with whatever it likes for the names: the value that it refuses, for one.
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
    """What PostgreSQL named, for a log line or a run's record."""
    said = {
        "SQLSTATE": refusal.sqlstate,
        "constraint": refusal.constraint,
        "column": refusal.column,
        "table": refusal.table,
        "trigger": refusal.trigger,
    }
    return ", ".join(f"{name} {value}" for name, value in said.items() if value) or "no word from PostgreSQL"


@dataclass(slots=True)
class AlikeRefusals:
    """Counts rows in succession that are refused for one reason, so that a batch is not bisected for ever.

    Rows that were refused by an earlier run as well say nothing: every run tries them again.
    """

    refusal: Refusal | None = None
    count: int = 0

    def note(self, refusal: Refusal) -> bool:
        """Note a refused row; whether there are so many alike that the rows after it are to be asked."""
        self.count = self.count + 1 if refusal == self.refusal else 1
        self.refusal = refusal
        return self.count % MAX_ALIKE == 0

    def end(self) -> None:
        """A row was written."""
        self.refusal, self.count = None, 0

    def fail(self) -> None:
        """Raise EveryRowRefusedError."""
        reason = in_words(self.refusal or Refusal())
        raise EveryRowRefusedError(f"the database refuses every row for one reason ({reason})")
