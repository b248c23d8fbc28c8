"""Ledger lines with their contacts and source rows, as they are now, for the comparison. Only reads.

Lines come sorted by contact in one stream: the ledger has no index on the contact, and a look-up for every page would
read all of it each time. Rows and contacts are index probes, one statement a page for each table.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from django.conf import settings
from django.db import DatabaseError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.resolutions import Resolutions
from crm.backfill.read.snapshots import PREPARER_IS_THERE, SnapshotReader
from crm.outcome import Outcome, Reason, Refusal, Source
from crm.postgres import errors
from crm.postgres.apart import read_apart
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.loaders import read_as_text
from crm.postgres.snapshot import stream
from crm.rules.mapping import MappedRow, map_rows, unmapped
from crm.rules.snapshot import ContactSnapshot
from crm.rules.source_rows import SOURCE_TABLES, RawRow

logger = logging.getLogger(__name__)

#: Stands for an outcome in a line that tells what an update changed.
UPDATED = "updated"

_LEAD_SOURCES = ", ".join(f"'{source}'" for source in Source.of_table("leads"))
_PROVEN = "proven"
_LINES = f"""
WITH proven AS MATERIALIZED ({{proven}})
SELECT NULL AS contact_id, '{_PROVEN}' AS outcome, count(*)::text AS id, NULL,
       (count(*) FILTER (WHERE touched))::text, NULL, NULL, NULL::bigint AS run_id, NULL::timestamp AS written_at,
       NULL::bigint AS turn
  FROM proven
 UNION ALL
SELECT contact_id, outcome, id, CASE WHEN source IN ({_LEAD_SOURCES}) THEN 'leads' ELSE 'profiles' END, source_id,
       source_updated_at, filled, run_id, source_updated_at::timestamp({{second_digits}}), turn
  FROM (SELECT contact_id, outcome, id, source, source_id, source_updated_at, filled, run_id, 0 AS turn
          FROM ledger_entry WHERE outcome IN ('created', 'merged') AND contact_id IS NOT NULL
         UNION ALL
        SELECT contact_id, '{UPDATED}', line_id, source, source_id, source_updated_at, columns, run_id, id
          FROM contact_update) line
 WHERE NOT EXISTS (SELECT FROM proven WHERE proven.id = line.contact_id)
"""
_LINES = f"""
SELECT contact_id, outcome, id, table_name, source_id, source_updated_at, filled, run_id, written_at
  FROM ({_LINES}) AS line(
         contact_id, outcome, id, table_name, source_id, source_updated_at, filled, run_id, written_at, turn)
 ORDER BY contact_id COLLATE "C" NULLS FIRST, outcome <> 'created', run_id, turn, id COLLATE "C"
"""
#: A query that proves no contact.
NONE_PROVEN = "SELECT NULL::text AS id, false AS touched WHERE false"
# Whatever the planner believes of tables that a run has just filled: a join of whole tables is no nested loop.
_FOR_WHOLE_TABLES = "SET LOCAL enable_nestloop = off; SET LOCAL work_mem = '64MB'"
_FOR_PAGES = "SET LOCAL enable_nestloop = on"
# Each LATERAL with its LIMIT is one index probe a row, whatever the planner believes. The last column tells what became
# of somebody else's row that the contact takes a value from, the user's address or who the preparer is: changed after
# the run that migrated the row had begun, or not there.
_ROWS = """
SELECT r.* FROM unnest(%(ids)s::text[], %(runs)s::bigint[]) AS wanted(id, run_id) CROSS JOIN LATERAL (
  SELECT {values}, {other}
    FROM (SELECT {columns} FROM {table} r WHERE r.id = wanted.id LIMIT 1) r {join}) r
"""
_BEGUN = "(SELECT started_at AT TIME ZONE 'UTC' FROM backfill_run WHERE id = wanted.run_id)"
_OTHER = {
    "profiles": f"CASE WHEN u.changed_at >= {_BEGUN} THEN 'changed' END",
    "leads": f"""CASE WHEN p.changed_at >= {_BEGUN} THEN 'changed'
              WHEN p.id IS NULL AND r."assignedPreparerId" IS NOT NULL
              THEN CASE WHEN EXISTS (SELECT FROM users WHERE users.id = r."assignedPreparerId")
                        THEN 'not linked' ELSE 'not there' END
         END""",
}
_CHANGED_AT = {"profiles": '"updatedAt"', "leads": 'greatest("createdAt", "updatedAt")'}
_USER_CHANGES_READABLE = """
SELECT has_column_privilege(attrelid, attnum, 'SELECT') FROM pg_attribute
 WHERE attrelid = to_regclass(quote_ident(%s) || '.users') AND attname = 'updatedAt' AND NOT attisdropped
"""


CHANGED = "changed"
NOT_THERE = "not there"
NOT_LINKED = "not linked"


class Line(NamedTuple):
    """A ledger line that speaks of a contact of ours."""

    contact_id: str
    outcome: str
    id: str
    table: str
    source_id: str
    source_updated_at: str
    filled: str | None
    run_id: int
    #: `source_updated_at` as the contact keeps it.
    written_at: str

    @property
    def row(self) -> str:
        """The row's reference."""
        return f"{self.table}:{self.source_id}"


class LinesOfContact(NamedTuple):
    """The line of the row that made a contact, and those of the rows that were merged into it or updated it.

    Those stand in the order of their runs: what emptied again may have been filled more than once.
    """

    creator: Line
    later: Sequence[Line]

    @property
    def merged(self) -> list[Line]:
        """The lines of the rows that were merged."""
        return [line for line in self.later if line.outcome == Outcome.MERGED]


class FoundRow(NamedTuple):
    """A source row as it is now.

    `mapped` is None for a row that is not to be migrated; `updated_at` is None where it is not known.
    `other` is CHANGED, for the user of a profile and for the preparer of a lead; for the preparer alone also NOT_THERE,
    or NOT_LINKED where the lead names a user who has no profile.
    """

    updated_at: str | None
    mapped: MappedRow | None
    other: str | None


class Proven(NamedTuple):
    """How many contacts the server proved to be as they should be, and how many of them somebody touched."""

    contacts: int
    touched: int


def lines_of_contacts(
    connection: BaseDatabaseWrapper, facts: DatabaseFacts, proven: tuple[str, Mapping[str, Any]]
) -> tuple[Proven, Iterator[LinesOfContact]]:
    """How many contacts are proven by a query that names them, and the lines of every other contact of ours.

    Such a query has the columns `id` and `touched`; it comes with its parameters.
    """
    try:
        # Inside a transaction, a statement that fails would be the last one.
        with transaction.atomic(using=connection.alias):
            summary, lines = _proven_and_others(connection, facts, *proven)
    except DatabaseError as error:
        if errors.transient_cause(error) is not None:
            raise
        logger.warning("%s: every contact is compared by itself", errors.describe(error))
        summary, lines = _proven_and_others(connection, facts, NONE_PROVEN, {})
    return Proven(int(summary.id), int(summary.source_id)), _contact_by_contact(lines)


def _proven_and_others(
    connection: BaseDatabaseWrapper, facts: DatabaseFacts, query: str, parameters: Mapping[str, Any]
) -> tuple[Line, Iterator[Line]]:
    """The line with the counts, and all others."""
    with connection.cursor() as cursor:
        cursor.execute(_FOR_WHOLE_TABLES)
    query = _LINES.format(proven=query, second_digits=facts.second_digits)
    lines = map(Line._make, stream(connection, "lines", query, parameters))
    summary = next(lines)
    with connection.cursor() as cursor:
        cursor.execute(_FOR_PAGES)
    return summary, lines


def _contact_by_contact(lines: Iterable[Line]) -> Iterator[LinesOfContact]:
    for contact_id, group in groupby(lines, key=attrgetter("contact_id")):
        of_contact = list(group)
        creators = [line for line in of_contact if line.outcome == Outcome.CREATED and line.id == contact_id]
        if creators:
            yield LinesOfContact(creators[0], [line for line in of_contact if line.outcome != Outcome.CREATED])


def may_read_user_changes(connection: BaseDatabaseWrapper) -> bool:
    """Whether this role may see when a user was changed: the backfill itself does without."""
    with connection.cursor() as cursor:
        cursor.execute(_USER_CHANGES_READABLE, [settings.LEGACY_SCHEMA])
        return bool(cursor.fetchone() == (True,))


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads contacts and source rows by id, a page at a time."""

    connection: BaseDatabaseWrapper
    facts: DatabaseFacts
    sees_user_changes: bool
    missing_columns: Collection[str]
    resolutions: Resolutions

    def contacts(self, ids: Iterable[str]) -> dict[str, ContactSnapshot]:
        """Contacts by id; those that were deleted are not there."""
        return SnapshotReader(self.connection, self.missing_columns, preparer_is_there=PREPARER_IS_THERE).read(ids)

    def source_rows(self, lines: Iterable[Line]) -> dict[str, FoundRow]:
        """The source rows of lines, by their reference; those that are gone are not there."""
        of_table: dict[str, dict[str, Line]] = {table: {} for table in SOURCE_TABLES}
        for line in lines:
            of_table[line.table][line.source_id] = line
        found: dict[str, FoundRow] = {}
        for table in SOURCE_TABLES:
            query = self._query(table)
            read = partial(self._read, query, of_table[table])
            rows, unreadable = read_apart(self.connection, list(of_table[table]), read)
            found |= {f"{table}:{source_id}": row for source_id, row in self._mapped(table, rows)}
            faults = {source_id: (Reason.UNREADABLE, refusal) for source_id, refusal in unreadable.items()}
            for source_id in of_table[table].keys() & set(self.facts.repeated_ids.get(table, ())):
                faults[source_id] = (Reason.DUPLICATE_ID, Refusal())
            for source_id, fault in faults.items():
                found[f"{table}:{source_id}"] = FoundRow(None, unmapped(table, source_id, None, *fault), None)
        return found

    def _query(self, name: str) -> str:
        table = SOURCE_TABLES[name]
        is_hidden = name == "profiles" and not self.sees_user_changes
        changed_at = "NULL::timestamp" if is_hidden else _CHANGED_AT[name]
        return _ROWS.format(
            values=table.values,
            other=_OTHER[name],
            columns=table.columns(self.facts.missing),
            table=name,
            join=table.join.format(more=f", {changed_at} AS changed_at"),
        )

    def _read(self, query: str, lines: Mapping[str, Line], source_ids: Sequence[str]) -> list[tuple[Any, ...]]:
        runs = [lines[source_id].run_id for source_id in source_ids]
        return self._rows(query, {"ids": list(source_ids), "runs": runs})

    def _mapped(self, name: str, found: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, FoundRow]]:
        rules, table = self.facts.rules(), SOURCE_TABLES[name]
        of_source: dict[Source | None, list[tuple[RawRow, str | None]]] = {}
        for *values, other in found:
            row: RawRow = table.row._make(values)
            of_source.setdefault(self.facts.source_of(name, table.label_of(row)), []).append((row, other))
        for source, theirs in of_source.items():
            mapped: Sequence[MappedRow | None] = (
                [None] * len(theirs)
                if source is None
                else self.resolutions.applied(map_rows(source, [row for row, _ in theirs], rules))
            )
            for (row, other), maps_to in zip(theirs, mapped, strict=True):
                yield row.id, FoundRow(row.updated_at, maps_to, other)

    def _rows(self, query: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, parameters)
            return list(cursor.fetchall())
