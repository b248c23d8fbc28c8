"""Reads ledger entries with their current contacts and source rows, for the verification. Only reads.

Entries are read in one stream sorted by contact: the ledger has no index on the contact of created entries, so a lookup
per page would read all of it each time. Rows and contacts are read by index, with one statement per page and table.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any, NamedTuple

from django.db import DatabaseError, transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from crm.backfill.read.entries import COLUMNS, COLUMNS_OF_UPDATE, entry_of
from crm.backfill.read.referrers import Referrers
from crm.backfill.read.resolutions import Resolutions
from crm.backfill.read.snapshots import SnapshotReader
from crm.outcome import Outcome, Reason, Refusal, Source, UpdateOutcome
from crm.postgres import errors
from crm.postgres.apart import read_apart
from crm.postgres.facts.schema import DatabaseFacts
from crm.postgres.loaders import read_as_text
from crm.postgres.snapshot import stream
from crm.rules.entry import Entry
from crm.rules.mapping import MappedRow, map_rows, unmapped
from crm.rules.snapshot import ContactSnapshot
from crm.rules.source_rows import SOURCE_TABLES, RawRow

logger = logging.getLogger(__name__)

# The first row has counts: the proven contacts as its id, and the modified ones as its source id.
_ENTRIES = f"""
WITH proven AS MATERIALIZED ({{proven}})
SELECT id, source, source_id, outcome, contact_id, run_id, source_updated_at, filled, seen_preparer,
       seen_updated_at, contact_updated_at, attribution_before
  FROM (SELECT count(*)::text, NULL, (count(*) FILTER (WHERE touched))::text, NULL, NULL, NULL::bigint, NULL::timestamp,
               NULL, NULL, NULL::timestamp, NULL::timestamp, NULL, NULL::bigint
          FROM proven
         UNION ALL
        SELECT {COLUMNS}, 0
          FROM ledger_entry entry
         WHERE entry.outcome IN ('created', 'merged') AND entry.contact_id IS NOT NULL
           AND NOT EXISTS (SELECT FROM proven WHERE proven.id = entry.contact_id)
         UNION ALL
        SELECT {COLUMNS_OF_UPDATE}, change.id
          FROM contact_update change
         WHERE NOT EXISTS (SELECT FROM proven WHERE proven.id = change.contact_id)
       ) AS entry(id, source, source_id, outcome, contact_id, run_id, source_updated_at, filled, seen_preparer,
                  seen_updated_at, contact_updated_at, attribution_before, turn)
 ORDER BY contact_id COLLATE "C" NULLS FIRST, outcome <> 'created', run_id, turn, filled LIKE '%%commission%%',
          id COLLATE "C"
"""
#: A query that proves no contact.
NONE_PROVEN = "SELECT NULL::text AS id, false AS touched WHERE false"
# The planner lacks statistics of tables that a run has just filled, and would join whole tables by nested loops.
_FOR_WHOLE_TABLES = "SET LOCAL enable_nestloop = off; SET LOCAL work_mem = '64MB'"
_FOR_PAGES = "SET LOCAL enable_nestloop = on"
# LATERAL with LIMIT is always one index probe per row, whatever the planner estimates. The last column is true if the
# user of a profile was changed after the start of the run that migrated the row.
_ROWS = """
SELECT r.* FROM unnest(%(ids)s::text[], %(runs)s::bigint[]) AS wanted(id, run_id) CROSS JOIN LATERAL (
  SELECT {values}, {user_changed}
    FROM (SELECT {columns} FROM {table} r WHERE r.id = wanted.id LIMIT 1) r {join}) r
"""
_USER_CHANGED = """
COALESCE(u.changed_at >= (SELECT started_at AT TIME ZONE 'UTC' FROM backfill_run WHERE id = wanted.run_id), false)
"""


class EntriesOfContact(NamedTuple):
    """The entry of the row that created a contact, and those of the rows that were merged into it or updated it.

    `later` is in the order of the runs: a field that was emptied may have been filled more than once.
    """

    creator: Entry
    later: Sequence[Entry]

    @property
    def merged(self) -> list[Entry]:
        """The entries of the merged rows."""
        return [entry for entry in self.later if entry.outcome == Outcome.MERGED]

    @property
    def updates(self) -> list[Entry]:
        """The updates, in the form of entries."""
        return [entry for entry in self.later if entry.outcome == UpdateOutcome.UPDATED]


class FoundRow(NamedTuple):
    """The current state of a source row.

    `mapped` is None for an excluded row. `updated_at` is None if it is unknown. `user_changed` is True if the user of a
    profile changed since.
    """

    updated_at: str | None
    mapped: MappedRow | None
    user_changed: bool


class Proven(NamedTuple):
    """The number of contacts that the server proved to be correct, and of those that were modified."""

    contacts: int
    touched: int


def entries_of_contacts(
    connection: BaseDatabaseWrapper, facts: DatabaseFacts, proven: tuple[str, Mapping[str, Any]]
) -> tuple[Proven, Iterator[EntriesOfContact]]:
    """Return the counts of proven contacts, and an iterator of the entries of all other contacts of the backfill.

    `proven` is a query of the proven contacts, with the columns `id` and `touched`, and its parameters.
    """
    try:
        # A savepoint: without it, a failed statement would abort the transaction.
        with transaction.atomic(using=connection.alias):
            counts, entries = _proven_and_others(connection, facts, *proven)
    except DatabaseError as error:
        if errors.transient_cause(error) is not None:
            raise
        logger.warning("%s: every contact is compared by itself", errors.describe(error))
        counts, entries = _proven_and_others(connection, facts, NONE_PROVEN, {})
    return counts, _contact_by_contact(entries)


def _proven_and_others(
    connection: BaseDatabaseWrapper, facts: DatabaseFacts, query: str, parameters: Mapping[str, Any]
) -> tuple[Proven, Iterator[Entry]]:
    with connection.cursor() as cursor:
        cursor.execute(_FOR_WHOLE_TABLES)
    found = stream(connection, "entries", _ENTRIES.format(proven=query), parameters)
    proven, _, touched, *_ = next(found)
    with connection.cursor() as cursor:
        cursor.execute(_FOR_PAGES)
    return Proven(int(proven), int(touched)), (entry_of(values, facts.second_digits) for values in found)


def _contact_by_contact(entries: Iterable[Entry]) -> Iterator[EntriesOfContact]:
    for contact_id, group in groupby(entries, key=attrgetter("contact_id")):
        of_contact = list(group)
        creators = [entry for entry in of_contact if entry.outcome == Outcome.CREATED and entry.id == contact_id]
        if creators:
            yield EntriesOfContact(creators[0], [entry for entry in of_contact if entry.outcome != Outcome.CREATED])


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads contacts and source rows by id, page by page."""

    connection: BaseDatabaseWrapper
    facts: DatabaseFacts
    missing_columns: Collection[str]
    resolutions: Resolutions
    referrers: Referrers = field(default_factory=Referrers)

    def contacts(self, ids: Iterable[str]) -> dict[str, ContactSnapshot]:
        """Return the existing contacts by id."""
        return SnapshotReader(self.connection, self.missing_columns).read(ids)

    def source_rows(self, entries: Iterable[Entry]) -> dict[str, FoundRow]:
        """Return the existing source rows of entries, by reference."""
        of_table: dict[str, dict[str, Entry]] = {table: {} for table in SOURCE_TABLES}
        for entry in entries:
            of_table[entry.table][entry.source_id] = entry
        found: dict[str, FoundRow] = {}
        for table in self.facts.tables:
            query = self._query(table)
            read = partial(self._read, query, of_table[table])
            rows, unreadable = read_apart(self.connection, list(of_table[table]), read)
            found |= {f"{table}:{source_id}": row for source_id, row in self._mapped(table, rows)}
            faults = {source_id: (Reason.UNREADABLE, refusal) for source_id, refusal in unreadable.items()}
            for source_id in of_table[table].keys() & set(self.facts.repeated_ids.get(table, ())):
                faults[source_id] = (Reason.DUPLICATE_ID, Refusal())
            for source_id, fault in faults.items():
                mapped = unmapped(table, source_id, None, *fault)
                found[f"{table}:{source_id}"] = FoundRow(None, mapped, user_changed=False)
        return found

    def _query(self, name: str) -> str:
        table = SOURCE_TABLES[name]
        sees_changes = name == "profiles"
        return _ROWS.format(
            values=table.values,
            user_changed=_USER_CHANGED if sees_changes else "false",
            columns=table.columns(self.facts.missing),
            table=name,
            join=table.join(self.facts.missing, ', "updatedAt" AS changed_at' if sees_changes else ""),
        )

    def _read(self, query: str, entries: Mapping[str, Entry], source_ids: Sequence[str]) -> list[tuple[Any, ...]]:
        runs = [entries[source_id].run_id for source_id in source_ids]
        return self._rows(query, {"ids": list(source_ids), "runs": runs})

    def _mapped(self, name: str, found: Iterable[tuple[Any, ...]]) -> Iterator[tuple[str, FoundRow]]:
        rules, table = self.facts.rules(), SOURCE_TABLES[name]
        of_source: dict[Source | None, list[tuple[RawRow, bool]]] = {}
        for *values, user_changed in found:
            row: RawRow = table.row._make(values)
            of_source.setdefault(self.facts.source_of(name, table.label_of(row)), []).append((row, user_changed))
        for source, theirs in of_source.items():
            mapped: Sequence[MappedRow | None] = (
                [None] * len(theirs)
                if source is None
                else self.resolutions.applied(map_rows(source, self._referred([row for row, _ in theirs]), rules))
            )
            for (row, user_changed), maps_to in zip(theirs, mapped, strict=True):
                yield row.id, FoundRow(row.updated_at, maps_to, user_changed)

    def _referred(self, rows: list[RawRow]) -> list[RawRow]:
        return self.referrers.add_to(self.connection, self.facts, rows)

    def _rows(self, query: str, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with self.connection.cursor() as cursor:
            read_as_text(cursor)
            cursor.execute(query, parameters)
            return list(cursor.fetchall())
