"""What people said about rows in conflict, for whoever maps these rows. `crm.conflicts.resolving` records it.

A run takes the rows with a resolution last, and in one place: whose contact they are must not depend on which
worker is faster, and what they refer to may be made by this very run.
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
    """Resolutions by the key of their row's ledger entry; people make them one by one, so they are few."""

    by_id: Mapping[str, Resolution] = field(default_factory=dict)
    source_ids: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def pending(cls, database: BaseDatabaseWrapper, facts: DatabaseFacts) -> Self:
        """The resolutions of rows that are not settled; none, with a warning, where a dry run may not see them."""
        readable = is_readable(database)
        if readable is False:
            logger.warning("this role may not read conflict_decision: the dry run takes no decision into account")
        return cls._of(_fetched(database, _PENDING) if readable and facts.has_ledger else [])

    @classmethod
    def every(cls, database: BaseDatabaseWrapper) -> Self:
        """All resolutions, also those that were carried out. Raises OperatorError where this role may not see them."""
        readable = is_readable(database)
        if readable is False:
            raise OperatorError(
                "This role may not read what was decided about rows in conflict. Let the owner GRANT SELECT on "
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
        """Those of the sources that may have rows with a resolution."""
        return [source for source in sources if self.source_ids.get(source.table)]

    def applied(self, rows: list[MappedRow]) -> list[MappedRow]:
        """The rows, each with its resolution where there is one."""
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
    """Whether the resolutions may be read; None where there is no table of them as yet."""
    with database.cursor() as cursor:
        cursor.execute(_IS_READABLE, [settings.BACKFILL_SCHEMA])
        row = cursor.fetchone()
    return None if row is None else bool(row[0])


def _fetched(database: BaseDatabaseWrapper, query: str) -> list[_Recorded]:
    with database.cursor() as cursor:
        cursor.execute(query)
        return [_Recorded(identifier, row, Resolution(*values)) for identifier, row, *values in cursor.fetchall()]
