"""Reads the resolutions of rows in conflict, which `crm.conflicts.resolving` records.

A run processes rows with a resolution last, in one process: their contact must not depend on the speed of workers, and
this run may create the contact that they are assigned to.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from django.conf import settings
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.errors import OperatorError
from crm.outcome import Source
from crm.postgres.facts.schema import DatabaseFacts
from crm.rules.mapping import MappedRow, Resolution
from crm.rules.source_rows import SOURCE_TABLES

logger = logging.getLogger(__name__)

_ALL = 'SELECT id, "row", contact_id, separate_email FROM conflict_decision resolution'
_PENDING = f"""
{_ALL} WHERE NOT EXISTS (SELECT FROM ledger_entry entry WHERE entry.id = resolution.id AND entry.outcome <> 'error')
"""
_IS_READABLE = """
SELECT has_table_privilege(c.oid, 'SELECT') FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
 WHERE nspname = %s AND relname = 'conflict_decision' AND has_schema_privilege(n.oid, 'USAGE')
"""


class _Recorded(NamedTuple):
    id: str
    row: str
    resolution: Resolution


@dataclass(frozen=True, slots=True)
class Resolutions:
    """Resolutions by the key of the row's ledger entry. They are few, because people make them one by one."""

    by_id: Mapping[str, Resolution] = field(default_factory=dict)
    source_ids: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def pending(cls, database: BaseDatabaseWrapper, facts: DatabaseFacts) -> Self:
        """Return the resolutions of rows that are not migrated. If this role may not read them: none, and a warning."""
        readable = is_readable(database)
        if readable is False:
            logger.warning("this role may not read conflict_decision: the dry run applies no resolution")
        return cls._of(_fetched(database, _PENDING) if readable and facts.has_ledger else [])

    @classmethod
    def every(cls, database: BaseDatabaseWrapper) -> Self:
        """Return all resolutions, also applied ones. Raises OperatorError if this role may not read them."""
        readable = is_readable(database)
        if readable is False:
            raise OperatorError(
                "This role may not read the resolutions of rows in conflict. As the owner, GRANT SELECT on "
                "conflict_decision."
            )
        return cls._of(_fetched(database, _ALL) if readable else [])

    @classmethod
    def _of(cls, recorded: Sequence[_Recorded]) -> Self:
        source_ids: dict[str, list[str]] = {table: [] for table in SOURCE_TABLES}
        for _, row, _ in recorded:
            table, _, source_id = row.partition(":")
            source_ids[table].append(source_id)
        return cls({identifier: resolution for identifier, _, resolution in recorded}, source_ids)

    def among(self, sources: Iterable[Source]) -> list[Source]:
        """Return the sources that may have rows with a resolution."""
        return [source for source in sources if self.source_ids.get(source.table)]

    def applied(self, rows: list[MappedRow]) -> list[MappedRow]:
        """Return the rows with their resolutions."""
        return [self._resolved(row) for row in rows] if self.by_id else rows

    def _resolved(self, row: MappedRow) -> MappedRow:
        resolution = self.by_id.get(row.id)
        if resolution is None or row.draft is None:
            return row
        if resolution.separate_email is None:
            return row._replace(resolution=resolution)
        email = resolution.separate_email
        return row._replace(resolution=resolution, raw_email=email, draft=row.draft._replace(email=email))


def is_readable(database: BaseDatabaseWrapper) -> bool | None:
    """Return whether this role may read the resolutions; None if their table does not exist."""
    with database.cursor() as cursor:
        cursor.execute(_IS_READABLE, [settings.BACKFILL_SCHEMA])
        row = cursor.fetchone()
    return None if row is None else bool(row[0])


def _fetched(database: BaseDatabaseWrapper, query: str) -> list[_Recorded]:
    with database.cursor() as cursor:
        cursor.execute(query)
        return [_Recorded(identifier, row, Resolution(*values)) for identifier, row, *values in cursor.fetchall()]
