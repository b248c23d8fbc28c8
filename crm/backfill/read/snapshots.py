"""Reads the current contacts by id, for updates, rollbacks and verifications. Only reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from django.db.backends.base.base import BaseDatabaseWrapper

from crm.postgres.facts.columns import ATTRIBUTION_COLUMNS, COLUMN
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.loaders import read_as_text
from crm.rules.mapping import ContactDraft
from crm.rules.snapshot import ContactSnapshot

#: The version of a contact `c`. A view has none, and a dry run may lack the right to read it.
VERSION = "c.xmin::text"

# LATERAL with LIMIT is always one index probe per contact, whatever the planner estimates.
_CONTACTS = """
SELECT c.* FROM unnest(%s::text[]) AS wanted(id) CROSS JOIN LATERAL (
  SELECT {version}, {set_elsewhere}, {columns}
    FROM crm_contacts c WHERE c.id = wanted.id LIMIT 1) c
"""


@dataclass(frozen=True, slots=True)
class SnapshotReader:
    """Reads contacts by id. The fields are SQL expressions over a contact `c`, read besides the columns of a draft."""

    connection: BaseDatabaseWrapper
    missing_columns: Collection[str] = ()
    version: str = "''"
    set_elsewhere: str = "ARRAY[]::text[]"

    def read(self, ids: Iterable[str]) -> dict[str, ContactSnapshot]:
        """Return the contacts with these ids that exist, by id."""
        query = _CONTACTS.format(
            version=self.version,
            set_elsewhere=self.set_elsewhere,
            columns=", ".join(
                "NULL" if column in self.missing_columns else f'c."{column}"' for column in COLUMN.values()
            ),
        )
        with self.connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, [list(ids)])
            snapshots = (
                ContactSnapshot(ContactDraft._make(values), version, tuple(set_elsewhere))
                for version, set_elsewhere, *values in cursor.fetchall()
            )
            return {snapshot.values.id: snapshot for snapshot in snapshots}


def missing_columns(facts: DatabaseFacts) -> Collection[str]:
    """Return the columns of a contact that the table lacks."""
    return () if facts.has_attribution else ATTRIBUTION_COLUMNS
